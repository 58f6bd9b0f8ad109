"""What notebooks say they need, and whether they are up to date: by contents, never by times."""

import json
import os
import shutil

import matplotlib.pyplot as plt
import needs
import pytest
from small_notebooks import NAME, write_notebook

from companion.figures import report
from companion.runs.data import project_root
from companion.runs.store import Store

READER = "repair/06_summary"
RUN = "digits/mlp2-bn-w8/smoke/s2"

# ------------------------------------------------------------------------------------------------------------- names


def test_notebooks_are_found_by_name_and_by_path(project):
    write_notebook(project, name="00_quickstart")
    write_notebook(project, name=".ipynb_checkpoints/x")
    assert needs.find_notebooks() == ["00_quickstart", NAME]
    assert needs.find_notebooks(f"notebooks/{NAME}.ipynb, 00_quickstart") == [NAME, "00_quickstart"]
    with pytest.raises(ValueError, match="unknown notebook 'repair/3_collapse'; the nearest is 'repair/03_variance_co"):
        needs.find_notebooks("repair/3_collapse")


@pytest.fixture
def reader(project):
    """A second notebook that reads an item of the first, for an item of its own."""
    cell = "runs = ['digits/mlp2-bn-w8/smoke/s2']\n"
    cell += "reads = ['repair/sec3-theory'] if wanted('repair/fig1-left', items) else []"
    path = write_notebook(project, runs="[]", name=READER)
    path.write_text(path.read_text().replace("runs = []", f"from companion.experiments.scales import wanted\n{cell}"))


def test_what_is_read_is_made_first(reader):
    items, found = needs.find_needs("smoke", READER)
    assert items == [] and list(found) == [READER, NAME]
    assert found[READER] == {
        "runs": [RUN], "reads": ["repair/sec3-theory"], "after": [NAME], "error": ""
    }  # fmt: skip
    assert found[NAME] == {"runs": [], "reads": [], "after": [], "error": ""}


def test_items_bring_along_the_items_they_are_made_of(reader):
    items, found = needs.find_needs("smoke", items="repair/fig1-left")
    assert items == ["repair/fig1-left", "repair/sec3-theory"] and set(found) == {READER, NAME}
    items, found = needs.find_needs("smoke", items="repair/fig14")
    assert items == ["repair/fig14"] and set(found) == {READER} and found[READER]["reads"] == []


def test_items_are_found_with_and_without_their_paper():
    assert needs.find_items("repair/samples, fig2-left") == ["repair/samples", "repair/fig2-left"]
    assert needs.find_items("") == []
    with pytest.raises(ValueError, match="unknown item 'sampels'; the nearest is 'repair/samples'"):
        needs.find_items("sampels")


def test_a_notebook_that_cannot_say_what_it_needs_stops_no_other(project, reader):
    write_notebook(project, runs="[undefined]")
    items, found = needs.find_needs("smoke")
    assert found[NAME]["error"].endswith("the cell tagged `runs` fails: NameError: name 'undefined' is not defined")
    assert found[READER]["error"] == "" and found[READER]["runs"] == [RUN]
    write_notebook(project, runs='["digits/mlp2-bn-w8/smok/s1"]')
    assert "unknown recipe 'smok'; the nearest is 'smoke'" in needs.find_needs("smoke")[1][NAME]["error"]


# ------------------------------------------------------------------------------------------------------------- cells


CELLS = """\
# %% [markdown]
# # A title

# %% tags=["parameters"]
scale: str = "smoke"
items: str = ""

# %% tags=["runs"]
from companion.experiments.scales import by_scale

runs = [f"digits/mlp2-bn-w8/smoke/s{s}" for s in by_scale(scale, smoke=[1], quick=[1, 2, 1], fast=[], paper=[])]

# %%
raise RuntimeError("never executed")
"""


def test_notebook_runs_executes_the_two_tagged_cells(tmp_path):
    (tmp_path / "a.py").write_text(CELLS)
    assert needs.notebook_needs(tmp_path / "a.py", "smoke")["runs"] == ["digits/mlp2-bn-w8/smoke/s1"]
    assert needs.notebook_needs(tmp_path / "a.py", "quick")["runs"] == [f"digits/mlp2-bn-w8/smoke/s{s}" for s in (1, 2)]


def test_a_notebook_without_runs_needs_none(tmp_path):
    (tmp_path / "a.py").write_text("# %%\nruns = 1\n")
    assert needs.notebook_needs(tmp_path / "a.py", "smoke")["runs"] == []


