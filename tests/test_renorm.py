import copy

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from cases import CASES, batches, inputs, make
from torch import nn

from companion.experiments.theory import first_layer_theory
from companion.runs import models
from repairlib import corrections, data_independent, diagnostics, recording, renorm, tracing
from repairlib.interpolate import interpolate_models, mix_states, with_state
from repairlib.moments import gather

BN_CASES = [name for name in CASES if "-bn-" in name]


def pair(name, dtype=torch.float64):
    return make(name, 0, dtype), make(name, 1, dtype), batches(name, dtype=dtype)


def output(model, x):
    with recording.eval_mode(model):
        return model(x)


def attach(model, fixes, example):
    """Copy of a model with visible corrections."""
    return corrections.attach(tracing.trace(copy.deepcopy(model), example), fixes)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def goal_errors(models, repaired, data, targets, alpha):
    """How far the repaired network's means and stds are from Eqs. 3 and 4, relative to the goal std."""
    nets = [tracing.trace(m, data[0][:2]) for m in (*models, repaired)]
    worst = 0.0
    for m in gather(nets, data, targets).values():
        goal_mean = (1 - alpha) * m.mean(0) + alpha * m.mean(1)
        goal_std = (1 - alpha) * m.std(0) + alpha * m.std(1)
        alive = goal_std > 1e-6
        scale = goal_std.clamp_min(1e-6)
        worst = max(
            worst,
            float(((m.mean(2) - goal_mean).abs() / scale)[alive].max()),
            float(((m.std(2) - goal_std).abs() / scale)[alive].max()),
        )
    return worst


@pytest.mark.parametrize("name", CASES)
def test_sequential_repair_hits_its_goals_exactly(name):
    (a, b, data), alpha = pair(name), 0.3
    repair = renorm.Repair(a, b, data, method="sequential")
    # Dead channels of these random nets cannot be given a variance; they are left out by comparing living ones only.
    result = repair(alpha)
    # Before folding: a convolution without bias hands its shift on to the BatchNorm behind it.
    unfolded = attach(interpolate_models(a, b, alpha), result.corrections, repair.example)
    nets = [tracing.trace(m, data[0][:2]) for m in (a, b, unfolded)]
    for node, m in gather(nets, data, repair.targets).items():
        alive = ~m.dead(2) & ~m.dead(0) & ~m.dead(1)
        goal_mean, goal_std = repair.at(alpha)[node]
        torch.testing.assert_close(m.mean(2), goal_mean, rtol=1e-7, atol=1e-7, msg=node)
        torch.testing.assert_close(m.std(2)[alive], goal_std[alive], rtol=1e-7, atol=1e-9, msg=node)


@pytest.mark.parametrize("name", ["mlp3-plain-w8", "vgg11-bn-w0.125"])
def test_one_batch_makes_simultaneous_and_sequential_equal(name):
    a, b, data = pair(name)
    one = [torch.cat(data)]
    x = inputs(name, dtype=torch.float64)
    for bn in ("frozen", "reset") if "-bn-" in name else ("frozen",):
        out = [output(renorm.Repair(a, b, one, method=m, bn=bn)(0.5).model, x) for m in ("sequential", "simultaneous")]
        assert relative(*out) < 1e-9


@pytest.mark.parametrize("method", ["sequential", "simultaneous"])
@pytest.mark.parametrize("name", BN_CASES)
def test_conv_repair_with_reset_batchnorm_is_reset(name, method):
    """Jordan et al. 2022, Sec. 5.2: what a convolution's REPAIR changes, the BatchNorm behind it takes back."""
    a, b, data = pair(name)
    for model in (a, b):
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 1e-12  # eps is added to variances of different size; without it the identity is exact
    x = inputs(name, dtype=torch.float64)
    repaired = renorm.Repair(a, b, data, method=method, bn="reset", targets=("conv", "linear"))(0.5)
    plain = renorm.reset(interpolate_models(a, b, 0.5), data, method=method).model
    assert relative(output(repaired.model, x), output(plain, x)) < 1e-5


def test_frozen_batchnorm_differs_from_reset_by_std_against_variance():
    """With frozen BNs the aim is the interpolated std, while the BN divides by the interpolated variance's root."""
    name = "vgg11-bn-w0.125"
    a, b, data = pair(name)
    # Endpoints whose BatchNorm statistics are those of this data.
    a, b = renorm.reset(a, data).model, renorm.reset(b, data).model
    repaired = renorm.Repair(a, b, data, targets=("conv",), bn="frozen")(0.5).model
    nets = [tracing.trace(m, data[0][:2]) for m in (a, b, repaired)]
    bn = next(n for n, kind in nets[0].kinds.items() if kind == "batchnorm")
    conv = nets[0].node(bn).args[0].name
    m = gather(nets, data, [conv, bn])
    gamma = interpolate_models(a, b, 0.5).get_parameter(f"{nets[0].node(bn).target}.weight").abs()
    ends = m[conv]
    expected = gamma * (ends.std(0) + ends.std(1)) / 2 / ((ends.var(0) + ends.var(1)) / 2 + 1e-5).sqrt()
    torch.testing.assert_close(m[bn].std(2), expected, rtol=1e-5, atol=1e-9)
    assert (m[bn].std(2) < gamma).all()  # below one sigma, where RESET is at gamma


