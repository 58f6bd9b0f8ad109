"""The second call of a visit: train, make figures, and bring home what is done, whenever this is stopped."""

import json
import os
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from companion.figures import report
from companion.runs import packing
from companion.runs.devices import default_device
from companion.runs.names import parse_run
from gpu import archive, jobs
from gpu.jobs import Job
from gpu.machine import FILES, HOME, PIECE, ROOT, START, Machine, elapsed, say

RESERVE = 20.0  # seconds before the end of the budget in which nothing runs but the last packing
FIGURES = 5  # notebooks at once, which wait for Python more than for the GPU
SLOWS = {"train": 1.0, "figure": 0.2}  # see jobs.run
ACCURACY = {"bn": 0.8, "fused": 0.8}  # on the test set at `fast`; less means that something is wrong
LOWEST = 0.6  # for networks of any other kind
PIECES = FILES - 2  # beside results.tar.gz, and a file that may be left half-written
RESULTS = 8_000_000  # bytes that networks leave to figures and logs
# What comes back of figures and logs, if it does not all fit: these first.
FIRST = (".json", ".log", ".png", ".ipynb", ".svg", ".html")


def work(
    machine: Machine, budget: float, scale: str, items: list[str], extra: list[str], *, again: bool = False
) -> int:
    """Train the networks of items and make the items, most valuable first, until the budget is spent.

    Args:
        machine: this one.
        budget: seconds since the start of the process.
        scale: smoke, quick, fast or paper.
        items: full IDs, in order of value; empty for the plan's.
        extra: runs to train after those.
        again: make also items that are committed.

    Returns:
        The exit code: 0, or 3 if images are missing.
    """
    machine.enter()
    say(f"images: {machine.unpack('b.bin')}, runs: {unpack_runs(machine)}")
    if not machine.data_is_whole():
        say("the other half of the images is not there: look has to run first, on the same machine")
        return 3
    from gpu import plan  # needs the wheels

    found, left = plan.find(scale, items or plan.items_of(), again)
    for item, why in left.items():
        say(f"{item} is left out: it {why}")
    timings = machine.read("timings.json")
    choice = timings.get("choice", {})
    needed = [run for runs in found.values() for run in runs] + extra
    seconds = plan.training_seconds(needed, default_device(), timings)
    todo = plan.make_jobs(scale, found, extra, seconds)
    say(f"{len(todo)} jobs; training alone takes {sum(seconds.values()):.0f} s; {choice or 'nothing was measured'}")
    new = [job.name for job in todo if job.kind == "train"]
    parcel = Parcel(machine, scale, plan.packed_sizes(new))
    done = jobs.run(
        todo,
        {"train": choice.get("trainers", 2), "figure": FIGURES},
        START + budget - RESERVE,
        machine.environment(REPAIRLIB_GRAPH="1" if choice.get("graph") else "0"),
        machine.scratch / "logs",
        cwd=ROOT,
        slows=SLOWS,
        finished=parcel.add,
        say=say,
    )
    machine_jobs = {"scale": scale, "jobs": done, "left out": left, "seconds": round(elapsed(), 1)}
    (machine.scratch / "work.json").write_text(json.dumps(machine_jobs, indent=1) + "\n")
    parcel.close()
    say(f"{sum(row['outcome'] == 'done' for row in done)} of {len(done)} jobs are done")
    return 0


def unpack_runs(machine: Machine) -> str:
    """Put the trained networks that came along into the store; says how many."""
    path, number = machine.packed / "runs.bin", 0
    for name, content in archive.split(path.read_bytes()) if path.exists() else []:
        target = machine.scratch / "runs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.name == "model.packed":
            target, content, number = target.with_name("model.safetensors"), packing.unpack(content), number + 1
        target.write_bytes(content)
    return str(number)


