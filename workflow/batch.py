"""Execute notebooks from the command line, and show what came out.

    python workflow/batch.py notebooks/repair/04_repair.py --scale quick [--items repair/fig3-left,repair/samples]
    python workflow/batch.py gallery
    python workflow/batch.py summary --scale quick
    python workflow/batch.py sync

A notebook saves its items into a staging folder, which is moved over `figures/<scale>` only once all its cells have
passed: a run that fails or is killed leaves earlier results as they were. The Snakefile is the graph of these jobs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import filelock

from companion.experiments import scales
from companion.figures import report, scorecard
from companion.runs.data import project_root
from companion.runs.files import atomic_write
from repairlib.names import check

PAPERS = {
    "repair": "REPAIR (Jordan et al. 2022)",
    "rethink": "Rethink Model Re-Basin (Qu and Horvath 2024)",
    "combine": "Mode Combinability (Csiszárik et al. 2023)",
}

PATHS = ("REPAIRLIB_RUNS", "REPAIRLIB_DATA")
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class NotebookFailed(Exception):
    """A cell of a notebook raised, or its kernel died; the message holds the cell's traceback."""


# ---------------------------------------------------------------------------------------------- what there is to make


def find_notebooks(names: str = "") -> list[str]:
    """The notebooks asked for, by name (`repair/04_repair 00_quickstart`) or path; all below notebooks/ if none is."""
    folder = project_root() / "notebooks"
    found = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py"))
    found = [name for name in found if "/." not in f"/{name}"]  # not .ipynb_checkpoints
    asked = [re.sub(r"^notebooks/|\.(py|ipynb)$", "", name) for name in re.split(r"[\s,]+", names) if name]
    return [check(name, found, "notebook") for name in asked] or found


def find_items(names: str) -> list[str]:
    """The items asked for, as full IDs; the paper may be left out where that is clear (`fig2-left, samples`)."""
    index = report.read_index()
    asked = [name for name in re.split(r"[\s,]+", names) if name]
    matches = [[item for item in index if name in (item, item.partition("/")[2])] for name in asked]
    return [
        match[0] if len(match) == 1 else check(name, index, "item") for name, match in zip(asked, matches, strict=True)
    ]


def find_needs(scale: str, notebooks: str = "", items: str = "") -> tuple[list[str], dict[str, dict[str, list[str]]]]:
    """What a call of `make figures` has to make: the items, empty for all, and what each notebook needs for them.

    Notebooks that read what others save bring these along: their items, if some are asked for, else all they make.

    Returns the IDs of the items, and by notebook {runs, reads, after}: training runs, items, notebooks that make these.
    """
    index, wanted = report.read_index(), find_items(items)
    names = sorted({index[item]["notebook"] for item in wanted}) if wanted else find_notebooks(notebooks)
    needs: dict[str, dict[str, list[str]]] = {}
    while True:
        for name in names:
            found = report.notebook_needs(project_root() / "notebooks" / f"{name}.py", scale, ",".join(wanted))
            reads = [check(item, index, f"item that {name} reads") for item in found["reads"]]
            needs[name] = found | {"after": list(dict.fromkeys(index[item]["notebook"] for item in reads))}
        missing = {item for need in needs.values() for item in need["reads"]} - {*wanted} if wanted else set()
        new = {after for need in needs.values() for after in need["after"]} - needs.keys()
        if not (missing or new):
            return wanted, needs
        wanted += sorted(missing)
        names = sorted({*needs, *new})


def name_of(path: str | Path) -> str:
    """A notebook's name: its path below the folder notebooks/, without suffix."""
    parts = Path(path).resolve().with_suffix("").parts
    if "notebooks" not in parts:
        raise ValueError(f"{path} does not lie below a folder called notebooks")
    return "/".join(parts[len(parts) - parts[::-1].index("notebooks") :])


def read_done(name: str, scale: str) -> dict[str, Any] | None:
    """What the notebook's last run at `scale` made, or None if there was none or its files are not all there."""
    root = report.figures_root() / scale
    path = root / f"{name}.done.json"
    if not path.exists():
        return None
    done = json.loads(path.read_text(encoding="utf-8"))
    return done if all((root / file).exists() for file in done["files"]) else None


