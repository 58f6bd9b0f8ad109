import asyncio
import io
import itertools
import sys
import time

import matplotlib.image
import matplotlib.pyplot as plt
import pytest
import torch

from companion.experiments.pairs import load_pair, path_rows
from companion.figures import explore
from companion.figures.explore import ALPHAS, RENORMALISATIONS, Choice, Explorer, panel, stored_pairs
from companion.runs import store
from repairlib import diagnostics

BN = tuple(f"digits/resnet8-bn-w0.125/smoke/s{seed}" for seed in (1, 2))
MLP = tuple(f"digits/mlp2-plain-w16/smoke/s{seed}" for seed in (1, 2))


@pytest.fixture(autouse=True)
def no_figure_left_open():
    yield
    plt.close("all")


def parts(box) -> dict:
    """The panel's controls by description, and what it shows."""
    row, status, picture, words = box.children
    return {w.description: w for w in row.children} | {"status": status, "picture": picture, "words": words}


def test_pairs_differ_in_the_seed_only():
    for run in (*BN, *MLP, "digits/mlp2-plain-w16/smoke/s3", "digits/mlp3-plain-w16/smoke/s1"):
        store.get(run, progress=False)
    (store.Store().root / "digits/mlp2-plain-w16/smoke/sketch").mkdir()  # no run
    mlp = "digits/mlp2-plain-w16/smoke"
    assert stored_pairs() == {
        f"{mlp}/s1, s2": MLP,
        f"{mlp}/s1, s3": (f"{mlp}/s1", f"{mlp}/s3"),
        f"{mlp}/s2, s3": (f"{mlp}/s2", f"{mlp}/s3"),
        f"{BN[0]}, s2": BN,
    }


def test_numbers_are_those_of_the_library():
    explorer, choice = Explorer(calibration=5000), Choice(MLP)
    figure, text = explorer.view(choice)
    pair = load_pair(MLP)
    rows = path_rows(pair, ALPHAS)
    for line, network in zip(choice.lines.values(), ("aligned", "repaired"), strict=True):
        here = [row for row in rows if row["network"] == network]
        assert explorer.path(line).loss == pytest.approx([row["loss"] for row in here], abs=1e-6)
        assert explorer.path(line).accuracy == tuple(row["accuracy"] for row in here)
    models = {"aligned by activations": pair.midpoint(), "REPAIR": pair.repair()(0.5).model}
    table = diagnostics.variance_profile(pair.a, pair.aligned, models, pair.calibration)
    for ours, theirs in zip(explorer.profile(choice, 0.5), table, strict=True):
        assert ours == {key: theirs[key] for key in ours} | {"ratio": pytest.approx(theirs["ratio"], rel=1e-5)}
    bare = explorer.path(next(iter(choice.lines.values())))
    assert f"{bare.barrier():.3f}" in text and f"{100 * bare.midpoint():.1f}" in text
    assert "s1 and s2, trained on cpu; 1,397 training images" in text and "400 test images" in text
    assert [ax.get_ylabel() for ax in figure.axes] == ["test accuracy (%)", "variance relative\nto endpoints (ratio)"]
    assert figure.axes[0].lines[1].get_label() == "REPAIR"


@pytest.fixture
def three_points(monkeypatch):
    """Paths of three points, as there is a panel to be tested and not the networks."""
    monkeypatch.setattr(explore, "ALPHAS", (0.0, 0.5, 1.0))


@pytest.mark.parametrize(
    ("matching", "renormalisation"), [*zip(itertools.cycle(explore.MATCHINGS), RENORMALISATIONS, strict=False)]
)
def test_choices_of_a_network_with_batchnorm(matching, renormalisation):
    explorer, choice = Explorer(calibration=100), Choice(BN, matching, renormalisation)
    figure, text = explorer.view(choice, 0.35, "loss", complete=False)
    drawn = {line.get_label() for line in figure.axes[0].lines} & set(explore.LOOKS)
    assert drawn == set(choice.lines) and all(name in text for name in drawn)
    assert explorer.path(choice).alpha == (0.0, 0.35, 1.0)
    bare = next(iter(choice.lines.values()))
    a, b = (explorer.profile(bare, end) for end in (0.0, 1.0))  # the endpoints, whose mean is 1
    assert [x["ratio"] + y["ratio"] for x, y in zip(a, b, strict=True)] == pytest.approx([2] * len(a))
    if choice != bare:
        assert explorer.path(choice).loss[1] != explorer.path(bare).loss[1]


