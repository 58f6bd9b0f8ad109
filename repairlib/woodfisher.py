"""WoodFisher: prune by second derivatives in blocks, and let the weights that are left make up for those that go."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from repairlib.inputs import Inputs, arguments, as_batches, cast_input, count, device_of, examples
from repairlib.names import check
from repairlib.pruning import Masks, prunable
from repairlib.recording import eval_mode

UPDATES = ("independent", "joint")
BUFFER = 64  # gradients that are kept until they are multiplied together, as memory is slower than arithmetic
AT_ONCE = 2**24  # elements of the matrices that are inverted at once in float64: 128 MiB

Blocks = Float[Tensor, "blocks block"]


class WoodFisher:
    """Inverse of the empirical Fisher information in blocks of a layer's weights (Singh & Alistarh 2020).

        F = lambda I + 1/N sum_n g_n g_n^T,   g_n = gradient of the mean loss of the n-th small batch

    Without weight q, and with the best change of all others of its block, the loss rises by ``rho_q`` (their Eq. 10):

        rho_q = w_q^2 / (2 [F^-1]_qq),   delta w = -w_q F^-1 e_q / [F^-1]_qq

    The paper inverts by the Woodbury identity, one gradient after the other. Here F is summed first and then inverted
    by its Cholesky factor in float64, which gives the same to rounding, by products of matrices. For d weights and
    blocks of B, d B numbers are in memory, in float32.

    Args:
        model: a classifier. Untouched; it is in evaluation mode.
        data: any iterable of batches (x, y), y int64 [n]; examples are taken in their order.
        block: weights in a block; the last of a layer may have fewer.
        samples: how many gradients; fewer if there is less data.
        batch: examples whose mean loss a gradient is of.
        damping: lambda.

    Raises:
        ValueError: no examples or no labels, sizes below 1, a damping that is not positive, or no weights to prune.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> fisher = WoodFisher(net, [(torch.randn(20, 4), torch.randint(3, (20,)))])
    >>> {name: tuple(scores.shape) for name, scores in fisher.scores().items()}
    {'0.weight': (8, 4), '2.weight': (3, 8)}
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable,
        *,
        block: int = 100,
        samples: int = 400,
        batch: int = 1,
        damping: float = 1e-5,
    ):
        if min(block, samples, batch) < 1:
            raise ValueError(f"block, samples and batch are at least 1, not {block}, {samples} and {batch}")
        if not damping > 0:
            raise ValueError(f"damping must be positive, or the matrix has no inverse; it is {damping}")
        self.weights = {name: weight.clone() for name, weight in prunable(model).items()}
        if not self.weights:
            raise ValueError(f"{type(model).__name__} has no convolution or linear layer to prune")
        self._sizes = {name: min(block, weight.numel()) for name, weight in self.weights.items()}
        # By layer, the inverse of every block, (blocks, block, block).
        self._inverse = {name: self._sum_of_squares(name) for name in self.weights}
        self.samples = self._gather(model, data, samples, batch)
        for matrices in self._inverse.values():
            step = max(1, AT_ONCE // matrices.shape[1] ** 2)
            for part in matrices.split(step):
                fisher = part.double() / self.samples
                fisher.diagonal(dim1=1, dim2=2).add_(damping)
                part.copy_(torch.cholesky_inverse(torch.linalg.cholesky(fisher)))

    def scores(self) -> dict[str, Tensor]:
        """Rise of the loss without each weight, ``w_q^2 / (2 [F^-1]_qq)``, float64 of the weight's shape."""
        return {
            name: self._join(name, self._split(name).double() ** 2 / (2 * self._diagonal(name)))
            for name in self.weights
        }

    def update(self, masks: Masks, how: str = "independent") -> dict[str, Tensor]:
        """Weights after the best change of those that are kept, for `prune`.

        Args:
            masks: by name, True where a weight is kept.
            how: "independent" adds up the changes that every masked weight asks for by itself, as the paper does;
                "joint" makes the one change that is best for all of them together,
                ``delta w = -F^-1[:, Q] (F^-1[Q, Q])^-1 w_Q``.

        Returns:
            By name, new weights, zero where they are masked.

        Raises:
            ValueError: an unknown way, or a name without weights.
        """
        check(how, UPDATES, "update")
        new = {}
        for name, mask in masks.items():
            check(name, self.weights, "weight")
            weights = self._split(name).double()
            masked = ~self._blocks(name, mask.to(weights.device, torch.bool).flatten(), fill=True)
            parts = self._joint if how == "joint" else self._independent
            step = max(1, AT_ONCE // weights.shape[1] ** 2)
            changed = [
                w + parts(w, gone, inverse.double())
                for w, gone, inverse in zip(
                    weights.split(step), masked.split(step), self._inverse[name].split(step), strict=True
                )
            ]
            new[name] = self._join(name, torch.cat(changed).masked_fill(masked, 0.0)).to(self.weights[name].dtype)
        return new

    @staticmethod
    def _independent(weights: Blocks, masked: Blocks, inverse: Tensor) -> Blocks:
        wanted = torch.where(masked, weights / inverse.diagonal(dim1=1, dim2=2), 0.0)
        return -(inverse @ wanted[..., None])[..., 0]

    @staticmethod
    def _joint(weights: Blocks, masked: Blocks, inverse: Tensor) -> Blocks:
        both = masked[:, :, None] & masked[:, None, :]
        eye = torch.eye(masked.shape[1], dtype=inverse.dtype, device=inverse.device)
        among = torch.where(both, inverse, eye)  # F^-1[Q, Q], and the identity for all others
        wanted = torch.cholesky_solve(torch.where(masked, weights, 0.0)[..., None], torch.linalg.cholesky(among))
        return -(inverse @ wanted)[..., 0]

    # ------------------------------------------------------------------------------------------------------- blocks

    def _blocks(self, name: str, flat: Tensor, fill: float = 0) -> Tensor:
        """Values of a layer's weights (n,) as (blocks, block), the last one filled up."""
        size = self._sizes[name]
        missing = -len(flat) % size
        return F.pad(flat, (0, missing), value=fill).view(-1, size) if missing else flat.view(-1, size)

    def _split(self, name: str) -> Blocks:
        return self._blocks(name, self.weights[name].flatten())

    def _join(self, name: str, blocks: Tensor) -> Tensor:
        return blocks.flatten()[: self.weights[name].numel()].view(self.weights[name].shape)

    def _diagonal(self, name: str) -> Blocks:
        return self._inverse[name].diagonal(dim1=1, dim2=2).double()

    def _sum_of_squares(self, name: str) -> Tensor:
        blocks, size = self._split(name).shape
        return torch.zeros(blocks, size, size, device=self.weights[name].device)

    def _gather(self, model: nn.Module, data: Iterable, samples: int, batch: int) -> int:
        """Add up ``g g^T``; returns how many gradients there were."""
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        wanted = [parameters[name].requires_grad_() for name in self.weights]
        waiting: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        n = 0
        with eval_mode(model), torch.enable_grad():
            for x, y in _small_batches(data, model, batch):
                loss = F.cross_entropy(functional_call(model, parameters, *arguments(x)), y)
                gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
                for (name, rows), gradient in zip(waiting.items(), gradients, strict=True):
                    rows.append(self._blocks(name, gradient.flatten()))
                n += 1
                if n % BUFFER == 0 or n == samples:
                    self._add(waiting)
                if n == samples:
                    break
        if not n:
            raise ValueError("no examples to measure Fisher information on")
        self._add(waiting)
        return n

    def _add(self, waiting: dict[str, list[Tensor]]) -> None:
        for name, rows in waiting.items():
            if rows:
                g = torch.stack(rows, 1).float()  # (blocks, gradients, block)
                self._inverse[name].baddbmm_(g.transpose(1, 2), g)
                rows.clear()


def _small_batches(data: Iterable, model: nn.Module, size: int) -> Iterator[tuple[Inputs, Tensor]]:
    """Batches (x, y) of `size` examples, on the model's device."""
    device = device_of(model)
    for batch in as_batches(data):
        if isinstance(batch, Tensor) or len(batch) < 2:
            raise ValueError("WoodFisher needs batches (x, y): the loss is of labels")
        x, y = cast_input(batch[0], model), batch[1].to(device)
        for start in range(0, count(x), size):
            yield examples(x, start, start + size), y[start : start + size]
