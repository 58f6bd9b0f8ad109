"""Write the API reference of repairlib from its docstrings: `python workflow/api.py build/api`."""

import importlib
import pkgutil
import sys
from html import escape
from pathlib import Path

import pdoc

import repairlib


def modules() -> list[str]:
    """The package and its public modules."""
    found = [module.name for module in pkgutil.iter_modules(repairlib.__path__, "repairlib.")]
    return ["repairlib", *(name for name in found if not name.rpartition(".")[2].startswith("_"))]


def write(folder: Path) -> None:
    """Write an HTML page for each module, and an index of them."""
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*modules(), output_directory=folder)
    lines = []
    for name in modules():
        first = (importlib.import_module(name).__doc__ or "").partition("\n")[0]
        lines.append(f'<li><a href="{name.replace(".", "/")}.html">{name}</a>: {escape(first)}')
    (folder / "index.html").write_text(INDEX.replace("LINES", "\n".join(lines)), encoding="utf-8")


# pdoc's own index leads to the page of the package, which names no modules.
INDEX = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<title>repairlib: API reference</title>
<style>body { font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 50rem; padding: 0 1rem }</style>
<h1>repairlib: API reference</h1>
<ul>
LINES
</ul>
</html>
"""


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
