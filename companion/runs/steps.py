"""A step of training: operation by operation, or recorded once as a CUDA graph and then launched as a whole.

The operations of a narrow network take a GPU less time than it takes to launch them. A graph launches all of them at
once. It is used where $REPAIRLIB_GRAPH is 1, on one GPU.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.runs.recipes import Recipe


class Step:
    """A step of SGD on one batch, launched operation by operation.

    Args:
        net: in training mode, on the device of the batches.
        recipe: how.
        half: whether to compute in bfloat16.
    """

    graph: torch.cuda.CUDAGraph | None = None

    def __init__(self, net: nn.Module, recipe: Recipe, half: bool):
        self.net, self.recipe, self.half = net, recipe, half
        self.optimizer = self.sgd(lr=recipe.lr, foreach=True)

    def __call__(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """Take the step, and give the loss before it, without gradient."""
        self.optimizer.param_groups[0]["lr"] = lr
        return self.take(x, y)

    def sgd(self, **how: Any) -> torch.optim.SGD:
        """The recipe's optimizer."""
        recipe = self.recipe
        return torch.optim.SGD(
            self.net.parameters(), momentum=recipe.momentum, weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov, **how,
        )  # fmt: skip

    def take(self, x: Tensor, y: Tensor, keep_casts: bool = True) -> Tensor:
        """All of a step that the device does; nothing here may wait for it."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.half, cache_enabled=keep_casts):
            loss = F.cross_entropy(self.net(x), y, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class GraphStep(Step):
    """The same step as one CUDA graph.

    The first steps are launched operation by operation, on another stream as recording demands: they make what the
    optimizer keeps, and let cuDNN choose its algorithms. A graph holds kernels, addresses and numbers as they were.
    So every batch is copied to where the recorded one was, and the learning rate is a tensor. If a step cannot be
    recorded, a warning says so, and all are launched operation by operation.
    """

    WARM_UP = 3

    def __init__(self, net: nn.Module, recipe: Recipe, half: bool):
        self.net, self.recipe, self.half = net, recipe, half
        self.lr = torch.zeros((), device=next(net.parameters()).device)
        self.optimizer = self.sgd(lr=self.lr, fused=True)  # any other implementation reads a tensor's number
        self.stream = torch.cuda.Stream()
        self.batch: tuple[Tensor, Tensor] | None = None
        self.taken = 0

    def __call__(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """Take the step, and give the loss before it, without gradient. All batches have one size."""
        self.lr.fill_(lr)
        if self.batch is None:
            self.batch = x.clone(), y.clone()
        for kept, given in zip(self.batch, (x, y), strict=True):
            kept.copy_(given)
        if self.taken == self.WARM_UP:
            self.record()
        self.taken += 1
        if self.graph is not None:
            self.graph.replay()
            return self.loss.clone()  # the next step overwrites it
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.take(*self.batch, keep_casts=False)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def record(self) -> None:
        """Record a step without taking it."""
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()  # gradients must be made anew, in the graph's own memory
        try:
            with torch.cuda.stream(self.stream), torch.cuda.graph(graph, stream=self.stream):
                self.loss = self.take(*self.batch, keep_casts=False)
        except RuntimeError as error:
            warnings.warn(f"the training step is no CUDA graph, which may be slower: {error}", stacklevel=2)
        else:
            self.graph = graph
