"""Fisher information of a network's parameters: how much its outputs change with each of them."""

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from repairlib.inputs import Inputs, arguments, as_batches, cast_input, count, examples
from repairlib.names import check
from repairlib.recording import eval_mode

LABELS = ("sampled", "data", "logits")


def diagonal_fisher(
    model: nn.Module, data: Iterable, labels: str = "sampled", *, limit: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of a classifier's parameters (Achille et al. 2018; Qu & Horvath 2024, F.3).

        F_i = E_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta_i)^2]

    The expectation over y takes one label for each example (`labels`):

    * sampled: y is drawn from the network's own p(y|x), an unbiased estimate of F;
    * data: y is the label of the data, the "empirical" Fisher information, which is small where the network is right;
    * logits: ``sum_k (d z_k / d theta_i)^2`` of the logits z, without any y, as Qu & Horvath's released code has it.

    Examples go through the network one by one, in evaluation mode, so that no result depends on batches; sums are
    float64.

    Args:
        model: network with outputs [n, classes]. Untouched.
        data: any iterable of batches x [n, ...] or (x, y); "data" needs y int64 [n].
        labels: one of the three.
        limit: number of examples to use, the first ones; None for all.
        seed: of the sampled labels.

    Returns:
        By name, F_i for every element of a parameter, float64 of the parameter's shape.

    Raises:
        ValueError: unknown kind of labels, no examples, no labels where they are needed, or outputs of another shape.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> {name: tuple(values.shape) for name, values in diagonal_fisher(net, torch.randn(10, 4)).items()}
    {'0.weight': (8, 4), '0.bias': (8,), '2.weight': (3, 8), '2.bias': (3,)}
    """
    check(labels, LABELS, "kind of labels")
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    n = 0
    with eval_mode(model), torch.enable_grad():
        for x, y in _examples(data, model, limit):
            logits = functional_call(model, parameters, *arguments(x))
            if logits.ndim != 2:
                raise ValueError(f"Fisher information is of outputs (n, classes), not of shape {tuple(logits.shape)}")
            if labels == "data" and y is None:
                raise ValueError("labels='data' needs batches (x, y), and these have no y: use labels='sampled'")
            if labels == "logits":
                values = list(logits[0])
            else:
                values = [F.log_softmax(logits[0], 0)[y if labels == "data" else _draw(logits[0], generator)]]
            for value in values:
                gradients = torch.autograd.grad(
                    value, list(parameters.values()), retain_graph=len(values) > 1, materialize_grads=True
                )
                for square, gradient in zip(total.values(), gradients, strict=True):
                    square.add_(gradient.double() ** 2)
            n += 1
    if not n:
        raise ValueError("no examples to measure Fisher information on")
    return {name: values / n for name, values in total.items()}


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A class drawn from softmax(logits), (classes,): where the cumulative probability exceeds a random number."""
    number = torch.rand((), dtype=torch.float64, generator=generator).to(logits.device)
    cumulative = logits.detach().double().softmax(0).cumsum(0)
    return (cumulative <= number).sum().clamp_max(len(logits) - 1)


def _examples(data: Iterable, model: nn.Module, limit: int | None) -> Iterator[tuple[Inputs, Tensor | None]]:
    """Examples (x, y) one by one, up to `limit`; y is None where the data has none."""
    batches = ((batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)
               for batch in as_batches(data))  # fmt: skip
    one_by_one = (
        (examples(x, i, i + 1), None if ys is None else ys[i])
        for xs, ys in batches
        for x in [cast_input(xs, model)]
        for i in range(count(x))
    )
    return itertools.islice(one_by_one, limit)
