"""Small notebooks for the tests of the batch, and what else a project folder holds."""

import shutil
from pathlib import Path

from companion.runs.data import project_root

NOTEBOOK = """\
# %% tags=["parameters"]
scale: str = "smoke"
items: str = ""

# %% tags=["runs"]
runs = RUNS

# %%
import matplotlib.pyplot as plt
from companion.experiments.scales import wanted
from companion.figures.report import save_item

for item in ("repair/fig2-left", "repair/sec3-theory"):
    if wanted(item, items):
        figure, axes = plt.subplots()
        save_item(item, scale, [{"layer": 1, "ratio": 0.5}], {"corr": 0.5}, figure, runs=runs)
        plt.close(figure)

# %%
END
"""
NAME = "repair/03_variance_collapse"


def write_notebook(project: Path, runs="[]", end="print('the end')", name=NAME) -> Path:
    path = project / "notebooks" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NOTEBOOK.replace("RUNS", runs).replace("END", end))
    return path


def copy_tree(target: Path) -> None:
    """What the batch consists of, without its notebooks."""
    for name in ("repairlib", "companion", "workflow", "figures/index.yml", "Snakefile", "pyproject.toml"):
        source = project_root() / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
