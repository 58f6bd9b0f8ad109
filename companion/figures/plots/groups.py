"""A picture of a network's permutation groups."""

import matplotlib.pyplot as plt

from repairlib.groups import PermutationSpec


def draw_groups(spec: PermutationSpec, ax=None):
    """Diagram of layers and groups: a group is a band, filled where a layer makes its units, open where one reads.

    Args:
        spec: the network's permutation groups.
        ax: matplotlib Axes to draw on; a new figure of fitting size if None.

    Returns:
        The Axes.
    """
    rows = {layer: i for i, layer in enumerate(spec.layers)}
    colors = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")  # Okabe and Ito
    bands = [[(rows[a.tensor.rpartition(".")[0]], a.axis) for a in group.axes
              if a.tensor.rpartition(".")[0] in rows] for group in spec.groups]  # fmt: skip
    shown = [(min(band)[0], max(band)[0], k) for k, band in enumerate(bands) if band]
    lanes: list[list[tuple[int, int]]] = []
    lane_of = {}
    for top, bottom, k in sorted(shown, key=lambda band: (band[0] - band[1], band)):  # long ones to the left
        free = (i for i, lane in enumerate(lanes) if all(bottom < start or end < top for start, end in lane))
        lane_of[k] = next(free, len(lanes))
        lanes += [[]] * (lane_of[k] == len(lanes))
        lanes[lane_of[k]].append((top, bottom))
    if ax is None:
        width = max(3.3, 1 + 0.07 * max(map(len, rows), default=0) + 0.3 * len(lanes))
        ax = plt.subplots(figsize=(width, 0.6 + 0.2 * len(rows)), layout="constrained")[1]
    sizes: dict[int, list[str]] = {}
    for top, bottom, k in shown:
        sizes.setdefault(top, []).append(str(spec.groups[k].size))
        color, lane = colors[k % len(colors)], lane_of[k]
        ax.plot([lane, lane], [top, bottom], color=color, linewidth=5, alpha=0.35, solid_capstyle="round")
        for row, axis in bands[k]:
            ax.plot(lane, row, "o", color=color, markersize=5, markerfacecolor="white" if axis == 1 else color)
    for row, texts in sizes.items():
        ax.text(len(lanes) - 0.4, row, " + ".join(texts), va="center", fontsize=8)
    ax.hlines(range(len(rows)), -0.6, len(lanes) - 0.6, color="0.9", linewidth=0.5, zorder=0)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_title("\u25cf makes units, \u25cb reads them; right: how many", fontsize=8, loc="right")
    ax.set(xlim=(-0.6, len(lanes) + 0.6), ylim=(len(rows) - 0.5, -0.7), xticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(left=False)
    return ax
