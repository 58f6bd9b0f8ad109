"""What a GPU computes, beside the CPU. Everything here is skipped where there is none."""

import copy
import json
import math
import os
import shutil
from dataclasses import replace

import batch
import needs
import pytest
import torch
from cases import CASES, batches, inputs, make, noisy
from torch import nn

from companion.experiments.comparisons import label_agreement
from companion.figures import report
from companion.runs.data import load, project_root
from companion.runs.devices import device_name
from companion.runs.models import build
from companion.runs.recipes import Recipe
from companion.runs.store import Store
from companion.runs.train import fit, train
from repairlib import combine, evaluate, evaluate_many, match_activations, match_weights, permutation_spec, reset
from repairlib.corrections import fold_batchnorms
from repairlib.interpolate import non_finite
from repairlib.permutations import permute, random_permutation
from repairlib.renorm import METHODS, Repair

# CUDA warns of what is no concern of ours, such as a thread of autograd without a context.
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:the training step is no CUDA graph"),
]
DEVICES = ("cpu", "cuda")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions in float32: by default they round to TF32's 10 bits, as one test here shows."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("REPAIRLIB_DEVICE", "cuda")


def on_both(name, make_result):
    """What a function makes of two related networks and their data, on the CPU and on the GPU."""
    a = make(name)
    b = noisy(permute(a, spec := permutation_spec(a, inputs(name)), random_permutation(spec, 1)), 0.3)
    return [make_result(a.to(at), copy.deepcopy(b).to(at), [x.to(at) for x in batches(name)]) for at in DEVICES]


def assert_close(there, here, tolerance=1e-4):
    """To a tolerance relative to the largest number."""
    assert there.is_cuda and there.dtype == here.dtype
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=tolerance * max(1e-3, float(here.abs().max())))


@pytest.mark.parametrize("match", [match_activations, match_weights])
@pytest.mark.parametrize("name", CASES)
def test_matchings_are_those_of_the_cpu(name, match):
    def matched(a, b, data):
        found = match(a, b, data)
        return found, found.apply(b)(data[0]).detach(), b(data[0]).detach()

    (here, _, _), (there, aligned, plain) = on_both(name, matched)
    assert str(here.spec) == str(there.spec)
    assert here.objective == pytest.approx(there.objective, rel=1e-4)
    for group, permutation in here.permutation.items():
        assert torch.equal(permutation, there.permutation[group]), group
    assert_close(aligned, plain.cpu())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_repaired_networks_are_those_of_the_cpu(name, method):
    def repaired(a, b, data):
        aligned = match_weights(a, b, data).apply(b)
        return Repair(a, aligned, data, method=method)(0.4).model(data[0]).detach()

    here, there = on_both(name, repaired)
    assert_close(there, here, 1e-3)


@pytest.mark.parametrize("name", [name for name in CASES if "-bn-" in name])
def test_batchnorm_is_reset_and_folded_as_on_the_cpu(name):
    for change in (lambda a, data: reset(a, data).model, lambda a, data: fold_batchnorms(a, data[0][:2])):
        here, there = on_both(name, lambda a, b, data, change=change: change(a, data)(data[0]).detach())
        assert_close(there, here)


@pytest.mark.parametrize("name", CASES)
def test_combinations_are_drawn_and_evaluated_as_on_the_cpu(name):
    schemes = combine.bernoulli(0.3), combine.subcube(0.7), combine.hyperplane(0.2)

    def measured(a, b, data):
        labelled = [(x, torch.arange(len(x), device=x.device) % 5) for x in data]
        states = [combine.elementwise(a.state_dict(), b.state_dict(), scheme, 3) for scheme in schemes]
        counts = label_agreement(a, states, (a.state_dict(), b.state_dict()), labelled)
        return states, [evaluate(a, labelled), *evaluate_many(a, states, labelled, progress=False)], counts

    here, there = on_both(name, measured)
    for i, tolerance in enumerate((0, 0, 1e-5)):  # a logarithm is rounded otherwise
        for key, value in here[0][i].items():
            assert_close(there[0][i][key], value, tolerance)
    for (loss, accuracy), (loss_there, accuracy_there) in zip(here[1], there[1], strict=True):
        assert loss_there == pytest.approx(loss, rel=1e-4) and accuracy_there == accuracy
    assert here[2] == there[2]


