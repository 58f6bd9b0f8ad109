"""Notebooks that are made of what others have made, which nbval, executing each alone, cannot see."""

import shutil

import batch

from companion.figures import report
from companion.runs.data import project_root


def test_the_summary_of_repair_is_made_of_the_other_notebooks(tmp_path, monkeypatch):
    shutil.copytree(project_root() / "notebooks" / "repair", tmp_path / "notebooks" / "repair")
    monkeypatch.setattr(batch, "project_root", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(project_root()))
    asked = ["repair/fig1-left", "repair/fig1-middle", "repair/fig1-right", "repair/fig11"]
    items, needs = batch.find_needs("smoke", items=",".join(asked))
    assert list(needs)[0] == "repair/06_summary" and len(needs) > 5
    for name in sorted(needs):  # 06 comes last
        batch.execute(tmp_path / "notebooks" / f"{name}.py", "smoke", ",".join(items))
    assert set(batch.read_done("repair/06_summary", "smoke")["items"]) == set(asked)
    used = {run for item in asked for run in report.load_item(item, "smoke")["runs"]}
    assert used == {run for name, need in needs.items() if name != "repair/06_summary" for run in need["runs"]}
    batch.write_gallery()
    assert "repair/fig1-right" in (report.figures_root() / "gallery.html").read_text()
