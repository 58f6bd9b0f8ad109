"""The first call of a visit: what the machine is, what runs on it, and how fast."""

import json
import queue
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from typing import Any

import torch

from companion.figures import report
from companion.runs.devices import default_device
from gpu import jobs
from gpu.jobs import Job
from gpu.machine import ROOT, START, Machine, elapsed, say

PROCESSES = 3  # trainings at once, at most
AGREE = 0.02  # losses of the same steps may differ so much, relatively: both compute in bfloat16


class Timer:
    """A process of gpu/timer.py, which is started anew if it does not answer in time."""

    def __init__(self, machine: Machine, number: int):
        self.machine, self.log = machine, machine.scratch / "logs" / f"timer{number}.log"
        self._start()

    def _start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu.timer"], cwd=ROOT, text=True, bufsize=1,
                env=self.machine.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.answers), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen, answers: queue.Queue) -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put("")  # it has ended

    def ask(self, *request: object) -> None:
        """Send a request."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
        except OSError:
            pass  # it has ended: `answer` says so

    def answer(self, limit: float) -> dict[str, Any]:
        """Wait for the answer: {"answer": ...} or {"error": ...}."""
        try:
            if line := self.answers.get(timeout=max(limit, 0.1)):
                return json.loads(line)
            error = f"it ended; see {self.log.name}"
        except queue.Empty:
            error = f"no answer within {limit:.0f} s"
        self.stop()
        self._start()
        return {"error": error}

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def look(machine: Machine, budget: float, scale: str, items: list[str], processes: int = PROCESSES) -> int:
    """Install, unpack, measure, test; every phase has a limit, and one that fails does not stop the next.

    Args:
        machine: this one.
        budget: seconds since the start of the process.
        scale: of the networks that are measured.
        items: whose networks these are; empty for the plan's.
        processes: how many trainings at once are tried, at most.

    Returns:
        The exit code: 0 if every network trains, 3 if `work` should not be started.
    """
    phase("wheels", machine.install)
    machine.enter()
    phase("images", lambda: machine.unpack("a.bin"))
    timers = [Timer(machine, number) for number in range(processes)]  # they import while we go on
    phase("facts", lambda: facts(machine))
    from gpu import plan  # needs the wheels

    found, left = plan.find(scale, items or plan.items_of())
    for item, why in left.items():
        say(f"{item} is left out: it {why}")
    networks = list(dict.fromkeys(run.rpartition("/")[0] for runs in found.values() for run in runs))
    timings: dict[str, Any] = {"steps": [], "methods": [], "at once": [], "choice": {}}
    end = 0.6 * budget
    phase("ceilings", lambda: ceilings(machine, timers[0], timings, end))
    phase("steps", lambda: step_times(machine, timers[0], timings, networks, "as is", end))
    phase("at once", lambda: at_once(machine, timers, timings, networks, end))
    if cuda():
        phase("graphs", lambda: step_times(machine, timers[0], timings, networks, "graph", end))
    phase("methods", lambda: method_times(machine, timers[0], timings, networks, end))
    if cuda():
        phase("cuDNN", lambda: step_times(machine, timers[0], timings, networks, "no search", end))
    for timer in timers:
        timer.stop()
    phase("choice", lambda: choose(machine, timings))
    phase("tests and notebooks", lambda: everything(machine, START + budget - 5))
    phase("logs", lambda: pack_logs(machine))
    trained = [row for row in timings["steps"] if row["how"] == "as is" and "ms" in row]
    say(f"{len(trained)} of {len(networks)} networks train")
    return 0 if networks and len(trained) == len(networks) else 3


def phase(name: str, function: Callable[[], object]) -> None:
    """Run a phase and say how long it took; an error is printed."""
    start = elapsed()
    try:
        result = function()
    except Exception as error:
        result = f"FAILED: {type(error).__name__}: {error}"
    say(f"{name}: {result} ({elapsed() - start:.1f} s)")


def cuda() -> bool:
    """Whether this is on a GPU."""
    return default_device().startswith("cuda")


def facts(machine: Machine) -> str:
    """Write facts.json: software, processor, GPU and driver."""
    found = report.environment(default_device())
    if torch.cuda.is_available():
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        try:
            found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found["nvidia-smi"] = str(error)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    machine.write("facts.json", found)
    return f"{found['device']}, torch {found['versions']['torch']}, {found['cores']} cores, commit {found['commit']}"


def ceilings(machine: Machine, timer: Timer, timings: dict, end: float) -> str:
    """Measure the device's ceilings, which floors are computed from."""
    timer.ask("ceilings")
    timings["ceilings"] = timer.answer(end - elapsed()).get("answer", {})
    machine.write("timings.json", timings)
    return ", ".join(f"{name} {value:.3g}" for name, value in timings["ceilings"].items()) or "none"


def step_times(machine: Machine, timer: Timer, timings: dict, networks: list[str], how: str, end: float) -> str:
    """Measure a training step of every network in one way (see timer.steps), and what it takes at least."""
    for name in networks:
        if elapsed() > end:
            return "no time for all"
        timer.ask("steps", f"{name}/s1", how)
        reply = timer.answer(min(30, end - elapsed()))
        row = {"network": name, "how": how, **reply.get("answer", reply)}
        if how == "as is" and "ms" in row:
            timer.ask("floor", f"{name}/s1")
            row |= _floor(timings, timer.answer(min(20, end - elapsed())).get("answer", {}))
        timings["steps"].append(row)
        machine.write("timings.json", timings)
        say(f"  {name}, {how}: " + (f"{row['ms']:.2f} ms a step" if "ms" in row else row["error"]))
    return f"{len(networks)} networks"