def test_closed_form_is_exact_in_the_first_layer():
    for name in ("mlp3-plain-w8", "vgg11-plain-w0.125", "resnet8-bn-w0.5"):
        a, b, data = pair(name)
        for alpha in (0.2, 0.5):
            repair = renorm.Repair(a, b, data, method="closed-form")
            unfolded = attach(interpolate_models(a, b, alpha), repair(alpha).corrections, repair.example)
            assert goal_errors((a, b), unfolded, data, repair.targets[:1], alpha) < 1e-8


def test_eq5_predicts_the_measured_variance_to_rounding():
    name = "mlp3-plain-w8"
    a, b, data = pair(name)
    for alpha in (0.1, 0.5, 0.8):
        rows = first_layer_theory(a, b, interpolate_models(a, b, alpha), data, alpha)
        assert rows and all(row["eq5"] == pytest.approx(row["measured"], rel=1e-10) for row in rows)


@pytest.mark.parametrize("method", renorm.METHODS)
@pytest.mark.parametrize("name", ["mlp3-plain-w8", "vgg11-bn-w0.125", "resnet20-bn-w0.25"])
def test_alpha_0_and_1_are_the_endpoints_bit_for_bit(name, method):
    a, b, data = pair(name, torch.float32)
    repair = renorm.Repair(a, b, data, method=method)
    for alpha, end in ((0, a), (1, b)):
        out = repair(alpha)
        assert not out.corrections
        assert all(torch.equal(v, out.model.state_dict()[k]) for k, v in end.state_dict().items())


def test_repair_of_a_model_with_itself_is_the_identity():
    for name in ("mlp3-plain-w8", "resnet20-bn-w0.25"):
        a, _, data = pair(name)
        x = inputs(name, dtype=torch.float64)
        for method in renorm.METHODS[::2]:
            result = renorm.Repair(a, copy.deepcopy(a), data, method=method)(0.5)
            assert relative(output(result.model, x), output(a, x)) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_folding_changes_nothing(name):
    a, b, data = pair(name, torch.float32)
    x = inputs(name)
    repair = renorm.Repair(a, b, data)
    result = repair(0.5)
    unfolded = attach(interpolate_models(a, b, 0.5), result.corrections, repair.example)
    assert relative(output(result.model, x), output(unfolded, x)) < 1e-5
    net = tracing.trace(a, x)
    layers = {net.node(node).target: net.kinds[node] for node in repair.targets}
    bare = {name for name, kind in layers.items() if kind in ("conv", "linear") and net.modules[name].bias is None}
    assert set(result.new_biases) == (set() if "-bn-" in name else bare)  # a BatchNorm takes the shift, a LayerNorm not
    if "resnet" in name:
        assert result.visible and isinstance(result.model, torch.fx.GraphModule)
    else:
        assert not result.visible and type(result.model) is type(a)
        added = {f"{layer}.bias" for layer in result.new_biases}
        assert result.model.state_dict().keys() == a.state_dict().keys() | added


@pytest.mark.parametrize("name", ["resnet8-bn-w0.5", "resnet8-plain-w0.5"])
def test_conv_only_repair_of_a_resnet_folds_completely(name):
    a, b, data = pair(name)
    result = renorm.Repair(a, b, data, targets=("conv",))(0.5)
    assert not result.visible and result.model.state_dict().keys() == a.state_dict().keys()


def test_fold_without_bias_before_nothing_adds_one_and_says_so():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2)).double() for _ in range(2))
    data = [torch.randn(50, 4, dtype=torch.float64) + 1]
    result = renorm.Repair(a, b, data)(0.5)
    assert result.new_biases == ("0",)
    assert goal_errors((a, b), result.model, data, ["_0"], 0.5) < 1e-9


def test_a_layer_called_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.relu(self.layer(torch.relu(self.layer(x)))))

    torch.manual_seed(0)
    a, b = Twice().double(), Twice().double()
    data = [torch.randn(50, 4, dtype=torch.float64)]
    repair = renorm.Repair(a, b, data)
    result = repair(0.5)
    assert result.visible == ("layer", "layer_1")
    assert goal_errors((a, b), result.model, data, repair.targets, 0.5) < 1e-9


