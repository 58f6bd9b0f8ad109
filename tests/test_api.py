"""The public names on a user's own modules: not ours, not named like ours, any iterable of batches."""

import ast
import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import repairlib

ROOT = Path(repairlib.__file__).parent


class Mine(nn.Module):
    """A user's network with a residual connection, functional calls and in-place operations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.left, self.norm, self.right = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.right(nn.functional.relu(self.norm(self.left(x)), inplace=True))
        y += x
        return self.out(torch.relu_(y).mean((2, 3)))


@pytest.fixture
def endpoints():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) * 6).round().clamp(-1, 1).long() + 1
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = Mine()
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        nets.append(net.eval())
    return *nets, [(x[i::3], y[i::3]) for i in range(3)]


def test_align_keeps_the_function_and_the_inputs(endpoints):
    a, b, data = endpoints
    before = {k: v.clone() for k, v in b.state_dict().items()}
    aligned = repairlib.align(a, b, data)
    x = data[0][0]
    torch.testing.assert_close(aligned(x), b(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in b.state_dict().items())
    assert any(not torch.equal(before[k], v) for k, v in aligned.state_dict().items())


def test_merge_is_align_interpolate_repair(endpoints):
    a, b, data = endpoints
    aligned, x = repairlib.align(a, b, data), data[0][0]
    paper = repairlib.Repair(a, aligned, data)(0.3).model
    folded = repairlib.Repair(a, aligned, data, targets=("conv", "linear", "classifier"), visible=False)(0.3).model
    with torch.no_grad():
        assert torch.equal(repairlib.merge(a, b, data, 0.3).model(x), folded(x))
        assert torch.equal(repairlib.merge(a, b, data, 0.3, visible=True).model(x), paper(x))
        assert torch.equal(repairlib.merge(a, b, iter(data), 0.3).model(x), folded(x))  # a one-shot iterable


def test_barrier_falls_from_direct_to_aligned_repaired(endpoints):
    a, b, data = endpoints
    aligned = repairlib.align(a, b, data)
    direct = repairlib.barrier(a, b, data, points=5)
    repaired = repairlib.barrier(a, aligned, data, points=5, repaired=repairlib.Repair(a, aligned, data))
    assert 0 <= repaired < direct
    assert repairlib.barrier(a, a, data, points=3, metric="accuracy") == 0
    with pytest.raises(ValueError, match="two points or more, not 1"):
        repairlib.barrier(a, b, data, points=1)
    with pytest.raises(ValueError, match="unknown metric 'error'"):
        repairlib.barrier(a, b, data, metric="error")


def test_renormalize_a_pruned_network_with_one_batch(endpoints):
    a, _, data = endpoints
    pruned = copy.deepcopy(a)
    with torch.no_grad():
        for layer in (pruned.stem, pruned.left, pruned.right):
            layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0
    x = data[0][0]
    repaired = repairlib.renormalize(pruned, a, x, targets="conv")
    from_loader = repairlib.renormalize(pruned, a, [data[0]], targets="conv")
    with torch.no_grad():
        assert type(repaired.model) is Mine and torch.equal(repaired.model(x), from_loader.model(x))
        goal, before, after = (net.stem(x).std((0, 2, 3)) for net in (a, pruned, repaired.model))
        torch.testing.assert_close(after, goal, rtol=1e-4, atol=0)
        assert not torch.allclose(before, goal, rtol=1e-2)
    goals = repairlib.Goals(a, x)  # measured once, for any number of networks
    assert len(goals.renormalize(pruned).visible) == 1  # the end of the block


def test_data_independent_renormalisation(endpoints):
    a, b, data = endpoints
    x = data[0][0]
    merged = repairlib.interpolate_models(a, b)
    with torch.no_grad():
        assert not torch.equal(repairlib.batch_statistics(merged)(x), merged(x))
    recorded = []
    for net in (a, b):
        with repairlib.Recorder(net, x) as recorder:
            net.train()(x)
        recorded.append(recorder.statistics)
    result = repairlib.renormalize(merged, recorded, x, method="batch", correct="rescale")
    assert set(result.visible) == set(recorded[0]) and result.model(x).isfinite().all()


def test_public_names_and_modules_are_there():
    assert all(hasattr(repairlib, name) for name in repairlib.__all__)
    modules = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    assert all(inspect.ismodule(getattr(repairlib, name)) for name in modules)
    assert repairlib.evaluate is repairlib.evaluation.evaluate


# What a module may import besides the standard library and this one.
ALLOWED = {"torch", "numpy", "scipy", "tqdm", "jaxtyping", "repairlib"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_nothing_of_the_experiments(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        for name in {name.partition(".")[0] for name in names} - ALLOWED - sys.stdlib_module_names:
            raise AssertionError(f"{path.name}, line {node.lineno} imports {name}")


def test_importing_the_library_loads_nothing_heavy():
    heavy = ("torchvision", "pandas", "matplotlib", "PIL", "filelock", "safetensors", "sklearn", "companion", "scipy")
    code = f"import sys, repairlib; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_renormalisation_returns_what_it_did(endpoints):
    a, b, data = endpoints
    aligned = repairlib.align(a, b, data)
    results = {
        "merge": repairlib.merge(a, b, data, visible=True),
        "repair": repairlib.repair(a, aligned, data),
        "Repair": repairlib.Repair(a, aligned, data)(0.5),
        "renormalize": repairlib.renormalize(a, b, data),
        "reset": repairlib.reset(a, data),
    }
    assert {type(result) for result in results.values()} == {repairlib.Repaired}
    assert str(results["reset"]).splitlines() == ["Mine: 0 corrected, 0 visible"]
    first, head, *rows = str(results["merge"]).splitlines()
    (block,) = results["merge"].visible
    assert first == f"Mine: {len(rows)} corrected, 1 visible" and head.split()[:2] == ["node", "units"]
    assert [row.split()[0] for row in rows] == list(results["merge"].corrections)
    assert [row.split()[0] for row in rows if row.endswith("visible")] == [block]


def test_every_way_of_aligning_keeps_the_function(endpoints):
    a, b, data = endpoints
    x = data[0][0]
    results = []
    for method in ("activations", "weights", "straight-through", "transport"):
        aligned = repairlib.align(a, b, data, method=method)
        torch.testing.assert_close(aligned(x), b(x), rtol=1e-4, atol=1e-4)
        results.append(torch.cat([p.detach().flatten() for p in aligned.parameters()]))
    mine = torch.cat([p.detach().flatten() for p in a.parameters()])
    assert mine @ results[1] == max(mine @ r for r in results)  # that is what matching by weights maximises
    with pytest.raises(ValueError, match="unknown method 'weigths'; the nearest is 'weights'"):
        repairlib.align(a, b, data, method="weigths")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_merge(endpoints, dtype):
    a, b, data = endpoints
    single = repairlib.merge(a, b, data).model
    half = repairlib.merge(copy.deepcopy(a).to(dtype), copy.deepcopy(b).to(dtype), data).model
    assert all(p.dtype == dtype for p in half.parameters())
    x = data[0][0]
    with torch.no_grad():
        close = (half(x.to(dtype)).argmax(1) == single(x).argmax(1)).float().mean()
    assert close > 0.9
