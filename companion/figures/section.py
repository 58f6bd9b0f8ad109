"""What a notebook works with: a section of a paper at one scale, and its items.

    section = Section(width_depth, scale, items)
    if fig := section.item("repair/fig6-left"):
        table = fig.rows()
        fig.save(table, plots.barriers(table, "width"))

An item that was not asked for is None, so that its cell does nothing.
"""

import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import FigureBase

from companion.experiments.available import can_be_had, say_left_out
from companion.experiments.grids import Grid
from companion.experiments.pairs import Pair, pairs_of
from companion.experiments.rows import rows, usual_renorm
from companion.experiments.scales import SCALES, calibration_images, check_scale, wanted
from companion.experiments.tables import Table, restore_ends
from companion.figures.report import DamagedResult, load_item, read_index, save_item
from companion.runs import costs
from companion.runs.names import seeded

KEPT_BYTES = 1_000_000_000  # of the pairs that are kept for the next table; no more are kept once it is reached


class Section:
    """A section of a paper at one scale.

    Args:
        grid: from a scale to what the section needs there, one of `companion.experiments.grids`.
        scale: smoke, quick, fast or paper.
        items: comma-separated IDs of the items to make; empty: all of the section's.

    Attributes:
        grid: the needs and settings at the scale.
        runs: names of the training runs that the items need; the batch trains them first.
        passes: of the grid, for the batch.
        reads: items of other notebooks that are summed up; the batch makes them first.
        left_out: by item, names of runs that it does without, see `available.can_train`. An item that is not in
            `items` lacks too much to be made.
        tables: by item, the table that was saved, for a notebook's last checks.
    """

    def __init__(self, grid: Callable[[str], Grid], scale: str, items: str = ""):
        self.scale, self._make = check_scale(scale), grid
        everything = grid(scale)
        self._has = can_be_had() if scale == "fast" else lambda run: True
        self.grid, self._known = everything.only(self._has), list(everything.needs)
        asked = [item for item in everything.needs if wanted(item, items)]
        self.items = [item for item in asked if item in self.grid.needs]
        left = {item: set(self.grid.runs([item])) for item in self.items}
        missing = {item: [run for run in everything.runs([item]) if run not in left.get(item, ())] for item in asked}
        self.left_out = {item: runs for item, runs in missing.items() if runs}
        self.runs, self.passes = self.grid.runs(self.items), self.grid.passes
        self.reads = [name for item in self.items for name in self.grid.reads.get(item, ())]
        self.tables: dict[str, pd.DataFrame] = {}
        self._pairs: dict[str, list[tuple[str, Pair]]] = {}
        self._room = KEPT_BYTES
        self._measured: dict[str, tuple[list[dict], float]] = {}

    @property
    def calibration(self) -> int:
        """Training images for matching and statistics of what `rows` and `pairs` give; `load_pair` has its own."""
        return self.grid.settings.get("calibration", calibration_images(self.scale))

    @property
    def gone(self) -> list[str]:
        """Items that were asked for and lack too much to be made."""
        return [item for item in self.left_out if item not in self.items]

    def overview(self) -> pd.DataFrame:
        """What the section has at each scale; says what is not trained yet, and about how long that will take."""
        missing, seconds = costs.estimate(self.runs)
        if missing:
            print(
                f"{len(missing)} of {len(self.runs)} networks are not trained yet: about {costs.rough(seconds)} here."
            )
        if self.left_out:
            print(say_left_out(self.left_out, self.gone))
        return pd.DataFrame({scale: _column(self._make(scale), scale) for scale in SCALES})

    def example(self, *runs: str, networks: int = 2) -> list[str]:
        """Names of the runs of some seeds of one network, to look at step by step.

        Args:
            *runs: run names without their seeds. The first counts; at `fast` the first that can be had, else any
                network of the section. If it is not the first, a line says so.
            networks: how many.

        Raises:
            ValueError: no network of the section has so many seeds.
        """
        others = [network["run"] for network in self.grid.networks(self.grid.needs)]
        for run in [*runs, *others]:
            found = [name for seed in self.grid.seeds if self._has(name := seeded(run, seed))][:networks]
            if len(found) == networks:
                if runs and run != runs[0]:
                    print(f"Step by step with {run}, because {runs[0]} is not trained.")
                return found
        raise ValueError(f"no network here has {networks} seeds. {say_left_out(self.left_out, self.gone)}")

    def item(self, name: str) -> "Item | None":
        """The item, its clock started.

        None if it was not asked for, if items that it sums up are not made yet, or if it was made at `fast` of more
        networks than there are here: then it stays as it is.

        Raises:
            ValueError: the section has no such item.
        """
        if name not in self._known:
            raise ValueError(f"this section has no item {name!r}; it has: {', '.join(self._known)}")
        if name not in self.items or self._is_made_of_more(name):
            return None
        try:
            return Item(name, self)
        except FileNotFoundError as error:
            print(error)
            return None

    def _is_made_of_more(self, name: str) -> bool:
        """Whether an item that does without some runs has been made of all that it would be made of now, and more."""
        try:
            made = set(load_item(name, self.scale)["runs"]) if name in self.left_out else set()
        except (FileNotFoundError, DamagedResult):
            return False
        if more := made > set(self.grid.runs([name])):
            print(f"{name} was made of more networks than are here, and stays as it is.")
        return more

    def rows(self, networks: Iterable[Mapping[str, object]], **how) -> pd.DataFrame:
        """The long table of some networks; what is measured once is not measured again for another item.

        Args:
            networks: configurations, see `experiments.rows.rows`.
            **how: matchings, renorms, alphas, ..., see there. `calibration` is the section's.

        Returns:
            The table. Its ``attrs["seconds"]`` says how long measuring it took, whenever that was, beyond what another
            table had matched and measured before.
        """
        found, seconds = [], 0.0
        for network in networks:
            seeds = network.get("seeds", self.grid.seeds)
            key = repr((network["run"], seeds, sorted(how.items())))
            if key not in self._measured:
                start = time.perf_counter()
                given = {"calibration": self.calibration} | how
                table = rows([{"run": network["run"]}], seeds, pairs=self._pairs_one_by_one, **given)
                measured = table.to_dict("records")
                self._measured[key] = measured, time.perf_counter() - start
            columns = {name: value for name, value in network.items() if name != "seeds"}
            found += [columns | row for row in self._measured[key][0]]
            seconds += self._measured[key][1]
        table = pd.DataFrame(found)
        table.attrs["seconds"] = seconds
        return table

    def usual_rows(self, networks: Iterable[Mapping[str, object]], **how) -> pd.DataFrame:
        """The long table of some networks, each renormalised as usual, see `experiments.rows.usual_renorm`.

        The ends of all paths are the networks as trained.

        Args:
            networks, **how: see `rows`, without renorms.
        """
        tables = []
        for network in networks:
            renorm = usual_renorm(network["run"])
            table = self.rows([network], renorms=list(dict.fromkeys(["none", renorm])), **how)
            tables.append(restore_ends(table)[table["renorm"] == renorm])
        return pd.concat(tables, ignore_index=True)

    def pairs(self, run: str, seeds: Iterable[int] = (), **how) -> list[tuple[str, Pair]]:
        """Every pair of seeds of a run, by name ("1-2"); each is loaded and matched once for all items.

        Args:
            run: a run name without its seed.
            seeds: which; default those that the section's grid has of it.
            **how: matching, its options and so on, see `experiments.pairs.load_pair`. `test_images` and
                `calibration` are the section's.
        """
        of_run = {network["run"]: network.get("seeds") for network in self.grid.networks(self.grid.needs)}
        seeds = tuple(seeds) or of_run.get(run) or self.grid.seeds
        how = {"test_images": self.grid.settings.get("test_images"), "calibration": self.calibration} | how
        key = _key(run, seeds, how)
        if key not in self._pairs:
            self._pairs[key] = list(pairs_of(run, seeds, **how))
        return self._pairs[key]

    def _pairs_one_by_one(
        self, run: str, seeds: Iterable[int], calibration: int, device: str | None
    ) -> Iterator[tuple[str, Pair]]:
        """`pairs_of`. Small pairs are kept, with what is matched and measured, for the next table of the same run."""
        how = {"calibration": calibration, "device": device}
        key = _key(run, seeds, how)
        if key in self._pairs:
            yield from self._pairs[key]
            return
        kept = []
        for name, pair in pairs_of(run, tuple(seeds), **how):
            yield name, pair
            self._room -= _size(pair)
            kept = [*kept, (name, pair)] if self._room >= 0 else []
        if kept:
            self._pairs[key] = kept

    def check(self, paper: str = "") -> pd.DataFrame:
        """What the paper claims of the items made here, and whether they show it at this scale.

        A claim about trained networks is a verdict, never an error: another processor trains other networks.

        Args:
            paper: such as "repair": everything that it claims, judged from all items made so far.
        """
        # By name, so that whoever follows imports does not find the claims here: editing one changes no notebook.
        scorecard = importlib.import_module("companion.figures.scorecard")
        found = scorecard.scorecard(paper, [self.scale], items=None if paper else self.items)
        columns = {"item": "item", "statement": "the paper says", "published": "in numbers", "ours": "ours"}
        frame = pd.DataFrame(found, columns=[*columns, "verdict"]).rename(columns=columns)
        left = {"text-align": "left", "white-space": "normal"}
        return (
            frame.assign(ours=frame["ours"].str.replace("**", "", regex=False))  # bold in Markdown
            .style.hide()
            .set_properties(**left)
            .set_table_styles([{"selector": "th", "props": [*left.items()]}])
        )


