"""Run a folder of small scripts, each of which shows what somebody's model does and prints ``ok`` when we do it right.

python benchmarks/field_cases.py FOLDER
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def outcome(script: Path) -> str:
    """Last line that a script prints, of its errors if there are any."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, script.name)
        # Names of before: the module of permutations was called `graph`.
        copy.write_text(script.read_text().replace("repairlib.graph ", "repairlib.permutations "))
        command = ["bash" if script.suffix == ".sh" else sys.executable, str(copy)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return "took more than 300 s"
    return (done.stderr if done.returncode else done.stdout).strip().rpartition("\n")[2]


def main() -> None:
    """Print what every script ends with, and how many are ok."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    scripts = sorted(path for path in parser.parse_args().folder.iterdir() if path.suffix in (".py", ".sh"))
    right = 0
    for script in scripts:
        found = outcome(script)
        right += found == "ok"
        print(f"{script.stem:40} {found[:300]}", flush=True)
    print(f"{right} of {len(scripts)} are ok")


if __name__ == "__main__":
    main()
