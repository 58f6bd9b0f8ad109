import copy

import pytest
import torch
import torch.nn.utils.prune
from cases import CASES, batches, inputs, make
from torch import nn

from repairlib import diagnostics, graph, renorm
from repairlib.interpolate import interpolate_models
from repairlib.moments import gather

BN_CASES = [name for name in CASES if "-bn-" in name]


def pair(name, dtype=torch.float64):
    return make(name, 0, dtype), make(name, 1, dtype), batches(name, dtype=dtype)


def output(model, x):
    with graph.eval_mode(model):
        return model(x)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def goal_errors(models, repaired, data, targets, alpha):
    """How far the repaired network's means and stds are from Eqs. 3 and 4, relative to the goal std."""
    nets = [graph.trace(m, data[0][:2]) for m in (*models, repaired)]
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


@pytest.mark.parametrize("alpha", [0.3, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_sequential_repair_hits_its_goals_exactly(name, alpha):
    a, b, data = pair(name)
    repair = renorm.Repair(a, b, data, method="sequential")
    # Dead channels of these random nets cannot be given a variance; they are left out by comparing living ones only.
    result = repair(alpha)
    # Before folding: a convolution without bias hands its shift on to the BatchNorm behind it.
    unfolded = renorm.attach(interpolate_models(a, b, alpha), result.corrections, repair.example)
    nets = [graph.trace(m, data[0][:2]) for m in (a, b, unfolded)]
    for node, m in gather(nets, data, repair.targets).items():
        alive = ~m.dead(2) & ~m.dead(0) & ~m.dead(1)
        goal_mean, goal_std = renorm._goal(m, alpha)
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
    plain = renorm.reset(interpolate_models(a, b, 0.5), data, method=method)
    assert relative(output(repaired.model, x), output(plain, x)) < 1e-5


def test_frozen_batchnorm_differs_from_reset_by_std_against_variance():
    """With frozen BNs the aim is the interpolated std, while the BN divides by the interpolated variance's root."""
    name = "vgg11-bn-w0.125"
    a, b, data = pair(name)
    # Endpoints whose BatchNorm statistics are those of this data.
    a, b = renorm.reset(a, data), renorm.reset(b, data)
    repaired = renorm.Repair(a, b, data, targets=("conv",), bn="frozen")(0.5).model
    nets = [graph.trace(m, data[0][:2]) for m in (a, b, repaired)]
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
            unfolded = renorm.attach(interpolate_models(a, b, alpha), repair(alpha).corrections, repair.example)
            assert goal_errors((a, b), unfolded, data, repair.targets[:1], alpha) < 1e-8


def test_eq5_predicts_the_measured_variance_to_rounding():
    name = "mlp3-plain-w8"
    a, b, data = pair(name)
    for alpha in (0.1, 0.5, 0.8):
        rows = diagnostics.first_layer_theory(a, b, interpolate_models(a, b, alpha), data, alpha)
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
    unfolded = renorm.attach(interpolate_models(a, b, 0.5), result.corrections, repair.example)
    assert relative(output(result.model, x), output(unfolded, x)) < 1e-5
    if "resnet" in name:
        assert result.visible and isinstance(result.model, torch.fx.GraphModule)
    else:
        assert not result.visible and not result.new_biases
        assert type(result.model) is type(a) and result.model.state_dict().keys() == a.state_dict().keys()


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
    out = renorm.reset(model, data)
    net = graph.trace(out, data[0][:2])
    norms = renorm._batchnorms(net)
    moments = gather([net], data, {node.args[0].name for node in norms.values()})
    for node in norms.values():
        module, m = net.modules[node.target], moments[node.args[0].name]
        torch.testing.assert_close(module.running_mean, m.mean(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(module.running_var, m.var(), rtol=1e-9, atol=1e-12)


def test_simultaneous_batch_mean_is_what_torch_batchnorm_records():
    """The released code: momentum=None BatchNorm in train mode, cumulative mean of unbiased batch variances."""
    name = "vgg11-bn-w0.125"
    a, b, data = pair(name)
    mid = interpolate_models(a, b, 0.5)
    ours = renorm.reset(mid, data, method="simultaneous", pooling="batch-mean")
    theirs = copy.deepcopy(mid)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for x in data:
            theirs(x)
    for k, v in theirs.state_dict().items():
        if "running" in k:
            torch.testing.assert_close(ours.state_dict()[k], v, rtol=1e-9, atol=1e-12)


def test_block_targets_are_the_ends_of_blocks():
    name = "resnet8-bn-w0.5"
    net = graph.trace(make(name), inputs(name, 2))
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
    with pytest.raises(ValueError, match="method must be one of 'closed-form'"):
        renorm.Repair(a, b, data, method="exact")
    with pytest.raises(ValueError, match="calibration data is empty"):
        renorm.Repair(a, b, [])
    with pytest.raises(ValueError, match="no BatchNorm statistics to reset"):
        renorm.reset(a, data)
    with pytest.raises(ValueError, match="nothing to correct"):
        renorm.Repair(a, b, data, targets=("conv",))
    with pytest.raises(KeyError, match="no node 'convs'"):
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
    unfolded = renorm.attach(interpolate_models(a, b, 0.5), result.corrections, repair.example)
    assert result.visible
    assert relative(output(result.model, data[0]), output(unfolded, data[0])) < 1e-9


def test_classifier_is_left_alone_also_before_a_softmax():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.LogSoftmax(1))
    traced = graph.trace(net, torch.zeros(2, 4))
    assert renorm.target_nodes(traced) == ["_0"] and renorm.target_nodes(traced, "classifier") == ["_2"]


def test_linear_layers_on_tokens_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="node '_0': the units .* are not on axis 1"):
        renorm.Repair(net, copy.deepcopy(net), [torch.randn(5, 4, 4)])


def test_batch_mean_pools_the_endpoints_too():
    """With one batch, unbiased over unbiased is the ratio that exact pooling gives."""
    a, b, data = pair("mlp3-plain-w8")
    one, x = [torch.cat(data)], inputs("mlp3-plain-w8", dtype=torch.float64)
    exact = renorm.Repair(a, b, one, method="simultaneous")
    pooled = renorm.Repair(a, b, one, method="simultaneous", pooling="batch-mean")
    n = len(one[0])
    for node, moments in exact.ends.items():
        torch.testing.assert_close(pooled.ends[node].var(1), moments.var(1) * n / (n - 1), rtol=1e-9, atol=0)
    # A batch is normalised to the unbiased goal by its own population std; that factor is the only difference.
    assert relative(output(pooled(0.5).model, x), output(exact(0.5).model, x)) < 2 / n
    for method in ("sequential", "closed-form"):
        with pytest.raises(ValueError, match="pooling='batch-mean' is of method='simultaneous'"):
            renorm.Repair(a, b, data, method=method, pooling="batch-mean")
    with pytest.raises(ValueError, match="two values a channel"):
        renorm.Repair(a, b, [*one, one[0][:1]], method="simultaneous", pooling="batch-mean")


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
