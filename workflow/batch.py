"""Execute notebooks, keep the two files of each in line, and say what came out.

    python workflow/batch.py notebooks/repair/04_repair.py --scale quick [--items repair/fig3-left,repair/samples]
    python workflow/batch.py gallery
    python workflow/batch.py sync

A notebook saves its items into a staging folder, which is moved over `figures/<scale>` only once all its cells have
passed: a run that fails or is killed leaves earlier results as they were. A cell tagged `check` may fail: what it found
is shown, and the items are published all the same. workflow/jobs.py calls this for many notebooks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import needs

from companion.experiments import scales
from companion.figures import gallery, report
from companion.figures.gallery import duration, relative
from companion.runs.data import project_root
from companion.runs.files import atomic_write

# nbformat imports jsonschema, which imports this package if it is installed, to check URIs. Building its grammar takes
# two seconds, and notebooks have no URIs to check.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

PATHS = ("REPAIRLIB_RUNS", "REPAIRLIB_NETWORKS", "REPAIRLIB_DATA")
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}

# Errors whose message says what is wrong and the way out, so that nobody needs to see where they came from.
SAYS_ALL = (
    "CorruptCheckpoint", "StaleRun", "DataMissing", "DivergedError", "DamagedResult", "FileExistsError", "OSError",
)  # fmt: skip


class NotebookFailed(Exception):
    """A cell of a notebook raised, or its kernel died; the message holds the cell's traceback."""


def name_of(path: str | Path) -> str:
    """A notebook's name: its path below the folder notebooks/, without suffix."""
    parts = Path(path).resolve().with_suffix("").parts
    if "notebooks" not in parts:
        raise ValueError(f"{path} does not lie below a folder called notebooks")
    return "/".join(parts[len(parts) - parts[::-1].index("notebooks") :])


# ------------------------------------------------------------------------------------------------- execute a notebook


