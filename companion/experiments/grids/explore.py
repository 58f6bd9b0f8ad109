"""What notebooks/explore.ipynb shows first, at every scale."""

from companion.experiments.grids import Grid
from companion.experiments.scales import by_scale


def explore(scale: str) -> Grid:
    """Two networks with BatchNorm, or at `fast` a pair of MLPs that a CPU trains."""
    run = by_scale(
        scale,
        smoke="digits/resnet8-bn-w0.25/smoke",
        quick="digits/resnet18-bn-w0.25/quick",
        fast="mnist/mlp6-fused-w128/fast",
        paper="cifar10/resnet18-bn-w1/jordan",
    )
    return Grid(needs={"explore": [{"run": run}]}, seeds=(1, 2), settings={"network": run})
