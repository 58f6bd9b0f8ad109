"""Whether a training that is killed again and again ends with the weights of an undisturbed one, and what that costs.

One process trains a network undisturbed. Others train it in another folder. Each is killed with SIGKILL at a random
moment, and the next one goes on. Both save their state as often.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import save

from companion.runs.store import Store

STEP = re.compile(r": (?:goes on from )?step (\d+) of (\d+)")


def start(root: Path, args: argparse.Namespace) -> subprocess.Popen:
    """A process that trains the run in a folder of its own."""
    environment = os.environ | {"REPAIRLIB_SAVE_MINUTES": str(args.seconds / 60), "REPAIRLIB_DEVICE": "cpu"}
    command = [sys.executable, "-u", "-m", "companion.runs.store", "--root", str(root), "train", args.run]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def listen(process: subprocess.Popen, began: float, said: list[tuple[float, int]]) -> None:
    """Note when a training says that its state is in the file, and the step."""
    said += [(time.monotonic() - began, int(match[1])) for line in process.stdout if (match := STEP.search(line))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="digits-hard/resnet8-ln-w1/quick-csiszarik/s1")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0, help="from one save to the next")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    chance, rows, saved = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory(prefix="repairlib-resume-") as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        process, began = start(whole, args), time.monotonic()
        lines = [(time.monotonic() - began, line) for line in process.stdout]
        steps = [(at, int(match[1]), int(match[2])) for at, line in lines if (match := STEP.search(line))]
        assert process.wait() == 0 and steps, "the undisturbed training failed"
        (first, step, total), (last, later, _) = steps[0], steps[-1]
        pace = (later - step) / (last - first)  # steps a second
        begins = first - step / pace  # seconds until the first step
        for number in range(1, args.kills + 1):
            process, began = start(killed, args), time.monotonic()
            said: list[tuple[float, int]] = []
            reader = threading.Thread(target=listen, args=(process, began, said))
            reader.start()
            wait = begins + chance.uniform(0, 2 * total / pace / args.kills)
            try:
                process.wait(wait)
                break  # it came to its end
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            ended = time.monotonic() - began
            reader.join()
            # One that has a state says so before its first step; killed before that, it has lost nothing.
            since = said[-1][0] if said else ended if saved else begins
            saved = said[-1][1] if said else saved
            rows.append({"kill": number, "after (s)": round(wait, 2), "saved until step": saved,
                         "lost (s)": round(max(ended - since, 0.0), 2)})  # fmt: skip
            print(rows[-1], flush=True)
        if process.poll() is None or process.returncode:
            process = start(killed, args)
            process.communicate()
        digests = [Store(root).info(args.run)["sha256"] for root in (whole, killed)]
    rows.append({
        "steps": total, "steps a second": round(pace, 1), "kills": len(rows), "same weights": digests[0] == digests[1],
        "most lost by a kill (s)": max(row["lost (s)"] for row in rows), "saved every (s)": args.seconds,
    })  # fmt: skip
    print(rows[-1])
    save(__file__, args, rows)
    return int(digests[0] != digests[1])


if __name__ == "__main__":
    sys.exit(main())
