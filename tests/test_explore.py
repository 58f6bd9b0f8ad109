import asyncio
import io
import itertools
import sys
import time

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from companion.experiments.methods import MATCHINGS, RENORMS
from companion.experiments.pairs import load_pair
from companion.experiments.rows import path_rows
from companion.figures import explore
from companion.figures.explore import ALPHAS, Choice, Explorer, offered_renorms, panel, stored_pairs
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
    words, pair, row, status, picture, numbers = box.children
    controls = {widget.description: widget for widget in (words, pair, *row.children)}
    return controls | {"status": status, "picture": picture, "numbers": numbers}


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
    assert list(stored_pairs("S3 mlp2")) == [f"{mlp}/s1, s3", f"{mlp}/s2, s3"] and stored_pairs("bn") == {
        f"{BN[0]}, s2": BN
    }
    assert stored_pairs("bn s3") == {}


def test_numbers_are_those_of_the_library():
    explorer, choice = Explorer(calibration=5000), Choice(MLP)
    figure, table, source = explorer.view(choice)
    pair = load_pair(MLP)
    expected = path_rows(pair, ALPHAS)
    rows = explorer.rows(choice)
    for name in ("matching", "renorm", "alpha", "accuracy"):
        assert list(rows[name]) == [row[name] for row in expected]
    assert list(rows["loss"]) == pytest.approx([row["loss"] for row in expected], abs=1e-6)
    models = {line.label: pair.path("AM", line.renorm)(0.5) for line in choice.lines}
    profile = diagnostics.variance_profile(pair.a, pair.aligned, models, pair.calibration)
    for ours, theirs in zip(explorer.profile(choice, 0.5), profile, strict=True):
        assert ours == {key: theirs[key] for key in ours} | {"ratio": pytest.approx(theirs["ratio"], rel=1e-5)}
    bare = rows[rows["renorm"] == "none"].set_index("alpha")
    line = table.loc["aligned by activations"]
    ends = bare.loss[0.0] + np.array(bare.index) * (bare.loss[1.0] - bare.loss[0.0])
    assert line["loss (nats)", "barrier"] == pytest.approx((bare.loss - ends).max(), abs=6e-4)
    assert line["accuracy (%)", "alpha 0.5"] == pytest.approx(100 * bare.accuracy[0.5], abs=0.06)
    assert line["", "points of the path"] == len(ALPHAS)
    assert "s1 and s2, trained on cpu; 1,397 training images" in source and "400 test images" in source
    assert [ax.get_ylabel() for ax in figure.axes] == ["test accuracy (%)", "variance relative\nto endpoints (ratio)"]
    assert figure.axes[0].lines[1].get_label() == "aligned by activations + REPAIR"


@pytest.fixture
def three_points(monkeypatch):
    """Paths of three points, as there is a panel to be tested and not the networks."""
    monkeypatch.setattr(explore, "ALPHAS", (0.0, 0.5, 1.0))


@pytest.mark.parametrize(("matching", "renorm"), [*zip(itertools.cycle(MATCHINGS), RENORMS, strict=False)])
def test_choices_of_a_network_with_batchnorm(matching, renorm):
    explorer, choice = Explorer(calibration=100), Choice(BN, matching, renorm)
    figure, table, _ = explorer.view(choice, 0.35, "loss", complete=False)
    labels = [line.label for line in choice.lines]
    assert [line.get_label() for line in figure.axes[0].lines][: len(labels)] == labels == list(table.index)
    assert labels[0] == MATCHINGS[matching].label and RENORMS[renorm].label in (
        *labels[-1].split(" + "),
        "as interpolated",
    )
    rows = explorer.rows(choice)
    assert set(rows["alpha"]) == {0.0, 0.35, 1.0}
    a, b = (explorer.profile(choice.lines[0], end) for end in (0.0, 1.0))  # the endpoints, whose mean is 1
    assert [x["ratio"] + y["ratio"] for x, y in zip(a, b, strict=True)] == pytest.approx([2] * len(a))
    if renorm != "none":
        assert rows[rows["alpha"] == 0.35].groupby("renorm")["loss"].first().nunique() == 2


def test_a_renormalisation_is_offered_where_it_fits():
    for run in (*BN, *MLP):
        store.get(run, progress=False)
    state = torch.get_rng_state()
    assert offered_renorms(BN[0]) == list(RENORMS)
    assert set(RENORMS) - set(offered_renorms(MLP[0])) == {"RESET", "REPAIR bn reset", "REPAIR conv"}
    assert torch.get_rng_state().equal(state)


def test_steps_are_said_before_they_are_made():
    explorer, choice = Explorer(calibration=100), Choice(MLP, "WM")
    assert explorer.step(choice, 0.5) == (
        f"training {MLP[0]} and {MLP[1]}, loading the networks and their data, matching units (aligned by weights), "
        "preparing REPAIR, testing the network aligned by weights + REPAIR at alpha 0.5"
    )
    explorer.point(choice, 0.5)
    assert explorer.step(choice, 0.25) == "testing the network aligned by weights + REPAIR at alpha 0.25"
    assert explorer.step(Choice(MLP, "none", "none"), 0.25) == "testing the network not aligned at alpha 0.25"


