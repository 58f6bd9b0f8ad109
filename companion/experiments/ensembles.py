"""What merged networks are measured against: outputs mixed instead of weights, and endpoints put in balance."""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repairlib.inputs import Batches
from repairlib.recording import eval_mode


class MixedLogits(nn.Module):
    """Ensemble of two networks, ``z(x) = (1 - alpha) z_A(x) + alpha z_B(x)`` (Jordan et al. 2022, App. C, Fig. 13).

    Args:
        model_a, model_b: any two networks of the same outputs [n, classes], of one architecture or not. Not copied.
        alpha: 0 is A and 1 is B, bit for bit.
    """

    def __init__(self, model_a: nn.Module, model_b: nn.Module, alpha: float = 0.5):
        super().__init__()
        self.model_a, self.model_b, self.alpha = model_a, model_b, alpha

    def forward(self, x: Tensor) -> Tensor:
        """The mixed logits."""
        if self.alpha in (0, 1):
            return (self.model_b if self.alpha else self.model_a)(x)
        return (1 - self.alpha) * self.model_a(x) + self.alpha * self.model_b(x)


class Balanced(nn.Module):
    """A network that over-predicts some classes, corrected: ``z_k(x) - shift`` for k in `group`, see `balance`.

    Args:
        model: a network with outputs [n, classes]. Not copied.
        group: the classes.
        data: any iterable of batches x or (x, y) with classes in equal parts. Labels are not used.
    """

    def __init__(self, model: nn.Module, group: Sequence[int], data: Iterable):
        super().__init__()
        self.model, self.group = model, list(group)
        self.shift = balance(predict(model, data), group)

    def forward(self, x: Tensor) -> Tensor:
        """The corrected logits."""
        logits = self.model(x)
        offset = logits.new_zeros(logits.shape[1])
        offset[self.group] = self.shift
        return logits - offset


def predict(model: nn.Module, data: Iterable) -> Float[Tensor, "n classes"]:
    """Logits of all examples, in float64.

    Args:
        model: a network with outputs [n, classes].
        data: any iterable of batches x or (x, y).

    Raises:
        ValueError: there are no batches.
    """
    with eval_mode(model):
        found = [model(x).double() for x in Batches(data, model)]
    if not found:
        raise ValueError("no batches to predict on")
    return torch.cat(found)


def balance(logits: Float[Tensor, "n classes"], group: Sequence[int]) -> float:
    """What to take off the logits of some classes so that their mean probability becomes their share of all classes.

        mean_n sum_{k in group} softmax(z_n - shift 1_group)_k = |group| / classes

    Jordan et al. 2022, Fig. 13, "scale down the first 50 logits of network A such that its predictions on the test set
    become balanced". Logits may be negative, so scaling is read as dividing the group's odds by exp(shift), and
    predictions as probabilities. The left side falls strictly with the shift, so that there is one solution; it is
    found to rounding. A group that is predicted too rarely gets a negative shift.

    Args:
        logits: of examples with classes in equal parts; their labels are not needed.
        group: the classes, some but not all.

    Raises:
        ValueError: no class or all classes in the group, a class that is none, one named twice, non-finite logits.

    >>> round(balance(torch.tensor([[1.0, 0.0]]), [0]), 12)
    1.0
    """
    from scipy.optimize import brentq  # here, as it takes long to import

    n, classes = logits.shape
    chosen = set(group)
    if len(chosen) != len(group) or not chosen <= set(range(classes)) or not 0 < len(chosen) < classes:
        raise ValueError(f"a group is some of the classes 0 to {classes - 1}, each once, not none and not all: {group}")
    if n == 0 or not logits.isfinite().all():
        raise ValueError("predictions can be balanced only if there are some and all logits are finite")
    rest = [k for k in range(classes) if k not in chosen]
    z = logits.detach().double()
    odds = z[:, list(chosen)].logsumexp(1) - z[:, rest].logsumexp(1)  # log of the group's odds, per example
    share = len(chosen) / classes
    even = math.log(len(chosen) / len(rest))
    # Beyond the most extreme example all lie on one side; by one more, clear of rounding if all are alike.
    low, high = float(odds.min()) - even - 1, float(odds.max()) - even + 1
    return brentq(lambda shift: float((odds - shift).sigmoid().mean()) - share, low, high, xtol=1e-14, maxiter=5000)
