import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, inputs, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion.experiments.ensembles import Balanced, MixedLogits, balance, predict
from companion.experiments.pairs import Pair
from companion.experiments.rows import baseline_rows
from companion.runs.data import iterate, load
from repairlib import evaluate

groups = st.integers(2, 8).flatmap(
    lambda classes: st.tuples(
        st.just(classes), st.sets(st.integers(0, classes - 1), min_size=1, max_size=classes - 1).map(sorted)
    )
)


def share(logits, group, shift=0.0):
    """Mean probability of the group, by the definition."""
    moved = logits.double().clone()
    moved[:, group] -= shift
    return float(moved.softmax(1)[:, group].sum(1).mean())


def random_logits(seed, n, classes, scale=1.0):
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ balance


@settings(max_examples=60, deadline=None)
@given(case=groups, seed=st.integers(0, 99), n=st.integers(1, 40), scale=st.sampled_from([0, 0.1, 3]))
def test_after_the_shift_a_group_has_its_share(case, seed, n, scale):
    classes, group = case
    logits = random_logits(seed, n, classes, scale)
    shift = balance(logits, group)
    assert share(logits, group, shift) == pytest.approx(len(group) / classes, abs=1e-12)
    rest = [k for k in range(classes) if k not in group]
    assert balance(logits, rest) == pytest.approx(-shift, abs=1e-9)  # only differences of logits count
    logits[:, group] -= shift
    assert balance(logits, group) == pytest.approx(0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), extra=st.floats(-20, 20))
def test_what_is_added_to_a_group_of_balanced_logits_is_what_is_taken_off(seed, extra):
    half = random_logits(seed, 20, 6)
    logits = torch.cat([half, half.roll(3, dims=1)])  # classes 0 to 2 are to 3 to 5 as these to those
    assert balance(logits, [0, 1, 2]) == pytest.approx(0, abs=1e-12)
    logits[:, :3] += extra
    assert balance(logits, [2, 0, 1]) == pytest.approx(extra, abs=1e-10)


def test_one_example_has_a_closed_form_whatever_the_sizes_of_group_and_rest():
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0]])
    group, rest = logits[0, :1].logsumexp(0), logits[0, 1:].logsumexp(0)
    assert balance(logits, [0]) == pytest.approx(float(group - rest) - math.log(1 / 3), abs=1e-6)  # float32 inputs


def test_extreme_and_many_logits():
    logits = torch.tensor([[1e6, 0.0], [1e6, 0.0], [0.0, 1e6]], dtype=torch.float64)
    assert share(logits, [0], balance(logits, [0])) == pytest.approx(0.5, abs=1e-9)
    half = random_logits(0, 100, 4).half()
    assert balance(half, [1]) == balance(half.double(), [1])  # whatever the precision, computed in float64


@pytest.mark.parametrize("group", [[], [0, 1, 2], [3], [-1], [1, 1]])
def test_a_group_is_some_classes(group):
    with pytest.raises(ValueError, match="some of the classes 0 to 2"):
        balance(torch.zeros(4, 3), group)


@pytest.mark.parametrize("logits", [torch.zeros(0, 3), torch.tensor([[0.0, float("nan"), 1.0]])])
def test_there_must_be_finite_logits(logits):
    with pytest.raises(ValueError, match="finite"):
        balance(logits, [0])


# ------------------------------------------------------------------------------------------ networks

NAME = "resnet8-bn-w0.5"


@pytest.fixture(scope="module")
def pair():
    return make(NAME, 0, torch.float64).eval(), make(NAME, 1, torch.float64).eval()


@pytest.fixture(scope="module")
def x():
    return inputs(NAME, 30).double()


def test_predictions_are_all_logits_in_evaluation_mode(pair, x):
    model = copy.deepcopy(pair[0]).train()
    y = torch.zeros(30)
    for data in (x, [x[:20], x[20:]], iter([(x[:20], y[:20]), (x[20:], y[20:])])):
        torch.testing.assert_close(predict(model, data), pair[0](x), rtol=1e-10, atol=1e-10)
    assert model.training and all(module.training for module in model.modules())
    single = copy.deepcopy(model).float()
    assert predict(single, [x]).dtype == torch.float64  # of a network of any precision
    with pytest.raises(ValueError, match="no batches"):
        predict(model, [])