# ------------------------------------------------------------------------------------------------- execute a notebook


def execute(path: str | Path, scale: str, items: str = "") -> dict[str, Any]:
    """Execute a jupytext notebook with papermill and publish the items it saves; returns what this run made, and where.

    items: comma-separated IDs of the items to make, empty for all.

    The executed notebook goes to build/<scale>/<name>.ipynb. Raises NotebookFailed when a cell does; then the notebook
    so far is in <name>.partial.ipynb there.
    """
    import jupytext  # these here, because importing them takes two seconds
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)
    path, name, root = Path(path).resolve(), name_of(path), report.figures_root()
    output = project_root() / "build" / scales.check_scale(scale) / f"{name}.ipynb"
    partial = output.with_suffix(".partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
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
        start = time.monotonic()
        try:
            with _environment_variables(paths | {"REPAIRLIB_FIGURES": str(staging), "REPAIRLIB_MADE": str(root)}):
                notebook = papermill.execute_notebook(
                    nbformat.from_dict(jupytext.read(path)),
                    str(partial),
                    parameters={"scale": scale, "items": items},
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    cwd=path.parent,
                    config=Config(KernelManager=ipc),
                    extra_arguments=["--IPKernelApp.log_level=50"],  # it reports its own shutdown as an error
                )
        except papermill.PapermillExecutionError as error:
            raise NotebookFailed(f"{path}: a cell failed; the notebook so far is in {partial}{error}") from None
        except DeadKernelError as error:
            raise NotebookFailed(f"{path}: {error}, out of memory perhaps; so far it is in {partial}") from None
        nbformat.write(notebook, output)
        partial.unlink()
        return _publish(name, scale, items, staging, root, time.monotonic() - start)


def _publish(name: str, scale: str, items: str, staging: Path, root: Path, seconds: float) -> dict[str, Any]:
    """Move what a notebook has staged over the figures, file by file, its .done.json last."""
    staged = sorted(path for path in (staging / scale).rglob("*") if path.is_file())
    records = [json.loads(path.read_text(encoding="utf-8")) for path in staged if path.suffix == ".json"]
    devices = {record["device"] for record in records}
    where = report.environment() | ({"device": ", ".join(sorted(devices))} if devices else {})
    done = {
        "notebook": name,
        "scale": scale,
        "items": sorted(record["item"] for record in records),
        "files": [path.relative_to(staging / scale).as_posix() for path in staged],
        "seconds": round(seconds, 1),
        "device": where["device"],
        "versions": where["versions"],
    }
    earlier = read_done(name, scale) if items else None  # a run for some items leaves the others in place
    merged = {key: sorted({*done[key], *earlier[key]}) for key in ("items", "files")} if earlier else {}
    for path in staged:
        target = root / scale / path.relative_to(staging / scale)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    path = root / scale / "environment.json"
    with filelock.FileLock(root / ".staging" / "environment.lock"):  # one file for all notebooks
        environments = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        _write_json(path, dict(sorted((environments | {name: where}).items())))
    _write_json(root / scale / f"{name}.done.json", done | merged)
    return done


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

    An .ipynb that is newer than its .py and has other cells was edited outside JupyterLab, and goes into the .py first.
    """
    import jupytext
    from jupytext.cli import jupytext as run_jupytext

    changed = []
    for name in find_notebooks():
        path = project_root() / "notebooks" / f"{name}.py"
        ipynb = path.with_suffix(".ipynb")
        if ipynb.exists() and ipynb.stat().st_mtime > path.stat().st_mtime:
            sources = [[cell.source for cell in jupytext.read(file).cells] for file in (path, ipynb)]
            if sources[0] != sources[1]:
                run_jupytext(["--quiet", "--to", "py:percent", str(ipynb)])
                changed.append(path)
        text = ipynb_of(path)
        if not ipynb.exists() or ipynb.read_text(encoding="utf-8") != text:
            atomic_write(ipynb, text)
            changed.append(ipynb)
    return changed


# -------------------------------------------------------------------------------------- show what came out, and where


def summarize(scale: str, since: float = 0.0) -> str:
    """A few lines for the end of `make figures`: what there is at `scale`, how long it took, where to look.

    since: when this call of `make figures` began (seconds since the epoch), to tell new results from earlier ones.
    """
    root, index = report.figures_root(), report.read_index()
    lines, made = [], set()
    for name in find_notebooks():
        done = read_done(name, scale)
        partial = project_root() / "build" / scale / f"{name}.partial.ipynb"
        notes = []
        if done:
            made |= {*done["items"]}
            notes.append(", ".join(item.partition("/")[2] for item in done["items"]))
            if (root / scale / f"{name}.done.json").stat().st_mtime < since:
                notes.append("(of before)" if partial.exists() else "(up to date)")
        if partial.exists():
            notes.append(f"failed: see {_relative(partial, Path.cwd())}")
        if notes:
            lines.append(f"  {name:30} {duration(done['seconds']) if done else '':>12}  {'  '.join(notes)}".rstrip())
    head = f"{scale}: {len(made & index.keys())} of {len(index)} items"
    head += f", in {duration(time.time() - since)}" if since else ""
    missing = [item for item in index if item not in made]
    if missing:
        lines.append(f"  not made: {', '.join(missing)}")
    where = _relative(root, Path.cwd())
    lines.append(f"Look at {where}/gallery.html; data and pictures are in {where}/{scale}/.")
    return "\n".join([head, *lines])


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(8.24), duration(75), duration(7384)
    ('8.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def write_gallery() -> Path:
    """Write figures/gallery.html, every item at every scale there is, and the claims judged from them.

    The claims also go into figures/scorecard.md, whose tables GitHub shows.
    """
    root, index, claims = report.figures_root(), report.read_index(), scorecard.scorecard()
    atomic_write(root / "scorecard.md", scorecard.markdown(claims))
    parts = []
    for paper, title in PAPERS.items():
        sections = [_section(item, entry, root) for item, entry in index.items() if item.startswith(f"{paper}/")]
        if sections:
            card = _scorecard([row for row in claims if row["claim"].startswith(f"{paper}/")])
            parts += [f"<h2>{escape(title)}</h2>", card, *sections]
    page = PAGE.replace("CONTENT", "\n".join(parts))
    atomic_write(root / "gallery.html", page)
    return root / "gallery.html"


def _section(item: str, entry: dict[str, Any], root: Path) -> str:
    """One item of the gallery."""
    paths = {scale: root / scale / f"{entry['output']}.json" for scale in scales.SCALES}
    records = {s: json.loads(path.read_text(encoding="utf-8")) for s, path in paths.items() if path.exists()}
    notebook = project_root() / "notebooks" / f"{entry['notebook']}.py"
    section, figure = entry["paper"]["section"], entry["paper"]["figure"]
    place = f"section {section}, {'figure ' if figure[0].isdigit() else ''}{figure}"
    parts = [
        f'<section id="{escape(item)}"><h3>{escape(item)}</h3><p>{escape(entry["what"])}</p>',
        f"<p class=small>The paper's {escape(place)}. Made by {_link(notebook, root, entry['notebook'])}.</p>",
        _numbers(entry.get("published", {}), {scale: record["summary"] for scale, record in records.items()}),
        "<div class=row>",
    ]
    for scale, record in records.items():
        picture = paths[scale].with_suffix(".png")
        executed = project_root() / "build" / scale / f"{entry['notebook']}.ipynb"
        facts = [
            f"<b>{scale}</b>",
            escape(record["device"]),
            f"seeds {', '.join(map(str, record['seeds']))}" if record["seeds"] else "",
            duration(record["seconds"]) if record["seconds"] is not None else "",
            _link(paths[scale], root, "data"),
            _link(executed, root, "executed notebook") if executed.exists() else "",
        ]
        source = escape(_relative(picture, root))
        image = f'<a href="{source}"><img src="{source}" alt="{escape(item)} at scale {scale}" loading=lazy></a>'
        shown = image if picture.exists() else _table(record["table"])
        parts.append(f"<figure>{shown}<figcaption>{' · '.join(filter(None, facts))}</figcaption></figure>")
    if not records:
        parts.append(f"<p class=small>Not made yet: <code>make figures ITEMS={escape(item)}</code></p>")
    return "\n".join([*parts, "</div></section>"])


def _scorecard(rows: list[dict[str, Any]]) -> str:
    """The claims of one paper, a line for each item and scale they were judged on; an item's name leads to it."""
    columns = ("statement", "published", "item", "ours", "verdict", "scale", "seeds")
    lines = ["".join(f"<th>{name.replace('statement', 'claim')}</th>" for name in columns)]
    for i, row in enumerate(rows):
        again = i > 0 and row["claim"] == rows[i - 1]["claim"]
        cells = {name: "" if again and name in columns[:2] else escape(row[name]) for name in columns}
        cells["item"] = f'<a href="#{cells["item"]}">{cells["item"]}</a>'
        cells["ours"] = re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", cells["ours"])
        lines.append("".join(f"<td>{cells[name]}</td>" for name in columns))
    return f"<table class=claims>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if rows else ""


def _numbers(published: dict[str, Any], ours: dict[str, dict[str, Any]]) -> str:
    """The paper's numbers beside ours, one line for each name."""
    names = list(dict.fromkeys([*published, *(name for summary in ours.values() for name in summary)]))
    if not names:
        return ""
    columns = ([("paper", published)] if published else []) + list(ours.items())
    rows = [{"": name} | {title: numbers.get(name, "") for title, numbers in columns} for name in names]
    return _table(rows)


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows as an HTML table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in names)}</tr>\n" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>\n{body}</table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value).replace("_", " "))


