"""A panel of widgets over stored runs: a pair, a matching, a renormalisation, and what becomes of the path between.

`Explorer` computes and draws, `panel` puts ipywidgets in front of it. Nothing else needs ipywidgets.
"""

import asyncio
import html
import io
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from companion.experiments.pairs import Pair, load_pair
from companion.figures import plots
from companion.figures.report import device_name
from companion.runs.store import Store
from companion.runs.train import parse_run
from repairlib.corrections import target_nodes
from repairlib.interpolate import Path, interpolate_models
from repairlib.moments import gather
from repairlib.names import check
from repairlib.renorm import Repair, reset
from repairlib.tracing import Batches, trace

MATCHINGS = {"none": "not aligned", "activations": "aligned by activations", "weights": "aligned by weights"}
REPAIRS = {
    "REPAIR": {},
    "REPAIR, closed form": {"method": "closed-form"},
    "RESCALE": {"correct": "rescale"},
    "RESHIFT": {"correct": "reshift"},
}
RENORMALISATIONS = ("none", *REPAIRS, "RESET")
METRICS = {"accuracy": "test accuracy (%)", "loss": "test loss (nats)"}
ALPHAS = tuple(i / 20 for i in range(21))  # of a path, and of the slider
LOOKS = {
    label: plots.LOOKS[look] | changes | {"label": label}
    for label, look, changes in (
        ("not aligned", "direct", {}),
        ("aligned by activations", "aligned", {}),
        ("aligned by weights", "aligned", {}),
        ("REPAIR", "repaired", {}),
        ("REPAIR, closed form", "closed-form", {}),
        ("RESCALE", "repaired", {"color": "#E69F00", "marker": "s"}),
        ("RESHIFT", "repaired", {"color": "#CC79A7", "marker": "^"}),
        ("RESET", "reset", {}),
    )
}


@dataclass(frozen=True)
class Choice:
    """What is looked at: two runs, how B is matched with A, how the networks between them are renormalised.

    Attributes:
        runs: names of two runs of one model.
        matching: one of `MATCHINGS`.
        renormalisation: one of `RENORMALISATIONS`.

    Raises:
        ValueError: an unknown matching or renormalisation, with the nearest.
    """

    runs: tuple[str, str]
    matching: str = "activations"
    renormalisation: str = "REPAIR"

    def __post_init__(self):
        check(self.matching, MATCHINGS, "matching")
        check(self.renormalisation, RENORMALISATIONS, "renormalisation")

    @property
    def lines(self) -> dict[str, "Choice"]:
        """What is drawn, by label: the path without renormalisation, and the one with it if there is one."""
        lines = {MATCHINGS[self.matching]: replace(self, renormalisation="none")}
        return lines if self.renormalisation == "none" else lines | {self.renormalisation: self}


def stored_pairs(store: Store | None = None) -> dict[str, tuple[str, str]]:
    """Every two stored runs that differ in nothing but the seed, by a short name; default: of the default store."""
    by_recipe: dict[str, list[str]] = {}
    for name in (store or Store()).names():
        try:
            parse_run(name, check_data=False)
        except ValueError:
            continue  # a folder of something else
        by_recipe.setdefault(name.rpartition("/")[0], []).append(name)
    pairs = (pair for names in by_recipe.values() for pair in itertools.combinations(names, 2))
    return {f"{a}, {b.rpartition('/')[2]}": (a, b) for a, b in pairs}