class Item:
    """One figure or table of a paper while it is being made.

    Attributes:
        name: its ID, such as "repair/fig6-left".
        networks: what it needs, without seeds, see `Grid.needs`.
        reads: by item that this one sums up, what was saved of it, see `report.load_item`.
        runs: names of the training runs, also of the items that it sums up.
        published: the numbers that the paper prints, by name.

    Raises:
        FileNotFoundError: an item that it sums up has not been made.
    """

    def __init__(self, name: str, section: Section):
        self.name, self.section = name, section
        self.networks = section.grid.networks([name])
        self.reads = _load(section.grid.reads.get(name, ()), section.scale)
        read = [run for record in self.reads.values() for run in record["runs"]]
        self.runs = list(dict.fromkeys(section.grid.runs([name]) + read))
        self.published: Mapping[str, object] = read_index()[name].get("published", {})
        self._start = time.perf_counter()

    def rows(self, **how) -> pd.DataFrame:
        """The long table of the item's networks, see `Section.rows`."""
        return self.section.rows(self.networks, **how)

    def measure(self, function: Callable[..., Iterable[Mapping]], *arguments, **how) -> pd.DataFrame:
        """What a function measures on every pair of the item's networks.

        Args:
            function: (pair, *arguments) -> rows.
            *arguments: of the function.
            **how: how units are matched, see `Section.pairs`.

        Returns:
            Columns {**network, pair: "1-2", **row}.
        """
        found = []
        for network in self.networks:
            columns = {name: value for name, value in network.items() if name != "seeds"}
            seeds = network.get("seeds", self.section.grid.seeds)
            for name, pair in self.section.pairs(network["run"], seeds, **how):
                found += [{**columns, "pair": name, **row} for row in function(pair, *arguments)]
        return pd.DataFrame(found)

    def measure_each(self, function: Callable[..., Iterable[Mapping]], *arguments) -> pd.DataFrame:
        """What a function measures on every network of the item, one by one.

        Args:
            function: (name of the run, *arguments) -> rows.
            *arguments: of the function.

        Returns:
            Columns {**network, seed, **row}.
        """
        found = []
        for network in self.networks:
            columns = {name: value for name, value in network.items() if name != "seeds"}
            for seed in network.get("seeds", self.section.grid.seeds):
                rows = function(seeded(network["run"], seed), *arguments)
                found += [{**columns, "seed": seed, **row} for row in rows]
        return pd.DataFrame(found)

    def save(self, table: Table, figure: FigureBase | None = None, summary: Mapping[str, object] | None = None) -> None:
        """Save the table, the picture and the summary, and show the picture and the paper's numbers beside ours.

        Args:
            table: the rows that the picture was drawn from.
            figure: the picture; None for a table.
            summary: the few numbers to compare with the paper's, under the names that `figures/index.yml` has.
        """
        measured = getattr(table, "attrs", {}).get("seconds", 0)  # for an item before this one, perhaps
        seconds = max(measured, time.perf_counter() - self._start)
        left_out = self.section.left_out.get(self.name, ())
        save_item(
            self.name, self.section.scale, table, summary or {}, figure, runs=self.runs, seconds=seconds,
            left_out=left_out,
        )  # fmt: skip
        self.section.tables[self.name] = pd.DataFrame(table)
        if get_ipython() is None:
            return
        if figure is not None:
            display(figure)
        if summary:
            display(beside(self.published, summary))


