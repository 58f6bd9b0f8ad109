"""Whether `make cluster` makes on SLURM what `make figures` makes here, also if the call is killed once.

tests/cluster.sh sets up a SLURM of one node and runs this. Two copies of this working tree make the same figures. In
one, `make figures` does. In the other, `make cluster` is called, killed with SIGKILL once a network is stored, and
called again. The jobs that SLURM has by then go on, and every job asks for a GPU, which this machine need not have.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import save
from interrupt import Home, compare, conclude, undisturbed


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--notebooks", default="00_quickstart repair/04_repair rethink/04_1_data_independent")
    parser.add_argument("--cores", default="all", help="as CORES of make figures")
    parser.add_argument("--plugin", default="", help="folder of Snakemake's plugin, if it is not installed")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="repairlib-cluster-"))
    here, there = Home(root / "here", args), Home(root / "cluster", args, "cluster")
    there.environment["PYTHONPATH"] += f":{args.plugin}" if args.plugin else ""
    # This machine need not have the four CPUs that a job asks for beside a GPU, nor a data base of past jobs.
    there.command += ["GPUS=1", "SNAKEMAKE=--slurm-status-command squeue "
                      "--set-resources train:cpus_per_task=1 notebook:cpus_per_task=1"]  # fmt: skip
    _, seconds = undisturbed(here)

    began = time.monotonic()
    process = there.start()
    while process.poll() is None and not there.finished():
        time.sleep(0.1)
    if process.poll() is not None:
        sys.exit(f"the first call ended by itself:\n{there.tail()}")
    there.kill(process, kernels=False)
    waiting = len(slurm("squeue", "--noheader").splitlines())
    killed_at, stored = time.monotonic() - began, len(there.finished())
    there.inspect("after the kill")
    process = there.start()
    if process.wait():
        there.problems.append(f"the second call failed:\n{there.tail()}")
    seconds_there = time.monotonic() - began
    while slurm("squeue", "--noheader"):  # what the first call has submitted
        time.sleep(0.5)
    there.inspect("at the end")
    jobs = [line for line in slurm("scontrol", "show", "job", "--oneliner").splitlines() if "JobId=" in line]
    asked = sum(bool(re.search(r"gres[/:]gpu|TresPer\w+=\S*gpu", line)) for line in jobs)
    rows = [{
        "make figures (s)": round(seconds, 1), "make cluster, killed once (s)": round(seconds_there, 1),
        "killed after (s)": round(killed_at, 1), "networks stored then": stored, "jobs that went on": waiting,
        "jobs": len(jobs), "that asked for a GPU": asked, "slurm": slurm("sinfo", "--version").split()[1],
        "GPUs of the planner": int(shutil.which("nvidia-smi") is not None),
    }]  # fmt: skip
    if asked < len(jobs):
        there.problems.append(f"{len(jobs) - asked} of {len(jobs)} jobs asked for no GPU")
    rows.append(compare(here, there))
    problems = here.problems + there.problems
    del args.plugin
    save(__file__, args, [*rows, {"problems": problems}])
    for row in (*rows, *problems):
        print(row)
    return conclude(root, problems)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
