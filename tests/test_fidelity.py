"""docs/fidelity.py: the papers' numbers beside those of saved tables, and why they differ."""

import doctest
import importlib.util
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from companion.figures import report
from companion.runs.store import shipped_root

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("fidelity", ROOT / "docs" / "fidelity.py")
fidelity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fidelity)


INDEX = {item: entry["published"] for item, entry in report.read_index().items() if "published" in entry}
END = {"end_loss": 0.1, "end_accuracy": 0.9}


def found(item: str, summary: dict) -> dict:
    """Our numbers by the paper's names."""
    ours = {name: fidelity.find_ours(number, name, summary) for name, number in fidelity.NUMBERS[item].items()}
    return {name: each for name, each in ours.items() if each is not None}


def save(item: str, summary: dict, networks: list[str], seeds=(1, 2), table=({"alpha": 0},)) -> None:
    runs = [f"{network}/s{seed}" for network in networks for seed in seeds]
    report.save_item(item, "fast", list(table), summary, plt.figure(), runs=runs)


def test_doctests():
    tried = doctest.testmod(fidelity)
    assert tried.attempted >= 7 and tried.failed == 0


def test_every_published_number_is_looked_up_or_said_to_be_anothers():
    assert INDEX.keys() - set(fidelity.HYPERPARAMETERS) == fidelity.NUMBERS.keys()
    for item, numbers in fidelity.NUMBERS.items():
        assert numbers.keys() == INDEX[item].keys(), item
    others = [name for numbers in fidelity.NUMBERS.values() for name, n in numbers.items() if n.ours is None]
    assert others == ["ot_fusion_midpoint", "ainsworth_best_loss"]


def test_names_of_numbers_are_those_of_summaries():
    """docs/gallery.md shows the summaries of `quick`, which has every item."""
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    for item, numbers in fidelity.NUMBERS.items():
        part = gallery.partition(f"\n### {item}\n")[2].partition("\n### ")[0]
        shown = {
            cells[0]: cells[2]
            for line in re.findall(r"^\| (.*) \|$", part, re.M)
            if len(cells := line.split(" | ")) > 2
        }
        for name, number in numbers.items():
            if number.ours is None or fidelity.paper_width(number, name):
                continue
            for each in number.ours or (name,):
                assert shown.get(each.replace("_", " ")), (item, each)


def test_the_page_is_what_the_tables_say():
    saved, networks = ROOT / "figures", ROOT / "data" / "networks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPAIRLIB_FIGURES", str(saved))
        patch.setenv("REPAIRLIB_NETWORKS", str(networks))
        assert fidelity.PAGE.read_text() == fidelity.page(), "run `python docs/fidelity.py`"


def test_what_a_summary_lacks_is_not_found():
    summary = {"bn_midpoint": 40.0, "bn_endpoints": 90.0}
    assert found("repair/fig4-right", summary).keys() == summary.keys()
    assert found("repair/fig4-left", {"bn_after_1x": 0.1}) == {}  # LayerNorm's is missing
    assert found("repair/fig4-left", {"bn_after_1x": 0.1, "ln_after_2x": 0.1}) == {}  # not of one width


def test_the_nearest_width_stands_in_and_says_so():
    table = {
        f"midpoint_{norm}_{when}_{w}x": 10.0 * w
        for norm in ("bn", "ln")
        for when in ("before", "after")
        for w in (1, 2)
    }
    ours = found("repair/fig4-middle", table)
    assert len(ours) == 4 and {each.width for each in ours.values()} == {2}
    name, number = "midpoint_ln_after_8x", fidelity.NUMBERS["repair/fig4-middle"]["midpoint_ln_after_8x"]
    assert "| 20.0 %, at 2x | -73.2 points |" in fidelity.row("", number, name, 93.2, ours[name])
    ours = found("repair/fig8-left", {"ln_before_1x": 0.5, "ln_before_0.5x": 0.7})  # no other width stands in here
    assert ours == {"git_re_basin_1x": fidelity.Ours(0.5, 1)}
    both = {f"{norm}_after_{width}x": barrier for norm, barrier in {"bn": 0.1, "ln": 0.2}.items() for width in (4, 8)}
    assert found("repair/fig4-left", both) == {"bn_ln_loss_barrier_at_16x": fidelity.Ours(0.2, 8)}


