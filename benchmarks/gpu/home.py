"""Before a visit and after it, at home: what travels, and what becomes of what came back."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from companion.figures import report
from companion.runs import packing
from companion.runs.data import data_root
from companion.runs.files import atomic_write, write_folder
from companion.runs.store import Store
from gpu import archive
from gpu.machine import CALL, DATA, ROOT

# What the notebooks import and the machine lacks; it has PyTorch, NumPy, pandas, Matplotlib, pytest and so on.
WHEELS = """
    asttokens beartype beautifulsoup4 bleach comm decorator defusedxml entrypoints executing fastjsonschema ipykernel
    ipython ipython-pygments-lexers jsonschema jsonschema-specifications jupyter-client jupyter-core
    jupyterlab-pygments jupytext matplotlib-inline mdit-py-plugins mistune nbclient nbconvert nbformat nest-asyncio2
    pandocfilters papermill pexpect platformdirs prompt-toolkit ptyprocess pure-eval pyzmq referencing rpds-py
    soupsieve stack-data tenacity tinycss2 tornado traitlets wcwidth webencodings
""".split()
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
LOOK, WORK = (f"python3 benchmarks/gpu_visit.py {what}" for what in ("look", "work"))


def commit(dirty: bool = False) -> str:
    """The commit that results are marked with; RuntimeError if there are changes beside it, unless `dirty`."""
    changed = bool(_git("status", "--porcelain"))
    if changed and not dirty:
        raise RuntimeError("commit first: results are marked with the commit")
    return _git("rev-parse", "HEAD") + "+changes" * changed


def exclude(folder: Path) -> None:
    """Let git ignore a folder of this checkout, in this checkout only."""
    path, line = ROOT / _git("rev-parse", "--git-path", "info/exclude"), f"/{folder.name}/"
    known = path.read_text().splitlines() if path.exists() else []
    if line not in known:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*known, line]) + "\n")


def pack(folder: Path, commit: str, runs: Sequence[str], *, wheels: bool = True) -> None:
    """Write what travels beside the tracked files.

    Args:
        folder: where to.
        commit: what results are marked with.
        runs: stored networks to take along.
        wheels: False leaves out what would be downloaded.
    """

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "whl").mkdir(parents=True)
    (folder / "commit").write_text(f"{commit}\n")
    if wheels:
        _download(folder / "whl")
    for name, content in zip(("a.bin", "b.bin"), archive.halves(data_root() / DATA), strict=True):
        (folder / name).write_bytes(content)
    store, taken = Store(), {}
    for run in runs:
        store.load(run)  # raises if it is damaged
        if (weights := store.path(run) / "model.safetensors").exists():  # others come with the repository
            taken[f"{run}/run.json"] = (store.path(run) / "run.json").read_bytes()
            taken[f"{run}/model.packed"] = packing.pack(weights.read_bytes())
    if taken:
        (folder / "runs.bin").write_bytes(archive.join(taken))


def print_calls(folder: Path) -> None:
    """Print the two calls to make; RuntimeError if one would carry too much."""
    tracked = sum((ROOT / name).stat().st_size for name in _git("ls-files").splitlines() if (ROOT / name).is_file())
    calls = {LOOK: (210, ["whl", "a.bin", "commit"]), WORK: (590, ["b.bin", "commit", "runs.bin"])}
    for number, (command, (limit, names)) in enumerate(calls.items(), 1):
        names = [name for name in names if (folder / name).exists()]
        files = [path for name in names for path in [folder / name, *(folder / name).glob("*")] if path.is_file()]
        size = tracked + sum(path.stat().st_size for path in files)
        if size > CALL:
            raise RuntimeError(
                f"call {number} would carry {size / 2**20:.1f} MiB, more than {CALL / 2**20:.0f}; tracked files are "
                f"{tracked / 2**20:.1f} of it: `git sparse-checkout set --no-cone '/*' '!/data/networks'` leaves the "
                "networks behind, and `git sparse-checkout disable` brings them back"
            )
        print(f"call {number}, {size / 2**20:.1f} MiB: {command}")
        print(f"  carry {', '.join(f'{folder.name}/{name}' for name in names)}; limit {limit} s")
    print("Make call 2 at once after call 1, give the machine back, then:")
    print("  python benchmarks/gpu_visit.py fold FOLDER  # with what came back")


def _download(folder: Path) -> None:
    """Download the wheels, in the versions of requirements.txt."""
    from packaging.requirements import Requirement

    lines = (line.rstrip(" \\") for line in (ROOT / "requirements.txt").read_text().splitlines())
    pinned = [Requirement(line) for line in lines if re.match(r"[\w.-]+==", line)]
    place = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux",
             "os_name": "posix", "platform_python_implementation": "CPython"}  # fmt: skip
    versions = {r.name: str(r.specifier) for r in pinned if r.marker is None or r.marker.evaluate(place)}
    wanted = [f"{name}{versions.get(name, '')}" for name in WHEELS]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), *wanted], check=True)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


# ----------------------------------------------------------------------------------------------------------- come back


def fold(folders: list[Path], results: Path) -> int:
    """Put what came back where it belongs: networks into the store, figures beside the others.

    Nothing that is there is overwritten by a network, and none is stored unless its weights have the digest of its
    sidecar. A figure stays if what came back was made of some of its networks only. Whatever cannot be taken in is
    named, and the rest is taken in.

    Args:
        folders: with the files of both calls, or of `work` alone.
        results: the file for timings and facts.

    Returns:
        The exit code: 1 if something could not be taken in.
    """
    files = {path.name: path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        came = Path(name)
        for tar in (files[name] for name in ("look.tar.gz", "results.tar.gz") if name in files):
            with tarfile.open(fileobj=io.BytesIO(tar.read_bytes())) as content:
                content.extractall(came, filter="data")
        facts, timings, done = (
            _read(came / n) or _read(files.get(n)) for n in ("facts.json", "timings.json", "work.json")
        )
        stored = _store_runs(files, problems)
        scale = done.get("scale", "fast")
        _take_figures(came / "figures" / scale, scale, problems)
        for row in timings.get("steps", []):
            row.pop("losses", None)
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps({"environment": facts, "timings": timings, "work": done}, indent=1) + "\n")
        _print_table(done, came, stored)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _read(path: Path | None) -> dict:
    return json.loads(path.read_text()) if path and path.exists() else {}


def _store_runs(files: dict[str, Path], problems: list[str]) -> dict[str, str]:
    """Store the networks that came back; by run, what became of it."""
    came: dict[str, dict[str, bytes]] = {}
    for name in sorted(name for name in files if re.fullmatch(r"runs\.\d", name)):
        try:
            for path, data in archive.split(files[name].read_bytes()):
                run, _, file = path.rpartition("/")
                came.setdefault(run, {})[file] = data
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
    stored = {}
    for run in sorted(came, key=lambda run: run.count("/")):  # before those that continue it
        try:
            stored[run] = _store(run, came[run])
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            problems.append(f"{run}: {type(error).__name__}: {error}")
    problems += [f"{run}: {what}; nothing is overwritten" for run, what in stored.items() if what != "stored"]
    return stored


def _store(run: str, came: dict[str, bytes]) -> str:
    """Store a network; says what became of it, or raises what is wrong with it."""
    if missing := [name for name in _files(came) if name not in came]:
        raise ValueError(f"came back without {', '.join(missing)}")
    sidecar, *parts = (came[name] for name in _files(came))
    weights = packing.unpack(b"".join(parts))
    digest = hashlib.sha256(weights).hexdigest()
    if digest != json.loads(sidecar)["sha256"]:
        raise ValueError("came back with other weights than it left with")
    store = Store()
    if store.has(run):
        return "stored before" if store.info(run)["sha256"] == digest else "NOT STORED, another is there"
    write_folder(store.path(run), {"model.safetensors": weights, "run.json": sidecar})
    try:
        store.load(run)  # is it the network that its name says, and continues the one that is here?
    except Exception:
        store.delete(run)
        raise
    return "stored"


def _files(came: Iterable[str]) -> list[str]:
    """The files that a network consists of: its sidecar, and its weights whole or in as many parts as they say."""
    numbers = {int(name.rpartition("of")[2]) for name in came if re.fullmatch(r"model\.packed\.\d+of\d+", name)}
    parts = [f"model.packed.{part}of{number}" for number in numbers for part in range(1, number + 1)]
    return ["run.json", *(parts or ["model.packed"])]


def _take_figures(source: Path, scale: str, problems: list[str]) -> None:
    """Move figures over those that are there; environments and lists of what was made are merged.

    A figure stays, with what is said of it, if only some of its networks went into the one that came back.
    """
    target = report.figures_root() / scale
    came = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()}
    poorer: dict[str, str] = {}  # by its path without suffix, the item
    for name, path in came.items():
        if path.suffix == ".json":
            old, new = ({*_read(place).get("runs", ())} for place in (target / name, path))
            if new < old:
                poorer[name.removesuffix(".json")] = item = _read(path)["item"]
                problems.append(f"{item}: stays as it is, of {len(old)} networks; {len(new)} of them came back")
    idle = {
        name.removesuffix(".done.json") for name, path in came.items()
        if name.endswith(".done.json") and {*_read(path)["items"]} <= {*poorer.values()}
    }  # fmt: skip
    for name, path in came.items():
        there = target / name
        if name.rpartition(".")[0] in poorer or re.sub(r"(\.done\.json|\.html)$", "", name) in idle:
            continue
        if name == "environment.json":
            new = {notebook: where for notebook, where in _read(path).items() if notebook not in idle}
            atomic_write(there, json.dumps(dict(sorted((_read(there) | new).items())), indent=1) + "\n")
        elif name.endswith(".done.json"):
            old, new = _read(there), _read(path)
            both = {key: sorted({*old.get(key, []), *new[key]}) for key in ("items", "files")}
            saw = {key: then for key, then in new["saw"].items() if not {*key.split(",")} & {*poorer.values()}}
            atomic_write(there, json.dumps(new | both | {"saw": old.get("saw", {}) | saw}, indent=1) + "\n")
        else:
            atomic_write(there, path.read_bytes())


def _print_table(done: dict, came: Path, stored: dict[str, str]) -> None:
    for row in done.get("jobs", []):
        line = f"{row['kind']:7} {row['name']:50} {row['seconds']:6.1f} s  {row['outcome']}"
        sidecar = _read(came / "runs" / row["name"] / "run.json")
        if sidecar:
            accuracy, place = sidecar["metrics"]["test_accuracy"], sidecar.get("processor", sidecar["device"])
            line += f"  {accuracy:.2%} on {place}; {stored.get(row['name'], 'did not come home')}"
        print(line)
    for item, why in done.get("left out", {}).items():
        print(f"figure  {item:50} left out: it {why}")