class Parcel:
    """What comes home: written after every job, in a thread, so that a kill loses only what is not done.

    Beside results.tar.gz there are pieces: runs.0, runs.1, ... Each is an archive of its own, to which networks are
    added as they are done. A piece is replaced as a whole, so that what is in one stays safe.

    Args:
        machine: this one.
        scale: smoke, quick, fast or paper.
        expected: bytes of the packed networks that are still to come, by run. As many as possible are to come home, so
            that a larger one waits until the end if it would take the room of these.
    """

    def __init__(self, machine: Machine, scale: str, expected: Mapping[str, int]):
        self.machine, self.scale, self.expected = machine, scale, dict(expected)
        self.pool, self.waiting = ThreadPoolExecutor(1), []
        self.pieces: list[dict[str, bytes]] = []
        self.late: dict[str, bytes] = {}

    def add(self, job: Job) -> str:
        """Take in what a job made; says what is wrong with it, if anything is."""
        self.waiting.append(self.pool.submit(self._take, job))
        if job.kind == "train":
            return self._judge(job.name)
        index, folder = report.read_index(), self.machine.scratch / "figures" / self.scale
        missing = [item for item in job.name.split(",") if not (folder / f"{index[item]['output']}.json").exists()]
        return f"its notebook did not make {', '.join(missing)}" if missing else ""

    def close(self) -> None:
        """Take in what has waited, write all once more, and raise what went wrong before."""
        self.waiting.append(self.pool.submit(self._finish))
        self.pool.shutdown()
        for each in self.waiting:
            each.result()

    def _take(self, job: Job) -> None:
        if job.kind == "train":
            weights = self.machine.scratch / "runs" / job.name / "model.safetensors"
            content = packing.pack(weights.read_bytes())
            self.expected.pop(job.name, None)
            smaller = sum(size for size in self.expected.values() if size < len(content))
            if len(content) + smaller > self._room() or not self._place(job.name, content):
                self.late[job.name] = content
        self._write()

    def _finish(self) -> None:
        for name, content in sorted(self.late.items(), key=lambda pair: len(pair[1])):
            self._place(name, content)
        self._write()

    def _place(self, run: str, content: bytes) -> bool:
        """Add a network to the first pieces that have room, whole or, if it is larger than a piece, in parts."""
        sidecar, largest = json.dumps(self._sidecar(run), indent=2).encode(), PIECE - 2**14
        parts = [content[start : start + largest] for start in range(0, len(content), largest)]
        names = [f"{run}/model.packed"]
        if len(parts) > 1:
            names = [f"{run}/model.packed.{number}of{len(parts)}" for number in range(1, len(parts) + 1)]
        pieces = [dict(piece) for piece in self.pieces]
        for name, part in zip(names, parts, strict=True):
            files = {f"{run}/run.json": sidecar, name: part}
            pieces.append({})
            next(piece for piece in pieces if _size(piece) + _size(files) <= PIECE).update(files)
            pieces = [piece for piece in pieces if piece]
        if len(pieces) > PIECES or sum(map(_size, pieces)) > HOME - RESULTS:
            return False
        self.pieces = pieces
        return True

    def _room(self) -> int:
        """Bytes that networks may still take."""
        return HOME - RESULTS - sum(map(_size, self.pieces))

    def _judge(self, run: str) -> str:
        accuracy = self._sidecar(run)["metrics"]["test_accuracy"]
        norm = parse_run(run, check_data=False).model.norm
        if self.scale == "fast" and accuracy < ACCURACY.get(norm, LOWEST):
            return f"TOO INACCURATE: {accuracy:.1%} ON THE TEST SET"
        say(f"  {run}: {accuracy:.2%}")
        return ""

    def _sidecar(self, run: str) -> dict:
        return json.loads((self.machine.scratch / "runs" / run / "run.json").read_text())

    def _write(self) -> None:
        """Write results.tar.gz, then the pieces that have changed."""
        self._put("results.tar.gz", self._results(min(PIECE, HOME - sum(map(_size, self.pieces)))))
        for number, piece in enumerate(self.pieces):
            self._put(f"runs.{number}", archive.join(piece))

    def _put(self, name: str, content: bytes) -> None:
        path = self.machine.out / name
        if not path.exists() or path.read_bytes() != content:
            temporary = path.with_name("unfinished")
            temporary.write_bytes(content)
            os.replace(temporary, path)

    def _results(self, limit: int) -> bytes:
        """Figures, logs, timings and sidecars as one .tar.gz of at most so many bytes."""
        scratch = self.machine.scratch
        files = [path for folder in ("figures", "logs") for path in (scratch / folder).rglob("*") if path.is_file()]
        files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(scratch).parts)]
        files += sorted((scratch / "runs").rglob("run.json"))
        files += [path for path in scratch.glob("*.json")]
        named = [(path.relative_to(scratch).as_posix(), path) for path in files]
        build = ROOT / "build" / self.scale
        named += [(f"failed/{path.name}", path) for path in build.rglob("*.partial.ipynb")] if build.exists() else []
        named.sort(key=lambda pair: (FIRST.index(pair[1].suffix) if pair[1].suffix in FIRST else len(FIRST), pair[0]))
        target, size = scratch / "results.tmp", 0
        with tarfile.open(target, "w:gz", compresslevel=6) as tar:
            for name, path in named:
                takes = path.stat().st_size + 1024  # or less, compressed
                if size + takes < limit:
                    tar.add(path, name)
                    size += takes
        return target.read_bytes()


def _size(files: Mapping[str, bytes]) -> int:
    """Bytes of an archive of some files, at most."""
    return sum(len(content) + 256 for content in files.values())
