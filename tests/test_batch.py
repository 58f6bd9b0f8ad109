"""Notebooks executed and published, and the pairs of .py and .ipynb."""

import json
import os
import subprocess
from pathlib import Path

import batch
import jupytext
import needs
import pytest
from small_notebooks import NAME, write_notebook

from companion.figures import gallery, report


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
    files = [f"{stem}.{suffix}" for stem in stems for suffix in ("json", "png", "svg")]
    assert done["files"] == sorted([f"{NAME}.html", *files]) and done["checks"] == []
    assert all((root / file).exists() for file in done["files"])
    assert json.loads((root / "environment.json").read_text())[NAME]["device"] == done["device"]
    executed = json.loads((project / "build" / "smoke" / f"{NAME}.ipynb").read_text())
    assert "the end" in executed["cells"][-1]["outputs"][0]["text"][0]
    assert "the end" in (root / f"{NAME}.html").read_text()
    assert not list((report.figures_root() / ".staging" / "smoke").rglob("*.*"))
    text = batch.summarize("smoke", since=2**40)
    assert text.startswith("smoke: 2 of 4 items")  # of this notebook
    assert "fig2-left, sec3-theory  (up to date)" in text and "not made: repair/fig2-middle, repair/" in text
    assert batch.summarize("smoke", items=["repair/sec3-theory"]).startswith("smoke: 1 of 1 items\n")
    assert batch.summarize("smoke", notebooks=["other"], errors={"other": "no"}).startswith("smoke\n  other")
    assert f"smoke/{NAME}.html" in batch.summarize("smoke", notebooks=[NAME])
    (root / "repair" / "fig2_left.png").unlink()
    assert needs.read_done(NAME, "smoke") is None  # so that the batch makes it again


def test_files_that_are_not_as_they_were_made_are_made_again(project, capsys):
    path = str(project / "notebooks" / f"{NAME}.py")
    assert batch.main([path, "--scale", "smoke"]) == 0
    root = report.figures_root() / "smoke"
    picture, table = root / "repair" / "fig2_left.png", root / "repair" / "sec3_theory.json"
    done = root / f"{NAME}.done.json"
    other = {**json.loads(done.read_text()), "notebook": "repair/04_repair"}
    damages = {
        picture: [picture.read_bytes()[:-9], (root / "repair" / "sec3_theory.png").read_bytes() + b" ", b""],
        table: [table.read_bytes()[:50], b"[]", (root / "repair" / "fig2_left.json").read_bytes()],
        done: [done.read_bytes()[:70], b"[]", b"{}", b"\xff\xfe", json.dumps(other).encode()],
    }
    for file, contents_of_others in damages.items():
        good = file.read_bytes()
        for content in contents_of_others:
            file.write_bytes(content)
            assert needs.read_done(NAME, "smoke") is None
            gallery.write_gallery()  # shows what there is, and says what is damaged
        file.write_bytes(good)
        assert needs.read_done(NAME, "smoke") is not None
    error = capsys.readouterr().err
    assert f"{table} is damaged (" in error and f"{table} is not the result of an item" in error
    assert f"{table} is repair/fig2-left at smoke, not repair/sec3-theory at smoke" in error
    assert error.count("make figures SCALE=smoke makes it again") == 3

    (root / "environment.json").write_text("{")
    table.write_text("{")
    plan = project / "plan.json"  # what a job of the batch is given, instead of finding it out
    plan.write_text(json.dumps({"needs": {NAME: needs.notebook_needs(path, "smoke")}}))
    assert batch.main([path, "--scale", "smoke", "--if-needed", "--plan", str(plan)]) == 0
    assert f"{root / 'environment.json'} is damaged" in capsys.readouterr().err
    assert needs.read_done(NAME, "smoke") and NAME in json.loads((root / "environment.json").read_text())


def test_a_notebook_that_was_interrupted_has_not_failed(project):
    partial = project / "build" / "smoke" / f"{NAME}.partial.ipynb"
    partial.parent.mkdir(parents=True)
    cells = [{"outputs": [{"output_type": "stream"}]}, {}]
    for content in (json.dumps({"cells": cells}), "", "{"):
        partial.write_text(content)
        text = batch.summarize("smoke", notebooks=[NAME])
        assert f"{NAME}" in text and "stopped before its end" in text and "failed" not in text
    cells[1] = {"outputs": [{"output_type": "error"}]}
    partial.write_text(json.dumps({"cells": cells}))
    assert "failed: see " in batch.summarize("smoke", notebooks=[NAME])


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


