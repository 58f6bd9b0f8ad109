"""The gallery: every figure and table made so far, with the paper's numbers beside ours.

`write_gallery` writes a page for a browser, figures/gallery.html; `write_docs` writes docs/gallery.md with small
pictures, for whoever reads the repository on GitHub.
"""

from __future__ import annotations

import io
import os
import re
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from companion.experiments import scales
from companion.figures import report
from companion.runs.data import project_root
from companion.runs.files import atomic_write

PAPERS = {
    "repair": "REPAIR (Jordan et al. 2022)",
    "rethink": "Rethink Model Re-Basin (Qu and Horvath 2024)",
    "combine": "Mode Combinability (Csiszárik et al. 2023)",
}


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
    from companion.figures import scorecard  # here, as it takes long to import, and jobs that execute need none

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
    records = report.saved_items(item, scales.SCALES, root)
    notebook = project_root() / "notebooks" / f"{entry['notebook']}.ipynb"
    parts = [
        f'<section id="{escape(item)}"><h3>{escape(item)}</h3><p>{escape(entry["what"])}</p>',
        f"<p class=small>The paper's {escape(_place(entry))}. Made by {_link(notebook, root, entry['notebook'])}.</p>",
        _numbers(entry.get("published", {}), {scale: record["summary"] for scale, record in records.items()}),
        "<div class=row>",
    ]
    for scale, record in records.items():
        picture = paths[scale].with_suffix(".png")
        executed = root / scale / f"{entry['notebook']}.html"
        facts = [
            f"<b>{scale}</b>",
            escape(record["device"]),
            f"seeds {', '.join(map(str, record['seeds']))}" if record["seeds"] else "",
            duration(record["seconds"]) if record["seconds"] is not None else "",
            _link(paths[scale], root, "data"),
            _link(executed, root, "notebook with its output") if executed.exists() else "",
        ]
        source = escape(relative(picture, root))
        image = f'<a href="{source}"><img src="{source}" alt="{escape(item)} at scale {scale}" loading=lazy></a>'
        shown = image if picture.exists() else _table(record["table"])
        parts.append(f"<figure>{shown}<figcaption>{' · '.join(filter(None, facts))}</figcaption></figure>")
    if not records:
        parts.append(f"<p class=small>Not made yet: <code>make figures ITEMS={escape(item)}</code></p>")
    return "\n".join([*parts, "</div></section>"])


def _place(entry: dict[str, Any]) -> str:
    """Where the paper shows an item."""
    section, figure = entry["paper"]["section"], entry["paper"]["figure"]
    return f"section {section}, {'figure ' if figure[0].isdigit() else ''}{figure}"


def _scorecard(rows: list[dict[str, Any]]) -> str:
    """The claims of one paper, a line for each item and scale they were judged on; an item's name leads to it."""
    columns = ("statement", "published", "item", "ours", "verdict", "scale", "networks", "seeds")
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
    return f'<a href="{escape(relative(path, start))}">{escape(text)}</a>'


def relative(path: Path, start: Path) -> str:
    """A path as seen from a folder, with slashes."""
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


# ------------------------------------------------------------------------------------------------- docs/gallery.md

SHOWN = ("quick", "fast")  # scales, side by side
WIDTH, COLORS, LIMIT = 640, 128, 5_000_000  # pixels; of a picture's palette; bytes of all pictures together


def write_docs() -> Path:
    """Write docs/gallery.md and docs/gallery/*.png from the items made at `quick` and `fast`; the path of the page.

    Raises:
        ValueError: the pictures are larger than 5 MB in all.
    """
    root, docs = report.figures_root(), project_root() / "docs"
    lines, pictures = [DOCS], {}
    for paper, title in PAPERS.items():
        entries = {item: entry for item, entry in report.read_index().items() if item.startswith(f"{paper}/")}
        lines += [f"## {title}"] if entries else []
        for item, entry in entries.items():
            notebook = f"[{entry['notebook']}](../notebooks/{entry['notebook']}.ipynb)"
            lines.append(f"### {item}\n\n{entry['what']} The paper's {_place(entry)}; notebook {notebook}.")
            paths = {scale: root / scale / f"{entry['output']}.json" for scale in SHOWN}
            records = report.saved_items(item, SHOWN, root)
            drawn = {scale: paths[scale].with_suffix(".png") for scale in records}
            drawn = {scale: path for scale, path in drawn.items() if path.exists()}
            names = {scale: f"{entry['output'].replace('/', '_')}{SUFFIXES[scale]}.png" for scale in drawn}
            pictures |= {names[scale]: _small(path) for scale, path in drawn.items()}
            if records:
                images = {scale: f"![{item} at {scale}](gallery/{name})" for scale, name in names.items()}
                lines.append("\n".join(_side_by_side(records, images)))
            else:
                lines.append(f"Not made: `make figures SCALE=fast ITEMS={item}`.")
            summaries = {scale: record["summary"] for scale, record in records.items()}
            if numbers := _markdown_numbers(entry.get("published", {}), summaries):
                lines.append("\n".join(numbers))
    if (size := sum(map(len, pictures.values()))) > LIMIT:
        raise ValueError(f"the pictures of docs/gallery.md take {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
    folder = docs / "gallery"
    for path in folder.glob("*.png") if folder.exists() else ():
        if path.name not in pictures:
            path.unlink()
    for name, content in pictures.items():
        atomic_write(folder / name, content)
    atomic_write(docs / "gallery.md", "\n\n".join(lines) + "\n")
    return docs / "gallery.md"


DOCS = """# Gallery

Every figure and table of the papers as `make figures` makes it, at the scales `quick` and, as far as it is made there,
`fast`. `quick` has small networks on scikit-learn's digits and takes minutes on a laptop: expect the phenomena and
other numbers. `fast` has the papers' data and architectures with shortened training; [fidelity.md](fidelity.md) sets
its numbers beside those that the papers print. [scorecard.md](scorecard.md) says which claims hold. `make readme`
writes this page."""
SUFFIXES = {"quick": "", "fast": "_fast"}  # of pictures' names


def _side_by_side(records: dict[str, dict[str, Any]], images: dict[str, str]) -> list[str]:
    """The pictures of an item at each scale, and where each was made from which seeds, as a table of Markdown."""
    scales = list(images or records)
    facts = []
    for scale in scales:
        seeds = ", ".join(map(str, records[scale]["seeds"]))
        facts.append(records[scale]["device"] + (f"; seeds {seeds}" if seeds else ""))
    rows = [[f"`{scale}`" for scale in scales], ["---"] * len(scales), list(images.values()), facts]
    return [f"| {' | '.join(row)} |" for row in rows if row]


def _small(path: Path) -> bytes:
    """A picture as a small PNG with a palette."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        height = round(picture.height * WIDTH / picture.width)
        picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
        # Far-off colours first: by frequency, thin lines of two colours would get one.
        picture = picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE)
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _markdown_numbers(published: dict[str, Any], ours: dict[str, dict[str, Any]]) -> list[str]:
    """The paper's numbers beside ours at each scale, as a table of Markdown."""
    names = list(dict.fromkeys([*published, *(name for summary in ours.values() for name in summary)]))
    if not names:
        return []
    columns = ([("paper", published)] if published else []) + [
        (f"`{scale}`", summary) for scale, summary in ours.items()
    ]
    lines = [f"| | {' | '.join(title for title, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [_cell(numbers.get(name, "")).replace("|", "/") for _, numbers in columns]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines
