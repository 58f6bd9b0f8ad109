"""Trained networks pruned and renormalised by the companion: rows, and what is shared among them."""

import pandas as pd
import pytest
import torch

from companion.experiments import pruning as experiment
from companion.experiments.pruning import AFTER_PRUNING, PRUNERS, Settings, load_trained, pruning_rows, sample_rows
from companion.experiments.statistics import density_rows
from companion.experiments.tables import pruned_means
from repairlib import pruning
from repairlib.evaluation import evaluate
from repairlib.renorm import Goals, renormalize

PLAIN, BATCHNORM = "digits/mlp2-plain-w16/smoke/s1", "digits/resnet8-bn-w0.125/smoke/s1"
FEW = Settings(images=8, gradients=8, batch=2, block=16)


@pytest.mark.parametrize("run", [PLAIN, BATCHNORM])
def test_every_pruner_makes_the_sparsity_and_leaves_the_network(run):
    network = load_trained(run, 100)
    before = {key: value.clone() for key, value in network.model.state_dict().items()}
    for make in PRUNERS.values():
        for sparsity, pruned in make(network, [0.5, 0.9], FEW):
            assert pruning.sparsity_of(pruned) == pytest.approx(sparsity, abs=0.01)
    assert all(torch.equal(value, before[key]) for key, value in network.model.state_dict().items())


def test_rows_are_of_every_pruner_sparsity_and_renormalisation():
    network = load_trained(BATCHNORM, 100)
    rows = pruning_rows(network, [0.5, 0.9], renorms=["none", "renormalised", "RESET"], how=FEW)
    assert len(rows) == 4 * (1 + 2 * 3)
    dense = [row for row in rows if row["sparsity"] == 0]
    assert {row["accuracy"] for row in dense} == {evaluate(network.model, network.test)[1]}
    named = {(row["pruner"], row["sparsity"], row["renorm"]): row["loss"] for row in rows}
    for pruner in ("global magnitude", "WoodFisher"):  # RESET is what the paper does with BatchNorm
        assert named[pruner, 0.5, "renormalised"] == named[pruner, 0.5, "RESET"] != named[pruner, 0.5, "none"]
    means = pruned_means([{"series": "x", **row} for row in rows])
    assert list(means) == ["none", "renormalised", "RESET"] and len(means) == 8


def test_without_batchnorm_a_network_gets_repair(monkeypatch):
    network, measured = load_trained(PLAIN, 100), []
    monkeypatch.setattr(experiment, "Goals", lambda *of, **how: measured.append(how) or Goals(*of, **how))
    scores, data = pruning.magnitude_scores(network.model), network.calibration
    usual, repaired = (AFTER_PRUNING[name](network.model, data) for name in ("renormalised", "REPAIR"))
    for sparsity in (0.5, 0.8):
        pruned = pruning.prune(network.model, pruning.mask_smallest(scores, sparsity))
        expected = renormalize(pruned, network.model, data, targets=("conv", "linear"), limit=None).model.state_dict()
        for after in (usual, repaired):
            assert all(torch.equal(value, expected[key]) for key, value in after(pruned).state_dict().items())
    assert len(measured) == 2  # the dense network, once for each


def test_few_images_and_all():
    rows = pd.DataFrame(sample_rows(BATCHNORM, [0.5], [32, 64], ["global magnitude"]))
    assert list(rows["samples"].unique()) == ["before", "32 images", "64 images", "all images"]
    assert (rows[rows["samples"] != "before"]["renorm"] == "renormalised").all()


def test_names_are_checked():
    network = load_trained(PLAIN, 100)
    with pytest.raises(ValueError, match="unknown pruner 'magnitud'"):
        pruning_rows(network, [0.5], ["magnitud"])
    with pytest.raises(ValueError, match="the nearest is 'RESET'"):
        pruning_rows(network, [0.5], ["global magnitude"], ["RESTE"])


def test_densities_have_an_area_of_one():
    rows = pd.DataFrame(density_rows(BATCHNORM, 50))
    for _, part in rows.groupby("what"):
        width = part["size"].diff().iloc[1]
        assert (part["density"] * width).sum() == pytest.approx(1)
        assert part["median"].nunique() == 1
