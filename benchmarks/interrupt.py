"""Whether `make figures`, killed at random moments and called again, ends with what an undisturbed call makes.

Two copies of this working tree, each with runs, figures and stamps of its own, make the same figures. One is left
alone. The other is killed with SIGKILL, by turns every process of it and all but the notebooks' kernels, which sit in
sessions of their own and outlive their parent by a second. Kills fall uniformly over the time the work should take.
After each, whatever is visible must be whole, and what was finished before must not have been touched. On Linux only,
since processes are found through /proc.

Then the killed copy meets other faults, one after the other: damaged and foreign files, wrong times, a full disk, two
calls at once. Each must be mended, or refused in words. None may be accepted in silence, and none end in a traceback.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from common import save
from PIL import Image

from companion.runs.data import data_root, project_root

MARK = "REPAIRLIB_INTERRUPT"  # an environment variable that every process of a home inherits, to find it by
JOB = re.compile(r"companion\.runs\.store train (\S+)|workflow/batch\.py notebooks/(\S+)\.py")
START = 4.0  # seconds that a job takes to import PyTorch, for the share of the work that is left


class Home:
    """A copy of the working tree with its own runs and figures, and the `make figures` or another target in it."""

    def __init__(self, root: Path, args: argparse.Namespace, target: str = "figures"):
        self.root, self.tree, self.mark, self.scale = root, root / "tree", uuid.uuid4().hex, args.scale
        self.runs, self.figures = root / "runs", root / "figures"
        self.seen: dict[str, tuple] = {}  # stored runs: what they were when they were first seen
        self.problems: list[str] = []
        listed = _output("git", "ls-files", "-coz", "--exclude-standard", cwd=project_root()).split("\0")
        for name in filter(None, listed):
            if (project_root() / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(project_root() / name, self.tree / name)
        self.environment = os.environ | {
            "REPAIRLIB_RUNS": str(self.runs),
            "REPAIRLIB_FIGURES": str(self.figures),
            "REPAIRLIB_DATA": str(data_root()),
            "PYTHONPATH": str(self.tree),  # before what is installed, which is the checkout
            MARK: self.mark,
        }
        used = _output(
            sys.executable, "-c", "import repairlib; print(repairlib.__file__)", cwd=root, env=self.environment
        )
        if self.tree not in Path(used).parents:
            raise RuntimeError(f"jobs would use {used.strip()} instead of the copy in {self.tree}")
        stamp = f"{sys.prefix}/.installed"  # taken as it is: nothing may be installed from a copy
        self.command = ["make", target, "-o", stamp, f"VENV={sys.prefix}", f"SCALE={args.scale}"]
        self.command += [f"NOTEBOOKS={args.notebooks}"] + ([f"CORES={args.cores}"] if target == "figures" else [])

    def start(self) -> subprocess.Popen:
        with open(self.root / "make.log", "ab") as log:
            return subprocess.Popen(
                self.command, cwd=self.tree, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def processes(self) -> dict[int, str]:
        """Process IDs of this home, and their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError):
                pass  # it has ended, or is another user's
        return found

    def jobs(self) -> list[str]:
        """The trainings and notebooks that run now."""
        lines = self.processes().values()
        return sorted({next(filter(None, match.groups())) for line in lines for match in JOB.finditer(line)})

    def kill(self, process: subprocess.Popen, kernels: bool) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while kernels and (left := self.processes()):
            for number in left:
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def finished(self) -> dict[str, float]:
        """Jobs that are finished, and the seconds each took."""
        paths = [*self.runs.rglob("run.json"), *self.figures.glob("*/**/*.done.json")]
        return {
            path.relative_to(self.root).as_posix(): _read(path).get("seconds", 0) + START
            for path in paths
            if _visible(path, self.root)
        }

    def inspect(self, when: str) -> None:
        """Note as problems whatever is visible and not whole, and stored runs that were touched."""
        for path in self.files():
            try:
                if path.suffix == ".json":
                    json.loads(path.read_text())
                elif path.suffix == ".png":
                    with Image.open(path) as picture:
                        picture.load()
            except (ValueError, OSError) as error:
                self.problems.append(f"{when}: {path} is not whole: {error}")
        now = {}
        for folder in self.runs.rglob("s*"):
            if not re.fullmatch(r"s\d+", folder.name):
                continue
            name = folder.relative_to(self.runs).as_posix()
            files = {path.name: path for path in folder.iterdir() if path.is_file()}  # folders hold what continues it
            if set(files) != {"model.safetensors", "run.json"}:
                self.problems.append(f"{when}: {folder} holds {', '.join(files) or 'nothing'}")
                continue
            info = _read(files["run.json"])
            digest = hashlib.sha256(files["model.safetensors"].read_bytes()).hexdigest()
            if digest != info.get("sha256"):
                self.problems.append(f"{when}: the weights of {name} are not those of its sidecar")
            stats = [(path.stat().st_ino, path.stat().st_mtime_ns) for _, path in sorted(files.items())]
            now[name] = (digest, info.get("created"), *stats)
        for name, then in self.seen.items():
            if now.get(name) != then:
                self.problems.append(f"{when}: {name} was stored, and {'is gone' if name not in now else 'changed'}")
        self.seen = now

    def files(self) -> list[Path]:
        """Everything in figures and runs that is not hidden."""
        found = (path for root in (self.figures, self.runs) for path in root.rglob("*"))
        return sorted(path for path in found if path.is_file() and _visible(path, self.root))

    def leftovers(self) -> list[str]:
        """What only an interrupted call can have left: temporary files and folders, staged items, processes."""
        paths = [*self.root.glob("runs/*/*/*/.s*"), *self.root.rglob("*.tmp")]
        paths += [*self.tree.glob("build/**/*.partial.ipynb")]
        paths += [path for path in self.figures.glob(".staging/**/*") if path.is_file()]
        return [str(path.relative_to(self.root)) for path in paths] + list(self.processes().values())

    def tail(self) -> str:
        return "\n".join((self.root / "make.log").read_text(errors="replace").splitlines()[-30:])


