"""Paths between stored networks, by widgets: choose a pair, a matching and a renormalisation, see what comes of them.

`Explorer` computes and draws. `panel` puts ipywidgets in front of it. Nothing else needs ipywidgets.
"""

import asyncio
import html
import io
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from companion.experiments.methods import MATCHINGS, RENORMS
from companion.experiments.methods import Path as Networks
from companion.experiments.pairs import Pair, load_pair, title_of
from companion.experiments.rows import equal_steps
from companion.experiments.tables import MEASURES, barriers, network_name, restore_ends
from companion.figures import plots
from companion.figures.report import device_name
from companion.runs import models
from companion.runs.store import Store
from companion.runs.train import parse_run
from repairlib.corrections import target_nodes
from repairlib.inputs import Batches
from repairlib.moments import gather
from repairlib.names import check
from repairlib.progress import bar
from repairlib.tracing import trace

METRICS = {"accuracy": "test accuracy (%)", "loss": "test loss (nats)"}
ALPHAS = tuple(equal_steps(21))  # of a path, and of the slider


@dataclass(frozen=True)
class Choice:
    """What is looked at: two runs, how B is matched with A, how the networks between them are renormalised.

    Attributes:
        runs: names of two runs of one model.
        matching: one of `MATCHINGS`.
        renorm: one of `RENORMS`.

    Raises:
        ValueError: an unknown matching or renormalisation, with the nearest.
    """

    runs: tuple[str, str]
    matching: str = "AM"
    renorm: str = "REPAIR"

    def __post_init__(self):
        check(self.matching, MATCHINGS, "matching")
        check(self.renorm, RENORMS, "renormalisation")

    @property
    def label(self) -> str:
        """The networks between the two runs, in words."""
        matching = MATCHINGS[self.matching].label
        return matching if self.renorm == "none" else f"{matching} + {RENORMS[self.renorm].label}"

    @property
    def look(self) -> dict:
        """How its line is drawn: as in the papers' figures, if they have such networks."""
        names = (network_name(matching, self.renorm) for matching in (self.matching, "AM"))
        return next((plots.LOOKS[name] for name in names if name in plots.LOOKS), {"marker": "o"})

    @property
    def lines(self) -> list["Choice"]:
        """What is drawn: the path as interpolated, and the renormalised one if there is one."""
        plain = replace(self, renorm="none")
        return [plain] if self == plain else [plain, self]


class View(NamedTuple):
    """One choice as a picture, as a table of numbers, and in words where these come from."""

    figure: Figure
    table: pd.DataFrame
    source: str


def stored_pairs(containing: str = "", store: Store | None = None) -> dict[str, tuple[str, str]]:
    """Every two stored runs that differ in nothing but the seed, by a short name.

    Args:
        containing: words that the short name must contain, such as "vgg s1"; empty: any name will do.
        store: default: the default store.
    """
    by_recipe: dict[str, list[str]] = {}
    for name in (store or Store()).names():
        try:
            parse_run(name, check_data=False)
        except ValueError:
            continue  # a folder of something else
        by_recipe.setdefault(name.rpartition("/")[0], []).append(name)
    pairs = (pair for names in by_recipe.values() for pair in itertools.combinations(names, 2))
    named = {f"{a}, {b.rpartition('/')[2]}": (a, b) for a, b in pairs}
    words = containing.lower().split()
    return {name: pair for name, pair in named.items() if all(word in name.lower() for word in words)}


def offered_renorms(run: str) -> list[str]:
    """The renormalisations that fit the networks of a stored run: RESET, for instance, needs a BatchNorm."""
    info = Store().info(run)
    with torch.device("meta"):  # the layers alone, without weights
        model = models.build(parse_run(run, check_data=False).model, tuple(info["shape"]), info["classes"])
    layers = " ".join(type(module).__name__ for module in model.modules())
    return [name for name, how in RENORMS.items() if how.needs in layers]


def _digests(runs: tuple[str, str]) -> tuple[str, ...]:
    """The digests of the stored weights, by which a run that was trained anew is told from what it was before."""
    store = Store()
    return tuple(store.info(run)["sha256"] if store.has(run) else "" for run in runs)


