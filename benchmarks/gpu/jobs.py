"""Run jobs until a deadline: in order, as many at once as there are places, none that would not be done in time."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SPARE = 1.2  # a job may take so many times its estimate


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: of the run or item that it makes.
        kind: which places it takes one of.
        command: what to execute.
        seconds: an estimate for when it has the machine to itself.
        needs: names of jobs that must have succeeded before.
        alone: no two jobs run at once that have the same of this.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    seconds: float = 0.0
    needs: tuple[str, ...] = ()
    alone: str = ""


class Running:
    """A job that runs, in a process group of its own, with its output in a log."""

    def __init__(self, job: Job, environment: Mapping[str, str], log: Path, cwd: Path):
        self.job, self.log, self.start = job, log, time.monotonic()
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                job.command, cwd=cwd, env=dict(environment), stdout=file, stderr=file, start_new_session=True
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Wait until it has ended, and after two seconds end it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self.signal(signal.SIGKILL)
        self.process.wait()


def run(
    jobs: Sequence[Job],
    places: Mapping[str, int],
    deadline: float,
    environment: Mapping[str, str],
    logs: Path,
    *,
    cwd: Path,
    slows: Mapping[str, float] | None = None,
    finished: Callable[[Job], str] = lambda job: "",
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Run jobs; one that fails stops only those that need it, and what still runs at the deadline is ended.

    Args:
        jobs: in the order in which they are to start, if they can.
        places: by kind, how many run at once.
        deadline: of time.monotonic().
        environment: of the processes.
        logs: folder of their output.
        cwd: where they run.
        slows: by kind, by how much of its time a job takes longer for each other one that runs; default not at all.
        finished: called after each that succeeded; says what is wrong with it all the same, if anything is.
        say: prints a line.

    Returns:
        For each job {name, kind, outcome, seconds, estimate}; the outcome is "done" or says why it is not.
    """
    waiting, running, outcome, seconds = list(jobs), [], {}, {}

    def alike(job: Job) -> int:
        return sum(each.job.kind == job.kind for each in running)

    def fits(job: Job, others: int = 0) -> bool:
        slower = 1 + (slows or {}).get(job.kind, 0) * others
        return time.monotonic() + SPARE * job.seconds * slower < deadline

    def close(job: Job, text: str, took: float = 0.0) -> None:
        outcome[job.name], seconds[job.name] = text, round(took, 1)
        say(f"{job.name}: {text}" + (f" in {took:.1f} s" if took else ""))

    try:
        while waiting or running:
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                code = each.process.returncode
                problem = f"failed ({code}): {_last_line(each.log)}" if code else finished(each.job)
                close(each.job, problem or "done", each.seconds)
            if time.monotonic() >= deadline:
                for each in running:
                    close(each.job, "stopped at the deadline", each.seconds)
                for job in waiting:
                    close(job, "not started: no time left")
                break
            for job in list(waiting):
                broken = [name for name in job.needs if outcome.get(name, "done") != "done"]
                ready = all(name in outcome for name in job.needs)
                taken = alike(job) >= places[job.kind] or (
                    job.alone and job.alone in [each.job.alone for each in running]
                )
                if broken or not fits(job):
                    waiting.remove(job)
                    why = f"{broken[0]} is not there" if broken else f"it would take {job.seconds:.0f} s"
                    close(job, f"not started: {why}")
                elif ready and not taken and fits(job, alike(job)):
                    waiting.remove(job)
                    log = logs / f"{job.name.replace('/', '__')}.log"
                    running.append(Running(job, environment, log, cwd))
            time.sleep(0.05)
    finally:  # also if this process is interrupted
        for each in running:
            each.signal(signal.SIGTERM)
        for each in running:
            each.stop()
    named = [(job, outcome[job.name]) for job in jobs]
    return [
        {"name": job.name, "kind": job.kind, "outcome": text, "seconds": seconds[job.name], "estimate": job.seconds}
        for job, text in named
    ]


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"
