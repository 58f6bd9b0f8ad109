"""Notebooks that are made of what others have made, which nbval, executing each alone, cannot see."""

import shutil

import batch
import needs

from companion.figures import gallery, report
from companion.runs.data import project_root


def test_the_summary_of_repair_is_made_of_the_other_notebooks(tmp_path, monkeypatch):
    shutil.copytree(project_root() / "notebooks" / "repair", tmp_path / "notebooks" / "repair")
    for module in (batch, needs):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(project_root()))
    asked = ["repair/fig1-left", "repair/fig1-middle", "repair/fig1-right", "repair/fig11"]
    items, needed = needs.find_needs("smoke", items=",".join(asked))
    assert list(needed)[0] == "repair/06_summary" and len(needed) > 5
    for name in sorted(needed):  # 06 comes last
        batch.execute(tmp_path / "notebooks" / f"{name}.py", "smoke", ",".join(items))
    assert set(needs.read_done("repair/06_summary", "smoke")["items"]) == set(asked)
    used = {run for item in asked for run in report.load_item(item, "smoke")["runs"]}
    assert used == {run for name, need in needed.items() if name != "repair/06_summary" for run in need["runs"]}
    gallery.write_gallery()
    assert "repair/fig1-right" in (report.figures_root() / "gallery.html").read_text()
