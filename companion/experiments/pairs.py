"""Two trained runs and the data to compare them on: what every experiment on a pair of networks starts from."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch
from torch import nn

from companion.experiments.ensembles import Balanced, MixedLogits
from companion.runs import store, train
from companion.runs.data import Batches, Dataset, iterate, load
from repairlib.interpolate import Path, interpolate_models, walk_path
from repairlib.matching import Matching, match_activations
from repairlib.names import check
from repairlib.renorm import Repair, reset
from repairlib.weight_matching import match_weights

NETWORKS = ("direct", "direct repaired", "aligned", "repaired", "reset")


@dataclass(frozen=True)
class Pair:
    """Endpoints A and B of one architecture, with their data.

    Attributes:
        runs: names of the two runs.
        a, b: the networks, as trained.
        dataset: the data that they are compared on, with its batches on the device.
        calibration: batches of training images without augmentation, for matching and statistics.
        test: batches of the test set.
        match: how units of B are matched with units of A: by "activations" or by "weights".
        options: of `match_activations` or `match_weights`.
    """

    runs: tuple[str, str]
    a: nn.Module
    b: nn.Module
    dataset: Dataset
    calibration: Batches
    test: Batches
    match: str = "activations"
    options: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def matching(self) -> Matching:
        """Units of B matched with units of A."""
        match = match_activations if self.match == "activations" else match_weights
        return match(self.a, self.b, self.calibration, **self.options)

    @cached_property
    def aligned(self) -> nn.Module:
        """B with its units in A's order."""
        return self.matching.apply(self.b)

    @cached_property
    def accuracy(self) -> float:
        """Mean test accuracy of the two endpoints, in [0, 1]."""
        return (self.evaluate(self.a)[1] + self.evaluate(self.b)[1]) / 2

    def direct(self, alpha: float = 0.5) -> nn.Module:
        """Interpolation without alignment."""
        return interpolate_models(self.a, self.b, alpha)

    def midpoint(self, alpha: float = 0.5) -> nn.Module:
        """Interpolation of the aligned endpoints."""
        return interpolate_models(self.a, self.aligned, alpha)

    def repair(self, data: Iterable | None = None, **options) -> Repair:
        """REPAIR between the aligned endpoints, on the calibration data unless other data is given, all of it."""
        return Repair(self.a, self.aligned, self.calibration if data is None else data, **({"limit": None} | options))

    def network(self, kind: str, **options) -> Callable[[float], nn.Module]:
        """How to make one of NETWORKS for any alpha: interpolated with or without alignment, REPAIRed or RESET.

        Args:
            kind: "direct", "aligned", either of them after REPAIR ("direct repaired", "repaired"), or "reset": aligned,
                and its BatchNorms re-estimated on the calibration data.
            **options: of REPAIR, see `repair`; of them, `method` and `pooling` concern RESET too.
        """
        check(kind, NETWORKS, "network")
        if kind == "direct repaired":
            repair = Repair(self.a, self.b, self.calibration, **({"limit": None} | options))
        elif kind == "repaired":
            repair = self.repair(**options)
        else:
            plain = self.direct if kind == "direct" else self.midpoint
            how = {name: options[name] for name in ("method", "pooling") if name in options}
            return (lambda alpha: reset(plain(alpha), self.calibration, **how)) if kind == "reset" else plain
        return lambda alpha: repair(alpha).model

    @property
    def title(self) -> str:
        """The model and the data, to put over a figure."""
        return title_of(self.runs[0].rpartition("/")[0], self.dataset.name)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Test loss (nats) and accuracy in [0, 1]."""
        return train.evaluate(model, self.test)

    def path(self, make, alphas: Iterable[float]) -> Path:
        """Evaluate ``make(alpha)`` on the test set for every alpha."""
        return walk_path(make, alphas, self.evaluate)

    def sample(self, n: int, seed: int) -> Batches:
        """n training images drawn at random without augmentation; another seed draws others."""
        chosen = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(seed))[:n]
        half = self.dataset.train.take(chosen)
        return iterate(replace(self.dataset, train=half), "train", batch_size=500)


def load_pair(
    runs: Sequence[str],
    calibration: int = 5000,
    device: str | None = None,
    *,
    data: str | None = None,
    match: str = "activations",
    **options,
) -> Pair:
    """The pair of two runs, trained first if they are not stored yet.

    Args:
        runs: two run names of one data set and model, such as ``digits/resnet20-bn-w1/quick/s1``.
        calibration: training images for matching and statistics (5,000 suffice, Jordan et al. 2022, Sec. 4.2).
        device: default `train.default_device()`.
        data: the data set to compare them on. Without it they must have been trained on one, which it is then.
        match, **options: how units are matched, see `Pair`; for instance ``match="weights", restarts=10``.

    Raises:
        ValueError: not two runs of one model, of two data sets and none is named, or an unknown way to match.
    """
    check(match, ("activations", "weights"), "match")
    names = [train.parse_run(run) for run in runs]
    if len(names) != 2 or len({name.model for name in names}) > 1:
        raise ValueError(f"a pair is two runs of one model, not {', '.join(runs) or 'nothing'}")
    if data is None and names[0].data != names[1].data:
        raise ValueError(f"{' and '.join(runs)} were trained on two data sets: say with data= which to compare them on")
    device = device or train.default_device()
    a, b = (store.get(run, device) for run in runs)
    dataset = load(data or names[0].data, device=device)
    calibration_batches = iterate(dataset, "train", batch_size=500, limit=calibration)
    test = iterate(dataset, "test", batch_size=500)
    return Pair(tuple(runs), a, b, dataset, calibration_batches, test, match, options)


def pairs_of(
    run: str, seeds: Sequence[int], calibration: int = 5000, device: str | None = None, **options
) -> Iterator[tuple[str, Pair]]:
    """Every pair of seeds of a run, one after the other, by name: (1, 2, 3) gives "1-2", "1-3" and "2-3".

    Args:
        run: a run name without its seed, such as "digits/resnet20-ln-w1/quick".
        seeds: which.
        calibration, device, **options: see `load_pair`.
    """
    for a, b in itertools.combinations(seeds, 2):
        yield f"{a}-{b}", load_pair([f"{run}/s{a}", f"{run}/s{b}"], calibration, device, **options)


def match_rows(pair: Pair) -> list[dict]:
    """Similarity of the weights of A and B as trained, and while B's units are being matched by weights.

        <theta_A, P(theta_B)> / (|theta_A| |theta_B|),

    the objective (Csiszarik et al. 2023, Algorithm 1) relative to what it is between equal networks, over all weights
    that a permutation moves. Of several descents it is the best, which need not start at the order as trained.

    Returns:
        Rows {sweep: over all layers, from 0, similarity, as_trained: without any permutation}.
    """
    matching = pair.matching
    moved = {axis.tensor for group in matching.spec.groups for axis in group.axes}
    a, b = (
        torch.cat([value.detach().double().flatten() for name, value in model.named_parameters() if name in moved])
        for model in (pair.a, pair.b)
    )
    whole = float(a.norm() * b.norm())
    start = {"as_trained": float(a @ b) / whole}
    return [{"sweep": i, "similarity": value / whole} | start for i, value in enumerate(matching.history)]


def title_of(run: str, data: str | None = None) -> str:
    """The model and the data of a run without its seed, to put over a figure; or another data set.

    >>> title_of("digits/tiny10-ln/quick")
    'tiny10-ln-w1 on digits'
    """
    name = train.parse_run(f"{run}/s1", check_data=False)
    return f"{name.model} on {data or name.data}"


def path_rows(
    pair: Pair,
    alphas: Iterable[float],
    *,
    networks: Sequence[str] = ("aligned", "repaired"),
    splits: Sequence[str] = ("test",),
    **options,
) -> list[dict]:
    """Tidy rows of the paths between the endpoints of a pair.

    Args:
        alphas: the points.
        networks: which paths, see `Pair.network`; aligned before REPAIR and after by default.
        splits: "test", "train" (without augmentation) or both. Each network is made once and evaluated on each.
        **options: of REPAIR, see `renorm.Options`. Without any, REPAIR changes nothing at alpha 0 and 1, and the
            endpoints are evaluated once for all paths but "reset".

    Returns:
        One row a split, network and point, in this order: {split, network, alpha, loss (nats), accuracy (in [0, 1])}.
        `plots.path` draws those of one split.
    """
    data = {split: iterate(pair.dataset, split, batch_size=1000) for split in splits}
    alphas, evaluated, found = list(alphas), {}, {}
    for network in networks:
        make = pair.network(network, **options)
        moves_ends = network == "reset" or (options and network.endswith("repaired"))
        for alpha in alphas:
            key = ("end" if alpha in (0, 1) and not moves_ends else network, alpha)
            if key not in evaluated:
                model = make(alpha)
                evaluated[key] = [train.evaluate(model, data[split]) for split in splits]
            found[network, alpha] = evaluated[key]
    return [
        {"split": split, "network": network, "alpha": alpha, "loss": results[i][0], "accuracy": results[i][1]}
        for i, split in enumerate(splits)
        for (network, alpha), results in found.items()
    ]


def barrier_rows(
    configurations: Iterable[Mapping],
    seeds: Sequence[int],
    alphas: Sequence[float] = (0.0, 0.5, 1.0),
    *,
    splits: Sequence[str] = ("test",),
    calibration: int = 5000,
    device: str | None = None,
    **options,
) -> list[dict]:
    """Barriers before REPAIR and after, of every pair of seeds of some configurations: a row for each pair and split.

    Each pair is aligned once and each network on its path made once, see `path_rows`.

    Args:
        configurations: each {"run": a run name without its seed, such as "digits/resnet20-ln-w1/quick", and any other
            columns, such as "series": "ln", "width": 1}, which its rows repeat.
        seeds: (1, 2, 3) gives the pairs 1-2, 1-3 and 2-3.
        alphas: points of the path, among them 0, 0.5 and 1; the barrier is the greatest rise at one of them (Jordan et
            al. 2022, Eq. 1).
        splits, options: see `path_rows`.
        calibration, device: see `load_pair`.

    Returns:
        Rows {**configuration, pair: "1-2", split,
        loss_before, loss_after: barriers in nats,
        accuracy_before, accuracy_after: barriers in accuracy, as a fraction (0.1 is ten points),
        midpoint_before, midpoint_after: accuracy at alpha 0.5, in [0, 1],
        endpoint_loss, endpoint_accuracy: means of the two endpoints}. `plots.barriers` draws them.
    """
    table = []
    for configuration in configurations:
        for name, pair in pairs_of(configuration["run"], seeds, calibration, device):
            points = path_rows(pair, alphas, splits=splits, **options)
            for split in splits:
                row = {**configuration, "pair": name, "split": split}
                for when, network in {"before": "aligned", "after": "repaired"}.items():
                    here = [point for point in points if (point["split"], point["network"]) == (split, network)]
                    path = Path(*(tuple(point[name] for point in here) for name in ("alpha", "loss", "accuracy")))
                    row |= {f"{metric}_{when}": path.barrier(metric) for metric in ("loss", "accuracy")}
                    row[f"midpoint_{when}"] = path.midpoint()
                    if when == "before":  # the endpoints as trained; options may re-estimate their BatchNorms
                        for metric in ("loss", "accuracy"):
                            at = dict(zip(path.alpha, getattr(path, metric), strict=True))
                            row[f"endpoint_{metric}"] = (at[0] + at[1]) / 2
                table.append(row)
    return table


def barrier_means(table: Iterable[Mapping], by: Sequence[str], metric: str = "loss") -> pd.DataFrame:
    """Means over pairs of the rows of `barrier_rows`, before REPAIR and after.

    Args:
        table: the rows.
        by: the columns that say which network it is, such as ("series", "width").
        metric: "loss" (barriers in nats), "accuracy" (barriers in points) or "midpoint" (accuracies in percent).

    Returns:
        Columns "before" and "after", indexed by the values of `by`.
    """
    frame = pd.DataFrame(table).groupby(list(by), sort=False)[[f"{metric}_before", f"{metric}_after"]].mean()
    return frame.set_axis(["before", "after"], axis=1) * (1 if metric == "loss" else 100)


def name_means(means: pd.DataFrame, sizes: Iterable[float] | None = None, form: str = "{0}_{when}_{1:g}x") -> dict:
    """The entries of `barrier_means` by name, to be saved as a summary.

    Args:
        means: of networks told apart by two columns, the second of them a size.
        sizes: leave out others; default: the smallest and the largest.
        form: of the names: {0} and {1} are the index, {when} is before or after.
    """
    column = means.index.get_level_values(1)
    kept = means[column.isin([column.min(), column.max()] if sizes is None else list(sizes))]
    return {form.format(*index, when=when): row[when] for index, row in kept.iterrows() for when in means}


def reduction_rows(tables: Iterable[Iterable[Mapping]], least: float = 0.01) -> list[dict]:
    """By how much REPAIR lowers the accuracy barrier of the midpoint, ``(before - after) / before``, for each pair.

    Args:
        tables: of `barrier_rows` (the test split counts), or of `path_rows` with columns `run` and `pair` added. A pair
            that is in two tables counts once.
        least: networks whose mean barrier before REPAIR is smaller (0.01 is a point) have none to speak of; left out.

    Returns:
        Rows {run, row: "ResNet20, digits", norm: "bn", "ln" or "none", width, pair, before, after (points),
        reduction (%)}. `plots.reductions` draws them.
    """
    found: dict[tuple, dict] = {}
    for frame in map(pd.DataFrame, tables):
        if "alpha" in frame:
            at = frame.pivot_table(index=["run", "pair"], columns=["network", "alpha"], values="accuracy", sort=False)
            ends = (at["aligned", 0] + at["aligned", 1]) / 2
            drops = pd.DataFrame({"before": ends - at["aligned", 0.5], "after": ends - at["repaired", 0.5]})
        else:
            frame = frame[frame["split"] == "test"].set_index(["run", "pair"])
            drops = frame[["accuracy_before", "accuracy_after"]].set_axis(["before", "after"], axis=1)
        drops = drops[drops["before"].groupby(level="run").transform("mean") >= least]
        for (run, pair), row in drops.iterrows():
            name = train.parse_run(f"{run}/s1", check_data=False)
            model = {"mlp": "MLP", "vgg": "VGG", "resnet": "ResNet", "tiny": "Tiny-"}.get(name.model.family)
            model = f"{model}{name.model.depth}" if model else str(name.model).removeprefix("torchvision-")
            norm = name.model.norm if name.model.norm in ("bn", "ln") else "none"
            found[run, pair] = {
                "run": run, "row": f"{model}, {name.data}", "norm": norm, "width": name.model.width, "pair": pair,
                "before": 100 * row.before, "after": 100 * row.after,
                "reduction": 100 * (row.before - row.after) / row.before,
            }  # fmt: skip
    return list(found.values())


def baseline_rows(pair: Pair, whole: nn.Module, alphas: Iterable[float]) -> list[dict]:
    """Tidy rows of what merged networks are measured against (Jordan et al. 2022, App. C, Fig. 13).

    The endpoints are corrected on the pair's test images, whose labels are not used for it.

    Args:
        pair: A trained on data with more of the first half of the classes, B with more of the others.
        whole: a network trained on all of the data.
        alphas: the points at which the ensemble is evaluated.

    Returns:
        Rows {network, alpha, loss (nats), accuracy (in [0, 1])} on the test set: "ensemble" at every alpha, then
        "corrected a", "corrected b" and "full data", which have no alpha (None). `plots.merging` draws them.
    """
    classes = range(pair.dataset.classes)
    half = len(classes) // 2
    rows = pair.path(lambda alpha: MixedLogits(pair.a, pair.b, alpha), alphas).table(network="ensemble")
    levels = {
        "corrected a": Balanced(pair.a, classes[:half], pair.test),
        "corrected b": Balanced(pair.b, classes[half:], pair.test),
        "full data": whole,
    }
    for network, model in levels.items():
        loss, accuracy = pair.evaluate(model)
        rows.append({"network": network, "alpha": None, "loss": loss, "accuracy": accuracy})
    return rows