class Explorer:
    """Paths between stored networks under any `Choice`; what was computed once is there at once the next time.

    The results of all choices are kept, the networks of the last pair only. A run that was trained anew since is
    loaded anew, and its results are computed anew.

    Args:
        calibration: training images for matching, renormalisation and variances; fewer than Jordan et al.'s 5,000
            (2022, Sec. 4.2), so that a panel answers soon.
        device: default `train.default_device()`.
    """

    def __init__(self, calibration: int = 500, device: str | None = None):
        self.calibration, self.device = calibration, device
        self._points: dict[tuple[Choice, tuple[str, ...]], dict[float, dict]] = {}
        self._sources: dict[tuple[str, str], str] = {}
        self._pair: Pair | None = None
        self._loaded: tuple[str, ...] = ()
        self._networks: dict[Choice, Networks] = {}
        self._lock = threading.Lock()  # JupyterLab calls widgets back in a thread of their own, while cells may run

    def pair(self, runs: tuple[str, str]) -> Pair:
        """The pair of two runs, trained first if they are not stored, see `pairs.load_pair`."""
        if self._pair is None or self._pair.runs != runs or self._loaded != _digests(runs):
            self._pair, self._networks = load_pair(runs, self.calibration, self.device), {}
            self._loaded = _digests(runs)
            data, where = self._pair.dataset, sorted({Store().info(run)["device"] for run in runs})
            self._sources[runs] = (
                f"{runs[0]} and {runs[1].rpartition('/')[2]}, trained on {', '.join(where)}; "
                f"{min(self.calibration, len(data.train)):,} training images to match, renormalise and measure "
                f"variances, {len(data.test):,} test images; computed on {device_name(data.device)}"
            )
        return self._pair

    def _known(self, choice: Choice) -> dict[float, dict]:
        """The points of one line that were computed so far, by alpha."""
        return self._points.setdefault((choice, _digests(choice.runs)), {})

    def point(self, choice: Choice, alpha: float) -> dict:
        """Measure the network at alpha.

        Returns:
            {alpha, loss (test, nats), accuracy (test, in [0, 1]), variance: by layer, of all its units together,
            squared units}.

        Raises:
            ValueError: the renormalisation does not fit the network.
            CorruptCheckpoint, StaleRun, DataMissing: a run cannot be used.
        """
        with self._lock:
            if alpha not in self._known(choice):
                pair = self.pair(choice.runs)
                if choice not in self._networks:
                    self._networks[choice] = pair.path(choice.matching, choice.renorm)
                model = self._networks[choice](alpha)
                loss, accuracy = pair.evaluate(model)
                batches = Batches(pair.calibration, model)
                net = trace(model, batches.example())
                moments = gather([net], batches, target_nodes(net, ("conv", "linear")))
                variance = {node: float(m.var().sum()) for node, m in moments.items()}
                point = {"alpha": alpha, "loss": loss, "accuracy": accuracy, "variance": variance}
                self._known(choice)[alpha] = point
            return self._known(choice)[alpha]

    def missing(self, choice: Choice, alpha: float) -> list[tuple[Choice, float]]:
        """Points that a complete view still lacks: first those without which there is none, alpha and the ends."""
        known = {line: self._known(line) for line in choice.lines}
        order = dict.fromkeys((alpha, 0.0, 1.0, 0.5, *ALPHAS))
        return [(line, at) for at in order for line in choice.lines if at not in known[line]]

    def step(self, choice: Choice, alpha: float) -> str:
        """What has to be done for a point, in words."""
        runs, steps = choice.runs, []
        if untrained := [run for run in runs if not Store().has(run)]:
            steps.append(f"training {' and '.join(untrained)}")
        fresh = self._pair is None or self._pair.runs != runs or self._loaded != _digests(runs)
        if fresh:
            steps.append("loading the networks and their data")
        if choice.matching != "none" and (fresh or not self._pair.has_matched(choice.matching)):
            steps.append(f"matching units ({MATCHINGS[choice.matching].label})")
        if choice.renorm != "none" and (fresh or choice not in self._networks):
            steps.append(f"preparing {RENORMS[choice.renorm].label}")
        return ", ".join([*steps, f"testing the network {choice.label} at alpha {alpha:g}"])

    def rows(self, choice: Choice) -> pd.DataFrame:
        """A long table of all points of the choice's lines that were computed so far.

        Returns:
            Columns {network: in words, matching, renorm, alpha, loss (nats), accuracy (in [0, 1])}.
        """
        with self._lock:
            known = {line: sorted(self._known(line).items()) for line in choice.lines}
        return pd.DataFrame(
            [
                {"network": line.label, "matching": line.matching, "renorm": line.renorm}
                | {name: point[name] for name in ("alpha", *MEASURES)}
                for line, points in known.items()
                for _, point in points
            ]
        )

    def profile(self, choice: Choice, alpha: float) -> list[dict]:
        """Variance of every layer relative to the endpoints, which interpolation at 0 and 1 is.

        ``v_alpha / ((v_1 + v_2) / 2)`` with v the sum of the units' variances (Jordan et al. 2022, Sec. 3.1).

        Returns:
            Rows {network, layer (from 1), node, ratio} of every line of the choice.
        """
        a, b = (self.point(choice.lines[0], end)["variance"] for end in (0.0, 1.0))
        if still := [node for node in a if a[node] + b[node] == 0]:
            raise ValueError(f"the endpoints do not vary at node {still[0]!r}; a variance ratio is undefined")
        return [
            {"network": line.label, "layer": layer, "node": node, "ratio": 2 * variance / (a[node] + b[node])}
            for line in choice.lines
            for layer, (node, variance) in enumerate(self.point(line, alpha)["variance"].items(), start=1)
        ]

    def view(self, choice: Choice, alpha: float = 0.5, metric: str = "accuracy", *, complete: bool = True) -> View:
        """Draw the path with alpha marked, and the variance of every layer there; a bar shows how far it is.

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
        todo = [(line, at) for line, at in self.missing(choice, alpha) if complete or at in (0, alpha, 1)]
        with bar(len(todo), "networks along the path", "net", show=complete and bool(todo)) as progress:
            for line, at in todo:
                self.point(line, at)
                progress.update()
        rows = self.rows(choice)
        return View(self._draw(choice, rows, alpha, metric), summarise(rows, alpha), self._sources[choice.runs])

    def _draw(self, choice: Choice, rows: pd.DataFrame, alpha: float, metric: str) -> Figure:
        """The path on the left, the variance of every layer on the right."""
        looks = {line.label: line.look for line in choice.lines}
        with plots.style():
            figure, (left, right) = plt.subplots(1, 2, figsize=(2 * plots.COLUMN_WIDTH, 2.7))
        title = title_of(choice.runs[0].rpartition("/")[0])
        plots.curves(rows, "alpha", metric, "network", xlabel=r"$\alpha$", ylabel=METRICS[metric], title=title,
                     percent=metric == "accuracy", legend="none", ax=left, looks=looks)  # fmt: skip
        left.axvline(alpha, color="black", lw=0.8, zorder=0)
        left.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nmodel A", "0.25", "0.5", "0.75", "1\nmodel B"])
        left.set_xlim(-0.03, 1.03)
        plots.curves(self.profile(choice, alpha), "layer", "ratio", "network", xlabel="layer",
                     ylabel="variance relative\nto endpoints (ratio)", title=rf"layers at $\alpha$ = {alpha:g}",
                     ax=right, looks=looks)  # fmt: skip
        right.axhline(1, color="black", lw=0.6, zorder=0)
        right.set_ylim(0, max(1.1, right.get_ylim()[1]))
        return figure


def summarise(rows: pd.DataFrame, alpha: float) -> pd.DataFrame:
    """Accuracy (%) and loss (nats) at alpha and at the ends, and barriers (points, nats) of what there is of the paths.

    Barriers are measured from the endpoints as trained, also where a renormalisation changes them.
    """
    found = barriers(restore_ends(rows)).set_index("network")
    units = {"accuracy": ("accuracy (%)", 100, 1), "loss": ("loss (nats)", 1, 3)}
    columns = {}
    for metric, (title, scale, digits) in units.items():
        at = rows.pivot(index="network", columns="alpha", values=metric)
        values = {
            f"alpha {alpha:g}": at[alpha],
            "model A": at[0],
            "model B": at[1],
            "barrier": found[f"{metric}_barrier"],
        }
        columns |= {(title, name): (scale * column).round(digits) for name, column in values.items()}
    columns["", "points of the path"] = rows.groupby("network")["alpha"].count()
    return pd.DataFrame(columns).loc[rows["network"].unique()].rename_axis(None)


def panel(explorer: Explorer, choice: Choice | None = None, alpha: float = 0.5, metric: str = "accuracy"):
    """Widgets in front of an explorer: every pair in the default store, matching, renormalisation, alpha, metric.

    The list of pairs shows those whose names contain the words of the field above it. Only renormalisations that fit
    the networks are offered. A line says what is being computed. A picture appears as soon as there are its ends and
    its alpha, and grows while the rest is computed; another choice made meanwhile ends that. What cannot be shown is
    said in words.

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
    if choice.runs not in pairs.values():
        raise ValueError(f"{' and '.join(choice.runs)} are not both stored: load_pair trains what is missing")
    wide = {"style": {"description_width": "110px"}, "layout": {"width": "430px"}}
    whole = {"style": {"description_width": "110px"}}  # as wide as the panel, so that no name is cut

    def renorms_of(runs: tuple[str, str]) -> list[tuple[str, str]]:
        return [(RENORMS[name].label, name) for name in offered_renorms(runs[0])]

    words = widgets.Text(description="filter", placeholder="words, such as: vgg digits s1", continuous_update=True,
                         **whole | {"layout": {"width": "430px"}})  # fmt: skip
    pair = widgets.Select(options=pairs, value=choice.runs, description="pair", rows=min(8, max(2, len(pairs))),
                          **whole | {"layout": {"width": "866px", "max_width": "100%"}})  # fmt: skip
    matching = widgets.Dropdown(options=[(how.label, name) for name, how in MATCHINGS.items()], value=choice.matching,
                                description="matching", **wide)  # fmt: skip
    renorm = widgets.Dropdown(options=renorms_of(choice.runs), value=choice.renorm, description="renormalisation",
                              **wide)  # fmt: skip
    slider = widgets.FloatSlider(value=alpha, min=0, max=1, step=0.05, continuous_update=False, description="alpha",
                                 **wide)  # fmt: skip
    measure = widgets.Dropdown(options=[(label, name) for name, label in METRICS.items()], value=metric,
                               description="measure", **wide)  # fmt: skip
    status = widgets.HTML(layout={"min_height": "28px"})  # so that the picture stays where it is
    numbers = widgets.HTML()
    picture = widgets.Image(format="png", layout={"width": "866px", "max_width": "100%"})
    turn, tasks = 0, set()  # which update is the last; tasks, as a loop itself holds them weakly
    listing = False  # while lists are being made anew, their events are none of the user's

    def attempt(step: Callable[[], object]) -> bool:
        try:
            step()
        except Exception as error:  # of any kind: a callback of a widget has no cell to show a traceback in
            status.value = f"<b>{type(error).__name__}:</b> {html.escape(str(error))}"
            picture.layout.display, numbers.value = "none", ""
            return False
        return True

    def draw(*wanted) -> None:
        view = explorer.view(*wanted, complete=False)
        buffer = io.BytesIO()
        view.figure.savefig(buffer, format="png", dpi=240)
        picture.value, picture.layout.display = buffer.getvalue(), None
        numbers.value, status.value = _markup(view), ""

    async def fill(mine: int, choice: Choice, alpha: float, metric: str) -> None:
        todo, drawn = explorer.missing(choice, alpha), 0.0
        for i, (line, at) in enumerate(todo):
            lacking = any(a in (0, alpha, 1) for _, a in todo[i:])
            what = "The picture is of the last choice until then." if lacking else "The path grows below."
            status.value = f"<i>{i + 1} of {len(todo)}: {html.escape(explorer.step(line, at))}. {what}</i>"
            await asyncio.sleep(0.02)  # lets in what widgets have to say
            if mine != turn or not attempt(partial(explorer.point, line, at)):
                return
            if not lacking and time.monotonic() > drawn + 1:
                said = status.value
                attempt(partial(draw, choice, alpha, metric))
                status.value, drawn = said, time.monotonic()
        attempt(partial(draw, choice, alpha, metric))

    def update(_=None) -> None:
        nonlocal turn
        if listing:
            return
        turn += 1
        if pair.value is None:
            status.value = "Choose a pair." if pair.options else "No pair of stored runs contains these words."
            return
        wanted = Choice(pair.value, matching.value, renorm.value), round(slider.value, 2), measure.value
        if not explorer.missing(*wanted[:2]):
            attempt(partial(draw, *wanted))
            return
        work = fill(turn, *wanted)
        try:
            tasks.add(task := asyncio.get_running_loop().create_task(work))
            task.add_done_callback(tasks.discard)
        except RuntimeError:  # no loop: not in a notebook
            asyncio.run(work)

    def list_pairs(_=None) -> None:
        nonlocal listing
        before, found = pair.value, stored_pairs(words.value)
        listing = True
        pair.options = found
        pair.value = before if before in found.values() else None
        listing = False
        if pair.value != before or before is None:
            update()

    def list_renorms(_=None) -> None:
        nonlocal listing
        if not listing and pair.value is not None:
            before, listing = renorm.value, True
            renorm.options = renorms_of(pair.value)
            renorm.value = before if before in dict(renorm.options).values() else "REPAIR"
            listing = False

    words.observe(list_pairs, "value")
    pair.observe(list_renorms, "value")  # before the update, which reads it
    controls = [matching, renorm, slider, measure]
    for control in (pair, *controls):
        control.observe(update, "value")
    update()
    return widgets.VBox(
        [words, pair, widgets.Box(controls, layout={"flex_flow": "row wrap"}), status, picture, numbers]
    )


def _markup(view: View) -> str:
    """The numbers of a view and where they come from, as HTML."""
    style = "<style>.explorer td, .explorer th {padding: 1px 10px; text-align: right}</style>"
    formats = {"accuracy (%)": "{:.1f}", "loss (nats)": "{:.3f}", "": "{:d}"}
    formatters = {column: formats[column[0]].format for column in view.table}
    table = view.table.to_html(border=0, classes="explorer", formatters=formatters)
    return f"{style}{table}<p style='line-height: 1.4'>{html.escape(view.source)}</p>"