def test_tf32_changes_convolutions_but_little(monkeypatch):
    layer, x = nn.Conv2d(64, 64, 3, device="cuda"), torch.randn(64, 64, 32, 32, device="cuda")
    exact = layer(x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert 0 < float((layer(x) - exact).abs().max()) < 0.01 * float(exact.abs().max())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_on_the_device(bad):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for size, place in ((1, 0), (1000, 999), (100_003, 50_000)):
            state = {name: torch.ones(size, dtype=dtype, device="cuda") for name in "abc"}
            assert non_finite(state) is None
            state["b"][place] = bad
            assert non_finite(state) == "b"


# training

FAMILIES = ["mlp2-bn-w16", "vgg11-bn-w0.125", "resnet8-bn-w0.5", "resnet8-ln-w0.5", "resnet8-fixup-w0.5",
            "tiny10-ln-w0.5"]  # fmt: skip
AUGMENT = ("translate", "cutout", "resize", "rotate", "resized-crop")


def learn(name, steps=30, callback=None, bf16=True, augment=(), batch_size=20):
    """Losses of a network that is trained on the GPU, and the network."""
    digits = load("digits", device="cuda")
    digits = replace(digits, train=digits.train.take(torch.arange(steps * batch_size)))
    recipe = Recipe("test", 1, batch_size, 0.03, "linear", augment=augment, bf16=bf16)
    torch.manual_seed(0)
    net = build(name, digits.shape, digits.classes)
    return fit(net, digits, recipe, callback=callback), net


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_learn(name):
    losses, net = learn(name, steps=60)
    assert losses.isfinite().all() and losses[-10:].mean() < losses[:5].mean()
    assert all(p.is_cuda and p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_step_waits_for_the_gpu(name):
    """CUDA itself raises if one does: from after the second step, which has made all there is to make, to the 45th."""

    def forbid(step, model, loss):
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 45 else "default")

    try:
        losses, _ = learn(name, steps=48, callback=forbid, augment=AUGMENT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses) == 48


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_graph_takes_the_same_steps(name, bf16, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    direct, net = learn(name, steps=20, bf16=bf16, augment=("translate",))
    monkeypatch.setenv("REPAIRLIB_GRAPH", "1")
    recorded, same = learn(name, steps=20, bf16=bf16, augment=("translate",))
    assert len(replays) == 17
    torch.testing.assert_close(recorded, direct, rtol=0.1 if bf16 else 1e-2, atol=0)
    for (key, value), other in zip(net.state_dict().items(), same.state_dict().values(), strict=True):
        if not value.is_floating_point():
            assert torch.equal(value, other), key  # BatchNorm's number of batches


def test_the_first_steps_are_those_of_the_cpu():
    recipe, digits = Recipe("test", 1, 200, 0.03, "linear", augment=("translate",)), load("digits")
    losses = []
    for device in DEVICES:
        torch.manual_seed(0)
        losses.append(fit(build("resnet8-bn-w0.5", digits.shape, 10), digits.to(device), recipe))
    assert losses[1].tolist() == pytest.approx(losses[0].tolist(), rel=0.02)


def test_a_trained_network_is_stored_and_says_where_it_was_trained(tmp_path):
    name, store = "digits/resnet8-bn-w0.25/smoke/s1", Store(tmp_path)
    before = torch.cuda.get_rng_state()
    net, metrics = train(name, device="cuda", progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(value.device.type == "cpu" and value.is_contiguous() for value in net.state_dict().values())
    store.save(name, net, metrics)
    info = json.loads((tmp_path / name / "run.json").read_text())
    assert info["processor"] == device_name("cuda") == torch.cuda.get_device_name()
    assert info["tf32"] == {"convolutions": False, "products": False}
    loaded = store.load(name).cuda()
    assert all(torch.equal(value, loaded.state_dict()[key].cpu()) for key, value in net.state_dict().items())


def test_a_notebook_runs_on_it(tmp_path, monkeypatch):
    notebook = tmp_path / "notebooks" / "repair" / "04_repair.py"
    notebook.parent.mkdir(parents=True)
    shutil.copy(project_root() / "notebooks" / "repair" / "04_repair.py", notebook)
    for module in (batch, needs):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(project_root()), prepend=os.pathsep)
    batch.execute(notebook, "smoke", "repair/fig3-left")
    assert report.load_item("repair/fig3-left", "smoke")["device"] == device_name("cuda")