def test_bounds_and_ranges():
    name = "bn_ln_loss_barrier_at_16x"
    line = fidelity.row("", fidelity.NUMBERS["repair/fig4-left"][name], name, "<0.05", fidelity.Ours(0.02, 16))
    assert line.endswith("| &lt;0.05 nats | 0.020 nats | below |")
    ours = found("repair/fig1-right", {"least": 25.0, "greatest": 90.0})["reduction_range"]
    number = fidelity.NUMBERS["repair/fig1-right"]["reduction_range"]
    line = fidelity.row("", number, "reduction_range", [60, 100], ours)
    assert line.endswith("| 60 to 100 % | 25.0 % to 90.0 % | -35.0 points and -10.0 points |")


def test_page_says_what_differs_and_what_is_missing():
    summary = {f"{norm}_{what}": 40.0 for norm in ("bn", "ln") for what in ("midpoint", "endpoints")}
    networks = ["cifar10/resnet20-bn-w1/fast~epochs10", "cifar10/resnet20-ln-w1/fast~epochs12"]
    save("repair/fig4-right", summary | {"both_after": 80.0}, networks)
    save("combine/figB15-B18", {"uniform_loss": 0.1, "uniform_accuracy": 5.0}, ["cifar10/tiny10-ln-w2/fast-csiszarik"])
    text = fidelity.page()
    assert (
        text.index("## REPAIR")
        < text.index("### Section 5.1")
        < text.index("### Appendix B.1")
        < text.index("## Not compared")
    )
    assert (
        "| Fig. 4, right | accuracy of the midpoint before REPAIR, BatchNorm | 34.7 % | 40.0 % | +5.3 points |" in text
    )
    (line,) = [line for line in text.splitlines() if line.startswith("* Fig. 4, right: ")]
    assert "width 1 (4); epochs 10, 12 (200); batch size 500, 128 (500); learning rate 0.4, 0.1 (0.4)" in line
    assert "seeds 1, 2" in line and "data" not in line and "norm" not in line  # as in the paper
    (line,) = [line for line in text.splitlines() if line.startswith("* Fig. B.15 to B.18: ")]
    assert "width 2 (16)" in line and "descents of weight matching 5 (1)" in line
    rest = text.partition("## Not compared")[2]
    network = fidelity.runs_of("repair/fig3-middle", "fast")[0].removesuffix("/s1")
    assert f"* 2 networks, `{network}/{{s1,s2}}`: Fig. 3, middle (95.5 %, 66.0 %, 94.1 %, 1.5 points, 90 %)." in rest
    assert "Fig. 4, right" not in rest and "(0.32 nats, 7 points, " in rest  # three schemes of Tiny-10 are missing
    assert "resnet20-ln-w32/jordan/" in rest and "tableA1" not in text and "77.0" not in text


def test_trained_networks_are_not_needed_again():
    network = fidelity.runs_of("repair/fig3-middle", "fast")[0].removesuffix("/s1")
    save("repair/fig3-left", {}, [network])
    assert "* No more networks: Fig. 3, middle (" in fidelity.page()


def test_sidecars_of_networks_in_the_repository_say_how_they_were_trained():
    runs = [f"cifar10/resnet20-bn-w1/fast/s{seed}" for seed in (1, 2)]
    record = {"table": [], "runs": runs, "seeds": [1, 2], "device": "a CPU"}
    assert "trained in" not in fidelity.why("repair/fig4-right", record)
    for run in runs:
        (shipped_root() / run).mkdir(parents=True)
        info = {"run": run, "sha256": "", "recipe": {}, "shape": [], "classes": 10, "metrics": {}}
        (shipped_root() / run / "run.json").write_text(
            json.dumps(info | {"precision": "bfloat16", "processor": "a GPU"})
        )
    assert "; trained in bfloat16 on a GPU; measured on a CPU" in fidelity.why("repair/fig4-right", record)


def test_settings_count_where_a_table_depends_on_them():
    runs = fidelity.runs_of("combine/fig9", "fast")
    line = [{"scheme": "extrapolation", "sample": 0, "x": 0, "split": split} for split in ("test", "train")]
    record = {"table": line, "runs": runs, "seeds": [1, 2, 3], "device": "a CPU"}
    here, there = (fidelity.grid_of("combine/fig9", scale).settings for scale in ("fast", "paper"))
    text = fidelity.why("combine/fig9", record)
    assert f"points of the line {len(here['alphas'])} ({len(there['alphas'])})" in text and "sizes of boxes" not in text
    assert f"training images evaluated {here['train_images']} (50000)" in text
    boxes = [{"scheme": "centred", "sample": 0, "x": 0, "split": "test"}]
    text = fidelity.why("combine/fig10", record | {"table": boxes})
    assert "sizes of boxes" in text and "points of the line" not in text and "training images" not in text
