"""What REPAIR's paper predicts about interpolated networks, beside what is measured."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from repairlib.diagnostics import layer_moments
from repairlib.renorm import predicted_variance


def std_over_root_variance(
    model_a: nn.Module, model_b: nn.Module, data: Iterable, targets: Sequence[str] = ("conv",), alpha: float = 0.5
) -> dict[str, float]:
    """Ratio of REPAIR's goal std to the std that an interpolated BatchNorm divides by, mean over channels, per layer.

    ``[(1-alpha) std_1 + alpha std_2] / sqrt((1-alpha) std_1^2 + alpha std_2^2)``, at most 1: REPAIR interpolates the
    std (Jordan et al. 2022, Eq. 4), BatchNorm's interpolated statistics hold the variance. Channels that are constant
    in both networks are left out.
    """
    ratios = {}
    for name, m in layer_moments([model_a, model_b], data, targets).items():
        variance = (1 - alpha) * m.var(0) + alpha * m.var(1)
        std = (1 - alpha) * m.std(0) + alpha * m.std(1)
        ratios[name] = float((std / variance.sqrt())[variance > 0].mean())
    return ratios


def first_layer_theory(
    model_a: nn.Module, model_b: nn.Module, model_mid: nn.Module, data: Iterable, alpha: float = 0.5
) -> list[dict]:
    """Predicted and measured variance of the first layer's units (Jordan et al. 2022, Sec. 3.2).

    Compares the measured ``Var(X_alpha)`` with Eq. 5 and with the rule of thumb ``(0.5 + 0.5 corr) Var(X_1)``.

    Args:
        model_a, model_b: aligned endpoints.
        model_mid: their interpolation at `alpha`.
        data: any iterable of batches.
        alpha: interpolation coefficient.

    Returns:
        Rows {unit, corr, variance_a, variance_b, eq5, rule_of_thumb, measured}; dead units are left out.
    """
    (m,) = layer_moments([model_a, model_b, model_mid], data, ["stem"], cross="paired").values()
    corr, eq5 = m.corr(), predicted_variance(m, alpha)
    alive = ~(m.dead(0) | m.dead(1))
    columns = {
        "corr": corr, "variance_a": m.var(0), "variance_b": m.var(1), "eq5": eq5,
        "rule_of_thumb": (0.5 + 0.5 * corr) * m.var(0), "measured": m.var(2),
    }  # fmt: skip
    return [
        {"unit": i, **{k: float(v[i]) for k, v in columns.items()}} for i in torch.nonzero(alive).flatten().tolist()
    ]
