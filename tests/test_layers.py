"""Imports go one way: the library, then runs, experiments, figures; notebooks and the batch are imported by nobody."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each layer may import of this project.
LAYERS = {
    "repairlib": {"repairlib"},
    "companion/runs": {"repairlib", "companion.runs"},
    "companion/experiments": {"repairlib", "companion.runs", "companion.experiments"},
    "companion/figures": {"repairlib", "companion.runs", "companion.experiments", "companion.figures"},
    "notebooks": {"repairlib", "companion.runs", "companion.experiments", "companion.figures"},
}
OURS = ("repairlib", "companion", "workflow", "batch", "needs", "jobs", "plan")


def imports(path: Path) -> set[str]:
    """Names of the modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_goes_back_up(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        wrong = [n for n in imports(path) if not any(f"{n}.".startswith(f"{allowed}.") for allowed in LAYERS[layer])]
        assert not wrong, (path, wrong)