def undisturbed(home: Home) -> tuple[float, float]:
    """Make all; seconds until the first job ran, and until the end."""
    began = time.monotonic()
    process, first = home.start(), None
    while process.poll() is None:
        if first is None and home.jobs():
            first = time.monotonic() - began
        time.sleep(0.1)
    if process.returncode or first is None:
        raise RuntimeError(f"the undisturbed call failed; say with --notebooks which to make instead\n{home.tail()}")
    home.inspect("undisturbed")
    return first, time.monotonic() - began


def disturbed(
    home: Home, whole: dict[str, float], first: float, seconds: float, args: argparse.Namespace
) -> list[dict]:
    """Make all, killed `args.kills` times; a row for each kill, and one for the call that completes.

    whole, first, seconds: what `Home.finished` says of the undisturbed copy, and its times.
    """
    rows, chance = [], random.Random(args.seed)
    for number in range(1, args.kills + 1):
        left = sum(cost for name, cost in whole.items() if name not in home.finished()) / sum(whole.values())
        # The earliest of as many moments as kills remain, uniform over the time that is left.
        share = 1 - chance.random() ** (1 / (args.kills - number + 1))
        wait = first + share * left * seconds
        process = home.start()
        try:
            process.wait(wait)
            break  # complete, or failed
        except subprocess.TimeoutExpired:
            during, kernels = home.jobs(), number % 2 == 1
            home.kill(process, kernels)
        home.inspect(f"after kill {number}")
        done = home.finished()
        notebooks = sum(name.endswith(".done.json") for name in done)
        rows.append({
            "kill": number, "after (s)": round(wait, 1), "kernels too": kernels, "during": ", ".join(during) or "start",
            "runs stored": len(done) - notebooks, "notebooks done": notebooks,
        })  # fmt: skip
        print(rows[-1], flush=True)
    else:
        process = home.start()
    began = time.monotonic()
    if process.wait():
        home.problems.append(f"the call that should complete failed:\n{home.tail()}")
    home.inspect("at the end")
    return [*rows, {"kill": "none", "seconds to the end": round(time.monotonic() - began, 1)}]