def _floor(timings: dict, counts: dict[str, float], product: str = "bfloat16") -> dict[str, float]:
    """What the device needs at least, in ms: for the FLOPs, and for the bytes if nothing is fused."""
    best = timings.get("ceilings", {})
    if not best or not counts:
        return counts
    flops = 1e3 * counts["flops"] / (best[f"{product} TFLOP/s"] * 1e12)
    traffic = 1e3 * counts["bytes"] / (best["copy GB/s"] * 1e9)
    return counts | {"ms for FLOPs": flops, "ms for bytes": traffic}


def at_once(machine: Machine, timers: list[Timer], timings: dict, networks: list[str], end: float) -> str:
    """Measure steps of the quickest and the slowest network in several processes at once."""
    alone = {row["network"]: row["ms"] for row in timings["steps"] if row["how"] == "as is" and "ms" in row}
    if len(timers) < 2 or not alone:
        return "not measured"
    ranked = sorted(alone, key=alone.get)
    for name in dict.fromkeys([ranked[0], ranked[-1]]):
        count = min(max(round((1500 if cuda() else 100) / alone[name]), 20), 1000)  # for a second and a half
        for number in range(2, len(timers) + 1):
            if elapsed() > end:
                return "no time for all"
            for timer in timers[:number]:
                timer.ask("steps", f"{name}/s1", "as is", count)
            replies = [timer.answer(min(30, end - elapsed())) for timer in timers[:number]]
            found = [reply["answer"]["ms"] for reply in replies if "answer" in reply]
            row = {"network": name, "processes": number, "ms alone": alone[name], "ms": found}
            if len(found) == number:  # networks trained per time, relative to one after another
                row["gain"] = sum(alone[name] / ms for ms in found)
            timings["at once"].append(row)
            machine.write("timings.json", timings)
            say(f"  {name}, {number} at once: {', '.join(f'{ms:.2f}' for ms in found)} ms a step")
    return f"up to {len(timers)} processes"


def method_times(machine: Machine, timer: Timer, timings: dict, networks: list[str], end: float) -> str:
    """Measure matching, REPAIR and evaluation for the models of the networks."""
    models = list(dict.fromkeys(name.split("/")[1] for name in networks))
    number = 5000 if cuda() else 50
    for name in models[: 3 if cuda() else 1]:
        if elapsed() > end:
            return "no time for all"
        timer.ask("methods", name, number)
        reply = timer.answer(min(40, end - elapsed()))
        for row in reply.get("answer", [{"network": name, **reply}]):
            counts = {key: row[key] for key in ("flops", "bytes") if key in row}
            timings["methods"].append(row | _floor(timings, counts, "TF32") | {"images": number})
        machine.write("timings.json", timings)
    return f"{len(models)} models"


def choose(machine: Machine, timings: dict) -> str:
    """How `work` should train: with CUDA graphs if these agree and are quicker, and how many networks at once."""
    rows = {(row["network"], row["how"]): row for row in timings["steps"] if "ms" in row}
    pairs = [(rows[name, "as is"], rows[name, how]) for name, how in rows if how == "graph" and (name, "as is") in rows]
    differences = [
        max(abs(x - y) / abs(x) for x, y in zip(a["losses"], b["losses"], strict=True)) for a, b in pairs
    ]  # fmt: skip
    tried = {name for name, how in rows if how == "as is"}
    agree = bool(pairs) and len(pairs) == len(tried) and max(differences) < AGREE
    quicker = agree and any(b["ms"] < 0.9 * a["ms"] for a, b in pairs)
    gains = [(row["gain"], row["processes"]) for row in timings["at once"] if "gain" in row]
    best = max(gains, default=(1.0, 1))
    choice = {"graph": bool(quicker), "trainers": max(2, best[1]) if best[0] > 1.2 else 2}
    timings["choice"] = choice | {"largest difference of a loss": max(differences, default=None)}
    machine.write("timings.json", timings)
    return str(timings["choice"])


def everything(machine: Machine, deadline: float) -> str:
    """Run the tests for GPUs and, at `smoke`, every notebook that is a section of a paper."""
    import needs

    names = [name for name in needs.find_notebooks() if "/" in name] if cuda() else []
    folder = machine.scratch / "smoke"
    environment = machine.environment(REPAIRLIB_RUNS=str(folder / "runs"), REPAIRLIB_FIGURES=str(folder / "figures"))
    tests = [sys.executable, "-m", "pytest", *"-q -n 4 -W default -p no:cacheprovider tests/test_cuda.py".split()]
    todo = [Job("tests", "test", tuple(tests))] if (ROOT / "tests" / "test_cuda.py").exists() and names else []
    for name in names:
        command = (sys.executable, "workflow/batch.py", f"notebooks/{name}.py", "--scale", "smoke")
        todo.append(Job(name, "figure", command))
    if not todo:
        return "only on a GPU"
    logs = machine.scratch / "logs"
    done = jobs.run(todo, {"test": 1, "figure": 10}, deadline, environment, logs, cwd=ROOT, say=say)
    machine.write("timings.json", machine.read("timings.json") | {"tests and notebooks": done})
    return f"{sum(row['outcome'] == 'done' for row in done)} of {len(done)} passed"


def pack_logs(machine: Machine) -> str:
    """Bring logs and notebooks that failed back."""
    temporary = machine.scratch / "look.tar.gz"
    with tarfile.open(temporary, "w:gz") as tar:
        for path in sorted((machine.scratch / "logs").iterdir()):
            tar.add(path, f"logs/{path.name}")
        for path in sorted((ROOT / "build" / "smoke").rglob("*.partial.ipynb")) if (ROOT / "build").exists() else []:
            tar.add(path, f"failed/{path.name}")
    size = temporary.stat().st_size
    (machine.out / "look.tar.gz").write_bytes(temporary.read_bytes())
    return f"{size / 1e6:.1f} MB"
