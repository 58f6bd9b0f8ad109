"""docs/fidelity.py: the papers' numbers beside those of saved tables, and why they differ."""

import doctest
import importlib.util
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from companion.figures import report
from companion.runs.store import shipped_root

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("fidelity", ROOT / "docs" / "fidelity.py")
fidelity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fidelity)


INDEX = {item: entry["published"] for item, entry in report.read_index().items() if "published" in entry}
END = {"end_loss": 0.1, "end_accuracy": 0.9}
AFTER = {"none": 0.4, "REPAIR": 0.8}  # accuracies of midpoints


def paths(pairs=("1-2",), drop: float = 0.0, **columns) -> list[dict]:
    """Aligned paths with accuracy 0.9 at their ends; that of the second pair is lower in the middle, by `drop`."""
    return [
        {**columns, "pair": pair, "matching": "AM", "renorm": renorm, "alpha": alpha, "split": "test"}
        | {"accuracy": value, "loss": 1 - value}
        for i, pair in enumerate(pairs)
        for renorm, middle in AFTER.items()
        for alpha, value in {0: 0.9, 0.5: middle - i * drop, 1: 0.9}.items()
    ]


def made(item: str) -> bool:
    """Whether the checkout has the item at `fast`."""
    return (ROOT / "figures" / "fast" / f"{report.read_index()[item]['output']}.json").exists()


def measured(item: str, table: list[dict]) -> dict:
    found = {name: fidelity.measure(number, pd.DataFrame(table)) for name, number in fidelity.NUMBERS[item].items()}
    return {name: value for name, value in found.items() if value is not None}


def save(item: str, table: list[dict], networks: list[str], seeds=(1, 2)) -> None:
    runs = [f"{network}/s{seed}" for network in networks for seed in seeds]
    report.save_item(item, "fast", table, {}, plt.figure(), runs=runs)


def test_doctests():
    found = doctest.testmod(fidelity)
    assert found.attempted >= 5 and found.failed == 0


def test_every_published_number_is_measured_or_said_to_be_anothers():
    assert INDEX.keys() - set(fidelity.HYPERPARAMETERS) == fidelity.NUMBERS.keys()
    for item, numbers in fidelity.NUMBERS.items():
        assert numbers.keys() == INDEX[item].keys(), item
    others = [name for numbers in fidelity.NUMBERS.values() for name, n in numbers.items() if n.measure is None]
    assert others == ["ot_fusion_midpoint", "ainsworth_best_loss"]


@pytest.mark.parametrize("item", [item for item in fidelity.NUMBERS if made(item)])
def test_summaries_of_committed_tables_say_the_same(item):
    record = report.load_item(item, "fast", ROOT / "figures")
    for name, ours in measured(item, record["table"]).items():
        if name in record["summary"] and not isinstance(ours.value, list):
            assert ours.value == pytest.approx(record["summary"][name], rel=1e-6, abs=1e-6), name


def test_pairs_are_measured_by_themselves():
    table = paths(("1-2", "1-3"), 0.1, series="bn") + paths(("1-2", "1-3"), 0.2, series="ln")
    found = measured("repair/fig4-right", table)
    assert found["ln_midpoint"].value == pytest.approx(30) and found["ln_midpoint"].pairs == pytest.approx([40, 20])
    assert found["both_after"].value == pytest.approx(70) and found["bn_endpoints"].value == pytest.approx(90)
    line = fidelity.row(
        "Fig. 4, right", fidelity.NUMBERS["repair/fig4-right"]["ln_midpoint"], 88.4, found["ln_midpoint"]
    )
    number = "accuracy of the midpoint before REPAIR, LayerNorm"
    assert line == f"| Fig. 4, right | {number} | 88.4 % | 30.0 % (20.0 to 40.0) | -58.4 points |"


def test_what_a_table_lacks_is_not_measured():
    assert measured("repair/fig4-right", paths(series="bn")).keys() == {"bn_midpoint", "bn_endpoints"}
    assert measured("repair/fig4-left", paths(series="bn", width=1)) == {}
    assert measured("repair/fig5-right", paths(series="ResNet18")).keys() == {"resnet18"}
    assert (
        measured("combine/fig9", [{"scheme": "centred", "matching": "WM", "split": "test", "x": 0, "accuracy": 1}])
        == {}
    )


def test_the_nearest_width_stands_in_and_says_so():
    table = [row for norm in ("bn", "ln") for width in (1, 2) for row in paths(series=norm, width=width)]
    found = measured("repair/fig4-middle", table)
    assert len(found) == 4 and {ours.width for ours in found.values()} == {2}
    number = fidelity.NUMBERS["repair/fig4-middle"]["midpoint_ln_after_8x"]
    assert "| 80.0 %, at 2x | -13.2 points |" in fidelity.row("", number, 93.2, found["midpoint_ln_after_8x"])
    found = measured("repair/fig8-left", table)  # a barrier for each width, and no other stands in for it
    assert found.keys() == {"git_re_basin_1x", "git_re_basin_2x"} and found["git_re_basin_1x"].value == pytest.approx(
        0.5
    )
    assert measured("repair/fig4-left", table)["bn_ln_loss_barrier_at_16x"].value == pytest.approx(0.1)


