import copy
import math
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion.runs import train as training
from companion.runs.data import AUGMENTATIONS, Dataset, Split, iterate, load
from companion.runs.devices import has_bfloat16
from companion.runs.models import build
from companion.runs.train import DivergedError, Recipe, evaluate, find_recipe, fit, parse_run, train

RUN = "digits/mlp2-plain-w16/smoke/s1"


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def run(name=RUN, **options):
    return train(name, device="cpu", progress=False, **options)


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# recipes


def test_jordans_recipes_are_table_1():
    table = {r: (r.batch_size, r.epochs, r.schedule, r.lr, r.weight_decay, set(r.augment), r.momentum)
             for r in (find_recipe("jordan", family, "cifar10") for family in ("mlp", "vgg", "resnet"))}  # fmt: skip
    assert list(table.values()) == [
        (2000, 100, "linear", 0.2, 0.0, {"translate"}, 0.9),
        (500, 100, "cosine", 0.08, 0.0005, {"flip", "translate"}, 0.9),
        (500, 200, "cosine", 0.4, 0.0001, {"flip", "translate", "cutout"}, 0.9),
    ]


@pytest.mark.parametrize("data", ["digits", "mnist", "svhn"])
def test_digits_are_not_mirrored(data):
    for name, kinds in training.RECIPES.items():
        for kind in kinds:
            assert set(find_recipe(name, kind, data).augment) <= {"translate", "resize", "rotate"}


def test_recipe_of_a_biased_half_is_that_of_the_whole():
    for data in ("digits", "digits-hard", "mnist", "svhn", "cifar100"):
        for kind in ("resnet-bn", "torchvision"):
            whole = find_recipe("jordan", kind, data)
            assert (
                find_recipe("jordan", kind, f"{data}-first80") == find_recipe("jordan", kind, f"{data}-last51") == whole
            )


def test_biased_half_trains_by_name():
    name = RUN.replace("digits", "digits-hard-last80")
    assert str(parse_run(name)) == name
    first, last = (run(name.replace("last", which))[0] for which in ("first", "last"))
    assert not equal(bits(first), bits(last))


def test_every_recipe_is_complete():
    families = {"mlp", "vgg", "resnet", "tiny", "torchvision"}
    for name, kinds in training.RECIPES.items():
        assert {kind.split("-")[0] for kind in kinds} <= set(kinds) & families  # a norm's own recipe is an exception
        assert {r.name for r in kinds.values()} == {name}
        assert all(set(r.augment) <= set(AUGMENTATIONS) for r in kinds.values())
        if name in ("fast", "quick", "smoke"):
            assert families <= set(kinds)
    # A stored run counts a field it does not have as its default, so fields beyond the first six must have one.
    assert [f.name for f in fields(Recipe)][:5] == ["name", "epochs", "batch_size", "lr", "schedule"]
    Recipe("new", 1, 1, 0.1, "linear")


def test_recipe_of_the_closest_kind():
    for name in ("jordan", "jordan-released", "fast", "quick", "smoke"):  # stored runs and figures came from these
        for kind in ("mlp-plain", "mlp-bn", "mlp-fused", "vgg-plain", "vgg-bn", "vgg-fused", "resnet-bn"):
            assert find_recipe(name, kind, "cifar10") is training.RECIPES[name].get(
                kind, training.RECIPES[name][kind.split("-")[0]]
            )
    released = training.RECIPES["jordan-released"]
    assert find_recipe("jordan-released", "resnet-ln", "cifar10") is released["resnet-ln"]
    assert find_recipe("jordan-released", "resnet-fixup", "cifar10") is released["resnet"]
    assert find_recipe("qu", "vgg-plain", "cifar10").schedule == "step"
    assert find_recipe("qu", "vgg-plain-nobias", "cifar10").schedule == "cosine"
    assert find_recipe("qu", "resnet-plain-nobias", "cifar10").schedule == "cosine"
    with pytest.raises(ValueError, match="recipe 'csiszarik' is for resnet, tiny, not for mlp-bn; .*'"):
        find_recipe("csiszarik", "mlp-bn", "cifar10")
    with pytest.raises(ValueError, match="^run name 'digits/tiny10-ln/jordan/s1': recipe 'jordan' is for mlp"):
        parse_run("digits/tiny10-ln/jordan/s1")