def test_what_was_computed_is_not_computed_again(monkeypatch):
    explorer, choice = Explorer(calibration=100), Choice(MLP)
    explorer.view(choice)
    assert explorer.missing(choice, 0.5) == []
    explorer.view(Choice(BN), complete=False)  # its networks replace those of the first pair, not the results
    monkeypatch.setattr(explore, "load_pair", None)
    began = time.perf_counter()
    explorer.view(choice, 0.35, "loss")
    assert time.perf_counter() - began < 5
    assert [alpha for _, alpha in explorer.missing(choice, 0.33)] == [0.33, 0.33]


@pytest.mark.parametrize(
    ("change", "error"),
    [({"matching": "weight"}, "nearest is 'weights'"), ({"renormalisation": "REPAIRED"}, "nearest is 'REPAIR'")],
)
def test_unknown_choices(change, error):
    with pytest.raises(ValueError, match=error):
        Choice(MLP, **change)


def test_bad_views_are_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="alpha must be from 0"):
        Explorer().view(Choice(MLP), 1.5)
    with pytest.raises(ValueError, match="unknown metric 'los'"):
        Explorer().view(Choice(MLP), metric="los")
    assert not stored_pairs()


def test_constant_endpoints_have_no_ratio():
    explorer, choice = Explorer(calibration=100), Choice(MLP, renormalisation="none")
    pair = explorer.pair(MLP)
    for model in (pair.a, pair.b):
        torch.nn.init.zeros_(next(model.parameters()))
    with pytest.raises(ValueError, match="do not vary at node"):
        explorer.view(choice, complete=False)


def test_panel_follows_its_widgets(three_points):
    for run in (*BN, *MLP):
        store.get(run, progress=False)
    shown = parts(panel(Explorer(calibration=100), Choice(BN)))
    assert list(shown["pair"].options) == list(stored_pairs()) and shown["pair"].value == BN
    assert matplotlib.image.imread(io.BytesIO(shown["picture"].value)).ndim == 3
    seen = [(shown["picture"].value, shown["words"].value)]
    for control, value, said in (
        ("alpha", 0.25, "alpha 0.25"), ("renormalisation", "RESET", "RESET"), ("matching", "weights", "by weights"),
        ("pair", MLP, None), ("renormalisation", "none", "mlp2-plain-w16"),
    ):  # fmt: skip
        shown[control].value = value
        if said is None:  # RESET of a network without BatchNorm
            assert "no BatchNorm" in shown["status"].value and shown["picture"].layout.display == "none"
            assert shown["words"].value == ""
            continue
        assert shown["status"].value == "" and shown["picture"].layout.display is None
        assert said in shown["words"].value
        seen.append((shown["picture"].value, shown["words"].value))
    shown["metric"].value = "loss"  # another picture, the same numbers
    assert shown["picture"].value != seen[-1][0] and shown["words"].value == seen[-1][1]
    assert len(set(seen)) == len(seen) and not plt.get_fignums()


def test_another_choice_ends_the_computation_of_the_last():
    for run in BN:
        store.get(run, progress=False)
    explorer, choice = Explorer(calibration=100), Choice(BN)
    bare = choice.lines["aligned by activations"]

    async def drive():
        shown = parts(panel(explorer, choice))  # in a loop, as in a notebook: computed while we wait
        while not shown["picture"].value:  # it is there before the path is
            await asyncio.sleep(0.01)
        left = len(explorer.missing(choice, 0.5))
        shown["renormalisation"].value = "none"
        while explorer.missing(bare, 0.5) or shown["status"].value:
            assert "computing network" in shown["status"].value
            await asyncio.sleep(0.01)
        return left, shown

    left, shown = asyncio.run(asyncio.wait_for(drive(), 120))
    assert left > len(ALPHAS)
    assert len(explorer.path(choice).alpha) < len(ALPHAS) and explorer.path(bare).alpha == ALPHAS
    assert "REPAIR" not in shown["words"].value


def test_panel_without_stored_runs_says_how_to_make_some():
    message = panel(Explorer()).value
    assert "make figures" in message and "store.get" in message and str(store.Store().root) in message


def test_panel_wants_runs_that_are_stored():
    for run in MLP:
        store.get(run, progress=False)
    with pytest.raises(ValueError, match="are not both stored"):
        panel(Explorer(), Choice(BN))


def test_without_ipywidgets_there_is_a_message(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert panel(Explorer()) is None
    assert "pip install 'repairlib[lab]'" in capsys.readouterr().out