def test_reset_gives_every_batchnorm_the_statistics_of_its_input():
    name = "resnet20-bn-w0.25"
    _, b, data = pair(name)
    model = interpolate_models(*pair(name)[:2], 0.5)
    out = renorm.reset(model, data).model
    net = tracing.trace(out, data[0][:2])
    norms = corrections.batchnorms(net)
    moments = gather([net], data, {node.args[0].name for node in norms.values()})
    for node in norms.values():
        module, m = net.modules[node.target], moments[node.args[0].name]
        torch.testing.assert_close(module.running_mean, m.mean(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(module.running_var, m.var(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BN_CASES)
def test_goals_of_reset_networks_are_read_in_the_pass_that_resets(name, monkeypatch):
    a, b, data = pair(name)
    monkeypatch.setattr(renorm, "gather", lambda *_: pytest.fail("one more pass"))
    repair = renorm.Repair(a, b, data, bn="reset")
    for k, model in enumerate((a, b)):
        whole = renorm.reset(model, data).model
        for key, value in whole.state_dict().items():
            assert torch.equal(repair.references[k].state_dict()[key], value)
        moments = gather([tracing.trace(whole, data[0][:2])], data, repair.targets)
        for node, (mean, std) in repair.statistics[k].items():
            torch.testing.assert_close(mean, moments[node].mean())
            torch.testing.assert_close(std, moments[node].std())


def test_block_targets_are_the_ends_of_blocks():
    name = "resnet8-bn-w0.5"
    net = tracing.trace(make(name), inputs(name, 2))
    blocks = renorm.target_nodes(net, ["block"])
    assert len(blocks) == 3 and all(net.kinds[n] == "activation" for n in blocks)
    assert len(renorm.target_nodes(net, ["conv"])) == sum(isinstance(m, nn.Conv2d) for m in make(name).modules())
    assert renorm.target_nodes(net, ["linear"]) == []
    assert len(renorm.target_nodes(net, ["classifier"])) == 1
    assert renorm.target_nodes(net, [blocks[1]]) == [blocks[1]]


def test_repaired_networks_can_be_read_where_they_were_corrected():
    """Node names survive a visible correction, and reading a node gives the corrected value."""
    name = "resnet8-bn-w0.5"
    a, b, data = pair(name)
    repair = renorm.Repair(a, b, data)
    result = repair(0.5)
    assert result.visible
    assert goal_errors((a, b), result.model, data, list(result.visible), 0.5) < 1e-7
    rows = diagnostics.variance_profile(a, b, {"repaired": result.model}, data, ("conv", "block"))
    assert len(rows) == len(repair.targets) and all(0.5 < row["ratio"] <= 1 + 1e-6 for row in rows)


def test_inputs_are_untouched_and_one_shot_data_works():
    name = "resnet8-bn-w0.5"
    a, b, data = pair(name, torch.float32)
    a.train()
    before = {k: v.clone() for k, v in a.state_dict().items()}
    from_list = renorm.Repair(a, b, data)(0.5).model
    from_generator = renorm.Repair(a, b, ((x, None) for x in data))(0.5).model
    assert a.training and from_list.training
    assert all(torch.equal(before[k], v) for k, v in a.state_dict().items())
    x = inputs(name)
    assert torch.equal(output(from_list, x), output(from_generator, x))


def test_bad_options_and_data():
    a, b, data = pair("mlp1-plain-w6")
    with pytest.raises(ValueError, match="unknown method 'sequence'; the nearest is 'sequential'"):
        renorm.Repair(a, b, data, method="sequence")
    with pytest.raises(ValueError, match="calibration data is empty"):
        renorm.Repair(a, b, [])
    with pytest.raises(ValueError, match="no BatchNorm statistics to reset"):
        renorm.reset(a, data)
    with pytest.raises(ValueError, match="nothing to correct"):
        renorm.Repair(a, b, data, targets=("conv",))
    with pytest.raises(KeyError, match="no node 'convs'.*nearest: conv"):
        renorm.Repair(a, b, data, targets=("convs",))
    with pytest.raises(ValueError, match="different architectures"):
        renorm.Repair(a, make("mlp3-plain-w8"), data)
    with pytest.raises(ValueError, match="cannot reset BatchNorm"):
        renorm.Repair(a, b, data, method="closed-form", bn="reset")


def test_repair_of_an_already_repaired_network():
    """A merged residual net carries visible corrections; REPAIR of it with itself changes nothing and adds none."""
    name = "resnet8-bn-w0.5"
    a, b, data = pair(name)
    merged = renorm.Repair(a, b, data)(0.5).model
    x = inputs(name, dtype=torch.float64)
    for method in renorm.METHODS[::2]:
        again = renorm.Repair(merged, copy.deepcopy(merged), data, method=method)(0.5)
        assert relative(output(again.model, x), output(merged, x)) < 1e-9
        assert again.model.state_dict().keys() == merged.state_dict().keys()
    other = renorm.Repair(make(name, 2, torch.float64), make(name, 3, torch.float64), data)(0.5).model
    repair = renorm.Repair(merged, other, data)
    blocks = [target for target in repair.targets if "relu" in target]
    assert goal_errors((merged, other), repair(0.5).model, data, blocks, 0.5) < 1e-7


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    torch.nn.utils.prune.random_unstructured(net[0], "weight", 0.3)
    return net


def weight_normed() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    return net


@pytest.mark.parametrize("build", [Tied, pruned, weight_normed])
def test_weights_that_are_shared_or_computed_are_not_folded_into(build):
    torch.manual_seed(0)
    a, b = build().double(), build().double()
    b.load_state_dict({k: v if "mask" in k else v + torch.randn_like(v) / 2 for k, v in a.state_dict().items()})
    data = [torch.randn(50, 4, dtype=torch.float64)]
    repair = renorm.Repair(a, b, data)
    result = repair(0.5)
    unfolded = attach(interpolate_models(a, b, 0.5), result.corrections, repair.example)
    assert result.visible
    assert relative(output(result.model, data[0]), output(unfolded, data[0])) < 1e-9


def test_classifier_is_left_alone_also_before_a_softmax():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.LogSoftmax(1))
    traced = tracing.trace(net, torch.zeros(2, 4))
    assert renorm.target_nodes(traced) == ["_0"] and renorm.target_nodes(traced, "classifier") == ["_2"]


def test_units_on_tokens_are_repaired_on_their_own_axis():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).double() for _ in range(2))
    data = [torch.randn(50, 3, 4, dtype=torch.float64)]
    for method in ("sequential", "simultaneous", "closed-form"):
        repaired = renorm.Repair(a, b, data, method=method)(0.5)
        flat = renorm.Repair(a, b, [data[0].flatten(0, 1)], method=method)(0.5)
        assert torch.allclose(repaired.model(data[0]), flat.model(data[0]), rtol=1e-9) and not repaired.visible


def test_limit_takes_the_first_examples():
    a, b, data = pair("mlp3-plain-w8")
    limited = renorm.Repair(a, b, data, limit=30)
    assert [len(x) for x in limited.batches] == [25, 5]
    x = inputs("mlp3-plain-w8", dtype=torch.float64)
    by_hand = renorm.Repair(a, b, [data[0], data[1][:5]])
    assert torch.equal(output(limited(0.5).model, x), output(by_hand(0.5).model, x))


def test_every_module_keeps_its_own_training_flag():
    a, b, data = pair("resnet8-bn-w0.5", torch.float32)
    a.train()
    a.bn1.eval()
    model = renorm.Repair(a, b, data)(0.5).model
    assert model.training and not model.bn1.training and model.stages.get_submodule("0.0.bn1").training


# ------------------------------------------------------------------------------- RESCALE, RESHIFT, averages, references


def moments_at(model, data, targets):
    return gather([tracing.trace(model, data[0][:2])], data, targets)


def assert_statistics(model, goals, data, mean=True, std=True):
    """Every channel that is not constant has its goal mean and std, whichever is asked for."""
    for node, m in moments_at(model, data, goals).items():
        goal_mean, goal_std = goals[node]
        alive = ~m.dead()
        assert alive.any()
        if mean:
            torch.testing.assert_close(m.mean()[alive], goal_mean[alive], rtol=1e-7, atol=1e-7, msg=node)
        if std:
            torch.testing.assert_close(m.std()[alive], goal_std[alive], rtol=1e-7, atol=1e-9, msg=node)


# One of each kind where no BatchNorm takes a shift up, so that a folded network hits its goals.
NO_BATCHNORM = [
    name for name in CASES
    if name.startswith(("mlp2", "vgg11", "tiny10", "resnet8")) and "-bn-" not in name
]  # fmt: skip


@pytest.mark.parametrize("correct", renorm.CORRECT)
@pytest.mark.parametrize("name", NO_BATCHNORM)
def test_every_correction_hits_its_part_of_the_goals_of_three_networks(name, correct):
    models, data = [make(name, seed, torch.float64) for seed in range(3)], batches(name, dtype=torch.float64)
    weights = (0.2, 0.5, 0.3)
    repair = renorm.Repair(*models[:2], data, others=models[2:], correct=correct)
    result, goals = repair(weights), repair.at(weights)
    for node, (mean, std) in goals.items():
        alone = [moments_at(model, data, [node])[node] for model in models] if node == repair.targets[-1] else []
        for w, m in zip(weights, alone, strict=False):
            mean, std = mean - w * m.mean(), std - w * m.std()
        assert not alone or max(mean.abs().max(), std.abs().max()) < 1e-9
    assert_statistics(result.model, goals, data, mean=correct != "rescale", std=correct != "reshift")
    for fix in result.corrections.values():
        assert correct != "rescale" or (not fix.shift.any() and (fix.gain >= 0).all())  # zero and signs stay
        assert correct != "reshift" or (fix.gain == 1).all()
    assert correct != "rescale" or not result.new_biases  # nothing to add where there is no bias


def test_vertices_and_edges_of_three_networks():
    name = "vgg11-bn-w0.125"
    models, data = [make(name, seed) for seed in range(3)], batches(name)
    for method in set(renorm.METHODS) - {"closed-form"}:
        repair = renorm.Repair(*models[:2], data, others=models[2:], method=method)
        for k, model in enumerate(models):
            vertex = repair([float(i == k) for i in range(3)])
            assert not vertex.corrections and not vertex.visible
            assert all(torch.equal(v, vertex.model.state_dict()[n]) for n, v in model.state_dict().items())
        edge, two = repair((0.7, 0.3, 0.0)).model, renorm.Repair(*models[:2], data, method=method)(0.3).model
        assert relative(output(edge, inputs(name)), output(two, inputs(name))) < 1e-5
    for weights in ((0.5, 0.5), 0.5, (0.5, 0.5, 0.5)):
        with pytest.raises(ValueError, match="3 networks need 3 weights that sum to 1"):
            repair(weights)