@pytest.mark.parametrize("cell", ["runs = 'digits/mlp2'", "runs = [1]", "run = []"])
def test_runs_must_be_a_list_of_names(tmp_path, cell):
    (tmp_path / "a.py").write_text(f'# %% tags=["runs"]\n{cell}\n')
    with pytest.raises(TypeError, match="a.py: the cell tagged `runs` must set `runs`"):
        needs.notebook_needs(tmp_path / "a.py", "smoke")["runs"]


def test_a_notebook_says_what_it_reads(tmp_path):
    (tmp_path / "a.py").write_text(CELLS.replace("runs = [", "reads = ['repair/fig2-left'] * 2\nruns = ["))
    assert needs.notebook_needs(tmp_path / "a.py", "smoke") == {
        "runs": ["digits/mlp2-bn-w8/smoke/s1"],
        "reads": ["repair/fig2-left"],
    }
    (tmp_path / "b.py").write_text('# %% tags=["runs"]\nruns, reads = [], "repair/fig2-left"\n')
    with pytest.raises(TypeError, match="must set `reads` to a list of item IDs"):
        needs.notebook_needs(tmp_path / "b.py", "smoke")


def test_a_failing_runs_cell_is_named(tmp_path):
    (tmp_path / "a.py").write_text('# %% tags=["runs"]\nruns = [1 / 0]\n')
    with pytest.raises(ValueError, match="a.py: the cell tagged `runs` fails: ZeroDivisionError"):
        needs.notebook_needs(tmp_path / "a.py", "smoke")["runs"]


def test_a_section_says_it_for_the_notebook(tmp_path):
    cell = "class Section: runs, reads = ['digits/mlp2-bn-w8/smoke/s1'], ['repair/fig2-left']\nsection = Section()\n"
    cell += "section.overview()  # shows something, and is left out\n"
    (tmp_path / "a.py").write_text(f'# %% tags=["runs"]\n{cell}')
    assert needs.notebook_needs(tmp_path / "a.py", "smoke") == {
        "runs": ["digits/mlp2-bn-w8/smoke/s1"],
        "reads": ["repair/fig2-left"],
    }
    (tmp_path / "a.py").write_text(f'# %% tags=["runs"]\n{cell}section.passes = 100\n')
    assert needs.notebook_needs(tmp_path / "a.py", "smoke")["passes"] == 100


