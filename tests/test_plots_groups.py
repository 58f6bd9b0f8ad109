import matplotlib.pyplot as plt
from cases import inputs, make

from companion.figures.plots.groups import draw_groups
from repairlib import groups


def test_diagram_shows_every_group():
    plt.switch_backend("agg")
    for name in ("resnet20-bn-w0.25", "vgg11-plain-w0.125", "mlp3-plain-w8"):
        spec = groups.permutation_spec(make(name), inputs(name, 2), verify=False)
        ax = draw_groups(spec)
        assert [label.get_text() for label in ax.get_yticklabels()] == list(spec.layers)
        bands = [line for line in ax.lines if line.get_linewidth() == 5]
        assert len(bands) == len(spec.groups)
        lanes = sorted((*line.get_xdata()[:1], *line.get_ydata()) for line in bands)
        assert all(a[0] != b[0] or a[2] < b[1] for a, b in zip(lanes, lanes[1:], strict=False))  # none overlap
        assert draw_groups(spec, ax) is ax
        plt.close(ax.figure)
