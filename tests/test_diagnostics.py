import pytest
import torch
from cases import batches, make

from repairlib import diagnostics, recording, tracing
from repairlib.interpolate import interpolate_models
from repairlib.moments import Moments
from repairlib.renorm import Repair


def test_variance_ratio_is_the_papers():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    m = Moments()
    m.update(x, 3 * x, x / 2)
    assert diagnostics.variance_ratio(m, 2) == pytest.approx(0.25 / 5, rel=1e-5)
    assert diagnostics.variance_ratio(m, 0, (0, 0)) == pytest.approx(1)
    flat = Moments()
    flat.update(torch.ones(5, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match="undefined"):
        diagnostics.variance_ratio(flat, 1)


def test_profile_against_a_direct_computation():
    name = "mlp3-plain-w8"
    a, b, data = make(name, 0), make(name, 1), batches(name)
    mid = interpolate_models(a, b)
    rows = diagnostics.variance_profile(a, b, {"mid": mid, "a": a}, data)
    assert [row["layer"] for row in rows] == [1, 2, 3, 1, 2, 3]
    node = rows[1]["node"]
    v = []
    for model in (mid, a, b):
        net = tracing.trace(model, data[0])
        with recording.eval_mode(model):
            ((_, value),) = net.walk(torch.cat(data), [node])
        v.append(value.double().var(0, correction=0).sum())
    assert rows[1]["ratio"] == pytest.approx(float(v[0] / ((v[1] + v[2]) / 2)), rel=1e-5)
    assert rows[1]["ratio"] < 1
    # The goal is what REPAIR reaches, which is less than 1: it interpolates stds.
    repaired = Repair(a, b, data, limit=None)(0.5).model
    for row in diagnostics.variance_profile(a, b, {"repaired": repaired}, data):
        assert row["ratio"] == pytest.approx(row["goal"], rel=1e-4) and row["goal"] < 1


def test_channel_statistics_and_agreement():
    name = "vgg11-bn-w0.125"
    a, data = make(name), batches(name)
    node = tracing.trace(a, data[0]).nodes[1].name
    rows = diagnostics.channel_statistics({"a": a, "b": make(name, 1)}, data, node)
    assert {row["network"] for row in rows} == {"a", "b"} and all(row["variance"] > 0 for row in rows)
    for corr in diagnostics.unit_agreement(a, a, data).values():
        alive = corr != 0
        torch.testing.assert_close(corr[alive], torch.ones_like(corr[alive]), rtol=1e-5, atol=0)


def test_channel_statistics_of_a_network_with_visible_corrections():
    """Its node names are those of the network it came from, whichever of the two is named first."""
    name = "resnet8-plain-w0.5"
    a, b, data = make(name, 0), make(name, 1), batches(name)
    repair = Repair(a, b, data)
    merged, block = repair(0.5).model, repair.targets[-1]
    for models in ({"a": a, "merged": merged}, {"merged": merged, "a": a}):
        rows = diagnostics.channel_statistics(models, data, block)
        found = {key: [row["variance"] for row in rows if row["network"] == key] for key in models}
        found = {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}
        torch.testing.assert_close(found["a"], repair.ends[block].var(0), rtol=1e-5, atol=0)
        goal = repair.at(0.5)[block][1] ** 2
        torch.testing.assert_close(found["merged"][goal > 0], goal[goal > 0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["mlp3-plain-w8", "vgg11-bn-w0.125", "resnet8-ln-w0.5"])
def test_activation_scales_against_a_direct_computation(name):
    a, b, data = make(name, 0), make(name, 1), batches(name)
    found = diagnostics.activation_scales({"a": a, "b": b}, data)
    net = tracing.trace(b, data[0])
    nodes = [node for node in net.nodes if net.kinds[node.name] == "activation"]
    rows = [row for row in found if row["network"] == "b"]
    assert [row["node"] for row in rows[::2]] == [node.name for node in nodes] and len(rows) == 2 * len(nodes)
    whole = torch.cat(data)
    for before, after, node in zip(rows[::2], rows[1::2], nodes, strict=True):
        assert (before["place"], after["place"]) == ("before", "after") and before["layer"] == after["layer"]
        with recording.eval_mode(b):
            values = {key: x.clone() for key, x in net.walk(whole, [node.all_input_nodes[0].name, node.name])}
        for row, value in zip((before, after), values.values(), strict=True):
            x = value.double().transpose(0, 1).flatten(1)
            assert row["mean"] == pytest.approx(float(x.mean()), rel=1e-4, abs=1e-6)
            assert row["std"] == pytest.approx(float(x.std(1, correction=0).mean()), rel=1e-4)
            assert row["scale"] == pytest.approx(float(x.abs().mean()), rel=1e-4)
            assert row["zeros"] == pytest.approx(float((x == 0).double().mean()), abs=1e-4)
            assert row["dead"] == pytest.approx(float((x == 0).all(1).double().mean()))
    split = [x for batch in data for x in batch.split(7)]
    for row, other in zip(found, diagnostics.activation_scales({"a": a, "b": b}, split), strict=True):
        assert row["std"] == pytest.approx(other["std"], rel=1e-5) and row["zeros"] == pytest.approx(other["zeros"])


def test_activation_scales_of_a_repaired_network_are_the_goals():
    """Visible corrections count as part of the nonlinearity's input, whichever network is named first."""
    name = "resnet8-plain-w0.5"
    a, b, data = make(name, 0), make(name, 1), batches(name)
    repair = Repair(a, b, data, targets=("conv", "linear", "block"))
    merged = repair(0.5).model
    for models in ({"a": a, "merged": merged}, {"merged": merged, "a": a}):
        rows = diagnostics.activation_scales(models, data)
        assert len(rows) == 2 * 2 * 7
        std = {(row["network"], row["place"], row["layer"]): row["std"] for row in rows}
        assert std["merged", "before", 1] == pytest.approx(float(repair.at(0.5)[repair.targets[0]][1].mean()), rel=1e-3)
    with pytest.raises(ValueError, match="no nonlinearity"):
        diagnostics.activation_scales({"linear": torch.nn.Linear(2, 2)}, torch.randn(4, 2))


def test_weights_and_distances():
    a, b = make("vgg11-bn-w0.125", 0), make("vgg11-bn-w0.125", 1)
    found = diagnostics.weight_magnitudes(a)
    layers = {name: m for name, m in a.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert list(found) == list(layers)
    for name, layer in layers.items():
        values = torch.cat([p.detach().flatten() for p in layer.parameters()])
        assert found[name] == pytest.approx(float(values.abs().mean()), rel=1e-6)
    vectors = [torch.nn.utils.parameters_to_vector(model.parameters()).detach().double() for model in (a, b)]
    assert diagnostics.distance(a, b) == pytest.approx(float((vectors[0] - vectors[1]).norm()), rel=1e-9)
    a.train()(torch.cat(batches("vgg11-bn-w0.125")))  # moves the running statistics and nothing else
    moved = [(p - q).double().square().sum() for p, q in zip(a.buffers(), b.buffers(), strict=True) if p.ndim]
    expected = (diagnostics.distance(a, b) ** 2 + float(sum(moved))) ** 0.5
    assert diagnostics.distance(a, b, buffers=True) == pytest.approx(expected, rel=1e-9) and sum(moved) > 0
    with pytest.raises(ValueError):
        diagnostics.distance(a, make("mlp3-plain-w8"))
