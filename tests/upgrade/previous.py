"""The release before this one, out of the repository's history, in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path

#: The revision of the schema that it was built for.
PREVIOUS = "0021"

REPOSITORY = Path(__file__).parents[2]
_REVISION = "queue_service/db/revision.py"


def run(*command: str | Path, cwd: Path) -> bytes:
    """What it printed; a failure is shown with all it said."""
    clean = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    words = [str(each) for each in command]
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout.decode()[-5_000:]}\n{done.stderr.decode()[-5_000:]}"
    return done.stdout


def installed(directory: Path) -> Path:
    """The python of an environment with that release, built from its last commit. Only its dependencies are ours."""
    source, built, place = directory / "source", directory / "built", directory / "venv"
    archive = directory / "source.tar"
    run("git", "archive", "--output", archive, _last_commit(), cwd=REPOSITORY)
    with tarfile.open(archive) as packed:
        packed.extractall(source, filter="data")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, cwd=source)
    (wheel,) = built.glob("*.whl")
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "-q",
        wheel,
        cwd=directory,
    )
    paths = {"base": str(place), "platbase": str(place)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    # After the release's own packages on the path, and without what ours have in `.pth` files.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _last_commit() -> str:
    """The newest one on this line of history which was built for PREVIOUS."""
    try:
        is_shallow = run("git", "rev-parse", "--is-shallow-repository", cwd=REPOSITORY).strip() == b"true"
        found = next(iter(_commits()), None)
    except (AssertionError, FileNotFoundError) as failed:
        raise AssertionError(f"{_HOW} There is no history here: {failed}") from None
    assert found is not None, f"{_HOW} This clone is shallow: {is_shallow}."
    return found


_HOW = (
    f"The release before this one, of revision {PREVIOUS}, is built from the repository's history. Fetch all of it: "
    "`git fetch --unshallow`, or in CI a checkout of full depth."
)


def _commits() -> Iterator[str]:
    changes = (
        run("git", "log", "--first-parent", "--format=%H", "HEAD", "--", _REVISION, cwd=REPOSITORY).decode().split()
    )
    for commit in ("HEAD", *(f"{each}^1" for each in changes)):
        shown = subprocess.run(
            ["git", "show", f"{commit}:{_REVISION}"],  # noqa: S607 - whichever git this machine has
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if re.search(rf'^HEAD = "{PREVIOUS}"$', shown.stdout, re.MULTILINE):
            yield commit
