import math
import weakref

import pytest
import torch
from cases import CASES, CLASSES, inputs, make
from hypothesis import given
from hypothesis import strategies as st
from test_combine import same_bits
from torch import nn

import repairlib
from companion.runs.data import Dataset, Split, iterate
from companion.runs.train import evaluate
from repairlib import evaluation, interpolate
from repairlib.evaluation import evaluate_many


def labelled(name, n=30, size=12, dtype=torch.float32):
    y = torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(1))
    return list(zip(inputs(name, n, dtype=dtype).split(size), y.split(size), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_many_states_agree_with_one_after_the_other(name):
    model, other = make(name, 0), make(name, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = [interpolate.interpolate_states(before, other.state_dict(), alpha) for alpha in (0.0, 0.4, 1.0)]
    data = labelled(name)
    expected = [evaluate(interpolate.with_state(model, state), data) for state in states]
    model.train()
    assert evaluate_many(model, states, data) == expected
    assert all(module.training for module in model.modules()) and same_bits(before, model.state_dict())


def test_states_and_batches_may_be_generators_and_one_state_is_alive_at_a_time(capsys):
    name = "mlp2-bn-w8"
    model, data, alive, most = make(name), labelled(name), weakref.WeakSet(), []

    def states():
        for seed in range(7):
            state = {k: v.clone() for k, v in make(name, seed).state_dict().items()}
            alive.update(state.values())
            most.append(len(alive) / len(state))
            yield state
            del state

    expected = [evaluate(make(name, seed), data) for seed in range(7)]
    assert evaluate_many(model, states(), iter(data)) == expected
    assert max(most) == 1
    assert evaluate_many(model, [], data) == []
    assert capsys.readouterr().out == ""  # nobody is looking


def test_no_state_is_kept_while_it_is_evaluated(monkeypatch):
    name, alive, found = "mlp2-bn-w8", weakref.WeakSet(), []
    model, data = make(name), labelled(name)

    def fresh(seed):
        state = {k: v.clone() for k, v in make(name, seed).state_dict().items()}
        alive.update(state.values())
        return state

    run = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: found.append(len(alive)) or run(*args))
    evaluate_many(model, (fresh(seed) for seed in range(4)), data)
    assert found == [0] * 4


def test_a_bar_counts_the_networks_for_whoever_looks(monkeypatch, capsys):
    name = "mlp2-bn-w8"
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/explore.ipynb")
    evaluate_many(make(name), [make(name).state_dict()] * 3, labelled(name))
    assert "networks: 100%" in (out := capsys.readouterr().out) and "3/3" in out
    evaluate_many(make(name), [make(name).state_dict()] * 3, labelled(name), progress=False)
    assert capsys.readouterr().out == ""


def test_tied_weights_and_precision():
    name = "mlp1-plain-w6"
    model = make(name, dtype=torch.float64)
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, CLASSES)).double()
    tied[3].weight = tied[1].weight
    data = labelled(name)  # float32: goes to the precision of the model
    for net in (model, tied):
        state = {k: v.float() for k, v in net.state_dict().items()}
        out = evaluate_many(net, [state], data)
        assert out[0] == pytest.approx(evaluate(interpolate.with_state(net, state), data), rel=1e-12)


def test_tokens_stay_integers():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3)).double()
    data = [(torch.randint(0, 9, (12, 5)), torch.randint(0, 3, (12,)))]
    assert evaluate_many(net, [net.state_dict()], data) == [evaluate(net, data)]


def test_evaluation_refuses_what_does_not_fit():
    model, data = make("mlp1-plain-w6"), labelled("mlp1-plain-w6")
    other, broken = make("mlp3-plain-w8").state_dict(), dict(model.state_dict())
    broken["fc1.bias"] = broken["fc1.bias"] * math.nan
    with pytest.raises(ValueError, match="is .6, 64. in the model, .8, 64. in state 1|is in state 1 only"):
        evaluate_many(model, [model.state_dict(), other], data)
    with pytest.raises(ValueError, match="^state 1: 'fc1.bias' holds NaN"):
        evaluate_many(model, [model.state_dict(), broken], data)
    with pytest.raises(ValueError, match="no batches"):
        evaluate_many(model, [model.state_dict()], [])


# -------------------------------------------------------------------------------------------------- what can be judged


def linear(classes=3):
    torch.manual_seed(0)
    return nn.Linear(8, classes)


def test_labels_of_every_position_are_counted_and_ignored_ones_left_out():
    torch.manual_seed(0)
    net, x, y = nn.Conv2d(2, 3, 1), torch.randn(5, 2, 4, 4), torch.randint(3, (5, 4, 4))
    y[0], y[1, 2] = -100, -100
    loss, accuracy = evaluation.evaluate(net, zip(x.split(2), y.split(2), strict=True))
    with torch.no_grad():
        logits = net(x).double()
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)))
    known = y != -100
    assert accuracy == pytest.approx(float((logits.argmax(1) == y)[known].double().mean()))


