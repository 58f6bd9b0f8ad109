"""Notebooks executed and published, the gallery, the pairs of .py and .ipynb, and the batch graph."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import batch
import matplotlib.pyplot as plt
import pytest

from companion.figures import report
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


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one notebook, whose kernels find this repairlib."""
    monkeypatch.setattr(batch, "project_root", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(project_root()))
    write_notebook(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- names


def test_notebooks_are_found_by_name_and_by_path(project):
    write_notebook(project, name="00_quickstart")
    write_notebook(project, name=".ipynb_checkpoints/x")
    assert batch.find_notebooks() == ["00_quickstart", NAME]
    assert batch.find_notebooks(f"notebooks/{NAME}.ipynb, 00_quickstart") == [NAME, "00_quickstart"]
    with pytest.raises(ValueError, match="unknown notebook 'repair/3_collapse'; the nearest is 'repair/03_variance_co"):
        batch.find_notebooks("repair/3_collapse")


READER = "repair/06_summary"


@pytest.fixture
def reader(project):
    """A second notebook that reads an item of the first, for an item of its own."""
    cell = "runs = ['digits/mlp2-bn-w8/smoke/s2']\n"
    cell += "reads = ['repair/sec3-theory'] if wanted('repair/fig1-left', items) else []"
    path = write_notebook(project, runs="[]", name=READER)
    path.write_text(path.read_text().replace("runs = []", f"from companion.experiments.scales import wanted\n{cell}"))


def test_what_is_read_is_made_first(reader):
    items, needs = batch.find_needs("smoke", READER)
    assert items == [] and list(needs) == [READER, NAME]
    assert needs[READER] == {
        "runs": ["digits/mlp2-bn-w8/smoke/s2"], "reads": ["repair/sec3-theory"], "after": [NAME]
    }  # fmt: skip
    assert needs[NAME] == {"runs": [], "reads": [], "after": []}


def test_items_bring_along_the_items_they_are_made_of(reader):
    items, needs = batch.find_needs("smoke", items="repair/fig1-left")
    assert items == ["repair/fig1-left", "repair/sec3-theory"] and set(needs) == {READER, NAME}
    items, needs = batch.find_needs("smoke", items="repair/fig14")
    assert items == ["repair/fig14"] and set(needs) == {READER} and needs[READER]["reads"] == []


def test_items_are_found_with_and_without_their_paper():
    assert batch.find_items("repair/samples, fig2-left") == ["repair/samples", "repair/fig2-left"]
    assert batch.find_items("") == []
    with pytest.raises(ValueError, match="unknown item 'sampels'; the nearest is 'repair/samples'"):
        batch.find_items("sampels")


def test_name_of_a_notebook(tmp_path):
    assert batch.name_of(tmp_path / "notebooks" / "repair" / "04_repair.py") == "repair/04_repair"
    with pytest.raises(ValueError, match="does not lie below a folder called notebooks"):
        batch.name_of(tmp_path / "04_repair.py")


# ----------------------------------------------------------------------------------------------------------- execute


def test_execute_publishes_what_a_notebook_saves(project, capsys):
    assert batch.main([str(project / "notebooks" / f"{NAME}.py"), "--scale", "smoke"]) == 0
    assert capsys.readouterr().out.startswith(f"{NAME} [smoke]: fig2-left, sec3-theory in ")
    root = report.figures_root() / "smoke"
    stems = [f"repair/{stem}" for stem in ("fig2_left", "sec3_theory")]
    done = json.loads((root / f"{NAME}.done.json").read_text())
    assert done["items"] == ["repair/fig2-left", "repair/sec3-theory"] and done["scale"] == "smoke"
    assert done["files"] == [f"{stem}.{suffix}" for stem in stems for suffix in ("json", "png", "svg")]
    assert all((root / file).exists() for file in done["files"])
    assert json.loads((root / "environment.json").read_text())[NAME]["device"] == done["device"]
    executed = json.loads((project / "build" / "smoke" / f"{NAME}.ipynb").read_text())
    assert "the end" in executed["cells"][-1]["outputs"][0]["text"][0]
    assert not list((report.figures_root() / ".staging" / "smoke").rglob("*.*"))
    text = batch.summarize("smoke", since=2**40)
    assert text.startswith(f"smoke: 2 of {len(report.read_index())} items")
    assert "fig2-left, sec3-theory  (up to date)" in text and "not made: " in text and "repair/samples" in text
    (root / "repair" / "fig2_left.png").unlink()
    assert batch.read_done(NAME, "smoke") is None  # so that the batch makes it again


def test_a_failed_run_leaves_earlier_results_and_shows_the_cell(project, capsys):
    report.save_item("repair/equivalence", "smoke", [{"x": 1}], {})
    before = contents(report.figures_root())
    path = write_notebook(project, end="ratio = 1 / 0  # the failing line")
    assert batch.main([str(path), "--scale", "smoke"]) == 1
    shown = capsys.readouterr().err
    assert "1 / 0  # the failing line" in shown and "ZeroDivisionError" in shown and f"{NAME}.partial.ipynb" in shown
    assert contents(report.figures_root()) == before
    assert "failed: see" in batch.summarize("smoke")

    write_notebook(project, end="import os; os._exit(1)")
    with pytest.raises(batch.NotebookFailed, match="Kernel died"):
        batch.execute(path, "smoke")
    assert contents(report.figures_root()) == before


def test_some_items_leave_the_others_in_place(project):
    path = write_notebook(project)
    batch.execute(path, "smoke")
    theory = report.figures_root() / "smoke" / "repair" / "sec3_theory.json"
    before = theory.stat().st_mtime_ns
    assert batch.execute(path, "smoke", "repair/fig2-left")["items"] == ["repair/fig2-left"]
    assert theory.stat().st_mtime_ns == before
    assert batch.read_done(NAME, "smoke")["items"] == ["repair/fig2-left", "repair/sec3-theory"]


def test_bad_questions_are_answered(project, capsys):
    assert batch.main([str(project / "notebooks" / f"{NAME}.py"), "--scale", "tiny"]) == 2
    assert "unknown scale 'tiny'" in capsys.readouterr().err
    assert batch.main([str(project / "notebooks" / "missing.py"), "--scale", "smoke"]) == 2
    assert "missing.py" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- gallery and summary


class Links(HTMLParser):
    """Collects links, and complains about tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "img", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "p":
            assert self.open.pop() == tag


def test_gallery_shows_every_item_with_the_papers_numbers(project):
    report.save_item("repair/sec3-theory", "smoke", [{"layer": 1}], {"corr": 0.5}, plt.figure())
    report.save_item("repair/equivalence", "quick", [{"layer": 1, "frozen": True}], {"error": 1.25e-7})
    page = batch.write_gallery()
    text = page.read_text()
    for item in report.read_index():
        assert f'id="{item}"' in text
    assert "<td>final layer decay</td><td>&gt;10x</td>" in text  # printed in the paper, not made here
    assert "<td>corr</td><td>0.4</td><td>0.5</td>" in text  # the paper's beside ours
    assert "1.25e-07" in text and "<td>yes</td>" in text
    # A claim that rests on what was made, and was not made with what it needs.
    assert '<td><a href="#repair/equivalence">repair/equivalence</a></td>' in text and "not judged" in text
    assert "| repair/equivalence | " in (page.parent / "scorecard.md").read_text()
    parser = Links()
    parser.feed(text)
    assert parser.open == []
    pictures = [link for link in parser.links if link.endswith(".png")]
    assert len(pictures) == 2 and all((page.parent / link).exists() for link in pictures)
    assert "<script" not in text and "http" not in text


# ------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("name", batch.find_notebooks())
def test_ipynb_is_what_its_py_gives(name):
    path = project_root() / "notebooks" / f"{name}.py"
    ipynb = path.with_suffix(".ipynb")
    assert ipynb.exists() and ipynb.read_text(encoding="utf-8") == batch.ipynb_of(path), "run `make sync`"


def test_sync_takes_the_newer_and_strips_outputs(project):
    path = write_notebook(project)
    ipynb = path.with_suffix(".ipynb")
    assert batch.sync() == [ipynb] and batch.sync() == []
    notebook = json.loads(ipynb.read_text())
    notebook["cells"][-1] |= {"source": ["print('edited')"], "execution_count": 3, "metadata": {"collapsed": True}}
    ipynb.write_text(json.dumps(notebook))
    os.utime(ipynb, (path.stat().st_mtime + 10,) * 2)
    assert batch.sync() == [path, ipynb]
    assert "print('edited')" in path.read_text() and "collapsed" not in path.read_text()
    assert ipynb.read_text() == batch.ipynb_of(path) and '"execution_count": 3' not in ipynb.read_text()


# ------------------------------------------------------------------------------------------------------- batch graph


def test_the_batch_makes_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    for name in ("repairlib", "companion", "workflow", "figures/index.yml", "Snakefile", "pyproject.toml"):
        source, target = project_root() / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    runs = '["digits/mlp1-bn-w4/smoke/s1"]'
    path = write_notebook(tmp_path, runs)
    write_notebook(tmp_path, runs, name="00_quickstart")  # at the same time, so the kernels must not collide
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("REPAIRLIB_FIGURES", str(tmp_path / "figures"))

    def make() -> str:
        options = "--cores 2 --nolock --rerun-incomplete --rerun-triggers mtime --scheduler greedy --quiet all"
        command = [sys.executable, "-m", "snakemake", *options.split(), "--config", "scale=smoke"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    output = make()
    assert all(f"{name} [smoke]: fig2-left, sec3-theory in" in output for name in (NAME, "00_quickstart"))
    assert (Path(os.environ["REPAIRLIB_RUNS"]) / "digits/mlp1-bn-w4/smoke/s1/model.safetensors").exists()
    assert "[smoke]" not in make()  # nothing to do
    path.write_text(path.read_text() + "\n# edited\n")
    output = make()
    assert f"{NAME} [smoke]" in output and "00_quickstart" not in output and "mlp1" not in output