def test_step_schedule_of_the_other_papers():
    """Qu and Horvath 2024: at iterations 32,000 and 48,000. Csiszarik et al. 2023: at each third of 300 epochs."""
    qu = find_recipe("qu", "resnet-ln", "cifar10")
    per_epoch = 50_000 // qu.batch_size
    rates = [qu.lr_at(step, per_epoch) for step in (0, per_epoch - 1, 31_999, 32_000, 47_999, 48_000, 62_399)]
    assert rates == pytest.approx([0.1 / per_epoch, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    tiny = find_recipe("csiszarik", "tiny-ln", "cifar10")
    rates = [tiny.lr_at(epoch * 500 + step, 500) for epoch, step in ((0, 0), (99, 499), (100, 0), (200, 0), (299, 499))]
    assert rates == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-4])
    assert len(tiny.augment) == 3 and find_recipe("csiszarik", "resnet-ln", "cifar10").epochs == 250


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 2.5])
def test_learning_rate_rises_to_its_peak_and_falls_to_zero(schedule, warmup):
    how = Recipe("test", 10, 1, 0.3, schedule, warmup_epochs=warmup)
    rates = [how.lr_at(step, 8) for step in range(80)]
    peak = int(warmup * 8)
    assert rates[peak] == 0.3 == max(rates) and min(rates) > 0
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] <= 0.3 / (80 - peak) + 1e-12
    middle = how.lr_at(peak + (80 - peak) // 2, 8)
    assert middle == pytest.approx(0.15)  # both schedules are at half height half way


@pytest.mark.parametrize("schedule,milestones,words", [
    ("steps", (), "'steps'; the nearest is 'step'"), ("step", (), "step needs them"),
    ("cosine", (0.5,), "step needs them, and only it"),
])  # fmt: skip
def test_impossible_schedule(schedule, milestones, words):
    with pytest.raises(ValueError, match=words):
        Recipe("test", 1, 1, 0.1, schedule, milestones=milestones)


# run names


@pytest.mark.parametrize("name,words", [
    ("minst/mlp2-plain/smoke/s1", "'minst'.*'mnist'"), ("digits/mlp2-plane/smoke/s1", "'mlp2-plane'.*'mlp2-plain'"),
    ("digits/mlp2-plain/quik/s1", "'quik'.*'quick'"), ("digits/mlp2-plain/smoke/seed7", "'seed7'.*'s7'"),
    ("digits/mlp2-plain/smoke/s01", "'s01'.*'s1'"), ("digits/mlp2-plain/smoke/s-1", "'s-1'.*'s1'"),
    ("digits/mlp2-plain/smoke", "is not <data>/<model>/<recipe>/s<seed>"),
    ("digits/mlp2-plain/smoke/s1/", "is not <data>"), ("", "is not <data>"),
])  # fmt: skip
def test_bad_run_name_gives_the_nearest_valid_part(name, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_run(name)
    assert f"run name {name!r}" in str(caught.value)


def test_run_name_round_trip():
    for name in ("digits/resnet20-bn-w4-sc1/quick/s0", "cifar100/vgg16-fused-w0.5/jordan-released/s123"):
        assert str(parse_run(name)) == name
    assert str(parse_run("mnist/mlp10-fused/fast/s1")) == "mnist/mlp10-fused-w128/fast/s1"


# training


@pytest.mark.parametrize("name", [RUN, "digits/mlp3-fused-w16/smoke/s1", "digits/resnet8-bn-w0.25/smoke/s1",
                                  "digits/resnet8-fixup-w0.25/smoke/s1"])  # fmt: skip
def test_training_again_gives_the_same_bits(name):
    torch.manual_seed(1)
    first, metrics = run(name)
    torch.manual_seed(2)
    torch.rand(5)  # the global generator plays no part
    second, again = run(name)
    other, _ = run(name.replace("s1", "s2"))
    assert equal(bits(first), bits(second)) and not equal(bits(first), bits(other))
    assert {k: v for k, v in metrics.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


def test_training_in_another_process_with_other_settings_gives_the_same_bits(tmp_path):
    """Hash seeds, thread settings and the global generator of a process do not matter."""
    name = "digits/resnet8-bn-w0.25/smoke/s1"
    script = (
        "import torch; torch.set_num_threads(2); torch.manual_seed(5)\n"
        "from companion.runs.train import train\n"
        f"model, _ = train({name!r}, device='cpu', progress=False)\n"
        "assert torch.get_num_threads() == 2\n"
        f"torch.save(model.state_dict(), {str(tmp_path / 'weights')!r})"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    assert equal(torch.load(tmp_path / "weights", weights_only=True), bits(run(name)[0]))


def test_the_callback_sees_the_initial_weights_and_every_step():
    seen = {}

    def look(step, model, loss):
        seen[step] = copy.deepcopy(model.state_dict())

    final, _ = train("digits/mlp2-plain-w8/smoke/s1", callback=look, progress=False)
    again, _ = train("digits/mlp2-plain-w8/smoke/s1", progress=False)
    assert list(seen) == list(range(len(seen))) and len(seen) > 2
    assert all(torch.equal(value, final.state_dict()[key]) for key, value in seen[max(seen)].items())
    assert all(torch.equal(value, final.state_dict()[key]) for key, value in again.state_dict().items())
    torch.manual_seed(1)
    start = build("mlp2-plain-w8", (1, 16, 16), 10).state_dict()
    assert all(torch.equal(value, start[key]) for key, value in seen[0].items())


def test_seed_gives_the_initial_weights():
    untrained = Recipe("none", 0, 200, 0.1, "linear")
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = build("mlp2-plain-w16", (1, 16, 16), 10)
        assert equal(bits(run(RUN.replace("s1", f"s{seed}"), recipe=untrained)[0]), bits(expected))


def test_training_leaves_the_process_as_it_was(monkeypatch):
    torch.manual_seed(0)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    monkeypatch.setenv("REPAIRLIB_THREADS", "3")
    _, metrics = run("digits/mlp2-fused-w16/smoke/s1")
    assert metrics["threads"] == 3 and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setenv("REPAIRLIB_THREADS", "many")
    with pytest.raises(ValueError, match="REPAIRLIB_THREADS.*'many'"):
        run()


def test_network_learns_and_metrics_are_those_of_the_network(digits):
    model, metrics = run("digits/mlp2-fused-w32/smoke/s1")
    assert metrics["test_accuracy"] > 0.6
    logits = model((digits.test.images / 255 - digits.mean[0]) / digits.std[0]).detach()
    assert metrics["test_loss"] == pytest.approx(float(F.cross_entropy(logits, digits.test.labels)), rel=1e-5)
    assert metrics["test_accuracy"] == float((logits.argmax(1) == digits.test.labels).double().mean())
    assert not model.training and metrics["shape"] == (1, 16, 16) and metrics["classes"] == 10


def test_fit_is_sgd_with_momentum_and_weight_decay(digits):
    """Two full-batch steps against the formula, in float64."""
    data = replace(digits, train=Split(digits.train.images[:50], digits.train.labels[:50]))
    how = Recipe("test", 2, 1000, 0.5, "linear", weight_decay=0.1, label_smoothing=0.2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).double()
    x = ((data.train.images / 255 - data.mean[0]) / data.std[0]).double().flatten(1)
    target = F.one_hot(data.train.labels, 10).double() * 0.8 + 0.02
    weight, bias = (p.detach().clone() for p in model.parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    expected = []
    for rate in (0.5, 0.25):
        logits = x @ weight.T + bias
        expected.append(float(-(target * logits.log_softmax(1)).sum(1).mean()))
        residual = (logits.softmax(1) - target) / 50
        for v, g, p in zip(velocity, (residual.T @ x, residual.sum(0)), (weight, bias), strict=True):
            v.mul_(0.9).add_(g + 0.1 * p)
            p.sub_(rate * v)

    class Double(nn.Module):  # batches are float32
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.double())

    losses = fit(Double(), data, how)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(model[1].weight, weight, atol=1e-6) and torch.allclose(model[1].bias, bias, atol=1e-6)


needs_bfloat16 = pytest.mark.skipif(not has_bfloat16("cpu"), reason="this CPU does not multiply in bfloat16")


def gradient(name, digits, dtype=torch.float32, **changes):
    """The gradient of one step on 200 images, as `fit` takes it, as one vector in float64."""
    some = replace(digits, train=digits.train.take(torch.arange(200)))
    torch.manual_seed(0)
    net = build(name, digits.shape, digits.classes).to(dtype)
    before = torch.cat([p.detach().double().flatten() for p in net.parameters()])
    fit(net, some, Recipe("step", 1, 200, lr=1e-3, schedule="constant", momentum=0, **changes))
    assert all(p.dtype == dtype for p in net.parameters())
    return (before - torch.cat([p.detach().double().flatten() for p in net.parameters()])) / 1e-3


@needs_bfloat16
@pytest.mark.parametrize("name", ["resnet8-bn-w0.5", "resnet8-ln-w0.5", "tiny10-ln-w0.5", "vgg11-bn-w0.125"])
def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(digits, name):
    single, half = gradient(name, digits), gradient(name, digits, bf16=True)
    assert not torch.equal(single, half)
    cosine = F.cosine_similarity(single, half, dim=0)
    assert cosine > 0.97 and abs(half.norm() / single.norm() - 1) < 0.1, (cosine, half.norm() / single.norm())


@pytest.mark.parametrize("name", ["resnet8-bn-w0.5", "resnet8-ln-w0.5", "vgg11-bn-w0.125"])
def test_gradients_in_channels_last_agree_to_rounding(digits, name, monkeypatch):
    """Beside float64, in smooth networks.

    With ReLU and maximum pooling gradients differ by up to 1 % between layouts, as between machines: each sums in
    another order, which moves values by a millionth, and a unit that close to zero counts or does not.
    """
    monkeypatch.setattr(F, "relu", F.softplus)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: F.softplus(x))
    monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, x: F.avg_pool2d(x, self.kernel_size))
    x, y = next(iter(iterate(digits, "train", batch_size=200)))

    def gradients(dtype, layout):
        torch.manual_seed(0)
        net = build(name, digits.shape, digits.classes).to(dtype, memory_format=layout)
        F.cross_entropy(net(x.to(dtype)), y).backward()
        return torch.cat([p.grad.double().flatten() for p in net.parameters()])

    exact = gradients(torch.float64, torch.contiguous_format)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert (gradients(torch.float32, layout) - exact).norm() < 1e-4 * exact.norm()


def test_a_recipe_in_bfloat16_needs_a_device_that_has_it(digits, monkeypatch):
    monkeypatch.setattr(training, "has_bfloat16", lambda device: False)
    assert training.precision(find_recipe("fast", "vgg-bn", "cifar10"), "cpu") == "float32"
    assert torch.equal(gradient("mlp2-plain-w16", digits), gradient("mlp2-plain-w16", digits, bf16=True))


def test_batches_that_are_not_full_are_left_out(digits):
    model = build("mlp1-plain-w4", digits.shape)
    sizes = []
    model.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    fit(model, digits, Recipe("test", 2, 500, 0.01, "linear"))
    assert sizes == [500] * 4
    fit(model, digits, Recipe("test", 1, 2000, 0.01, "linear"))
    assert sizes[4:] == [1397]


# callbacks, and parts of a schedule


def test_callback_sees_every_step_and_changes_nothing(digits):
    how = Recipe("test", 2, 300, 0.1, "linear", momentum=0.5)
    nets = []
    for watched in (False, True):
        seen = []

        def record(step, model, loss, seen=seen):
            seen.append((step, float(loss), evaluate(model, iterate(digits, "test", 400))[1], model.training))

        torch.manual_seed(0)
        model = build("mlp2-bn-w16", digits.shape)
        losses = fit(model, digits, how, 3, callback=record if watched else None)
        nets.append(bits(model))
    assert equal(*nets)
    assert [step for step, *_ in seen] == list(range(1, 9)) and [loss for _, loss, *_ in seen] == losses.tolist()
    assert seen[-1][2] > seen[0][2] and all(training for *_, training in seen)


def test_callback_stops(digits):
    how = Recipe("test", 2, 300, 0.1, "linear")
    nets, counts = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = build("mlp2-plain-w16", digits.shape)
        counts.append(len(fit(model, digits, how, 3, callback=lambda step, model, loss: step == 6)))
        nets.append(bits(model))
    assert counts == [6, 6] and equal(*nets)
    calls = []
    fit(model, digits, how, callback=lambda step, model, loss: calls.append(step))  # None goes on
    assert len(calls) == 8


def test_stopping_after_an_epoch_gives_the_first_epochs_of_the_whole_run(digits):
    """Bit for bit: `qu~stop2` is what `qu` is after two epochs, with warm-up, augmentation and running statistics."""
    how = Recipe("test", 4, 300, 0.1, "cosine", augment=("translate",), warmup_epochs=1.5)
    torch.manual_seed(0)
    model = build("vgg11-bn-w0.125", digits.shape)
    part, epochs = copy.deepcopy(model), {}

    def keep(step, model, loss):
        epochs[step / 4] = bits(model)

    losses = fit(model, digits, how, 5, callback=keep)
    first = fit(part, digits, replace(how, stop=2), 5)
    assert equal(bits(part), epochs[2]) and torch.equal(first, losses[:8])
    steps = []
    rest = fit(part, digits, replace(how, start=2), 5, callback=lambda step, model, loss: steps.append(step))
    assert steps == list(range(9, 17)) and len(rest) == 8
    assert rest[0] == losses[8]  # the same images; from then on, momentum differs


def test_training_until_an_accuracy(digits):
    how = Recipe("test", 30, 100, 0.05, "constant", until=0.9)
    torch.manual_seed(0)
    model, accuracies = build("mlp2-plain-w32", digits.shape), []

    def record(step, model, loss):
        if step % 13 == 0:
            accuracies.append(evaluate(model, iterate(digits, "train", 1000))[1])

    losses = fit(model, digits, how, callback=record)
    assert len(losses) == 13 * len(accuracies) < 13 * 30
    assert accuracies[-1] >= 0.9 > max(accuracies[:-1], default=0)


def test_initial_weights_by_name():
    untrained = Recipe("none", 0, 200, 0.1, "linear")
    layers = {}
    for init in ("kaiming-normal", "fan-out", "uniform"):
        net, _ = run("digits/vgg11-plain-w1/smoke/s1", recipe=replace(untrained, init=init))
        layers[init] = net
        assert bool(net.conv3.bias.any()) == (init == "uniform")
    inputs, outputs = 128 * 9, 256 * 9
    expected = {"kaiming-normal": 2 / inputs, "fan-out": 2 / outputs, "uniform": 1 / (3 * inputs)}
    for init, variance in expected.items():
        assert float(layers[init].conv3.weight.detach().var()) == pytest.approx(variance, rel=0.02)
    assert float(layers["fan-out"].head.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert float(layers["uniform"].conv3.weight.detach().abs().max()) <= inputs**-0.5
    with pytest.raises(ValueError, match="unknown init 'normal'; the nearest is"):
        replace(untrained, init="normal")


def test_batches_must_divide_among_the_processes(digits, monkeypatch):
    monkeypatch.setattr(training, "processes", lambda: (0, 3))
    with pytest.raises(ValueError, match="mine: batches of 200 images cannot be divided among 3 processes"):
        fit(build("mlp1-plain-w4", digits.shape), digits, find_recipe("smoke", "mlp", "digits"), name="mine")


def test_huge_learning_rate_stops_the_run_with_name_step_and_loss():
    huge = Recipe("huge", 3, 200, 1e6, "linear")
    with pytest.raises(DivergedError) as caught:
        run("digits/mlp8-plain-w16/smoke/s1", recipe=huge)
    message = str(caught.value)
    assert message.startswith("digits/mlp8-plain-w16/smoke/s1: the loss became nan at step ")
    assert " of 18; the last finite loss was " in message
    assert 1 < int(message.split("at step ")[1].split(" ")[0]) <= 18


def diverging(digits, step):
    """A network whose loss becomes NaN at a given step, counted from 1; losses before are ln 10."""

    class Diverging(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.zeros(())), 0

        def forward(self, x):
            self.calls += 1
            return x.new_zeros(len(x), 10) * self.weight + (math.nan if self.calls == step else 0)

    return Diverging()


@pytest.mark.parametrize("step,last", [(1, "no loss was finite"), (2, "last finite loss was 2.30259"), (13, "2.30259")])
def test_diverging_step_is_exact(digits, step, last):
    with pytest.raises(DivergedError, match=f"^mine: the loss became nan at step {step} of 13; .*{last}"):
        fit(diverging(digits, step), digits, Recipe("test", 1, 100, 0.1, "linear"), name="mine")


def test_losses_looked_at_rarely_still_give_the_exact_step():
    """As on a GPU, where they are read every 50 steps."""
    losses = torch.tensor([1.0, 2.0, 3.0, math.inf, math.nan, 0.0])
    training._check_losses(losses, 0, 3, "run")
    with pytest.raises(DivergedError, match="became inf at step 4 of 6; the last finite loss was 3"):
        training._check_losses(losses, 2, 5, "run")


def test_last_step_may_diverge_too(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    with pytest.raises(DivergedError, match="mine: 1.weight became non-finite at step 1"):
        fit(model, digits, Recipe("test", 1, 1397, 1e38, "linear", weight_decay=1e9), name="mine")


# evaluation


def test_evaluation_does_not_depend_on_batches_and_restores_modes(digits):
    torch.manual_seed(0)
    model = build("vgg11-bn-w0.125", digits.shape).train()
    model.bn2.eval()
    x = torch.randn(60, 1, 16, 16)
    y = torch.randint(10, (60,))
    before = bits(model)
    results = [evaluate(model, list(zip(x.split(n), y.split(n), strict=True))) for n in (60, 7, 1)]
    assert all(r == pytest.approx(results[0], rel=1e-6) for r in results)
    modes = {name: module.training for name, module in model.named_modules()}
    assert not modes.pop("bn2") and all(modes.values())
    assert equal(before, bits(model))  # running statistics too
    assert all(type(value) is float for value in results[0])


def test_evaluation_takes_any_precision_and_a_network_without_parameters(digits):
    torch.manual_seed(0)
    x, y = torch.randn(40, 12), torch.randint(3, (40,))
    model = nn.Linear(12, 3)
    single = evaluate(model, [(x, y)])
    assert evaluate(model.double(), [(x, y)]) == pytest.approx(single, rel=1e-6)
    logits = F.one_hot(y, 3).float()
    assert evaluate(nn.Identity(), [(logits, y)]) == pytest.approx((math.log(math.e + 2) - 1, 1.0))


def test_evaluating_on_nothing():
    with pytest.raises(ValueError, match="no batches"):
        evaluate(nn.Linear(2, 2), [])


def test_evaluation_restores_modes_after_an_error(digits):
    model = build("mlp1-bn-w4", digits.shape).train()
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))])
    assert model.training and model.bn1.training