def test_more_than_two_parts_of_a_batch_and_integer_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 3))
    x, y = torch.randint(20, (16, 5)), torch.randint(3, (16,))
    assert evaluation.evaluate(net, [(x, y, "names")]) == evaluation.evaluate(net, [(x, y)])
    assert repairlib.barrier(net, net, [(x, y)], points=3) == 0
    evaluate_many(net, [net.state_dict()], [(x, y)])


@pytest.mark.parametrize("y,words", [
    (torch.randn(6, 1), "class indices .integers., not torch.float32"),
    (torch.zeros(6, dtype=torch.bool), "not torch.bool"),
    (torch.zeros(6, 3, dtype=torch.int64), r"labels \(6, 3\) are no class indices of outputs \(6, 3\)"),
    (torch.zeros(5, dtype=torch.int64), r"labels \(5,\)"),
    (torch.full((6,), 3), "6 labels are no class indices"),
    (torch.tensor([0, 1, 2, -1, -100, 0]), "1 labels are no class indices"),
    (torch.full((6,), -100), "none with a label"),
    ("abcdef", "not str"),
])  # fmt: skip
def test_what_are_no_labels_is_refused(y, words):
    with pytest.raises(ValueError, match=words):
        evaluation.evaluate(linear(), [(torch.randn(6, 8), y)])


def test_outputs_that_are_no_logits_are_refused():
    class Dictionary(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    data = [(torch.randn(6, 8), torch.zeros(6, dtype=torch.int64))]
    with pytest.raises(ValueError, match="not dict; give a score of your own"):
        evaluation.evaluate(Dictionary(8, 3), data)
    with pytest.raises(ValueError, match=r"must be logits \(n, classes\), not \(6,\)"):
        evaluation.evaluate(nn.Sequential(linear(1), nn.Flatten(0)), data)
    assert evaluation.mean_score(Dictionary(8, 3), data, lambda out, y: out["logits"][:, 0] * 0 + 2) == 2


def test_a_barrier_in_any_unit():
    torch.manual_seed(0)
    a, b, x = linear(1), nn.Linear(8, 1), torch.randn(50, 8)
    with torch.no_grad():
        data = [(x, (a(x) + b(x)) / 2)]  # the midpoint is right everywhere

    def squared_error(outputs, y):
        return (outputs - y) ** 2

    ends = [evaluation.mean_score(net, data, squared_error) for net in (a, b)]
    assert repairlib.barrier(a, b, data, score=squared_error) == pytest.approx(0, abs=1e-6)
    assert ends[0] == pytest.approx(ends[1])
    assert evaluate_many(a, [a.state_dict(), b.state_dict()], data, score=squared_error) == pytest.approx(ends)
    with pytest.raises(ValueError, match="not their mean"):
        evaluation.mean_score(a, data, lambda outputs, y: squared_error(outputs, y).mean())
    with pytest.raises(ValueError, match="labels must be class indices"):
        repairlib.barrier(a, b, data)
    with pytest.raises(ValueError, match="no batches"):
        evaluation.mean_score(a, [], squared_error)


@given(st.integers(0, 99), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_loss_and_accuracy_are_those_of_float64_whatever_the_batches(seed, classes, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(23, classes, 2, generator=generator).to(dtype)
    y = torch.randint(classes, (23, 2), generator=generator)
    y[torch.rand(23, 2, generator=generator) < 0.3] = evaluation.IGNORED
    y[0] = 0  # one label at least
    exact, known = logits.double(), y != evaluation.IGNORED
    expected = [-exact.log_softmax(1).gather(1, y.clamp_min(0)[:, None])[:, 0][known].mean(),
                (exact.argmax(1) == y)[known].double().mean()]  # fmt: skip
    for size in (23, 7, 1):
        found = evaluation.evaluate(nn.Identity(), zip(logits.float().split(size), y.split(size), strict=True))
        assert found == pytest.approx([float(each) for each in expected], rel=1e-12)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_labels_may_be_integers_of_any_kind(kind):
    x, y = torch.randn(6, 3), torch.tensor([0, 2, 1, 0, 1, 2])
    assert evaluation.evaluate(nn.Identity(), [(x, y.to(kind))]) == evaluation.evaluate(nn.Identity(), [(x, y)])


@pytest.mark.parametrize("pixels,expected", [(8, 500), (16, 400), (28, 130), (32, 100), (64, 25), (224, 10)])
def test_the_companion_evaluates_larger_images_in_smaller_batches(pixels, expected):
    half = Split(torch.zeros(1, 1, pixels, pixels, dtype=torch.uint8).expand(600, -1, -1, -1), torch.zeros(600).long())
    first = next(iter(iterate(Dataset("grey", half, half, 2, (0.5,), (0.5,)), "test")))
    assert len(first[1]) == expected