def test_mixing_gives_the_ends_bit_for_bit_and_a_straight_line_between(pair, x):
    a, b = pair
    with torch.no_grad():
        assert MixedLogits(a, b, 0)(x).equal(a(x)) and MixedLogits(a, b, 1)(x).equal(b(x))
        assert MixedLogits(a, b)(x).equal((a(x) + b(x)) / 2)
        torch.testing.assert_close(MixedLogits(a, b, 0.3)(x), 0.7 * a(x) + 0.3 * b(x), rtol=1e-12, atol=1e-12)


def test_the_mixed_loss_is_never_above_the_straight_line(pair, x):
    """Cross entropy is convex in the logits, so that an ensemble has no barrier: this tells alpha from 1 - alpha."""
    a, b = pair
    data = [(x, torch.arange(30) % CLASSES)]
    ends = [evaluate(net, data)[0] for net in pair]
    for alpha in (0.1, 0.5, 0.9):
        loss = evaluate(MixedLogits(a, b, alpha), data)[0]
        assert loss <= (1 - alpha) * ends[0] + alpha * ends[1] + 1e-12


def test_a_balanced_network_predicts_the_group_at_its_share(pair, x):
    model = pair[0]
    group = [0, 3]
    balanced = Balanced(model, group, [(x[:20], None), (x[20:], None)])
    with torch.no_grad():
        before, after = model(x), balanced(x)
    assert abs(float(before.softmax(1)[:, group].sum(1).mean()) - 0.4) > 1e-3  # there was something to correct
    assert float(after.softmax(1)[:, group].sum(1).mean()) == pytest.approx(0.4, abs=1e-12)
    rest = [1, 2, 4]
    assert after[:, rest].equal(before[:, rest])
    torch.testing.assert_close(before[:, group] - after[:, group], torch.full((30, 2), balanced.shift).double())
    assert set(balanced.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_balance_undoes_a_shift_of_the_classes_in_training():
    """A classifier with the exact posterior of a 4:1 mixture gets back the posterior of an even one."""
    z = random_logits(0, 2000, 4)
    z = torch.cat([z, z.roll(2, dims=1)])  # an even mixture, exactly
    data = [(z, z.argmax(1))]
    biased = nn.Linear(4, 4, dtype=torch.float64)
    with torch.no_grad():
        biased.weight.copy_(torch.eye(4))
        biased.bias.copy_(torch.tensor([4, 4, 1, 1]).double().log())  # Bayes: priors multiply odds
    balanced = Balanced(biased, [0, 1], data)
    assert balanced.shift == pytest.approx(math.log(4), abs=1e-9)
    assert evaluate(balanced, data)[0] == pytest.approx(float(F.cross_entropy(z, z.argmax(1))), abs=1e-9)
    assert evaluate(biased, data)[0] > evaluate(balanced, data)[0] + 0.05


def test_baselines_of_a_pair():
    """Two classifiers of digits that say a fixed half of the classes too often, and one that knows none."""
    digits = load("digits")
    test = iterate(digits, "test")
    ends = []
    for favoured in (range(5), range(5, 10)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
        with torch.no_grad():
            model[1].bias[list(favoured)] += 3
        ends.append(model.eval())
    ignorant = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    nn.init.zeros_(ignorant[1].weight), nn.init.zeros_(ignorant[1].bias)
    pair = Pair(("a", "b"), *ends, digits, iterate(digits), test)
    rows = baseline_rows(pair, ignorant, [0, 0.5, 1])
    assert [(row["network"], row["alpha"]) for row in rows] == [
        ("ensemble", 0), ("ensemble", 0.5), ("ensemble", 1), ("corrected A", None), ("corrected B", None),
        ("full data", None),
    ]  # fmt: skip
    by = {(row["network"], row["alpha"]): row for row in rows}
    for end, model in enumerate(ends):
        assert (by["ensemble", end]["loss"], by["ensemble", end]["accuracy"]) == evaluate(model, test)
    assert by["full data", None]["loss"] == pytest.approx(math.log(10), abs=1e-6)
    # The two differ in what was added only: corrected, they are one network.
    a, b = by["corrected A", None], by["corrected B", None]
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["loss"] < by["ensemble", 0]["loss"] - 0.1