# output


def test_one_line_at_the_end_when_stdout_is_no_terminal(capsys):
    train(RUN, device="cpu", progress=True)
    out = capsys.readouterr()
    assert out.out.startswith(f"{RUN}: test accuracy ") and out.out.count("\n") == 1 and not out.err
    run()
    assert capsys.readouterr() == ("", "")


def test_progress_bar_with_time_left_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train(RUN, device="cpu", progress=True)
    out = capsys.readouterr().out
    assert RUN in out and "12/12" in out and "<00:00" in out


def test_default_device(monkeypatch):
    monkeypatch.setenv("REPAIRLIB_DEVICE", "mps")
    assert training.default_device() == "mps"
    for wrong in ("gpu", "cuda:", "CPU", "cuda0"):
        monkeypatch.setenv("REPAIRLIB_DEVICE", wrong)
        with pytest.raises(
            ValueError, match=r"REPAIRLIB_DEVICE is cpu, cuda, cuda:0 \(or another number\) or mps, not"
        ):
            training.default_device()
    if not torch.cuda.is_available():
        monkeypatch.setenv("REPAIRLIB_DEVICE", "cuda:1")
        with pytest.raises(ValueError, match="REPAIRLIB_DEVICE is cuda:1, and PyTorch finds no GPU here"):
            training.default_device()
    monkeypatch.delenv("REPAIRLIB_DEVICE")
    assert training.default_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_data_set_of_ones_own(digits):
    n = 40
    images = torch.randint(256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split(images, torch.arange(n) % 3)
    model, metrics = run(dataset=Dataset("own", split, split, 3, (0.5,) * 3, (0.3,) * 3))
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 3) and metrics["shape"] == (3, 8, 8)