def test_weights_may_be_an_array():
    a, b, data = pair("mlp1-plain-w6")
    repair = renorm.Repair(a, b, data)
    assert renorm._weights(np.array([0.25, 0.75]), 2) == renorm._weights(0.75, 2) == (0.25, 0.75)
    assert all(
        torch.equal(v, repair(0.75).model.state_dict()[k]) for k, v in repair((0.25, 0.75)).model.state_dict().items()
    )


def test_closed_form_is_for_averages_of_two_networks():
    name, weights = "mlp3-plain-w8", (0.2, 0.8)
    models, data = [make(name, seed, torch.float64) for seed in range(3)], batches(name, dtype=torch.float64)
    repair = renorm.Repair(*models[:2], data, method="closed-form")
    first = repair.targets[0]
    assert_statistics(repair(weights).model, {first: repair.at(weights)[first]}, data)
    mixed = with_state(models[0], mix_states([m.state_dict() for m in models[:2]], weights))
    by_hand = renorm.renormalize(mixed, models[:2], data, weights=weights, method="closed-form")
    assert torch.equal(output(by_hand.model, data[0]), output(repair(weights).model, data[0]))
    with pytest.raises(ValueError, match="'fc1.weight' is something else"):
        renorm.renormalize(models[2], models[:2], data, weights=weights, method="closed-form")
    for references in (models[0], models):
        with pytest.raises(ValueError, match="needs two networks"):
            renorm.renormalize(mixed, references, data, method="closed-form")


@pytest.mark.parametrize("correct", renorm.CORRECT)
def test_a_network_towards_itself_is_unchanged(correct):
    for name in ("mlp3-plain-w8", "resnet8-fixup-w0.5", "vgg11-ln-w0.125", "resnet8-bn-w0.5"):
        model, data = make(name, 0, torch.float64), batches(name, dtype=torch.float64)
        x = inputs(name, dtype=torch.float64)
        for method in ("sequential", "simultaneous"):
            # Simultaneous REPAIR normalises by batches, and only one batch has the goal's statistics.
            calibration = data if method == "sequential" else [torch.cat(data)]
            result = renorm.renormalize(model, model, calibration, correct=correct, method=method)
            assert relative(output(result.model, x), output(model, x)) < 1e-9


def test_repair_is_rescale_then_reshift():
    """(x / std * goal_std) moved to the goal mean: at one node, the two halves make the whole."""
    name = "vgg11-plain-w0.125"
    model, reference, data = pair(name)
    x = inputs(name, dtype=torch.float64)
    for target in ("stem", "classifier"):
        half = renorm.renormalize(model, reference, data, targets=target, correct="rescale").model
        both = renorm.renormalize(half, reference, data, targets=target, correct="reshift").model
        whole = renorm.renormalize(model, reference, data, targets=target).model
        assert relative(output(both, x), output(whole, x)) < 1e-9


@pytest.mark.parametrize("name", ["mlp2-plain-w8-nobias", "vgg11-plain-w0.125", "vgg11-plain-w0.125-nobias"])
def test_rescale_undoes_every_positive_rescaling_of_units(name):
    """A unit's weights and bias times s > 0: RESCALE divides by s, so that the network it came from is back."""
    model, data = make(name, 0, torch.float64), batches(name, dtype=torch.float64)
    scaled, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    layers = [m for m in scaled.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers[:-1]:
        s = torch.rand(len(layer.weight), generator=generator, dtype=torch.float64) + 0.1
        for parameter in layer.parameters():
            parameter.data.mul_(s.view(-1, *[1] * (parameter.ndim - 1)))
    result = renorm.renormalize(scaled, model, data, correct="rescale")
    assert result.model.state_dict().keys() == model.state_dict().keys()
    dead = sum(int((fix.gain == 1).sum()) for fix in result.corrections.values())
    x = inputs(name, dtype=torch.float64)
    assert dead or relative(output(result.model, x), output(model, x)) < 1e-9
    assert_statistics(result.model, renorm.Goals(model, data).at(), data)


def test_average_gives_a_layer_one_std():
    """Qu & Horvath 2024, Table 1: the goal std is its mean over channels; the goal mean stays each channel's own."""
    a, b, data = pair("mlp3-plain-w8")
    goals = renorm.Repair(a, b, data).at(0.3)
    for correct in ("rescale", "repair"):
        repair = renorm.Repair(a, b, data, correct=correct, average=True)
        for node, (mean, std) in repair.at(0.3).items():
            assert torch.equal(mean, goals[node][0])
            torch.testing.assert_close(std, goals[node][1].mean().expand(8))
        assert_statistics(repair(0.3).model, repair.at(0.3), data, mean=correct == "repair")


def test_eps_is_added_to_the_variance():
    a, b, data = pair("mlp1-plain-w6")
    plain, eps = (renorm.Repair(a, b, data, correct="rescale", eps=e)(0.5).corrections["fc1"].gain for e in (0, 0.1))
    var = moments_at(interpolate_models(a, b, 0.5), data, ["fc1"])["fc1"].var()
    torch.testing.assert_close(eps, plain * (var / (var + 0.1)).sqrt())
    assert (renorm.Repair(a, a, data, eps=1e-5)(0.5).corrections["fc1"].gain < 1).all()


def test_an_independent_network_as_the_reference():
    """Qu & Horvath 2024, Table 8."""
    name = "vgg11-plain-w0.125"
    a, b, data = pair(name)
    other = make(name, 2, torch.float64)
    result = renorm.renormalize(interpolate_models(a, b, 0.5), other, data)
    assert_statistics(result.model, renorm.Goals(other, data).at(), data)
    with pytest.raises(ValueError, match="node 'conv1' has 8 channels, its goals are of 16"):
        renorm.renormalize(a, make_wide(name), data)
    with pytest.raises(ValueError, match="the network to renormalise: .conv1.bias. holds NaN"):
        broken = copy.deepcopy(a)
        broken.conv1.bias.data[0] = float("nan")
        renorm.renormalize(broken, a, data)
    with pytest.raises(KeyError, match="no node 'conv1' in the graph"):
        renorm.renormalize(
            make("mlp1-plain-w6", 0, torch.float64), renorm.Goals(a, data).statistics, [torch.ones(2, 1, 8, 8)]
        )


def make_wide(name):
    return models.build(name.replace("0.125", "0.25"), shape=CASES[name], classes=5).double()


@pytest.mark.parametrize("name", ["vgg11-plain-w0.125", "vgg11-ln-w0.125"])
def test_a_pruned_network_gets_the_dense_ones_statistics(name):
    """Qu & Horvath 2024, Sec. 5, with one batch and the smallest 80% of all weights at zero."""
    dense, data = make(name, 0, torch.float64), batches(name, dtype=torch.float64)[:1]
    pruned = copy.deepcopy(dense)
    weights = [m.weight for m in pruned.modules() if isinstance(m, nn.Conv2d)]
    threshold = torch.cat([w.detach().abs().flatten() for w in weights]).quantile(0.8)
    with torch.no_grad():
        for w in weights:
            w[w.abs() < threshold] = 0
    goals = renorm.Goals(dense, data)
    result = goals.renormalize(pruned)
    assert_statistics(result.model, goals.at(), data)
    masks = [m.weight != 0 for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(torch.equal(mask, w != 0) for mask, w in zip(masks, weights, strict=True))  # as sparse as before


@pytest.mark.parametrize("bn", ["frozen", "reset"])
def test_other_corrections_need_no_new_measurement(bn, monkeypatch):
    a, b, data = pair("resnet8-bn-w0.5")
    choices = [{}, {"correct": "rescale", "average": True, "eps": 1e-5}, {"correct": "reshift"}]
    if bn == "frozen":
        choices += [{"method": "simultaneous"}, {"method": "simultaneous", "correct": "rescale", "unbiased": True}]
    expected = [renorm.Repair(a, b, data, bn=bn, **options)(0.3).model.state_dict() for options in choices]
    first = renorm.Repair(a, b, data, bn=bn, correct="rescale")
    for measuring in ("gather", "_reset"):
        monkeypatch.setattr(renorm, measuring, None)
    for options, state in zip(choices, expected, strict=True):
        found = first.with_options(bn=bn, **options)(0.3).model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in found.items())
    assert first.options.correct == "rescale"
    assert first.with_options(bn=bn, targets=list(corrections.TARGETS)).targets == first.targets  # a list or a tuple


def test_recorded_statistics_serve_any_correction():
    model, _, data = pair("resnet8-bn-w0.5")
    recorded = renorm.Goals(model, data).statistics
    first = renorm.Goals(recorded, data)
    for options in ({"correct": "rescale"}, {"bn": "reset"}, {"limit": 10}):
        expected = renorm.Goals(recorded, data, **options).renormalize(model).model.state_dict()
        found = first.with_options(**options).renormalize(model).model.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"targets": "conv"}, r"targets=\('conv',\) needs other statistics than targets=.* make Repair anew"),
        ({"targets": ["conv"]}, "targets=.* needs other statistics"),
        ({"limit": 3}, "limit=3 needs other statistics"),
        ({"bn": "reset"}, "bn='reset' needs other statistics than bn='frozen'"),
        ({"method": "closed-form"}, "method='closed-form' needs other statistics than method='sequential'"),
        ({"shrink": True}, "one network as the reference"),
        ({"corect": "rescale"}, "nearest is 'correct'"),
    ],
)
def test_what_would_need_a_measurement_is_refused(options, words):
    repair = renorm.Repair(*pair("resnet8-bn-w0.5"))
    with pytest.raises(ValueError, match=words):
        repair.with_options(**options)


# --------------------------------------------------------------------------------------------------- data-independent


