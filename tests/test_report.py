"""Scales, and saved items."""

import errno
import json
import os
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from companion.experiments import scales
from companion.figures import report

ITEM = "repair/fig2-left"
TABLE = [{"layer": 1, "ratio": 0.7, "aligned": True}, {"layer": 2, "ratio": 0.4, "aligned": False}]


@pytest.fixture
def figure():
    figure, axes = plt.subplots()
    axes.plot([1, 2], [0.7, 0.4])
    yield figure
    plt.close(figure)


def test_by_scale_picks_one():
    values = [scales.by_scale(scale, smoke=1, quick=2, fast=3, paper=4) for scale in scales.SCALES]
    assert values == [1, 2, 3, 4]


def test_unknown_scale_names_the_nearest():
    with pytest.raises(ValueError, match="unknown scale 'papr'; the nearest is 'paper'"):
        scales.by_scale("papr", smoke=1, quick=2, fast=3, paper=4)


def test_a_scale_left_out_is_named():
    with pytest.raises(TypeError, match="'fast'"):
        scales.by_scale("quick", smoke=1, quick=2, paper=4)


def test_save_item_writes_data_and_pictures(figure):
    runs = ["digits/mlp2-bn-w8/smoke/s12", "digits/mlp2-bn-w8/smoke/s1"]
    path = report.save_item(ITEM, "smoke", TABLE, {"corr": 0.41}, figure, runs=runs, seconds=1.234)
    assert path == report.figures_root() / "smoke" / "repair" / "fig2_left.json"
    saved = json.loads(path.read_text())
    assert saved["table"] == TABLE and saved["summary"] == {"corr": 0.41}
    assert saved["seeds"] == [1, 12] and saved["runs"] == runs and saved["seconds"] == 1.2
    assert saved["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in path.with_suffix(".svg").read_bytes()
    assert not list(path.parent.glob(".*"))  # nothing temporary stays


def test_the_same_figure_gives_the_same_bytes(figure, tmp_path):
    for folder in "ab":
        report.save_item(ITEM, "smoke", TABLE, {}, figure, root=tmp_path / folder)
    for name in ("fig2_left.png", "fig2_left.svg", "fig2_left.json"):
        first, second = (tmp_path / folder / "smoke" / "repair" / name for folder in "ab")
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.array(0.5), 0.5])
def test_scalars_of_any_library_are_saved(figure, value):
    path = report.save_item(ITEM, "smoke", [{"x": value}], {"x": value}, figure)
    assert json.loads(path.read_text())["table"] == [{"x": 0.5}]


def test_a_data_frame_is_a_table(figure):
    path = report.save_item(ITEM, "smoke", pd.DataFrame(TABLE), {}, figure)
    assert json.loads(path.read_text())["table"] == TABLE


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("-inf"))])
def test_not_finite_is_refused_and_named(figure, value):
    with pytest.raises(ValueError, match="repair/fig2-left: column 'ratio', row 1 is"):
        report.save_item(ITEM, "smoke", [{"ratio": 1.0}, {"ratio": value}], {}, figure)
    with pytest.raises(ValueError, match="summary 'corr' is"):
        report.save_item(ITEM, "smoke", TABLE, {"corr": value}, figure)
    assert not report.figures_root().exists()


def test_nested_values_are_refused(figure):
    with pytest.raises(TypeError, match="column 'ratio', row 0 is a list"):
        report.save_item(ITEM, "smoke", [{"ratio": [1, 2]}], {}, figure)


def test_unknown_item_names_the_nearest(figure):
    with pytest.raises(ValueError, match="the nearest is 'repair/fig2-left'"):
        report.save_item("repair/fig2left", "smoke", TABLE, {}, figure)


def test_a_saved_item_is_loaded_from_either_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="make figures SCALE=quick ITEMS=repair/equivalence"):
        report.load_item("repair/equivalence", "quick")
    monkeypatch.setenv("REPAIRLIB_MADE", str(tmp_path / "made"))
    for root, x in ((tmp_path / "made", 1), (None, 2)):
        report.save_item("repair/equivalence", "quick", [{"x": x}], {}, root=root)
        assert report.load_item("repair/equivalence", "quick")["table"] == [{"x": x}]  # one's own comes first
    assert report.load_item("repair/equivalence", "quick", tmp_path / "made")["table"] == [{"x": 1}]
    with pytest.raises(ValueError, match="the nearest is 'repair/equivalence'"):
        report.load_item("repair/equivalent", "quick")


def test_only_tables_go_without_a_figure():
    assert report.save_item("repair/equivalence", "smoke", TABLE, {}).exists()
    with pytest.raises(ValueError, match="needs a figure"):
        report.save_item(ITEM, "smoke", TABLE, {})


def test_a_full_disk_leaves_the_earlier_result(figure, monkeypatch):
    path = report.save_item(ITEM, "smoke", TABLE, {"corr": 0.41}, figure)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.save_item(ITEM, "smoke", TABLE, {"corr": 0.5}, figure)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_index_is_complete():
    index = report.read_index()
    for item, entry in index.items():
        assert set(entry) <= {"notebook", "output", "kind", "what", "paper", "published"}, item
        assert entry["kind"] in ("figure", "table") and entry["what"] and set(entry["paper"]) == {"section", "figure"}
        assert (report.project_root() / "notebooks" / f"{entry['notebook']}.py").exists(), item
    assert len({entry["output"] for entry in index.values()}) == len(index)


def test_environment_says_where():
    where = report.environment()
    assert where["cores"] == os.cpu_count() and where["device"] == where["cpu"] and "torch" in where["versions"]


@pytest.mark.parametrize("git", ["", FileNotFoundError("git")])
def test_environment_takes_the_commit_that_it_is_told_where_git_knows_none(git, monkeypatch):
    monkeypatch.setattr(report, "_git", Mock(side_effect=[git]))
    monkeypatch.setenv("REPAIRLIB_COMMIT", "abc")
    assert report.environment()["commit"] == "abc"
    monkeypatch.setattr(report, "_git", Mock(side_effect=["def\n", ""]))
    assert report.environment()["commit"] == "def"