def _load(reads: Iterable[str], scale: str) -> dict[str, dict]:
    """What was saved of some items; at `fast`, of those that have been made.

    Raises:
        FileNotFoundError: one has not been made; at `fast`, none has.
    """
    found, missing = {}, None
    for item in reads:
        try:
            found[item] = load_item(item, scale)
        except FileNotFoundError as error:
            if scale != "fast":
                raise
            missing = error
    if missing and not found:
        raise missing
    return found


def _key(run: str, seeds: Iterable[int], how: Mapping[str, object]) -> str:
    """What tells pairs apart; an option that is None counts as left out."""
    return repr((run, tuple(seeds), sorted(item for item in how.items() if item[1] is not None)))


def _size(pair: Pair) -> int:
    """Bytes of a pair's images and networks, and as much again for networks in another order of units."""
    weights = sum(weight.nbytes for model in (pair.a, pair.b) for weight in model.parameters())
    return 2 * weights + sum(len(half) * math.prod(half.shape) for half in (pair.dataset.train, pair.dataset.test))


def stack(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Several tables of `Section.rows` as one, with the seconds of all."""
    tables = list(tables)
    table = pd.concat(tables, ignore_index=True)
    table.attrs["seconds"] = sum(each.attrs["seconds"] for each in tables)
    return table


def beside(published: Mapping[str, object], ours: Mapping[str, object]) -> pd.DataFrame:
    """The paper's numbers beside ours, a row for each name."""
    names = dict.fromkeys([*ours, *published])
    columns = {"paper": published, "ours": ours} if published else {"ours": ours}
    return pd.DataFrame({title: {n: _words(numbers.get(n, "")) for n in names} for title, numbers in columns.items()})


def _words(value: object) -> object:
    """A value as a reader wants to see it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(str(_words(each)) for each in value) if isinstance(value, list | tuple) else value


def _column(grid: Grid, scale: str) -> dict[str, object]:
    """A grid in words: one column of the overview."""
    shared = {"calibration of rows": grid.settings.get("calibration", calibration_images(scale))}
    return {name: _words(value) for name, value in {**shared, **grid.settings, "seeds": grid.seeds}.items()}
