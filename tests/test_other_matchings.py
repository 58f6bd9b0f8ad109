import copy
import itertools

import pytest
import torch
from cases import batches, inputs, make
from torch import nn

from repairlib import groups, permutations
from repairlib.interpolate import interpolate_models
from repairlib.other_matchings import match_straight_through, match_transport
from repairlib.tracing import trace


@pytest.mark.parametrize("name", ["mlp3-plain-w8", "vgg11-bn-w0.125", "resnet8-bn-w0.5"])
def test_a_planted_permutation_is_found(name):
    a = make(name)
    spec = groups.permutation_spec(a, inputs(name, 2))
    planted = permutations.random_permutation(spec, 3)
    b = permutations.permute(a, spec, planted)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(1e-3 * p.abs().mean() * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    found = match_transport(a, b, batches(name, 120), spec=spec, tap="pre")
    for group, back in permutations.invert(planted).items():
        assert torch.equal(found.permutation[group], back), group


def test_bad_arguments():
    name = "mlp1-plain-w6"
    a, b = make(name, 0), make(name, 1)
    with pytest.raises(ValueError, match="different architectures"):
        match_transport(a, make("mlp3-plain-w8"), batches(name))
    with pytest.raises(ValueError, match="unknown tap 'middle'"):
        match_transport(a, b, batches(name), tap="middle")


def test_what_has_no_distance_is_refused():
    name = "mlp1-plain-w6"
    a, b = make(name, 0).half(), make(name, 1).half()
    with pytest.raises(ValueError, match="not finite"):
        match_transport(a, b, [x.half() * 6e4 for x in batches(name)])


def test_the_plan_is_the_cheapest_permutation():
    name = "mlp1-plain-w6"
    a, b, data = make(name, 0), make(name, 1), batches(name, 120)
    found = match_transport(a, b, data, tap="pre")
    (group,) = found.spec.groups
    with torch.no_grad():
        x, y = (dict(trace(m, data[0]).walk(torch.cat(data), [group.taps["pre"]]))[group.taps["pre"]] for m in (a, b))
    cost = (x[:, :, None] - y[:, None]).square().mean(0)
    best = min(sum(float(cost[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
    assert -found.objective[group.name] == pytest.approx(best, rel=1e-4)


def classification(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 6, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] + x[:, 3] > 0).long()
    return list(zip(x.split(100), y.split(100), strict=True))


def trained(seed, data):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def test_straight_through_lowers_the_loss_of_the_midpoint():
    data = classification()
    a, b = trained(0, data), trained(1, data)
    before = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    spec = groups.permutation_spec(a, data[0][0])
    start = {group.name: torch.arange(group.size) for group in spec.groups}
    found = match_straight_through(a, b, data, spec=spec, start=start, epochs=4)
    assert min(found.history) < found.history[0] / 2 and len(found.history) == 5
    # the reported loss is that of the midpoint with batch statistics
    middle = interpolate_models(a, found.apply(b), 0.5).train()
    with torch.no_grad():
        loss = sum(float(nn.functional.cross_entropy(middle(x), y)) for x, y in data) / 3
    assert min(found.history) == pytest.approx(loss, rel=1e-5)
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    still = match_straight_through(a, b, data, spec=spec, start=start, epochs=4, momentum=0.0)
    assert still.history[0] == found.history[0] and still.history != found.history
    # a start that nothing improves on is kept
    same = match_straight_through(a, a, data, epochs=1)
    assert same.history[0] <= same.history[1]
    assert all(torch.equal(p, torch.arange(len(p))) for p in same.permutation.values())


class Tokens(nn.Module):
    """Integer inputs, and a head that evaluation does not use."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(self.embed(x).mean(1))))


def test_straight_through_takes_any_type_of_weights_and_inputs():
    x, y = torch.randint(0, 9, (40, 5)), torch.randint(0, 3, (40,))
    for dtype in (torch.float32, torch.float64):
        a, b = Tokens().to(dtype), Tokens().to(dtype)
        spec = groups.permutation_spec(a, x[:2])
        with torch.no_grad():
            found = match_straight_through(a, b, [(x, y)], spec=spec, start={}, epochs=2)
        assert set(found.permutation) == {group.name for group in spec.groups} and len(found.history) == 3
        assert all(p.grad is None for p in a.parameters())
    a = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="a batch of 1 cannot be trained on"):
        match_straight_through(a, copy.deepcopy(a), [(torch.randn(1, 4), torch.zeros(1, dtype=torch.int64))])
    with pytest.raises(ValueError, match="batches must be"):
        match_straight_through(a, copy.deepcopy(a), [torch.randn(2, 4)])
