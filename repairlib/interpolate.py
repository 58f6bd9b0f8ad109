"""Straight paths between networks, and the barrier along them."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def check_compatible(state_a: State, state_b: State) -> None:
    """Refuse two state dicts that are no endpoints of one path.

    Raises:
        ValueError: names the first parameter that is missing, of another shape, or not finite.
    """
    if state_a.keys() != state_b.keys():
        name = next(iter([k for k in state_a if k not in state_b] or [k for k in state_b if k not in state_a]))
        raise ValueError(f"different architectures: {name!r} is in model {'A' if name in state_a else 'B'} only")
    for name, a in state_a.items():
        if a.shape != state_b[name].shape:
            raise ValueError(
                f"different architectures: {name!r} is {tuple(a.shape)} in A, {tuple(state_b[name].shape)} in B"
            )
    for which, state in (("A", state_a), ("B", state_b)):
        for name, value in state.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(
                    f"model {which}: {name!r} holds NaN or infinity; was its training stopped or its file damaged?"
                )


def interpolate_states(state_a: State, state_b: State, alpha: float) -> dict[str, Tensor]:
    """Parameters and buffers of ``theta_alpha = (1 - alpha) theta_a + alpha theta_b`` (Jordan et al. 2022, Sec. 2.1).

    Args:
        state_a, state_b: state dicts of one architecture.
        alpha: 0 gives `state_a` and 1 gives `state_b`, bit for bit; values outside [0, 1] extrapolate.

    Integer buffers (BatchNorm's batch counts) are taken from `state_a`, at alpha = 1 from `state_b`.

    >>> interpolate_states({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)["w"]
    tensor([1.])
    """
    check_compatible(state_a, state_b)
    if alpha in (0, 1):  # 0 * b is not nothing: -0.0 + 0.0 is 0.0
        return {name: value.clone() for name, value in (state_a, state_b)[int(alpha)].items()}
    return {
        name: (1 - alpha) * a + alpha * state_b[name] if a.is_floating_point() else a.clone()
        for name, a in state_a.items()
    }


def interpolate_models(model_a: nn.Module, model_b: nn.Module, alpha: float = 0.5) -> nn.Module:
    """Module with the weights ``(1 - alpha) theta_a + alpha theta_b``; see `interpolate_states`."""
    out = copy.deepcopy(model_a)
    with torch.no_grad():
        out.load_state_dict(interpolate_states(model_a.state_dict(), model_b.state_dict(), alpha))
    return out


@dataclass(frozen=True)
class Path:
    """Loss (nats) and accuracy (in [0, 1]) at every alpha of a path; `table` gives one row a point."""

    alpha: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    def table(self, **columns) -> list[dict]:
        """Tidy rows, with the same extra columns in each."""
        points = zip(self.alpha, self.loss, self.accuracy, strict=True)
        return [{**columns, "alpha": a, "loss": loss, "accuracy": acc} for a, loss, acc in points]

    def barrier(self, metric: str = "loss", baseline: str = "linear") -> float:
        """Barrier of the path in its loss, or in its error ``1 - accuracy``; see `barrier_of`."""
        if metric not in ("loss", "accuracy"):
            raise ValueError(f"metric must be 'loss' or 'accuracy', not {metric!r}")
        cost = self.loss if metric == "loss" else [1 - a for a in self.accuracy]
        return barrier_of(self.alpha, cost, baseline)

    def midpoint(self, metric: str = "accuracy") -> float:
        """Loss or accuracy at alpha = 0.5."""
        return getattr(self, metric)[self.alpha.index(0.5)]


def barrier_of(alpha: Sequence[float], cost: Sequence[float], baseline: str = "linear") -> float:
    """Height of a path over its endpoints: how much it costs to go from A to B.

    linear: ``max_alpha cost(alpha) - [(1 - alpha) cost(0) + alpha cost(1)]`` (Jordan et al. 2022, Eq. 1, read as the
    largest difference); mean: ``max_alpha cost(alpha) - [cost(0) + cost(1)] / 2`` (the released code).

    Args:
        alpha: points of the path, among them 0 and 1.
        cost: something that is better when lower, at these points.

    >>> barrier_of([0, 0.5, 1], [1.0, 4.0, 2.0])
    2.5
    """
    if baseline not in ("linear", "mean"):
        raise ValueError(f"baseline must be 'linear' or 'mean', not {baseline!r}")
    at = dict(zip(alpha, cost, strict=True))
    if 0 not in at or 1 not in at:
        raise ValueError("a barrier needs both endpoints: alpha must contain 0 and 1")
    ends = {a: (1 - a) * at[0] + a * at[1] if baseline == "linear" else (at[0] + at[1]) / 2 for a in at}
    return max(at[a] - ends[a] for a in at)


def walk_path(
    make: Callable[[float], nn.Module], alphas: Iterable[float], evaluate: Callable[[nn.Module], tuple[float, float]]
) -> Path:
    """Evaluate one network per alpha.

    Args:
        make: alpha -> network, for instance ``lambda alpha: interpolate_models(a, b, alpha)``.
        alphas: the points.
        evaluate: network -> (mean loss, accuracy), for instance ``lambda net: train.evaluate(net, test_batches)``.
    """
    alphas = tuple(alphas)
    loss, accuracy = zip(*(evaluate(make(alpha)) for alpha in alphas), strict=True)
    return Path(alphas, loss, accuracy)
