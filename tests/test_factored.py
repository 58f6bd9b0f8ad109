"""Weights of low rank that are never formed: layers compute as with the formed ones, and what cannot is refused."""

import copy

import pytest
import torch
from torch import nn

from repairlib import _factored as factored

LAYERS = {
    "linear": (lambda: nn.Linear(200, 150), (3, 200)),
    "linear of tokens": (lambda: nn.Linear(200, 150, bias=False), (3, 5, 200)),
    "conv": (lambda: nn.Conv2d(100, 90, 3, stride=2, padding=1, dilation=2), (2, 100, 9, 9)),
    "conv, 1x1": (lambda: nn.Conv2d(100, 90, 1, bias=False), (2, 100, 5, 5)),
    "conv, circular": (lambda: nn.Conv1d(100, 90, 3, padding="same", padding_mode="circular"), (100, 9)),
    "conv, 3 axes": (lambda: nn.Conv3d(100, 90, 3), (1, 100, 4, 4, 4)),
    "conv in blocks": (lambda: nn.Conv2d(100, 90, 3, groups=2), (1, 100, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(100, 90, 3, stride=2, padding=1, output_padding=1), (2, 100, 5, 5)),
    "transposed in blocks": (lambda: nn.ConvTranspose2d(100, 90, 3, groups=2), (2, 100, 5, 5)),
    "encoder": (lambda: nn.TransformerEncoderLayer(128, 4, 256), (5, 2, 128)),
    "decoder": (lambda: Pair(nn.TransformerDecoderLayer(128, 4, 256)), (5, 2, 128)),
    "bilinear": (lambda: Pair(nn.Bilinear(60, 60, 60)), (3, 60)),
    "matrix": (lambda: Product(lambda x, w: x @ w), (2, 5, 100)),
    "its transpose, seen as rows": (lambda: Product(lambda x, w: x @ w.T.reshape(100, 120)), (2, 100)),
    "from the left": (lambda: Product(lambda x, w: w.T @ x), (2, 100, 7)),
    "einsum": (lambda: Product(lambda x, w: torch.einsum("btc,cd->bdt", x, w)), (2, 5, 100)),
    "sum with it": (lambda: Product(lambda x, w: x @ (w + w.mean(0)) + torch.linalg.norm(w)), (2, 100)),
    "rows of it": (lambda: Product(lambda x, w: x[:, :40] @ w[:40]), (2, 100)),
    "itself": (lambda: Product(lambda x, w: x @ w @ (w.T @ w)), (2, 100)),
    "a batch of it": (lambda: Product(lambda x, w: torch.bmm(x, w.expand(2, -1, -1))), (2, 5, 100)),
}  # fmt: skip


class Product(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(100, 120))

    def forward(self, x):
        return self.function(x, self.w)


class Pair(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x.flip(0))


def both(model):
    """A float64 copy with factored weights, and one with the same weights formed."""
    memo = factored.factors(model, torch.Generator().manual_seed(0), torch.float64)
    number = len(memo)  # a copy adds to it
    assert number
    plain, copied = copy.deepcopy(model).double().eval(), copy.deepcopy(model, memo).double().eval()
    pairs = list(zip(plain.parameters(), copied.parameters(), strict=True))
    assert sum(isinstance(b, factored.Factored) for _, b in pairs) == number
    for a, b in pairs:
        a.data.copy_(b.formed() if isinstance(b, factored.Factored) else b)
    return plain, copied


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers_compute_as_with_the_formed_weight(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    plain, copied = both(build())
    x = torch.randn(shape, dtype=torch.float64)
    expected, found = first(plain(x)), first(copied(x))
    assert found.shape == expected.shape and type(found) is torch.Tensor
    assert torch.allclose(found, expected, 1e-11, 1e-11 * float(expected.abs().max()))


@torch.no_grad()
def test_embedding_and_tied_weights():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(300, 64, padding_idx=0), nn.Linear(64, 300, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x):
            return self.out(self.words(x))

    plain, copied = both(Words())
    assert copied.out.weight is copied.words.weight
    x = torch.randint(0, 300, (3, 7))
    assert torch.allclose(copied(x), plain(x), 1e-11, 1e-11)


@pytest.mark.parametrize("axis", range(4))
@torch.no_grad()
def test_units_of_every_axis_are_those_of_a_factor(axis):
    weight = nn.Conv2d(100, 90, 3).weight
    (own,) = factored.factors(nn.ParameterList([weight]), torch.Generator().manual_seed(0), torch.float64).values()
    before, order = own.formed(), torch.randperm(weight.shape[axis])
    tensor, place = own.factor(axis)
    tensor.copy_(tensor.index_select(place, order))
    assert torch.allclose(own.formed(), before.index_select(axis, order), 1e-12, 1e-14)


def test_factors_vary_as_weights_of_a_layer_do():
    """Variance 2 / fan-in, and no two rows or columns alike: otherwise an exchange of units would hide."""
    for weight in (torch.empty(400, 300), torch.empty(128, 128, 3, 3)):
        found = factored.factored_like(weight, torch.Generator().manual_seed(0), torch.float64).formed()
        assert found.shape == weight.shape
        assert float(found.var()) * weight[0].numel() / 2 == pytest.approx(1, rel=0.3)
        for axis in (0, 1):
            rows = found.movedim(axis, 0).flatten(1)
            assert (torch.cdist(rows, rows) + torch.eye(len(rows))).min() > 1e-3 * rows.norm(dim=1).mean()


def test_small_weights_and_vectors_have_no_factors():
    assert not factored.factors(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)), torch.Generator(), torch.float64)


@torch.no_grad()
def test_nothing_writes_to_it():
    _, copied = both(Product(lambda x, w: x @ w.mul_(2)))
    with pytest.raises(RuntimeError, match="would write"):
        copied(torch.randn(2, 100, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        copied.w.numpy()


def test_recurrent_layers_keep_their_kernels():
    assert not factored.factors(nn.LSTM(100, 120, 2), torch.Generator(), torch.float64)
