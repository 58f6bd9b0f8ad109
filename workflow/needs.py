"""What notebooks need, and whether they are up to date.

The batch finds out what a notebook needs by executing two of its cells, here and in this process: the cell tagged
`parameters`, then, with `scale` and `items` set, the cell tagged `runs`. That cell defines `section` (see
companion/figures/section.py), or lists called `runs` (names of training runs) and `reads` (items of other notebooks).
It must be quick and must not train anything. Lines of it that only show something, such as `section.overview()`, are
left out, and no other cell is executed. If one of the two fails, that notebook cannot be made and the message says why;
the other notebooks can.

A notebook is up to date if its last execution saw what is there now: the same text of the notebook, of every module
that it imports from repairlib and companion, and that these import, the same weights of the runs, and the same numbers
in the items that it reads. Contents count, not times. What is imported by name at run time, with importlib, does not
count: so a claim can be edited without executing notebooks.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from companion.experiments.available import say_left_out
from companion.experiments.scales import check_scale
from companion.figures import report
from companion.runs.data import project_root
from companion.runs.names import parse_run
from companion.runs.store import Store
from repairlib.names import check

PACKAGES = ("repairlib", "companion")


# ---------------------------------------------------------------------------------------------- what there is to make


def find_notebooks(names: str = "") -> list[str]:
    """The notebooks asked for, by name (`repair/04_repair 00_quickstart`) or path; all below notebooks/ if none is."""
    folder = project_root() / "notebooks"
    found = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.py"))
    found = [name for name in found if "/." not in f"/{name}"]  # not .ipynb_checkpoints
    asked = [re.sub(r"^notebooks/|\.(py|ipynb)$", "", name) for name in re.split(r"[\s,]+", names) if name]
    return [check(name, found, "notebook") for name in asked] or found


def path_of(name: str) -> Path:
    """The source of a notebook."""
    return project_root() / "notebooks" / f"{name}.py"


def find_items(names: str) -> list[str]:
    """The items asked for, as full IDs; the paper may be left out where that is clear (`fig2-left, samples`)."""
    index = report.read_index()
    asked = [name for name in re.split(r"[\s,]+", names) if name]
    matches = [[item for item in index if name in (item, item.partition("/")[2])] for name in asked]
    return [
        match[0] if len(match) == 1 else check(name, index, "item") for name, match in zip(asked, matches, strict=True)
    ]


def find_needs(scale: str, notebooks: str = "", items: str = "") -> tuple[list[str], dict[str, dict[str, Any]]]:
    """What a call of `make figures` has to make: the items, empty for all, and what each notebook needs for them.

    Notebooks that read what others save bring these along: their items, if some are asked for, else all they make.

    Returns:
        The IDs of the items, and by notebook {runs, reads, after, error}: training runs, items, the notebooks that make
        these, and why the notebook does not say what it needs ("" if it does); perhaps left_out, gone and
        idle, see `notebook_needs`.

    Raises:
        ValueError: unknown scale, notebook or item.
    """
    check_scale(scale)
    index, wanted = report.read_index(), find_items(items)
    names = sorted({index[item]["notebook"] for item in wanted}) if wanted else find_notebooks(notebooks)
    needs: dict[str, dict[str, Any]] = {}
    while True:
        for name in names:
            needs[name] = {"runs": [], "reads": [], "after": [], "error": ""}
            try:
                found = notebook_needs(path_of(name), scale, ",".join(wanted))
                after = [index[check(item, index, f"item that {name} reads")]["notebook"] for item in found["reads"]]
                needs[name] |= found | {"after": list(dict.fromkeys(after))}
            except (ValueError, TypeError, OSError) as error:
                needs[name]["error"] = str(error)
        missing = {item for need in needs.values() for item in need["reads"]} - {*wanted} if wanted else set()
        new = {after for need in needs.values() for after in need["after"]} - needs.keys()
        if not (missing or new):
            return wanted, needs
        wanted += sorted(missing)
        names = sorted({*needs, *new})


def left_out(needs: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], str]:
    """Items that notebooks do not make for lack of networks, and what to say of all that they do without.

    Args:
        needs: see `find_needs`.
    """
    runs = {item: names for need in needs.values() for item, names in need.get("left_out", {}).items()}
    gone = [item for need in needs.values() for item in need.get("gone", [])]
    return gone, say_left_out(runs, gone) if runs else ""


def notebook_needs(path: str | Path, scale: str, items: str = "") -> dict[str, Any]:
    """What a notebook in the percent format needs: names of training `runs`, and items of other notebooks it `reads`.

    If its section does without some runs, `left_out` has them by item, `gone` names the items that lack too much, and
    `idle` says whether no other item is left to make. `passes` is there if its grid has it.

    Raises:
        ValueError: a cell fails, or a run's name does not parse.
        TypeError: `runs` or `reads` is no list of strings.
    """
    cells = re.split(r"^# %%", Path(path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for tag in ("parameters", "runs"):
        for cell in cells:
            head, _, code = cell.partition("\n")
            if re.search(rf'tags=\[[^\]]*"{tag}"', head):
                try:
                    tree = ast.parse(code)
                    tree.body = [statement for statement in tree.body if not isinstance(statement, ast.Expr)]
                    exec(compile(tree, f"{path} ({tag})", "exec", dont_inherit=True), namespace)
                except (Exception, SystemExit) as error:
                    why = f"{type(error).__name__}: {error}"
                    raise ValueError(f"{path}: the cell tagged `{tag}` fails: {why}") from error
                found.append(tag)
        namespace.update(scale=check_scale(scale), items=items)
    if "runs" not in found:
        return {"runs": [], "reads": []}  # a notebook that trains nothing
    if (section := namespace.get("section")) is not None:
        needs = {"runs": section.runs, "reads": section.reads}
    else:
        needs = {"runs": namespace.get("runs"), "reads": namespace.get("reads", [])}
    for name, what in {"runs": "run names", "reads": "item IDs"}.items():
        value = needs[name]
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise TypeError(f"{path}: the cell tagged `runs` must set `{name}` to a list of {what}, got {value!r}")
    for run in needs["runs"]:
        try:
            parse_run(run, check_data=False)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    unique = {name: list(dict.fromkeys(value)) for name, value in needs.items()}
    if passes := getattr(section, "passes", None):
        unique["passes"] = passes
    if left_out := getattr(section, "left_out", None):
        unique |= {"left_out": left_out, "gone": section.gone, "idle": not section.items}
    return unique


# ---------------------------------------------------------------------------------------------------------- contents


def imported_files(path: str | Path) -> list[Path]:
    """The modules of repairlib and companion that a Python file imports, those that they import, and so on."""
    roots = package_roots()
    found: dict[Path, None] = {}
    queue = [(Path(path), "")]
    while queue:
        file, package = queue.pop()
        for name in _imports(file.read_text(encoding="utf-8"), package):
            # Importing a.b.c executes a and a.b first.
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                module = ".".join(parts[:end])
                for ending, inside in (("/__init__.py", module), (".py", module.rpartition(".")[0])):
                    source = roots[parts[0]] / f"{module.replace('.', '/')}{ending}"
                    if source.is_file() and source not in found:
                        found[source] = None
                        queue.append((source, inside))
    return sorted(found)


def package_roots() -> dict[str, Path]:
    """By package, the folder that it lies in."""
    return {name: Path(importlib.util.find_spec(name).origin).parents[1] for name in PACKAGES}


@functools.cache
def _imports(text: str, package: str) -> list[str]:
    """Names of repairlib and companion that a module's text imports; what follows the dot may be no module."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []  # executing it will say so
    names = []
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return [name for name in dict.fromkeys(names) if name.partition(".")[0] in PACKAGES]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All statements but those under `if TYPE_CHECKING`, which nothing executes."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # an expression imports nothing
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _walk(child)