def compare(one: Home, two: Home) -> dict:
    """How many results of the two are equal; what is not becomes a problem of the second."""
    names = [{path.relative_to(home.root).as_posix() for path in home.files()} for home in (one, two)]
    two.problems += [f"{name} is only in one of the two" for name in sorted(names[0] ^ names[1])]
    counts: dict = {}
    for name in sorted(names[0] & names[1]):
        kind = Path(name).suffix[1:] if name.startswith("figures") else Path(name).name
        if kind == "html":
            continue  # it shows how long everything took
        equal, same = counts.get(kind, (0, 0))
        paths = [home.root / name for home in (one, two)]
        if kind in ("json", "run.json"):
            alike = len({json.dumps(_timeless(_read(path))) for path in paths}) == 1
        else:
            alike = paths[0].read_bytes() == paths[1].read_bytes()
        counts[kind] = equal + alike, same + 1
        if not alike:
            two.problems.append(f"{name} differs")
    check = [sys.executable, "-m", "companion.runs.store", "check"]
    result = subprocess.run(check, cwd=two.tree, env=two.environment, capture_output=True, text=True)
    if result.returncode:
        two.problems.append(f"python -m companion.runs.store check: {result.stderr}")
    # Lock files stay for good, in both.
    two.problems += [f"left over: {name}" for name in two.leftovers() if name not in one.leftovers()]
    return {f"{kind} equal": f"{equal} of {n}" for kind, (equal, n) in counts.items()}


