"""Folders and environment of a visit, on the borrowed machine and at home."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu import archive

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT / ".gpu"  # what travels beside the tracked files
DATA = "cifar10"  # the image folder that travels, below $REPAIRLIB_DATA
START = time.monotonic()  # a budget counts from here

# What may come back: files below $OUT, bytes of one and of all; and bytes that may travel in one call.
FILES, PIECE, HOME, CALL = 8, 16_700_000, 66_000_000, 63 * 2**20


@dataclass(frozen=True)
class Machine:
    """Where a visit keeps its things.

    Args:
        scratch: a folder that stays while the machine is held: data, runs, figures, logs.
        packed: what `pack` made.
        out: what is in it comes back.
    """

    scratch: Path
    packed: Path
    out: Path

    def __post_init__(self):
        for name in ("data", "runs", "figures", "logs"):
            (self.scratch / name).mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)

    def environment(self, **changes: str) -> dict[str, str]:
        """Of a process that trains or makes figures here."""
        commit = self.packed / "commit"
        return (
            {"OMP_NUM_THREADS": "2"}
            | os.environ
            | {
                "PYTHONPATH": os.pathsep.join(map(str, self.paths())),
                "JUPYTER_PATH": str(self.scratch / "site" / "share" / "jupyter"),
                "PYTHONUNBUFFERED": "1",
                "REPAIRLIB_DATA": str(self.scratch / "data"),
                "REPAIRLIB_RUNS": str(self.scratch / "runs"),
                "REPAIRLIB_FIGURES": str(self.scratch / "figures"),
                "REPAIRLIB_TRAIN": "1",
                "REPAIRLIB_COMMIT": commit.read_text().strip() if commit.exists() else "",
                **changes,
            }
        )

    def paths(self) -> list[Path]:
        """Where modules are found: the project's, then the wheels'; then what $PYTHONPATH had before."""
        before = [Path(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return list(dict.fromkeys([ROOT, ROOT / "workflow", ROOT / "benchmarks", *before, self.scratch / "site"]))

    def enter(self) -> None:
        """Let this process find what the others do, and see the same folders."""
        os.environ.update(self.environment())
        sys.path[:0] = [str(path) for path in self.paths() if str(path) not in sys.path]

    def install(self) -> str:
        """Install the wheels that travelled; says what happened."""
        wheels = sorted(map(str, (self.packed / "whl").glob("*.whl")))
        if not wheels:
            return "no wheels"
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
        target = str(self.scratch / "site")
        subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, *wheels], check=True)
        return f"{len(wheels)} wheels"

    def unpack(self, name: str) -> str:
        """Unpack one of `pack`'s archives of images; says what happened."""
        path = self.packed / name
        if not path.exists():
            return f"no {name}"
        archive.unpack(path.read_bytes(), self.scratch / "data")
        return name

    def data_is_whole(self) -> bool:
        """Whether the image folder has all its images."""
        return archive.is_whole(self.scratch / "data" / DATA)

    def read(self, name: str) -> dict:
        """A JSON file of the scratch folder; empty if there is none."""
        path = self.scratch / name
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self, name: str, content: dict) -> None:
        """Write a JSON file of the scratch folder and, so that it comes back, one below $OUT."""
        for folder in (self.scratch, self.out):
            temporary = folder / f"{name}.tmp"
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(temporary, folder / name)


def elapsed() -> float:
    """Seconds since the start of this process."""
    return time.monotonic() - START


def say(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"{elapsed():6.1f} s  {text}", flush=True)