def test_batch_statistics_is_batchnorm_in_train_mode_and_reset_on_one_batch():
    name = "resnet8-bn-w0.5"
    model, data = make(name, 0, torch.float64), [torch.cat(batches(name, dtype=torch.float64))]
    out = data_independent.batch_statistics(model)
    assert relative(output(out, data[0]), output(renorm.reset(model, data).model, data[0])) < 1e-9
    train = copy.deepcopy(model).train()
    with torch.no_grad():
        assert relative(output(out, data[0]), train(data[0])) < 1e-12
    assert model.bn1.running_mean is not None
    with pytest.raises(ValueError, match="no BatchNorm statistics"):
        data_independent.batch_statistics(out)


@pytest.mark.parametrize("correct", renorm.CORRECT)
def test_batch_method_corrects_every_batch_as_sequential_does_the_whole_set(correct):
    for name in ("vgg11-ln-w0.125", "resnet8-fixup-w0.5"):
        a, b, data = pair(name)
        one = [torch.cat(data)]
        batch = renorm.Repair(a, b, one, correct=correct, method="batch")(0.5)
        measured = renorm.Repair(a, b, one, correct=correct)(0.5)
        assert set(batch.visible) == set(measured.corrections) and not batch.corrections
        assert relative(output(batch.model, one[0]), output(measured.model, one[0])) < 1e-9
        again = renorm.renormalize(batch.model, batch.model, data)  # corrections on top of corrections
        assert relative(output(again.model, one[0]), output(batch.model, one[0])) < 1e-6


def test_recorder_keeps_running_statistics_without_touching_the_network():
    name = "vgg11-ln-w0.125"
    model, data = make(name), batches(name)
    keys = list(model.state_dict())
    model.train()
    with data_independent.Recorder(model, data[0], "conv", momentum=0.25) as recorder:
        with torch.no_grad():
            for x in data:
                model(x)
        model.eval()
        output(model, 5 * data[0])  # evaluation is not recorded
    model.train()(7 * data[0])
    assert list(model.state_dict()) == keys and len(recorder.statistics) == 8
    mean = var = None
    for x in data:
        m = moments_at(model, [x], ["conv3"])["conv3"]
        mean = m.mean() if mean is None else 0.75 * mean + 0.25 * m.mean()
        var = m.var() if var is None else 0.75 * var + 0.25 * m.var()
    torch.testing.assert_close(recorder.statistics["conv3"][0], mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(recorder.statistics["conv3"][1], var.sqrt(), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="not the output of one module"):
        data_independent.Recorder(make("resnet8-bn-w0.5"), inputs("resnet8-bn-w0.5"), "block")


def test_recorded_goals_need_no_data_of_the_references():
    name = "vgg11-ln-w0.125"
    a, b, data = pair(name)
    one = [torch.cat(data)]
    recorded = []
    for model in (a, b):
        with data_independent.Recorder(model, one[0], momentum=None) as recorder:
            model.train()(one[0])
        recorded.append(recorder.statistics)
    for method in ("sequential", "batch"):
        mid = interpolate_models(a, b, 0.3).eval()
        ours = renorm.renormalize(mid, recorded, one, weights=(0.7, 0.3), method=method).model
        theirs = renorm.renormalize(mid, [a, b], one, weights=(0.7, 0.3), method=method, targets="conv").model
        assert relative(output(ours, one[0]), output(theirs, one[0])) < 1e-9
    for wrong in ([], [{}], [recorded[0], {}]):
        with pytest.raises(ValueError, match="at least one reference|one or more nodes"):
            renorm.renormalize(mid, wrong, one)


# ------------------------------------------------------------------------------------------------ targets, types, flags


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("resnet")])
def test_roles_of_residual_networks(name):
    """stem, inner and shortcut share the convolutions out, and the modules' names say which is which."""
    net = tracing.trace(make(name), inputs(name, 2))
    where = {
        role: {net.node(n).target for n in renorm.target_nodes(net, role)} for role in ("stem", "inner", "shortcut")
    }
    convs = {n for n, m in net.modules.items() if isinstance(m, nn.Conv2d)}
    assert where["stem"] == {"conv1"}
    assert where["shortcut"] == {n for n in convs if "shortcut" in n} and where["shortcut"]
    assert where["inner"] == convs - where["stem"] - where["shortcut"]
    assert len(renorm.target_nodes(net, "block")) == len(where["inner"]) // (3 if "resnet26" in name else 2)
    norms = renorm.target_nodes(net, "norm")
    assert len(norms) == (len(convs) if "-bn-" in name or "-ln-" in name else 0)
    assert {net.axis(n) for n in norms} <= ({1} if "-bn-" in name else {3})