class Explorer:
    """Paths between stored networks under any `Choice`; what was computed once is there at once the next time.

    The results of all choices are kept, the networks of the last pair only.

    Args:
        calibration: training images for matching, renormalisation and variances; fewer than Jordan et al.'s 5,000
            (2022, Sec. 4.2), so that a panel answers soon.
        device: default `train.default_device()`.
    """

    def __init__(self, calibration: int = 500, device: str | None = None):
        self.calibration, self.device = calibration, device
        self._points: dict[Choice, dict[float, dict]] = {}
        self._origins: dict[tuple[str, str], str] = {}
        self._pair: Pair | None = None
        self._made: dict[Hashable, Any] = {}
        self._lock = threading.Lock()  # JupyterLab calls widgets back in a thread of their own, while cells may run

    def pair(self, runs: tuple[str, str]) -> Pair:
        """The pair of two runs, trained first if they are not stored, see `pairs.load_pair`."""
        if self._pair is None or self._pair.runs != runs:
            self._pair, self._made = load_pair(runs, self.calibration, self.device), {}
            data, where = self._pair.dataset, sorted({Store().info(run)["device"] for run in runs})
            self._origins[runs] = (
                f"{runs[0]} and {runs[1].rpartition('/')[2]}, trained on {', '.join(where)}; "
                f"{min(self.calibration, len(data.train)):,} training images to match, renormalise and measure "
                f"variances, {len(data.test):,} test images; computed on {device_name(data.device)}"
            )
        return self._pair

    def network(self, choice: Choice, alpha: float) -> nn.Module:
        """The network at alpha; raises ValueError if the renormalisation does not fit it."""
        pair = self.pair(choice.runs)
        b = pair.b
        if choice.matching != "none":
            b = self._once(choice.matching, lambda: replace(pair, match=choice.matching).aligned)
        if choice.renormalisation in REPAIRS:
            options = REPAIRS[choice.renormalisation]
            repair = self._once(choice, lambda: Repair(pair.a, b, pair.calibration, limit=None, **options))
            return repair(alpha).model
        model = interpolate_models(pair.a, b, alpha)
        return reset(model, pair.calibration).model if choice.renormalisation == "RESET" else model

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def point(self, choice: Choice, alpha: float) -> dict:
        """Of the network at alpha {alpha, loss (test, nats), accuracy (test, in [0, 1]), variance (by layer, of all its
        units together, squared units)}.

        Raises:
            ValueError: the renormalisation does not fit the network.
            CorruptCheckpoint, StaleRun, DataMissing: a run cannot be used.
        """
        with self._lock:
            points = self._points.setdefault(choice, {})
            if alpha not in points:
                model, pair = self.network(choice, alpha), self.pair(choice.runs)
                loss, accuracy = pair.evaluate(model)
                batches = Batches(pair.calibration, model)
                net = trace(model, batches.example())
                moments = gather([net], batches, target_nodes(net, ("conv", "linear")))
                variance = {node: float(m.var().sum()) for node, m in moments.items()}
                points[alpha] = {"alpha": alpha, "loss": loss, "accuracy": accuracy, "variance": variance}
            return points[alpha]

    def missing(self, choice: Choice, alpha: float) -> list[tuple[Choice, float]]:
        """Points that a complete view still lacks: first those without which there is none, alpha and the ends."""
        order = dict.fromkeys((alpha, 0.0, 1.0, 0.5, *ALPHAS))
        return [(c, a) for a in order for c in choice.lines.values() if a not in self._points.get(c, {})]

    def path(self, choice: Choice) -> Path:
        """The points of one line that were computed so far."""
        with self._lock:
            points = sorted(self._points.get(choice, {}).items())
        return Path(*(tuple(point[key] for _, point in points) for key in ("alpha", "loss", "accuracy")))

    def profile(self, choice: Choice, alpha: float) -> list[dict]:
        """Variance of every layer relative to the endpoints, which interpolation at 0 and 1 is.

        ``v_alpha / ((v_1 + v_2) / 2)`` with v the sum of the units' variances (Jordan et al. 2022, Sec. 3.1).

        Returns:
            Rows {network, layer (from 1), node, ratio} of every line of the choice.
        """
        bare = next(iter(choice.lines.values()))
        a, b = (self.point(bare, end)["variance"] for end in (0.0, 1.0))
        if still := [node for node in a if a[node] + b[node] == 0]:
            raise ValueError(f"the endpoints do not vary at node {still[0]!r}; a variance ratio is undefined")
        return [
            {"network": name, "layer": layer, "node": node, "ratio": 2 * variance / (a[node] + b[node])}
            for name, line in choice.lines.items()
            for layer, (node, variance) in enumerate(self.point(line, alpha)["variance"].items(), start=1)
        ]

    def view(
        self, choice: Choice, alpha: float = 0.5, metric: str = "accuracy", *, complete: bool = True
    ) -> tuple[Figure, str]:
        """The path with alpha marked and the variance of every layer there, as a figure, and its numbers as text.

        Args:
            choice: what to look at.
            alpha: of the network whose variances are shown, in [0, 1].
            metric: "accuracy" or "loss".
            complete: compute the whole path first; otherwise draw what there is of it.

        Raises:
            ValueError: alpha or metric out of range, or see `point`.
        """
        check(metric, METRICS, "metric")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 (model A) to 1 (model B), not {alpha}")
        for line, at in self.missing(choice, alpha):
            if complete or at in (0, alpha, 1):
                self.point(line, at)
        run = parse_run(choice.runs[0], check_data=False)
        paths = {name: self.path(line) for name, line in choice.lines.items()}
        rows = [row for name, path in paths.items() for row in path.table(network=name)]
        with plots.style():
            figure, (left, right) = plt.subplots(1, 2, figsize=(2 * plots.COLUMN_WIDTH, 2.7))
        plots.curves(rows, "alpha", metric, "network", xlabel=r"$\alpha$", ylabel=METRICS[metric],
                     title=f"{run.model} on {run.data}", percent=metric == "accuracy", legend="none", ax=left,
                     looks=LOOKS)  # fmt: skip
        left.axvline(alpha, color="black", lw=0.8, zorder=0)
        left.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nmodel A", "0.25", "0.5", "0.75", "1\nmodel B"])
        left.set_xlim(-0.03, 1.03)
        plots.curves(self.profile(choice, alpha), "layer", "ratio", "network", xlabel="layer",
                     ylabel="variance relative\nto endpoints (ratio)", title=rf"layers at $\alpha$ = {alpha:g}",
                     ax=right, looks=LOOKS)  # fmt: skip
        right.axhline(1, color="black", lw=0.6, zorder=0)
        right.set_ylim(0, max(1.1, right.get_ylim()[1]))
        return figure, f"{_table(paths, alpha)}\n{self._origins[choice.runs]}"