def faults(home: Home) -> list[dict]:
    """What `make figures` does about files that are wrong; a row for each fault. The home is whole before and after."""
    home.command = [part for part in home.command if not part.startswith("NOTEBOOKS=")] + [
        "NOTEBOOKS=repair/03_variance_collapse"
    ]
    figures, notebook = home.figures / home.scale, home.tree / "notebooks" / "repair" / "03_variance_collapse.py"
    done, source = figures / "repair" / "03_variance_collapse.done.json", notebook.read_text()
    if not done.exists():
        return []  # that notebook was not asked for
    tables = [figures / file for file in _read(done)["files"] if file.endswith(".json")]
    table = next(path for path in tables if path.with_suffix(".png").exists())
    run = home.runs / min(run for path in tables for run in _read(path)["runs"] if "vgg11" in run)
    rows = []

    def call(**environment) -> subprocess.CompletedProcess:
        return subprocess.run(home.command, cwd=home.tree, env=home.environment | environment, capture_output=True,
                              text=True)  # fmt: skip

    def meet(fault: str, cause, *, makes: bool | None = None, says: str = "", **environment) -> None:
        """Cause a fault, call `make figures`, and see: whether it executes the notebook, or is refused with words."""
        kept = {path: path.read_bytes() for path in (done, table, table.with_suffix(".png"), notebook)}
        kept |= {path: path.read_bytes() for path in (*run.iterdir(), figures / "environment.json") if path.is_file()}
        cause()
        before = done.stat().st_mtime_ns if done.exists() else 0
        result = call(**environment)
        text = result.stdout + result.stderr
        made = done.exists() and done.stat().st_mtime_ns != before
        refused = result.returncode != 0
        survived = "Traceback" not in text and (refused and says in text if says else not refused and made == makes)
        rows.append({"fault": fault, "then it is": "refused" if refused else "made again" if made else "up to date",
                     "survived": survived})  # fmt: skip
        print(rows[-1], flush=True)
        if not survived:
            home.problems.append(f"{fault}: {text[-2000:]}")
        if run.is_file() or run.is_symlink():
            run.unlink()
        for path, content in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        if call().returncode:
            home.problems.append(f"after {fault}: make figures fails")

    def other_seed() -> None:
        other = run.with_name("s2")
        for path in other.iterdir():
            shutil.copy(path, run / path.name)

    def file_in_place_of_the_run() -> None:
        shutil.rmtree(run)
        run.write_text("")

    def edited_long_ago() -> None:
        notebook.write_text(source + "\n# edited\n")
        os.utime(notebook, (0, 0))

    png = table.with_suffix(".png")
    cut = {path: path.read_bytes()[:-20] for path in (table, png, done, run / "run.json", run / "model.safetensors")}
    meet("a table is cut off", lambda: table.write_bytes(cut[table]), makes=True)
    meet("a table is empty", lambda: table.write_bytes(b""), makes=True)
    meet("a picture is cut off", lambda: png.write_bytes(cut[png]), makes=True)
    meet("a picture is another's", lambda: Image.new("L", (9, 9)).save(png), makes=True)
    meet(".done.json is cut off", lambda: done.write_bytes(cut[done]), makes=True)
    meet("environment.json is no JSON", lambda: (figures / "environment.json").write_text("{"), makes=False)
    meet("the notebook's time is in the future", lambda: os.utime(notebook, (2**33, 2**33)), makes=False)
    meet("the notebook is edited, and its time old", edited_long_ago, makes=True)
    meet("a network of another seed under this name", other_seed, says="is of another run")
    meet("run.json is cut off", lambda: (run / "run.json").write_bytes(cut[run / "run.json"]), says="not valid JSON")
    meet("weights are cut off, and figures gone", lambda: [
        (run / "model.safetensors").write_bytes(cut[run / "model.safetensors"]), done.unlink()
    ], says="was altered or truncated")  # fmt: skip
    meet("a file lies where a network belongs", file_in_place_of_the_run, says="is a file, or a link to nothing")
    if os.geteuid() == 0:
        full = home.root / "full"
        full.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(full)]).returncode == 0
        if mounted:  # not in every container
            meet("the disk is full", lambda: None, says="No space left on device", REPAIRLIB_RUNS=str(full))
            subprocess.run(["umount", str(full)], check=True)
        full.rmdir()

    done.unlink()
    both = [subprocess.Popen(home.command, cwd=home.tree, env=home.environment, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for _ in range(2)]  # fmt: skip
    texts = [process.communicate()[0] for process in both]
    survived = not any(process.returncode for process in both) and "Traceback" not in "".join(texts) and done.exists()
    rows.append({"fault": "two calls at once", "then it is": "made by one of them", "survived": survived})
    home.problems += [] if survived else [f"two calls at once: {texts}"]
    return rows


def conclude(root: Path, problems: list[str]) -> int:
    """Keep everything if there are problems, else nothing; the exit code."""
    if problems:
        print(f"{len(problems)} problems; everything is kept in {root}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    return 0


def _read(path: Path) -> dict:
    """A JSON file, or nothing if it is not whole, which `Home.inspect` notes."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}


def _timeless(value):
    """JSON without what may differ between two calls: when, in how many seconds, and digests of files that say so."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key not in ("seconds", "created")}
        return {key: _timeless(one) for key, one in kept.items() if not (key == "sha256" and isinstance(one, dict))}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _output(*command: str, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--cores", default="all", help="as CORES of make figures")
    parser.add_argument("--notebooks", default="", help="as NOTEBOOKS of make figures: all by default")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="repairlib-interrupt-"))
    one, two = (Home(root / name, args) for name in ("undisturbed", "killed"))
    first, seconds = undisturbed(one)
    rows = [{"undisturbed (s)": round(seconds, 1), "first job after (s)": round(first, 1), "runs": len(one.seen)}]
    print(rows[0], flush=True)
    rows += disturbed(two, one.finished(), first, seconds, args)
    rows.append(compare(one, two))
    met = faults(two)
    rows += [*met, {"faults tried": len(met), "survived": sum(row["survived"] for row in met)}]
    two.seen = {}  # some were damaged, and put back
    two.inspect("after the faults")
    problems = one.problems + two.problems
    save(__file__, args, [*rows, {"problems": problems}])
    return conclude(root, problems)


if __name__ == "__main__":
    sys.exit(main())