def test_bounds_and_ranges():
    number = fidelity.NUMBERS["repair/fig4-left"]["bn_ln_loss_barrier_at_16x"]
    line = fidelity.row("", number, "<0.05", fidelity.Measured(0.02, [], 16))
    assert line.endswith("| &lt;0.05 nats | 0.020 nats | below |")
    table = [{"row": "a", "norm": "bn", "width": w, "reduction": r} for w, r in ((1, 20.0), (1, 30.0), (2, 90.0))]
    ours = measured("repair/fig1-right", table)["reduction_range"]
    line = fidelity.row("", fidelity.NUMBERS["repair/fig1-right"]["reduction_range"], [60, 100], ours)
    assert line.endswith("| 60 to 100 % | 25.0 % to 90.0 % | -35.0 points and -10.0 points |")


def combined(losses: dict[str, float]) -> list[dict]:
    return [
        {
            "scheme": scheme,
            "matching": matching,
            "pair": "1-2",
            "x": x,
            "loss": 0.1 + lost,
            "accuracy": 0.9 - lost,
            **END,
        }
        for scheme, worst in losses.items()
        for matching in ("WM", "none")
        for x, lost in {0: 0.0, 0.5: worst if matching == "WM" else 0.8}.items()
    ]


def test_combinations_are_measured_when_aligned():
    losses = {"uniform": 0.1, "subcube": 0.2, "hyperplane": 0.3, "bernoulli": 0.4}
    found = measured("combine/figB15-B18", combined(losses))
    for scheme, loss in losses.items():
        assert found[f"{scheme}_accuracy"].value == pytest.approx(100 * loss)
        assert found[f"{scheme}_loss"].value == pytest.approx(loss)
    assert measured("combine/fig5", combined({"bernoulli": 0.25}))["accuracy_barrier"].value == pytest.approx(25)


def test_distances_corners_and_layers():
    line = [
        {"scheme": "extrapolation", "matching": "WM", "split": split, "pair": "1-2", "x": x, "accuracy": accuracy}
        for split in ("train", "test")
        for x, accuracy in {-0.5: 0.5, -0.25: 0.895, 0: 0.9, 0.5: 0.2, 1: 0.9, 1.25: 0.895, 1.5: 0.5}.items()
    ]
    assert measured("combine/fig9", line)["train_unchanged_up_to"].value == 0.25
    boxes = [{"scheme": "centred", "matching": "WM", "x": x, "accuracy": 0.9 - x / 5} for x in (0, 0.2, 0.4)]
    assert measured("combine/fig10", boxes)["works_up_to"].value == 0.2
    corners = [
        {"triple": t, "matching": "WM", "accuracy": a} for t, least in (("123", 0.8), ("231", 0.9)) for a in (1, least)
    ]
    found = measured("combine/fig11b", corners)["worst_accuracy"]
    assert found.value == pytest.approx(85) and found.pairs == pytest.approx([80, 90])
    layers = [{"layer": layer, "k": k, "units": 4, "accuracy_barrier": barrier, "pair": "1-2"}
              for layer, cost in (("conv1", 0.01), ("conv2", 0.3)) for k, barrier in ((2, 0.0), (4, cost))]  # fmt: skip
    assert measured("combine/fig14", layers)["layers_that_bear_all"].value == 1


def test_page_says_what_differs_and_what_is_missing():
    table = paths(series="bn") + paths(series="ln")
    save("repair/fig4-right", table, ["cifar10/resnet20-bn-w1/fast~epochs10", "cifar10/resnet20-ln-w1/fast~epochs12"])
    save("combine/figB15-B18", combined({"uniform": 0.1}), ["cifar10/tiny10-ln-w2/fast-csiszarik"])
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
    save("repair/fig3-left", [{"network": "aligned", "channel": 0, "variance": 1.0}], [network])
    assert "* No more networks: Fig. 3, middle (" in fidelity.page()


def test_sidecars_of_networks_in_the_repository_say_how_they_were_trained():
    runs = [f"cifar10/resnet20-bn-w1/fast/s{seed}" for seed in (1, 2)]
    record = {"table": paths(series="bn"), "runs": runs, "seeds": [1, 2], "device": "a CPU"}
    assert "trained in" not in fidelity.why("repair/fig4-right", record)
    for run in runs:
        (shipped_root() / run).mkdir(parents=True)
        info = dict.fromkeys(("sha256", "recipe", "shape", "classes", "metrics"), 0)
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