def test_a_check_that_fails_says_what_it_found_and_stops_nothing(project, capsys):
    check = "# %% tags=['check']\nassert 1 > 2, 'found 1, expected more than 2'\n\n# %%\nprint('after it')"
    path = write_notebook(project, end=check)
    assert batch.main([str(path), "--scale", "smoke"]) == 0
    out = capsys.readouterr().out
    assert f"{NAME} [smoke]: fig2-left, sec3-theory in " in out
    assert f"{NAME} [smoke]: a check failed: AssertionError: found 1, expected more than 2" in out
    assert needs.read_done(NAME, "smoke")["checks"] == ["AssertionError: found 1, expected more than 2"]
    page = (report.figures_root() / "smoke" / f"{NAME}.html").read_text()
    assert "expected more than 2" in page and "after it" in page
    assert "a check failed" in batch.summarize("smoke") and "failed: see" not in batch.summarize("smoke")

    write_notebook(project, end=f"{check}\n\n# %%\n1 / 0")  # the message is that of the cell that stopped it
    with pytest.raises(batch.NotebookFailed, match="ZeroDivisionError"):
        batch.execute(path, "smoke")


def test_some_items_leave_the_others_in_place(project):
    path = write_notebook(project)
    batch.execute(path, "smoke")
    theory = report.figures_root() / "smoke" / "repair" / "sec3_theory.json"
    before = theory.stat().st_mtime_ns
    assert batch.execute(path, "smoke", "repair/fig2-left")["items"] == ["repair/fig2-left"]
    assert theory.stat().st_mtime_ns == before
    assert needs.read_done(NAME, "smoke")["items"] == ["repair/fig2-left", "repair/sec3-theory"]


def test_bad_questions_are_answered(project, capsys):
    assert batch.main([str(project / "notebooks" / f"{NAME}.py"), "--scale", "tiny"]) == 2
    assert "unknown scale 'tiny'" in capsys.readouterr().err
    assert batch.main([str(project / "notebooks" / "missing.py"), "--scale", "smoke"]) == 2
    assert "missing.py" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("name", needs.find_notebooks())
def test_both_files_of_a_notebook_have_the_same_cells(name):
    path = needs.path_of(name)
    found = [
        [(cell.cell_type, cell.source.strip()) for cell in jupytext.read(file).cells]
        for file in (path, path.with_suffix(".ipynb"))
    ]
    assert found[0] == found[1], "run `make sync`"  # outputs, as JupyterLab saves them, are no fault here


def test_copies_are_made_from_the_source_alone(project, tmp_path_factory):
    path, folder = write_notebook(project), tmp_path_factory.mktemp("copies")
    path.with_suffix(".ipynb").write_text("saved in JupyterLab")
    assert batch.main(["copy", "--to", str(folder)]) == 0
    assert (folder / f"{NAME}.ipynb").read_text() == batch.ipynb_of(path)


def test_sync_takes_what_was_edited_and_strips_outputs(project):
    path = write_notebook(project)
    ipynb = path.with_suffix(".ipynb")
    assert batch.sync() == [ipynb] and batch.sync() == []
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "notebooks"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    notebook = json.loads(ipynb.read_text())
    notebook["cells"][-1] |= {"source": ["print('edited')"], "execution_count": 3, "metadata": {"collapsed": True}}
    ipynb.write_text(json.dumps(notebook))
    assert batch.sync() == [path, ipynb]
    assert "print('edited')" in path.read_text() and "collapsed" not in path.read_text()
    # Both differ from the commit now: the .py is the source, whichever is newer.
    source = path.read_text()
    notebook["cells"][-1]["source"] = ["print('older')"]
    ipynb.write_text(json.dumps(notebook))
    os.utime(ipynb, (path.stat().st_mtime + 10,) * 2)
    assert batch.sync() == [ipynb] and path.read_text() == source
    assert ipynb.read_text() == batch.ipynb_of(path) and '"execution_count": 3' not in ipynb.read_text()