def code_digest(path: str | Path) -> str:
    """A digest of a notebook's text and of the modules that it imports."""
    digest, roots = hashlib.sha256(Path(path).read_bytes()), package_roots().values()
    for file in imported_files(path):
        name = next(file.relative_to(root) for root in roots if root in file.parents)
        digest.update(f"{name.as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def contents(runs: list[str], reads: list[str], scale: str) -> dict[str, dict[str, str]]:
    """Digests of the weights of runs and of the numbers in items, by name; "" for what is not there."""
    store = Store()
    found: dict[str, dict[str, str]] = {"runs": {}, "reads": {}}
    for run in runs:
        try:
            found["runs"][run] = store.info(run)["sha256"]
        except (OSError, ValueError, RuntimeError):  # missing or damaged
            found["runs"][run] = ""
    for item in reads:
        try:
            record = report.load_item(item, scale, report.figures_root())
        except (OSError, ValueError):  # missing or damaged
            record = None
        numbers = record and json.dumps([record["summary"], record["table"]], sort_keys=True)
        found["reads"][item] = hashlib.sha256(numbers.encode()).hexdigest() if numbers else ""
    return found


def read_done(name: str, scale: str) -> dict[str, Any] | None:
    """What the notebook's last run at `scale` made; None if there was none, or if a file is not as it left it.

    So what was cut off, edited or replaced is made again.
    """
    root, index = report.figures_root() / scale, report.read_index()
    try:
        done = json.loads((root / f"{name}.done.json").read_text(encoding="utf-8"))
        digests = done.get("sha256", {})
        # An item whose output was renamed in the index is not there either.
        files = {*done["files"], *(f"{index[item]['output']}.json" for item in done["items"] if item in index)}
        whole = (done["notebook"], done["scale"]) == (name, scale) and all(
            digests.get(file) in (None, digest_of(root / file)) for file in files
        )
        whole &= isinstance(done["seconds"], float | int) and isinstance(done["device"], str)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, damaged, or something else
        return None
    return done if whole else None


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key_of(name: str, items: str) -> str:
    """How .done.json calls an execution of a notebook for some items: by those of them that are its own."""
    index = report.read_index()
    return ",".join(sorted(item for item in items.split(",") if item in index and index[item]["notebook"] == name))


def is_up_to_date(name: str, scale: str, items: list[str], need: dict[str, Any]) -> bool:
    """Whether executing a notebook for some items (all if empty) would see what its last execution saw.

    Args:
        name: of the notebook.
        scale: smoke, quick, fast or paper.
        items: full IDs.
        need: what the notebook needs for them, see `find_needs`.
    """
    done = read_done(name, scale)
    if not done or need.get("error"):
        return False
    now = contents(need["runs"], need["reads"], scale)
    code = code_digest(path_of(name))
    for key in {"", key_of(name, ",".join(items))}:  # an execution for all items counts for some
        then = done.get("saw", {}).get(key)
        if then and then["code"] == code and all(
            (digest or kind == "reads") and then[kind].get(entry) == digest
            for kind in now
            for entry, digest in now[kind].items()
        ):  # fmt: skip
            return True
    return False
