"""Renormalise networks with statistics of BatchNorms or of training only: nothing is measured beforehand.

Data-independent RESET and REPAIR (Qu & Horvath 2024, App. F.2).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from repairlib.corrections import Statistics, correct_moments, target_nodes
from repairlib.inputs import Inputs
from repairlib.moments import moments_of
from repairlib.recording import ChannelAffine, copy_model
from repairlib.tracing import trace


def batch_statistics(model: nn.Module) -> nn.Module:
    """Copy of a model whose BatchNorms use the statistics of every batch, also in evaluation mode (RESET without data).

    Raises:
        ValueError: the model has no BatchNorm statistics.
    """
    out = copy_model(model)
    norms = [m for m in out.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no BatchNorm statistics to leave out")
    for norm in norms:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return out


class BatchNormTo(ChannelAffine):
    """Correction of each batch, from its own statistics to the goal (units,); see `correction`."""

    def __init__(self, goal_mean: Tensor, goal_std: Tensor, correct: str = "repair", eps: float = 0.0, axis: int = 1):
        super().__init__(goal_std, goal_mean, axis)
        self.correct, self.eps = correct, eps

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.bias.double(), self.weight.double()
        now = moments_of([x], self.axis)
        fix = correct_moments(now, goal_mean=mean, goal_std=std, correct=self.correct, eps=self.eps)
        return fix.apply(x, self.axis)


class Recorder:
    """Running mean and std of a network's targets while it trains: goals that need no data afterwards.

    ``running = (1 - momentum) running + momentum batch`` for mean and variance, as BatchNorm keeps them, in train mode
    only. Forward hooks record; the module and its state dict stay as they are.

    Args:
        model: any network.
        example: inputs (n, ...), to trace with.
        targets: see `target_nodes`; outputs of modules that are called once.
        momentum: weight of the newest batch; None weighs all batches alike.

    Raises:
        ValueError: a target is no output of a module, or of one that is called twice.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with Recorder(net, torch.zeros(2, 4)) as recorder:
    ...     _ = net(torch.randn(100, 4))
    >>> {node: tuple(mean.shape) for node, (mean, std) in recorder.statistics.items()}
    {'_0': (8,)}
    """

    def __init__(
        self,
        model: nn.Module,
        example: Inputs,
        targets: str | Sequence[str] = ("conv", "linear"),
        momentum: float | None = 0.1,
    ):
        net = trace(model, example)
        self.momentum = momentum
        self._seen: dict[str, tuple[int, Any, Any]] = {}
        calls = [node.target for node in net.nodes if node.op == "call_module"]
        self._modules = {}
        for name in target_nodes(net, targets):
            node = net.node(net.corrected(name))
            if calls.count(node.target) != 1:
                raise ValueError(f"node {name!r} is not the output of one module that is called once: cannot record it")
            self._modules[name] = net.modules[node.target], net.axis(name)

    def __enter__(self) -> "Recorder":
        self._hooks = [
            module.register_forward_hook(partial(self._update, name, axis))
            for name, (module, axis) in self._modules.items()
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _update(self, name: str, axis: int, module: nn.Module, args: tuple, value: Tensor) -> None:
        if module.training:
            batch = moments_of([value], axis)
            count, mean, var = self._seen.get(name, (0, 0, 0))
            new = 1 / (count + 1) if self.momentum is None or not count else self.momentum
            self._seen[name] = count + 1, mean + new * (batch.mean() - mean), var + new * (batch.var() - var)

    @property
    def statistics(self) -> Statistics:
        """Running mean and std (units,) by node, float64; a reference for `Goals` and `renormalize`."""
        return {name: (mean, var.sqrt()) for name, (_, mean, var) in self._seen.items()}