def _link(path: Path, start: Path, text: str) -> str:
    return f'<a href="{escape(_relative(path, start))}">{escape(text)}</a>'


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()


PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>repairlib: figures</title>
<style>
body { font: 16px/1.45 system-ui, sans-serif; margin: 1rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
h2 { border-bottom: 1px solid #ccc; margin-top: 2.5rem }
h3 { margin: 2.5rem 0 0 }
p { margin: .3rem 0; max-width: 50rem }
.small, figcaption { color: #555; font-size: .85rem }
.row { display: flex; flex-wrap: wrap; gap: 1.5rem; margin-top: .8rem }
figure { flex: 1 1 20rem; margin: 0; max-width: 40rem; min-width: 0 }
img { width: 100%; border: 1px solid #ddd; background: #fff }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
td, th { padding: .1rem .7rem .1rem 0; text-align: left; white-space: nowrap }
td + td, th + th { text-align: right }
tr + tr { border-top: 1px solid #eee }
.claims td, .claims th { white-space: normal; text-align: left; vertical-align: top; min-width: 3.5rem }
</style>
<h1>Figures</h1>
<p>Every figure panel and table made so far, with the numbers the papers print beside ours. What differs from the papers
at each scale stands at the top of each notebook: <b>smoke</b> and <b>quick</b> use scikit-learn's digits and small
networks, <b>fast</b> and <b>paper</b> the papers' data.</p>
CONTENT
</html>
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a cell failed and 2 if the question was wrong."""
    parser = argparse.ArgumentParser(prog="python workflow/batch.py", description="Execute notebooks, show results.")
    parser.add_argument("what", help="path of a notebook's .py, or `gallery`, or `summary`, or `sync`")
    parser.add_argument("--scale", default="quick", help="smoke, quick (default), fast or paper")
    parser.add_argument("--items", default="", help="comma-separated items to make, by default all of the notebook's")
    parser.add_argument("--since", default=0.0, type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.what == "gallery":
            print(write_gallery())
        elif options.what == "summary":
            write_gallery()
            print(summarize(scales.check_scale(options.scale), options.since))
        elif options.what == "sync":
            print("\n".join(str(path) for path in sync()) or "all in line")
        else:
            done = execute(options.what, options.scale, ",".join(find_items(options.items)))
            made = ", ".join(item.partition("/")[2] for item in done["items"]) or "done"
            print(f"{done['notebook']} [{options.scale}]: {made} in {duration(done['seconds'])}", flush=True)
    except NotebookFailed as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