def test_runs_that_were_trained_anew_are_computed_anew():
    explorer, choice = Explorer(calibration=100), Choice(MLP)
    before = explorer.point(choice, 0.0)
    info, stored = store.Store().info(MLP[0]), store.Store()
    model = stored.load(MLP[0])
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    stored.delete(MLP[0])
    facts = {key: info[key] for key in info if key not in ("sha256", "recipe", "run", "metrics")}
    stored.save(MLP[0], model, facts | info["metrics"])
    assert (choice, 0.0) in explorer.missing(choice, 0.5)
    assert explorer.step(choice, 0.0).startswith("loading the networks")
    assert explorer.point(choice, 0.0)["loss"] != before["loss"]


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
    [({"matching": "AN"}, "nearest is 'AM'"), ({"renorm": "REPAIRED"}, "nearest is 'REPAIR'")],
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
    explorer, choice = Explorer(calibration=100), Choice(MLP, renorm="none")
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
    seen = [(shown["picture"].value, shown["numbers"].value)]
    for control, value, said in (
        ("alpha", 0.25, "alpha 0.25"), ("renormalisation", "RESET", "RESET"), ("matching", "WM", "by weights"),
        ("pair", MLP, "mlp2-plain-w16"), ("renormalisation", "none", "aligned by weights"),
    ):  # fmt: skip
        shown[control].value = value
        assert shown["status"].value == "" and shown["picture"].layout.display is None
        assert said in shown["numbers"].value
        if value == MLP:  # RESET needs a BatchNorm
            assert shown["renormalisation"].value == "REPAIR" and "RESET" in seen[-1][1]
            assert "RESET" not in {label for label, _ in shown["renormalisation"].options}
        seen.append((shown["picture"].value, shown["numbers"].value))
    assert "REPAIR" not in shown["numbers"].value
    shown["measure"].value = "loss"  # another picture, the same numbers
    assert shown["picture"].value != seen[-1][0] and shown["numbers"].value == seen[-1][1]
    assert len(set(seen)) == len(seen) and not plt.get_fignums()


def test_the_list_of_pairs_is_filtered(three_points):
    for run in (*BN, *MLP, "digits/mlp2-plain-w16/smoke/s3"):
        store.get(run, progress=False)
    shown = parts(panel(Explorer(calibration=100), Choice(BN)))
    first = shown["numbers"].value
    shown["filter"].value = "bn"
    assert list(shown["pair"].options) == [f"{BN[0]}, s2"] and shown["pair"].value == BN
    shown["filter"].value = "mlp S3"
    assert [pair[1][-2:] for pair in shown["pair"].options.values()] == ["s3", "s3"]
    assert shown["pair"].value is None and shown["numbers"].value == first  # nothing is computed that was not chosen
    assert shown["status"].value == "Choose a pair."
    shown["filter"].value = "vgg"
    assert not shown["pair"].options and shown["status"].value == "No pair of stored runs contains these words."
    shown["filter"].value = ""
    shown["pair"].value = MLP
    assert "mlp2-plain-w16" in shown["numbers"].value and shown["status"].value == ""


def test_what_cannot_be_shown_is_said(three_points):
    for run in MLP:
        store.get(run, progress=False)
    explorer = Explorer(calibration=100)
    shown = parts(panel(explorer, Choice(MLP)))
    shown["renormalisation"].options = [*shown["renormalisation"].options, ("RESET", "RESET")]
    shown["renormalisation"].value = "RESET"
    assert "no BatchNorm" in shown["status"].value and shown["picture"].layout.display == "none"
    assert shown["numbers"].value == ""


def test_another_choice_ends_the_computation_of_the_last():
    for run in BN:
        store.get(run, progress=False)
    explorer, choice = Explorer(calibration=100), Choice(BN)
    bare = choice.lines[0]

    async def drive():
        shown = parts(panel(explorer, choice))  # in a loop, as in a notebook: computed while we wait
        while not shown["picture"].value:  # it is there before the path is
            await asyncio.sleep(0.01)
        left = len(explorer.missing(choice, 0.5))
        shown["renormalisation"].value = "none"
        while explorer.missing(bare, 0.5) or shown["status"].value:
            assert "testing the network aligned by activations" in shown["status"].value
            await asyncio.sleep(0.01)
        return left, shown

    left, shown = asyncio.run(asyncio.wait_for(drive(), 120))
    assert left > len(ALPHAS)
    computed = explorer.rows(choice)
    assert len(computed[computed["renorm"] == "REPAIR"]) < len(ALPHAS)
    assert tuple(computed[computed["renorm"] == "none"]["alpha"]) == ALPHAS
    assert "REPAIR" not in shown["numbers"].value


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
