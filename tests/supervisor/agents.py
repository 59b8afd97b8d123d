"""Children in three languages that do what the words of a turn's payload say."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
AGENTS = {
    "python": [sys.executable, str(HERE / "child_with_serve.py")],
    "node": ["node", str(HERE / "child.mjs")],
    "sh": ["sh", str(HERE / "child.sh")],
}
