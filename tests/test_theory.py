import pytest
import torch
from cases import batches, make

from companion.experiments.theory import first_layer_theory, std_over_root_variance
from repairlib.interpolate import interpolate_models


def test_theory_leaves_dead_units_out():
    name = "mlp1-plain-w6"
    a, b = make(name, 0), make(name, 1)
    with torch.no_grad():
        next(m for m in a.modules() if isinstance(m, torch.nn.Linear)).weight[3] = 0
    rows = first_layer_theory(a, b, interpolate_models(a, b), batches(name))
    assert [row["unit"] for row in rows] == [0, 1, 2, 4, 5]
    assert all(row["eq5"] == pytest.approx(row["measured"], rel=1e-4) for row in rows)


def test_std_never_exceeds_root_variance():
    """Cauchy-Schwarz, with equality where the endpoints vary alike."""
    name = "vgg11-bn-w0.125"
    a, b, data = make(name, 0), make(name, 1), batches(name)
    ratios = std_over_root_variance(a, b, data)
    assert len(ratios) == 8 and all(0.5 < ratio < 1 for ratio in ratios.values())
    assert all(ratio == pytest.approx(1) for ratio in std_over_root_variance(a, a, data).values())