def _table(paths: Mapping[str, Path], alpha: float) -> str:
    """Accuracy (%) and loss (nats) at alpha and at the ends, and the barriers of what there is of the paths."""
    rows = [("", "", f"alpha {alpha:g}", "model A", "model B", "barrier", "of alphas")]
    for name, path in paths.items():
        for metric, scale, digits in (("accuracy", 100, 1), ("loss", 1, 3)):
            at = dict(zip(path.alpha, getattr(path, metric), strict=True))
            numbers = [scale * value for value in (at[alpha], at[0], at[1], path.barrier(metric))]
            rows.append((name, METRICS[metric], *(f"{number:.{digits}f}" for number in numbers), str(len(at))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def panel(explorer: Explorer, choice: Choice | None = None, alpha: float = 0.5, metric: str = "accuracy"):
    """Widgets in front of an explorer: every pair in the default store, matching, renormalisation, alpha, metric.

    A view appears as soon as there are its ends and its alpha, and grows while the rest is computed; another choice
    made meanwhile ends that. What cannot be shown is said in words.

    Args:
        explorer: its results are used and added to.
        choice: what to show first; default the first pair, aligned and repaired.
        alpha, metric: as in `Explorer.view`.

    Returns:
        A box of widgets, or without ipywidgets None, after printing how to get it.

    Raises:
        ValueError: the runs of `choice` are not stored.
    """
    try:
        import ipywidgets as widgets
    except ImportError:
        print("The panel needs ipywidgets: pip install 'repairlib[lab]', or make lab. Explorer.view draws without it.")
        return None
    pairs = stored_pairs()
    if not pairs:
        return widgets.HTML(
            f"No two stored runs that differ in the seed only in {html.escape(str(Store().root))}: <code>make figures"
            "</code> trains some, and so does <code>companion.runs.store.get(name)</code>."
        )
    choice = choice or Choice(next(iter(pairs.values())))
    names = {runs: name for name, runs in pairs.items()}
    if choice.runs not in names:
        raise ValueError(f"{' and '.join(choice.runs)} are not both stored: load_pair trains what is missing")
    wide = {"style": {"description_width": "110px"}, "layout": {"width": "400px"}}
    controls = [
        widgets.Dropdown(options=pairs, value=choice.runs, description="pair", **wide),
        widgets.Dropdown(options=list(MATCHINGS), value=choice.matching, description="matching", **wide),
        widgets.Dropdown(options=RENORMALISATIONS, value=choice.renormalisation, description="renormalisation", **wide),
        widgets.FloatSlider(value=alpha, min=0, max=1, step=0.05, continuous_update=False, description="alpha", **wide),
        widgets.Dropdown(options=list(METRICS), value=metric, description="metric", **wide),
    ]
    status, words = widgets.HTML(), widgets.HTML()
    picture = widgets.Image(format="png", layout={"width": "820px", "max_width": "100%"})
    turn, tasks = 0, set()  # which update is the last; tasks, as a loop itself holds them weakly

    def attempt(step: Callable[[], object]) -> bool:
        try:
            step()
        except Exception as error:  # of any kind: a callback of a widget has no cell to show a traceback in
            status.value = f"<b>{type(error).__name__}:</b> {html.escape(str(error))}"
            picture.layout.display, words.value = "none", ""
            return False
        return True

    def draw(*wanted) -> None:
        figure, text = explorer.view(*wanted, complete=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=240)
        plt.close(figure)
        picture.value, picture.layout.display = buffer.getvalue(), None
        style = "line-height: 1.4; white-space: pre-wrap"
        words.value, status.value = f'<pre style="{style}">{html.escape(text)}</pre>', ""

    async def fill(mine: int, choice: Choice, alpha: float, metric: str) -> None:
        todo, drawn = explorer.missing(choice, alpha), 0.0
        for i, (line, at) in enumerate(todo):
            lacking = any(a in (0, alpha, 1) for _, a in todo[i:])
            what = "the picture is of the last choice until then" if lacking else "the path grows below"
            status.value = f"<i>computing network {i + 1} of {len(todo)} ... ({what})</i>"
            await asyncio.sleep(0.02)  # lets in what widgets have to say
            if mine != turn or not attempt(partial(explorer.point, line, at)):
                return
            if not lacking and time.monotonic() > drawn + 1:
                attempt(partial(draw, choice, alpha, metric))
                drawn = time.monotonic()
        attempt(partial(draw, choice, alpha, metric))

    def update(_=None) -> None:
        nonlocal turn
        turn += 1
        runs, matching, renormalisation, alpha, metric = (control.value for control in controls)
        wanted = Choice(runs, matching, renormalisation), round(alpha, 2), metric
        if not explorer.missing(*wanted[:2]):
            attempt(partial(draw, *wanted))
            return
        work = fill(turn, *wanted)
        try:
            tasks.add(task := asyncio.get_running_loop().create_task(work))
            task.add_done_callback(tasks.discard)
        except RuntimeError:  # no loop: not in a notebook
            asyncio.run(work)

    for control in controls:
        control.observe(update, "value")
    update()
    rows = widgets.Box(controls, layout={"flex_flow": "row wrap"})
    return widgets.VBox([rows, status, picture, words])
