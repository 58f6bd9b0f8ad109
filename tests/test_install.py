"""The environment that `make` sets up: once, however many ask for it, and again after an interruption."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from companion.runs.data import project_root

# Installs nothing: it notes the commands, which take a while.
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {workflow!r})
import install

def run(command):
    with open("commands", "a") as file:
        file.write(" ".join(command[1:4]) + "\\n")
    if "venv" in command:
        Path(".venv").mkdir(exist_ok=True)
    time.sleep(0.5)
    if Path("fails").exists():
        sys.exit("it failed")

install._run = run
install.main(Path(".venv"))
"""


@pytest.fixture
def project(tmp_path):
    for source in ("requirements.txt", "pyproject.toml", "companion/pyproject.toml"):
        (tmp_path / source).parent.mkdir(exist_ok=True)
        (tmp_path / source).write_text("")
    return tmp_path


def start(project: Path) -> subprocess.Popen:
    script = SCRIPT.format(workflow=str(project_root() / "workflow"))
    return subprocess.Popen([sys.executable, "-c", script], cwd=project, stdout=subprocess.PIPE, text=True)


def install(project: Path) -> int:
    process = start(project)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_two_installations_at_once_wait_for_each_other(project):
    both = [start(project) for _ in range(2)]
    outs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert (project / "commands").read_text().splitlines() == ["-m venv .venv", "-m pip install", "-m pip install"]
    assert sorted("Waiting for another installation" in out for out in outs) == [False, True]
    assert (project / ".venv" / ".installed").exists() and not (project / ".venv" / ".installing").exists()


def test_an_interrupted_installation_is_started_again_from_nothing(project):
    (project / "fails").write_text("")
    assert install(project) == 1 and not (project / ".venv" / ".installed").exists()
    (project / ".venv" / ".installing").touch()
    (project / "fails").unlink()
    assert install(project) == 0
    assert "-m venv --clear" in (project / "commands").read_text()
    assert install(project) == 0  # nothing is left to do
    assert len((project / "commands").read_text().splitlines()) == 4
    os.utime(project / "requirements.txt", (2**32, 2**32))  # changed since
    assert install(project) == 0
    assert len((project / "commands").read_text().splitlines()) == 7