# ---------------------------------------------------------------------------------------------------------- contents


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Small packages called repairlib and companion, by name of the file."""
    files = {
        "repairlib/__init__.py": "from repairlib import core\nfrom repairlib.core import thing\n",
        "repairlib/core.py": "from . import deep\n",
        "repairlib/deep.py": "import torch\n",
        "companion/__init__.py": "",
        "companion/figures/__init__.py": "",
        "companion/figures/plots/__init__.py": "",
        "companion/figures/plots/repair.py": "from companion.figures.plots import *\n",
        "companion/figures/plots/combine.py": "import repairlib\n",
        "companion/figures/section.py": "from .report import save\n\ndef check():\n    import importlib\n"
        "    importlib.import_module('companion.figures.claims')\n    from companion import late\n",
        "companion/figures/report.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from companion import types\n",
        "companion/figures/claims.py": "",
        "companion/late.py": "",
        "companion/types.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(needs, "package_roots", lambda: dict.fromkeys(needs.PACKAGES, tmp_path))
    return tmp_path


def imported(folder, text):
    (folder / "notebook.py").write_text(text)
    return {path.relative_to(folder).as_posix() for path in needs.imported_files(folder / "notebook.py")}


def test_imports_are_followed_through_the_packages(packages):
    library = {"repairlib/__init__.py", "repairlib/core.py", "repairlib/deep.py"}
    assert imported(packages, "import numpy\nimport repairlib as r\n") == library
    assert imported(packages, "from repairlib.deep import x\n") == library  # whose package is executed first
    plots = {"companion/__init__.py", "companion/figures/__init__.py", "companion/figures/plots/__init__.py"}
    assert imported(packages, "from companion.figures.plots import repair\n") == {
        *plots,
        "companion/figures/plots/repair.py",
    }
    assert imported(packages, "if True:\n    from companion.figures import section\n") == {
        "companion/__init__.py",
        "companion/figures/__init__.py",
        "companion/figures/section.py",
        "companion/figures/report.py",
        "companion/late.py",  # but neither claims nor types
    }
    assert imported(packages, "a cell that is no Python") == set()


def test_the_digest_of_the_code_changes_with_what_is_imported_only(packages):
    notebook = packages / "notebook.py"
    notebook.write_text("from companion.figures.plots import repair\nfrom companion.figures import section\n")
    before = needs.code_digest(notebook)

    def edited(name):
        """Whether editing a file, and only that, changes the digest."""
        path = packages / name
        text = path.read_text()
        os.utime(path)
        assert needs.code_digest(notebook) == before  # times do not count
        path.write_text(text + "# edited\n")
        changed = needs.code_digest(notebook) != before
        path.write_text(text)
        assert needs.code_digest(notebook) == before
        return changed

    assert edited("notebook.py") and edited("companion/figures/plots/repair.py") and edited("companion/late.py")
    assert not any(map(edited, ("companion/figures/plots/combine.py", "companion/figures/claims.py")))
    assert not edited("repairlib/core.py")  # which neither of the two imports


def test_claims_execute_nothing_and_plots_only_their_paper():
    files = {name: {path.relative_to(project_root()).as_posix() for path in needs.imported_files(needs.path_of(name))}
             for name in needs.find_notebooks()}  # fmt: skip
    readers = {name for name, each in files.items() if any("/claims/" in path for path in each)}
    assert readers <= {READER}  # which shows the scorecard
    assert not [n for n, each in files.items() if "companion/figures/plots/combine.py" in each and n[:7] == "repair/"]
    assert all("repairlib/matching.py" in each for name, each in files.items() if name == "repair/04_repair")


def store(run, digest):
    """A stored run, as far as contents are concerned."""
    folder = Store().path(run)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"run": run, "sha256": digest, "recipe": {}, "shape": [], "classes": 10, "metrics": {}}
    info |= {"seconds": 1.0, "device": "cpu"}
    (folder / "run.json").write_text(json.dumps(info))


def test_a_notebook_is_up_to_date_until_what_it_saw_changes(project):
    need = {"runs": [RUN], "reads": ["repair/samples"], "error": ""}
    path = needs.path_of(NAME)

    def save(ratio):
        report.save_item("repair/samples", "smoke", [{"ratio": ratio}], {"x": 1}, seconds=ratio, **figure)

    def done(items="", **more):
        saw = {"code": needs.code_digest(path)} | needs.contents(need["runs"], need["reads"], "smoke") | more
        content = {"items": ["repair/sec3-theory"], "files": ["repair/sec3_theory.json"], "saw": {items: saw}}
        content |= {"notebook": NAME, "scale": "smoke", "seconds": 1.0, "device": "cpu"}
        target = report.figures_root() / "smoke" / f"{NAME}.done.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content))

    def fresh(items=(), **changes):
        return needs.is_up_to_date(NAME, "smoke", list(items), need | changes)

    figure = {"figure": plt.figure()}
    assert not fresh()  # never executed
    store(RUN, "abc")
    save(0.5)
    report.save_item("repair/sec3-theory", "smoke", [{"layer": 1}], {}, **figure)
    done()
    assert fresh() and fresh(["repair/sec3-theory"])
    assert not fresh(error="the cell fails")
    assert fresh(runs=[]) and not fresh(runs=[RUN, "digits/mlp2-bn-w8/smoke/s3"])  # one more is needed by now
    store(RUN, "def")  # trained again, to other weights
    assert not fresh()
    store(RUN, "abc")
    assert fresh()
    shutil.rmtree(Store().path(RUN))
    assert not fresh()
    store(RUN, "abc")
    save(0.6)  # it reads that
    assert not fresh()
    report.save_item("repair/samples", "smoke", [{"ratio": 0.5}], {"x": 1}, seconds=7.0, **figure)
    assert fresh()
    text = path.read_text()
    path.write_text(text + "# edited")
    assert not fresh()
    path.write_text(text)
    os.utime(path, (2**33, 2**33))  # a clock that was wrong
    assert fresh()
    path.write_text(text + "# edited")
    os.utime(path, (0, 0))
    assert not fresh()
    path.write_text(text)
    (report.figures_root() / "smoke" / "repair" / "sec3_theory.json").unlink()
    assert not fresh()  # somebody removed a figure

    report.save_item("repair/sec3-theory", "smoke", [{"layer": 1}], {}, **figure)
    done("repair/sec3-theory")  # executed for one item
    assert fresh(["repair/sec3-theory", "repair/samples"]) and not fresh() and not fresh(["repair/fig2-left"])
