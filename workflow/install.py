"""Set up the virtual environment that `make` works in, from requirements.txt.

    python3 workflow/install.py .venv

An installation that was interrupted is started again from nothing, and two at once wait for each other. This runs on
whatever Python there is, with nothing installed.
"""

import os
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - whatever Python there is runs this
    sys.exit("repairlib needs Python >= 3.10, and this is older; say which: make PYTHON=/path/to/python3.12")

SOURCES = ("requirements.txt", "pyproject.toml", "companion/pyproject.toml")


def main(venv: Path) -> None:
    """Install, unless another process has meanwhile."""
    locks = Path("build")
    locks.mkdir(exist_ok=True)
    with open(locks / f"{venv.name}.lock", "w") as file:
        _wait_for(file)
        done, begun = venv / ".installed", venv / ".installing"
        if done.exists() and all(done.stat().st_mtime >= os.stat(source).st_mtime for source in SOURCES):
            return
        python = [str(venv / "bin" / "python"), "-m", "pip", "install", "-qq"]
        python += ["--disable-pip-version-check", "--no-deps"]
        print(f"Setting up {venv} (1 of 3): an empty environment", flush=True)
        _run([sys.executable, "-m", "venv", *(["--clear"] if begun.exists() else []), str(venv)])
        begun.touch()
        print(f"Setting up {venv} (2 of 3): packages, several GB, mostly PyTorch; a few minutes", flush=True)
        _run([*python, "-r", "requirements.txt"])
        print(f"Setting up {venv} (3 of 3): repairlib and its companion", flush=True)
        _run([*python, "--no-build-isolation", "-e", ".", "-e", "./companion"])
        begun.unlink()
        done.touch()


def _wait_for(file) -> None:
    """Lock a file until this process ends; says so if another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows, where `make` calls nothing twice by itself
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Waiting for another installation", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks


def _run(command: list) -> None:
    try:
        status = subprocess.call(command)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command starts the installation again.")
    if status:
        sys.exit(f"The installation failed; see above. The same command tries it again: {' '.join(command)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
