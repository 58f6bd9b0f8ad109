"""Sections and items: what a notebook asks for, shares and saves."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from companion.experiments import available
from companion.experiments.grids import Grid
from companion.experiments.methods import MATCHINGS, MatchingMethod
from companion.figures import section
from companion.figures.plots import repair as plots
from companion.figures.section import Item, Section, beside, stack
from repairlib import match_activations

RUN = "digits/mlp2-fused-w8/smoke"
LEFT, MIDDLE, SUMMARY = "repair/fig6-left", "repair/fig6-middle", "repair/table1"


def grid(scale: str) -> Grid:
    network = {"run": RUN, "series": "digits", "width": 8}
    return Grid(
        needs={LEFT: [network], MIDDLE: [network, "digits/mlp2-fused-w8/smoke/s3"], SUMMARY: []},
        seeds=(1, 2),
        settings={"units": [8]},
        reads={SUMMARY: [LEFT]},
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("REPAIRLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("REPAIRLIB_FIGURES", str(tmp_path / "figures"))
    return tmp_path


def test_a_section_knows_what_its_items_need():
    everything, one = Section(grid, "smoke"), Section(grid, "smoke", LEFT)
    assert everything.runs == [f"{RUN}/s{seed}" for seed in (1, 2, 3)] and everything.reads == [LEFT]
    assert one.runs == [f"{RUN}/s1", f"{RUN}/s2"] and one.reads == []
    assert one.item(MIDDLE) is None and isinstance(one.item(LEFT), Item)
    with pytest.raises(ValueError, match="no item 'repair/fig6-lft'; it has: repair/fig6-left"):
        one.item("repair/fig6-lft")
    with pytest.raises(ValueError, match="nearest is 'smoke'"):
        Section(grid, "smok")
    assert one.grid.units == [8]
    with pytest.raises(AttributeError, match="no setting 'unit'; there are: units"):
        _ = one.grid.unit


def test_the_overview_has_every_scale_and_says_what_is_missing(here, capsys):
    table = Section(grid, "smoke").overview()
    assert list(table) == ["smoke", "quick", "fast", "paper"] and table.loc["seeds", "quick"] == "1, 2"
    assert "3 of 3 networks are not trained yet: about" in capsys.readouterr().out


def test_items_share_what_is_measured_and_save_it(here, monkeypatch):
    measured = []
    rows = section.rows
    monkeypatch.setattr(section, "rows", lambda *args, **how: measured.append(how) or rows(*args, **how))
    work = Section(grid, "smoke")
    left, middle = work.item(LEFT), work.item(MIDDLE)
    table = left.rows(calibration=200)
    again = middle.rows(calibration=200)
    assert len(measured) == 1 and again.equals(table) and table.attrs["seconds"] > 0
    left.rows(calibration=100)
    assert len(measured) == 2  # other options are measured anew
    assert list(table) == ["run", "series", "width", "pair", "matching", "renorm", "alpha", "split", "loss", "accuracy"]
    left.save(table, plots.barriers(table, "width"), {"digits_mlp_w8_after": 0.5})
    record = json.loads((here / "figures/smoke/repair/fig6_left.json").read_text())
    assert record["runs"] == left.runs and record["seeds"] == [1, 2]
    assert pd.DataFrame(record["table"]).equals(table) and (here / "figures/smoke/repair/fig6_left.png").exists()
    assert work.tables[LEFT].equals(table)
    assert record["seconds"] >= round(table.attrs["seconds"], 1)


def test_a_function_measures_every_pair_and_pairs_are_loaded_once(here, monkeypatch):
    loaded = []
    pairs_of = section.pairs_of
    monkeypatch.setattr(section, "pairs_of", lambda *args, **how: loaded.append(args) or pairs_of(*args, **how))
    work = Section(grid, "smoke")
    found = [work.item(name).measure(lambda pair, text: [{"text": text, "run_a": pair.runs[0]}], "x", matching="WM")
             for name in (LEFT, MIDDLE)]  # fmt: skip
    assert loaded == [(RUN, (1, 2))] and found[0].equals(found[1])
    network = {"run": RUN, "series": "digits", "width": 8}
    assert found[0].to_dict("records") == [network | {"pair": "1-2", "text": "x", "run_a": f"{RUN}/s1"}]
    ((name, pair),) = work.pairs(RUN, [2, 3])
    assert name == "2-3" and pair.method == "AM"


def test_tables_of_one_network_share_what_was_matched(here, monkeypatch):
    matched = []
    counted = MatchingMethod("", lambda *ends: matched.append(ends) or match_activations(*ends))
    monkeypatch.setitem(MATCHINGS, "AM", counted)
    work = Section(grid, "smoke")
    tables = [work.item(LEFT).rows(renorms=[renorm], alphas=[0.5]) for renorm in ("none", "REPAIR")]
    assert len(matched) == 1 and tables[0]["loss"][0] != tables[1]["loss"][0]
    monkeypatch.setattr(section, "KEPT_BYTES", 1)  # so that no pair is small enough to be kept
    work = Section(grid, "smoke")
    again = [work.item(LEFT).rows(renorms=[renorm], alphas=[0.5]) for renorm in ("none", "REPAIR")]
    assert len(matched) == 3 and all(map(pd.DataFrame.equals, tables, again))


def test_a_function_measures_every_network_by_itself(here):
    item = Section(grid, "smoke").item(LEFT)
    table = item.measure_each(lambda run, x: [{"name": run, "x": x}], 3)
    assert table.to_dict("records") == [
        {"run": RUN, "series": "digits", "width": 8, "seed": seed, "name": f"{RUN}/s{seed}", "x": 3} for seed in (1, 2)
    ]


def test_networks_are_renormalised_as_usual_between_their_ends_as_trained(here):
    networks = [{"run": f"digits/resnet8-{norm}-w0.125/smoke", "series": norm} for norm in ("bn", "ln", "plain")]
    work = Section(lambda scale: Grid(needs={LEFT: networks}, seeds=(1, 2)), "smoke")
    table = work.usual_rows(networks, matchings=["WM"], calibration=200).set_index(["series", "alpha"])
    assert table["renorm"].unstack("alpha")[0.5].to_dict() == {"bn": "RESET", "ln": "none", "plain": "REPAIR"}
    trained = work.rows(networks, matchings=["WM"], renorms=["none"], calibration=200).set_index(["series", "alpha"])
    ends = [(norm, alpha) for norm in ("bn", "ln", "plain") for alpha in (0, 1)]
    assert (table.loc[ends, "accuracy"] == trained.loc[ends, "accuracy"]).all()


def test_an_item_is_measured_on_its_own_seeds_whatever_others_have(here):
    def two(scale: str) -> Grid:
        network = {"run": RUN, "width": 8}
        return Grid(needs={LEFT: [network], MIDDLE: [{**network, "seeds": (1, 2, 3)}]}, seeds=(1, 2))

    work = Section(two, "smoke")
    pairs = {name: set(work.item(name).measure(lambda pair: [{"x": 0}])["pair"]) for name in (LEFT, MIDDLE)}
    assert pairs == {LEFT: {"1-2"}, MIDDLE: {"1-2", "1-3", "2-3"}}


def test_an_item_that_sums_up_others_waits_for_them(here, capsys):
    work = Section(grid, "smoke")
    assert work.item(SUMMARY) is None
    assert f"{LEFT} has not been made" in capsys.readouterr().out
    left = work.item(LEFT)
    table = left.rows(calibration=200)
    left.save(table, plots.barriers(table, "width"))
    summary = work.item(SUMMARY)
    assert summary.reads[LEFT]["table"] == table.to_dict("records")
    assert summary.runs == left.runs


def test_tables_are_stacked_with_the_seconds_of_all():
    tables = [pd.DataFrame({"alpha": [alpha]}) for alpha in (0, 1)]
    for seconds, table in enumerate(tables, start=1):
        table.attrs["seconds"] = seconds
    found = stack(iter(tables))
    assert list(found["alpha"]) == [0, 1] and list(found.index) == [0, 1] and found.attrs["seconds"] == 3


def test_published_numbers_stand_beside_ours():
    table = beside({"midpoint": 66.0, "other": ">10x"}, {"midpoint": 65.43219, "more": 3})
    assert table.loc["midpoint"].to_dict() == {"paper": "66", "ours": "65.43"}
    assert table.loc["other", "paper"] == ">10x" and table.loc["more", "ours"] == 3
    assert list(beside({}, {"midpoint": 1.0})) == ["ours"]


def test_judging_saved_tables_imports_no_torch():
    code = "import sys, companion.figures.scorecard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------------- what `fast` does without


def fast_grid(scale: str) -> Grid:
    there, other = ({"run": f"cifar10/mlp2-fused-w{width}/fast", "series": "x", "width": width} for width in (8, 16))
    return Grid(needs={LEFT: [there, other], MIDDLE: [other], SUMMARY: []}, seeds=(1, 2), reads={SUMMARY: [LEFT]})


@pytest.fixture
def half(here, monkeypatch):
    """A store that has one of two networks."""
    stored = [f"cifar10/mlp2-fused-w8/fast/s{seed}" for seed in (1, 2)]
    monkeypatch.setattr(available.Store, "names", lambda self: stored)
    monkeypatch.setenv("REPAIRLIB_DEVICE", "cpu")
    return stored


def test_fast_does_without_networks_that_are_not_there_and_says_so(half, capsys, monkeypatch):
    work = Section(fast_grid, "fast")
    assert work.items == [LEFT, SUMMARY] and work.gone == [MIDDLE] and work.runs == half
    missing = [f"cifar10/mlp2-fused-w16/fast/s{seed}" for seed in (1, 2)]
    assert work.left_out == {LEFT: missing, MIDDLE: missing}
    assert work.item(MIDDLE) is None and [n["width"] for n in work.item(LEFT).networks] == [8]
    with pytest.raises(ValueError, match="no network here has 3 seeds. Left out, because .* cifar10/mlp2-fused-w16"):
        work.example(networks=3)
    capsys.readouterr()
    work.overview()
    said = capsys.readouterr().out
    assert f"not trained: cifar10/mlp2-fused-w16/fast.\nNot made, because they lack too much: {MIDDLE}" in said
    assert "TRAIN=1" in said
    assert Section(fast_grid, "quick").left_out == {}

    monkeypatch.setenv("REPAIRLIB_TRAIN", "1")
    assert Section(fast_grid, "fast").left_out == {} and available.can_train()
    monkeypatch.setenv("REPAIRLIB_TRAIN", "yes")
    with pytest.raises(ValueError, match="REPAIRLIB_TRAIN is 0 or 1, not 'yes'"):
        Section(fast_grid, "fast")


def test_fast_takes_other_data_sets_if_they_are_there(here, monkeypatch):
    def on_svhn(scale: str) -> Grid:
        runs = [{"run": f"{data}/mlp2-fused-w8/fast", "series": data} for data in ("mnist", "svhn")]
        return Grid(needs={LEFT: runs}, seeds=(1, 2))

    monkeypatch.setenv("REPAIRLIB_TRAIN", "1")
    monkeypatch.setenv("REPAIRLIB_DATA", str(here / "data"))
    assert [n["series"] for n in Section(on_svhn, "fast").grid.needs[LEFT]] == ["mnist"]
    (here / "data" / "SVHN").mkdir(parents=True)
    assert Section(on_svhn, "fast").left_out == {}


def test_what_was_left_out_is_saved(half, monkeypatch):
    work = Section(fast_grid, "fast")
    monkeypatch.setattr(section, "rows", lambda *args, **how: pd.DataFrame([{"alpha": 0, "loss": 1.0}]))
    with plots.style():
        figure = plots.plt.figure()
    work.item(LEFT).save([{"x": 1}], figure)
    assert section.load_item(LEFT, "fast")["left_out"] == work.left_out[LEFT]
    assert work.item(SUMMARY).reads[LEFT]["table"] == [{"x": 1}]


def test_an_example_is_what_is_asked_for_or_says_that_it_is_not(half, capsys):
    there, other = "cifar10/mlp2-fused-w8/fast", "cifar10/mlp2-fused-w16/fast"
    work = Section(fast_grid, "fast", LEFT)
    assert work.example(there) == half == work.example() and capsys.readouterr().out == ""
    assert work.example(other) == half
    assert capsys.readouterr().out == f"Step by step with {there}, because {other} is not trained.\n"
    assert work.example(other, RUN) == [f"{RUN}/s1", f"{RUN}/s2"]  # of smoke, which can always be trained
    for items in ("", LEFT, SUMMARY):  # at other scales, whatever is asked for
        assert Section(fast_grid, "quick", items).example(other, RUN) == [f"{other}/s1", f"{other}/s2"]


def test_an_item_that_was_made_of_more_stays(half, monkeypatch, capsys):
    record = {"item": LEFT, "runs": [*half, "cifar10/mlp2-fused-w16/fast/s1"], "table": [], "summary": {}}
    monkeypatch.setattr(section, "load_item", lambda item, scale: record)
    work = Section(fast_grid, "fast")
    assert work.item(LEFT) is None
    assert capsys.readouterr().out == f"{LEFT} was made of more networks than are here, and stays as it is.\n"
    record["runs"] = half
    assert work.item(LEFT) is not None


def test_a_stored_network_whose_data_are_not_there_is_left_out(here, monkeypatch):
    stored = [f"{data}/mlp2-fused-w8/fast/s{seed}" for data in ("mnist", "svhn") for seed in (1, 2)]
    monkeypatch.setattr(available.Store, "names", lambda self: stored)
    monkeypatch.setenv("REPAIRLIB_DATA", str(here / "data"))
    monkeypatch.setenv("REPAIRLIB_DEVICE", "cpu")
    runs = [{"run": run.removesuffix("/s1")} for run in stored[::2]]
    assert Section(lambda scale: Grid({LEFT: runs}, (1, 2)), "fast").left_out == {LEFT: stored[2:]}
