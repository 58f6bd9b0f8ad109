import math
import weakref

import pytest
import torch
from cases import CASES, CLASSES, inputs, make
from test_combine import same_bits
from torch import nn

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