@pytest.mark.parametrize("name, inner, shortcut", [("resnet18", 16, 3), ("resnet50", 48, 4)])
def test_roles_of_torchvisions_resnets(name, inner, shortcut):
    from torchvision.models import get_model

    net = tracing.trace(get_model(name), torch.zeros(1, 3, 32, 32))
    where = {role: {net.node(n).target for n in renorm.target_nodes(net, role)} for role in corrections.ROLES}
    assert where["stem"] == {"conv1"} and where["classifier"] == {"fc"} and len(where["inner"]) == inner
    assert len(where["shortcut"]) == shortcut and all(n.endswith("downsample.0") for n in where["shortcut"])
    assert len(where["norm"]) == 1 + inner + shortcut and len(renorm.target_nodes(net, "block")) == inner // (
        2 if name == "resnet18" else 3
    )


@pytest.mark.parametrize("name", ["mlp2-ln-w8", "mlp2-bn-w8", "vgg11-bn-w0.125", "vgg11-ln-w0.125"])
def test_outputs_of_normalisation_layers_as_targets(name):
    """Folded into the layer's own weight and bias, on the axis where it has its channels."""
    a, b, data = pair(name)
    repair = renorm.Repair(a, b, data, targets="norm")
    result = repair(0.3)
    assert not result.visible and not result.new_biases
    assert_statistics(result.model, repair.at(0.3), data)
    if "-bn-" in name:
        with pytest.raises(ValueError, match="cannot be reset and corrected at once"):
            renorm.Repair(a, b, data, targets="norm", bn="reset", method="simultaneous")(0.5)


def test_functional_layers_and_norms_without_bias_stay_visible():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.norm, self.last = nn.Parameter(torch.randn(5, 4)), nn.RMSNorm(5), nn.Linear(5, 2)

        def forward(self, x):
            return self.last(torch.relu(self.norm(nn.functional.linear(x, self.weight))))

    torch.manual_seed(0)
    a, b, data = Functional().double(), Functional().double(), [torch.randn(50, 4, dtype=torch.float64)]
    repair = renorm.Repair(a, b, data, targets=("linear", "norm", "classifier"))
    result = repair(0.3)
    assert result.visible == ("linear", "norm") and list(result.corrections) == ["linear", "norm", "last"]
    assert_statistics(result.model, repair.at(0.3), data)


def test_a_repaired_network_renormalised_towards_a_plain_one_and_back():
    name = "resnet8-plain-w0.5"
    a, b, data = pair(name)
    merged = renorm.Repair(a, b, data)(0.5).model
    for model, reference in ((merged, a), (a, merged)):
        goals = renorm.Goals(reference, data)
        assert_statistics(goals.renormalize(model).model, goals.at(), data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_have_float64_statistics_and_half_results(dtype):
    name = "vgg11-bn-w0.125"
    a, b, data = make(name, 0, dtype), make(name, 1, dtype), batches(name)
    expected = renorm.Repair(a.float(), b.float(), data, targets=("conv",))(0.5).model
    a, b = a.to(dtype), b.to(dtype)
    x = inputs(name)
    for options in ({}, {"bn": "reset"}, {"method": "simultaneous"}, {"method": "closed-form"}, {"method": "batch"}):
        repair = renorm.Repair(a, b, data, targets=("conv",), **options)
        result = repair(0.5)
        assert all(t.dtype == torch.float64 for goal in repair.at(0.5).values() for t in goal)
        assert all(p.dtype == dtype for p in result.model.state_dict().values() if p.is_floating_point())
        assert output(result.model, x.to(dtype)).dtype == dtype
        if not options:
            assert relative(output(result.model, x.to(dtype)).float(), output(expected, x)) < 0.1


def test_renormalize_leaves_its_inputs_alone_and_keeps_flags():
    name = "resnet8-bn-w0.5"
    model, reference, data = pair(name)
    model.train()
    model.bn1.eval()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, reference)]
    for options in ({}, {"bn": "reset"}, {"correct": "rescale", "targets": "inner"}, {"method": "batch"}):
        result = renorm.renormalize(model, reference, iter(data), **options).model
        assert result.training and not result.bn1.training and result.stages.get_submodule("0.0.bn1").training
    for m, state in zip((model, reference), before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in m.state_dict().items())


def test_options_that_exclude_each_other():
    a, b, data = pair("mlp1-plain-w6")
    for options, message in (
        ({"correct": "scale"}, "unknown correct 'scale'; the nearest is 'rescale'"),
        ({"bn": "freeze"}, "unknown bn 'freeze'; the nearest is 'frozen'"),
        ({"correct": "reshift", "average": True}, "which correct='reshift' does not use"),
        ({"correct": "reshift", "method": "closed-form"}, "nothing to reshift"),
        ({"method": "batch", "bn": "reset"}, "cannot reset BatchNorm"),
    ):
        with pytest.raises(ValueError, match=message):
            renorm.Repair(a, b, data, **options)
    with pytest.raises(ValueError, match="unknown option 'target'; the nearest is 'targets'"):
        renorm.Repair(a, b, data, target="conv")


def test_a_layer_that_is_called_like_a_role_has_its_own_role():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.linear = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.linear(torch.relu(self.stem(x)))

    net = tracing.trace(Named(), torch.zeros(2, 4))
    assert renorm.target_nodes(net, "linear") == ["stem"] and renorm.target_nodes(net, "classifier") == ["linear"]
