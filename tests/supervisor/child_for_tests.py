"""A child for supervisors under test: what it does with a turn is the turn's payload, a list of steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any


def main() -> None:
    if "mute" not in sys.argv:
        say(type="ready")
    for step in json.loads(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].startswith("[") else []:
        take(step, {"message_id": "none"})
    for line in map(json.loads, sys.stdin.buffer):
        if line["type"] == "turn":
            for step in line["payload"]:
                take(step, line)
        elif line["type"] == "late":
            say(type="event", message_id="after", kind="late", body=line["message_ids"])
        elif line["type"] == "stop" and "stubborn" not in sys.argv:
            break


def take(step: list[Any], turn: dict[str, Any]) -> None:  # noqa: C901
    verb, *arguments = step
    match verb:
        case "delta":
            say(type="event", message_id=turn["message_id"], kind="delta", body=arguments[0])
        case "reply":
            say(type="reply", message_ids=[turn["message_id"]], body=arguments[0])
        case "say":
            say(**arguments[0])
        case "write":
            os.write(1, arguments[0].encode())
        case "flood":
            # A line as long as was asked for.
            os.write(1, b'{"type":"event","body":"' + b"x" * arguments[0] + b'"}\n')
        case "exit":
            os._exit(arguments[0])
        case "kill":
            os.kill(os.getpid(), getattr(signal, arguments[0]))
        case "ignore":
            signal.signal(getattr(signal, arguments[0]), signal.SIG_IGN)
        case "beat":
            for _ in range(arguments[0]):
                say(type="beat")
                time.sleep(arguments[1])
        case "leave":
            # A process that outlives this one, and holds its output open.
            subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({arguments[0]})"])
        case _:
            raise ValueError(verb)


def say(**line: Any) -> None:
    rest = json.dumps(line).encode() + b"\n"
    while rest:
        rest = rest[os.write(1, rest) :]


if __name__ == "__main__":
    main()