def execute(path: str | Path, scale: str, items: str = "", need: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Execute a jupytext notebook with papermill and publish the items it saves; returns what this run made, and where.

    The executed notebook goes to build/<scale>/<name>.ipynb, and as HTML to figures/<scale>/<name>.html.

    Args:
        path: of the notebook's .py.
        scale: smoke, quick, fast or paper.
        items: comma-separated IDs of the items to make, empty for all.
        need: what the notebook needs for them, if that is known, see needs.find_needs.

    Raises:
        NotebookFailed: a cell failed; then the notebook so far is in build/<scale>/<name>.partial.ipynb.
        ValueError: the cell that says what the notebook needs fails.
    """
    import jupytext  # these here, because importing them takes a second
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)
    path, name, root = Path(path).resolve(), name_of(path), report.figures_root()
    output = project_root() / "build" / scales.check_scale(scale) / f"{name}.ipynb"
    partial = output.with_suffix(".partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    need = needs.notebook_needs(path, scale, items) if need is None else need
    saw: dict[str, Any] = {"code": needs.code_digest(path)}
    # Two processes making the same notebook would share its staging folder: the second waits.
    with contextlib.ExitStack() as stack:
        stack.enter_context(filelock.FileLock(output.with_suffix(".lock")))
        staging = stack.enter_context(_empty_folder(root / ".staging" / scale / name))
        # The kernel talks over sockets in files, not TCP ports, so parallel kernels cannot collide. In a folder of its
        # own, since the default is the working folder that all share; in /tmp, since their paths end at 107 bytes.
        sockets = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp" if os.path.isdir("/tmp") else None))
        ipc = {"transport": "ipc", "ip": f"{sockets}/kernel"} if os.name == "posix" else {}
        # The kernel starts in the notebook's folder, so a relative path of ours would mean something else there.
        paths = {key: os.path.abspath(os.environ[key]) for key in PATHS if os.environ.get(key)}
        notebook = nbformat.from_dict(jupytext.read(path))
        for cell in notebook.cells:
            if "check" in (tags := cell.metadata.get("tags", [])):
                cell.metadata["tags"] = [*tags, "raises-exception"]  # the cells after it are executed all the same
        start, checks = time.monotonic(), []
        try:
            with _environment_variables(paths | {"REPAIRLIB_FIGURES": str(staging), "REPAIRLIB_MADE": str(root)}):
                notebook = papermill.execute_notebook(
                    notebook,
                    str(partial),
                    parameters={"scale": scale, "items": items},
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    cwd=path.parent,
                    config=Config(KernelManager=ipc),
                    extra_arguments=["--IPKernelApp.log_level=50"],  # it reports its own shutdown as an error
                )
        except papermill.PapermillExecutionError:
            notebook = nbformat.read(partial, as_version=4)
            checks, others = _errors(notebook)
            if others:
                message = f"{path}: a cell failed; the notebook so far is in {partial}\n{others[0]}"
                raise NotebookFailed(message) from None
        except DeadKernelError as error:
            raise NotebookFailed(f"{path}: {error}, out of memory perhaps; so far it is in {partial}") from None
        nbformat.write(notebook, output)
        (staging / scale / f"{name}.html").parent.mkdir(parents=True, exist_ok=True)
        (staging / scale / f"{name}.html").write_text(_html(notebook, name), encoding="utf-8")
        partial.unlink()
        saw |= needs.contents(need["runs"], need["reads"], scale)
        return _publish(name, scale, items, staging, root, time.monotonic() - start, checks, saw)


def _errors(notebook: Any) -> tuple[list[str], list[str]]:
    """What failed in an executed notebook: in cells tagged `check`, in a line each; in others, source and traceback."""
    added = "papermill-error-cell-tag"
    notebook.cells = [cell for cell in notebook.cells if added not in cell.metadata.get("tags", [])]
    checks, others = [], []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                if "check" in cell.metadata.get("tags", []):
                    checks.append(f"{output.ename}: {output.evalue}".strip(": "))
                elif output.ename in SAYS_ALL:
                    others.append(f"{output.ename}: {output.evalue}")
                else:
                    others.append("\n".join([cell.source, "-" * 20, *output.traceback]))
    return checks, others


def _has_failed(partial: Path) -> bool:
    """Whether a cell of a notebook that did not come to its end has raised; else it was interrupted."""
    try:
        cells = json.loads(partial.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        return any(output["output_type"] == "error" for output in outputs)
    except (OSError, ValueError, KeyError):
        return False


def _html(notebook: Any, name: str) -> str:
    """An executed notebook as a page."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    return exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})[0]


def _publish(
    name: str,
    scale: str,
    items: str,
    staging: Path,
    root: Path,
    seconds: float,
    checks: list[str],
    saw: dict[str, Any],
) -> dict[str, Any]:
    """Move what a notebook has staged over the figures, file by file, its .done.json last.

    Args:
        name, scale, items: of the notebook, and as of `execute`.
        staging, root: where it has saved, and where figures are.
        seconds: what the execution took.
        checks: what failed in cells tagged `check`.
        saw: digests of what the notebook was made from, see needs.is_up_to_date.
    """
    staged = sorted(path for path in (staging / scale).rglob("*") if path.is_file())
    records = [json.loads(path.read_text(encoding="utf-8")) for path in staged if path.suffix == ".json"]
    devices = {record["device"] for record in records}
    where = report.environment() | ({"device": ", ".join(sorted(devices))} if devices else {})
    done = {
        "notebook": name,
        "scale": scale,
        "items": sorted(record["item"] for record in records),
        "files": [path.relative_to(staging / scale).as_posix() for path in staged],
        "sha256": {path.relative_to(staging / scale).as_posix(): needs.digest_of(path) for path in staged},
        "seconds": round(seconds, 1),
        "checks": checks,
        "device": where["device"],
        "versions": where["versions"],
        "saw": {needs.key_of(name, items): saw},
    }
    earlier = needs.read_done(name, scale) if items else None  # a run for some items leaves the others in place
    merged = {key: sorted({*done[key], *earlier[key]}) for key in ("items", "files")} if earlier else {}
    if earlier:  # what was made from other code is no longer all there
        merged["sha256"] = earlier.get("sha256", {}) | done["sha256"]
        same = {key: then for key, then in earlier.get("saw", {}).items() if then["code"] == saw["code"]}
        merged["saw"] = same | done["saw"]
    for path in staged:
        target = root / scale / path.relative_to(staging / scale)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    path = root / scale / "environment.json"
    with filelock.FileLock(root / ".staging" / "environment.lock"):  # one file for all notebooks
        environments = _read_environments(path)
        _write_json(path, dict(sorted((environments | {name: where}).items())))
    _write_json(root / scale / f"{name}.done.json", done | merged)
    return done


def _read_environments(path: Path) -> dict[str, Any]:
    """Where each notebook was executed; what is damaged is left out, and written again by the next execution."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        print(f"{path} is damaged ({error}), and written anew", file=sys.stderr)
        return {}
    return {name: each for name, each in found.items() if isinstance(each, dict)} if isinstance(found, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def _empty_folder(path: Path) -> Iterator[Path]:
    """An empty folder at `path`, whatever a killed run left there, removed afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _environment_variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, which a kernel started meanwhile inherits."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ------------------------------------------------------------------------------------------- the other half of a pair


def ipynb_of(path: str | Path) -> str:
    """Text of the .ipynb that belongs beside a notebook's .py: no outputs, and IDs that do not change by themselves."""
    import jupytext
    import nbformat

    notebook = nbformat.from_dict(jupytext.read(path))
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return nbformat.writes(notebook) + "\n"


def sync() -> list[Path]:
    """Bring each notebook's .py and .ipynb in line and strip outputs; returns the files that changed.

    The .py is the source. An .ipynb with other cells goes into the .py first only if it alone was changed since the
    last commit: outside JupyterLab, which writes both. Times of files do not count, as git gives them anew.
    """
    import jupytext
    from jupytext.cli import jupytext as run_jupytext

    changed = []
    for name in needs.find_notebooks():
        path = needs.path_of(name)
        ipynb = path.with_suffix(".ipynb")
        if ipynb.exists() and _edited(ipynb) and not _edited(path):
            sources = [[cell.source for cell in jupytext.read(file).cells] for file in (path, ipynb)]
            if sources[0] != sources[1]:
                run_jupytext(["--quiet", "--to", "py:percent", str(ipynb)])
                changed.append(path)
        text = ipynb_of(path)
        if not ipynb.exists() or ipynb.read_text(encoding="utf-8") != text:
            atomic_write(ipynb, text)
            changed.append(ipynb)
    return changed


def _edited(path: Path) -> bool:
    """Whether git knows a file and has seen a change of it since the last commit."""
    command = ["git", "status", "--porcelain", "--", path.name]
    found = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    return found.returncode == 0 and found.stdout[:2].strip() in ("M", "MM")


def copy(folder: Path) -> None:
    """Write every notebook's .ipynb into a folder, for tests: nothing that JupyterLab has saved gets in their way."""
    for name in needs.find_notebooks():
        atomic_write(folder / f"{name}.ipynb", ipynb_of(needs.path_of(name)))


# ------------------------------------------------------------------------------------------------ say what came out


def describe(done: dict[str, Any]) -> str:
    """A line about an execution, and one more for each check that failed."""
    made = ", ".join(item.partition("/")[2] for item in done["items"]) or "done"
    name = f"{done['notebook']} [{done['scale']}]"
    failed = [f"{name}: a check failed: {text}" for text in done["checks"]]
    return "\n".join([f"{name}: {made} in {duration(done['seconds'])}", *failed])


def summarize(
    scale: str,
    since: float = 0.0,
    notebooks: Iterable[str] | None = None,
    items: Iterable[str] = (),
    errors: Mapping[str, str] | None = None,
) -> str:
    """A few lines for the end of `make figures`: what there is at `scale`, how long it took, where to look.

    Args:
        scale: smoke, quick, fast or paper.
        since: when this call of `make figures` began (seconds since the epoch), to tell new results from earlier ones.
        notebooks: what it was asked for; default all.
        items: what it was asked for; all of these notebooks if empty.
        errors: by notebook, why it could not be made.
    """
    root, index, errors = report.figures_root(), report.read_index(), errors or {}
    notebooks = needs.find_notebooks() if notebooks is None else sorted(notebooks)
    asked = [*items] or [item for item, entry in index.items() if entry["notebook"] in notebooks]
    lines, made = [], set()
    for name in notebooks:
        done = needs.read_done(name, scale)
        partial = project_root() / "build" / scale / f"{name}.partial.ipynb"
        began, failed = partial.exists(), _has_failed(partial)
        notes = []
        if done:
            made |= {*done["items"]}
            notes.append(", ".join(item.partition("/")[2] for item in done["items"]))
            if (root / scale / f"{name}.done.json").stat().st_mtime < since:
                notes.append("(of before)" if began or name in errors else "(up to date)")
            notes += ["a check failed"] * bool(done.get("checks"))
        if name in errors:
            notes.append(f"failed: {errors[name]}")
        elif failed:
            notes.append(f"failed: see {relative(partial, Path.cwd())}")
        elif began:
            notes.append(f"stopped before its end: see {relative(partial, Path.cwd())}")
        if notes:
            lines.append(f"  {name:30} {duration(done['seconds']) if done else '':>12}  {'  '.join(notes)}".rstrip())
    head = f"{scale}: {len(made & {*asked})} of {len(asked)} items" if asked else scale
    head += f", in {duration(time.time() - since)}" if since else ""
    missing = [item for item in asked if item not in made]
    if missing:
        lines.append(f"  not made: {', '.join(missing)}")
    where = relative(root, Path.cwd())
    pages = [f"{scale}/{name}.html" for name in notebooks if (root / scale / f"{name}.html").exists()]
    page = pages[0] if len(notebooks) == 1 and pages else "gallery.html"
    lines.append(f"Look at {where}/{page}; data, pictures and executed notebooks are in {where}/{scale}/.")
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a cell failed and 2 if the question was wrong."""
    parser = argparse.ArgumentParser(prog="python workflow/batch.py", description="Execute notebooks, show results.")
    parser.add_argument("what", help="path of a notebook's .py, or `gallery`, `docs` (docs/gallery.md), `sync`, `copy`")
    parser.add_argument("--scale", default="quick", help="smoke, quick (default), fast or paper")
    parser.add_argument("--items", default="", help="comma-separated items to make, by default all of the notebook's")
    parser.add_argument("--if-needed", action="store_true", help="do nothing if the notebook is up to date")
    parser.add_argument("--plan", type=Path, help="the plan of workflow/jobs.py, which says what the notebook needs")
    parser.add_argument("--to", type=Path, help="the folder that `copy` writes every notebook's .ipynb into")
    options = parser.parse_args(arguments)
    try:
        if options.what == "gallery":
            print(gallery.write_gallery())
        elif options.what == "docs":
            print(gallery.write_docs())
        elif options.what == "sync":
            print("\n".join(str(path) for path in sync()) or "all in line")
        elif options.what == "copy":
            copy(options.to)
        else:
            items = needs.find_items(options.items)
            name, joined = name_of(options.what), ",".join(items)
            if options.plan:  # to find it out takes a second
                need = json.loads(options.plan.read_text(encoding="utf-8"))["needs"][name]
            else:
                need = needs.notebook_needs(options.what, options.scale, joined)
            if not (options.if_needed and needs.is_up_to_date(name, options.scale, items, need)):
                print(describe(execute(options.what, options.scale, joined, need)), flush=True)
    except NotebookFailed as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    except (ValueError, TypeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
