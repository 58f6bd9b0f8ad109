"""Barriers, means and names from long tables; pandas only, so that judging a saved table needs no networks.

A long table has one row for each network that was evaluated: what it is (run, pair, matching, renorm, alpha, ...), the
split, its loss (nats) and its accuracy (in [0, 1]).
"""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

Table = Iterable[Mapping] | pd.DataFrame
MEASURES = ["loss", "accuracy"]


def network_name(matching: str, renorm: str = "none") -> str:
    """A network in words, as legends and texts call it.

    >>> network_name("none"), network_name("AM", "REPAIR")
    ('not aligned', 'aligned + REPAIR')
    """
    aligned = "not aligned" if matching == "none" else "aligned"
    return aligned if renorm == "none" else f"{aligned} + {renorm}"


def name_networks(table: Table) -> pd.DataFrame:
    """The table with a column `network` in words: made of `matching` and `renorm` in rows that have none yet.

    Where several matchings stand beside each other, the words say which: "aligned (WM)".
    """
    frame = pd.DataFrame(table)
    if "matching" not in frame:
        return frame
    renorms = frame["renorm"] if "renorm" in frame else ["none"] * len(frame)
    names = [network_name(*pair) for pair in zip(frame["matching"], renorms, strict=True)]
    if len({*frame["matching"].dropna()} - {"none"}) > 1:
        names = [
            name if name.startswith("not") else name.replace("aligned", f"aligned ({matching})", 1)
            for name, matching in zip(names, frame["matching"], strict=True)
        ]
    made = pd.Series(names, frame.index, dtype=object)
    return frame.assign(network=frame["network"].fillna(made) if "network" in frame else made)


def barriers(table: Table, baseline: str = "linear") -> pd.DataFrame:
    """Barrier of every path in a long table (Jordan et al. 2022, Eq. 1).

        max_alpha [loss(alpha) - (1 - alpha) loss(0) - alpha loss(1)],

    and the same of the error, 1 - accuracy. A path is all rows that agree in everything but alpha
    and measures; each gets a row.

    Args:
        table: with columns alpha (among its values 0 and 1), loss and accuracy.
        baseline: "linear", or "mean" of the two ends.

    Returns:
        The columns that name a path, and loss_barrier (nats), accuracy_barrier (a fraction: 0.1 is ten points),
        midpoint_loss, midpoint_accuracy (at alpha 0.5, if it is there), end_loss and end_accuracy (means of both ends).

    Raises:
        ValueError: a path lacks an end, or the baseline is unknown.
    """
    if baseline not in ("linear", "mean"):
        raise ValueError(f"baseline must be 'linear' or 'mean', not {baseline!r}")
    frame = pd.DataFrame(table)
    if frame.empty:
        return frame
    names = [column for column in frame if column not in ("alpha", *MEASURES)]
    wide = frame.groupby([*names, "alpha"], sort=False, dropna=False)[MEASURES].mean().unstack("alpha")
    found = wide.index.to_frame(index=False)
    if not {0, 1} <= set(wide["loss"]) or wide["loss"][[0, 1]].isna().any(axis=None):
        raise ValueError("a barrier needs both endpoints: alpha must contain 0 and 1")
    for metric in MEASURES:
        cost = wide[metric] if metric == "loss" else 1 - wide[metric]
        shares = {alpha: alpha if baseline == "linear" else 0.5 for alpha in cost}
        rise = pd.DataFrame({a: cost[a] - (1 - share) * cost[0] - share * cost[1] for a, share in shares.items()})
        found[f"{metric}_barrier"] = rise.max(axis=1).to_numpy()
        if 0.5 in cost:
            found[f"midpoint_{metric}"] = wide[metric][0.5].to_numpy()
        found[f"end_{metric}"] = wide[metric][[0, 1]].mean(axis=1).to_numpy()
    return found


def restore_ends(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the endpoints as trained at both ends of every path, also where a renormalisation changes them.

    Barriers of RESET are measured so, like those of the networks that it is compared with.

    Args:
        table: long, see `barriers`, with networks as interpolated (`renorm` "none") among its rows. Their ends are the
            same whether they are aligned or not.
    """
    names = [column for column in table if column not in ("matching", "renorm", "network", *MEASURES)]
    trained = table[(table["renorm"] == "none") & table["alpha"].isin([0, 1])].drop_duplicates(names)
    ends = table[names].merge(trained[names + MEASURES], how="left", on=names).set_index(table.index)
    return table.assign(**{measure: ends[measure].fillna(table[measure]) for measure in MEASURES})


def pruned_means(table: Table, by: Sequence[str] = ("series", "pruner", "sparsity")) -> pd.DataFrame:
    """Mean accuracies of pruned networks in percent, by some columns: before and after they are renormalised.

    Args:
        table: rows of `pruning.pruning_rows`.
        by: columns.

    Returns:
        Columns "none", "renormalised", ..., indexed by the values of `by`; dense networks are left out.
    """
    frame = pd.DataFrame(table)
    frame = frame[frame["sparsity"] > 0]
    return 100 * frame.groupby([*by, "renorm"], sort=False)["accuracy"].mean().unstack("renorm")


def barrier_means(table: Table, by: Sequence[str], metric: str = "loss") -> pd.DataFrame:
    """Means over pairs of the barriers of a long table, a column for each renormalisation.

    Args:
        table: long, see `barriers`.
        by: the columns that say which network it is, such as ("series", "width").
        metric: "loss" (barriers in nats), "accuracy" (barriers in points) or "midpoint" (accuracies in percent).

    Returns:
        Columns "none", "REPAIR", ..., indexed by the values of `by`.
    """
    column = {"loss": "loss_barrier", "accuracy": "accuracy_barrier", "midpoint": "midpoint_accuracy"}[metric]
    mean = barriers(table).groupby([*by, "renorm"], sort=False)[column].mean().unstack("renorm", sort=False)
    return mean * (1 if metric == "loss" else 100)


WHEN = {"none": "before", "REPAIR": "after"}


def name_means(means: pd.DataFrame, sizes: Iterable[float] | None = None, form: str = "{0}_{when}_{1:g}x") -> dict:
    """The entries of `barrier_means` by name, to be saved as a summary.

    Args:
        means: of networks told apart by two columns, the second of them a size.
        sizes: leave out others; default: the smallest and the largest.
        form: of the names: {0} and {1} are the index, {when} is "before" or "after" REPAIR.
    """
    column = means.index.get_level_values(1)
    kept = means[column.isin([column.min(), column.max()] if sizes is None else list(sizes))]
    return {form.format(*index, when=WHEN[renorm]): row[renorm] for index, row in kept.iterrows() for renorm in means}


def sample_barriers(table: Table, by: Sequence[str] = ("scheme", "matching")) -> list[dict]:
    """Empirical barriers of what was evaluated: the worst network against the mean of the endpoints (Def. 3.3).

    Args:
        table: rows of `mixtures.evaluate_rows`.
        by: columns. Each combination of their values is a sample of its own, so the pair should be among them.

    Returns:
        Rows {**by, loss_barrier (nats), accuracy_barrier (a fraction: 0.01 is a point), end_loss, end_accuracy,
        networks}.
    """
    rows = []
    for key, group in pd.DataFrame(table).groupby(list(by), sort=False):
        end = {name: group[name].iloc[0] for name in ("end_loss", "end_accuracy")}
        found = {
            "loss_barrier": group["loss"].max() - end["end_loss"],
            "accuracy_barrier": end["end_accuracy"] - group["accuracy"].min(),
        }
        rows.append(dict(zip(by, key, strict=True)) | found | end | {"networks": len(group)})
    return rows


def mean_barriers(table: Table, by: Sequence[str] = ("matching",), each: str = "pair") -> pd.DataFrame:
    """Means over pairs of empirical barriers, see `sample_barriers`.

    Args:
        table: rows of `mixtures.evaluate_rows`.
        by: columns. Each combination of their values is a sample of its own.
        each: what to average over, the pair or another column.

    Returns:
        Columns loss_barrier (nats) and accuracy_barrier (a fraction), indexed by `by`.
    """
    found = pd.DataFrame(sample_barriers(table, [*by, each])).groupby(list(by), sort=False)
    return found[["loss_barrier", "accuracy_barrier"]].mean()


def name_barriers(table: Table, each: str = "pair") -> dict[str, float]:
    """Mean barriers by name, to be saved as a summary: loss_barrier, accuracy_barrier, loss_barrier_not_aligned, ...

    Args:
        table: rows of `mixtures.evaluate_rows` with a column `matching`.
        each: what to average over, the pair or another column.

    Returns:
        Losses in nats, accuracies in points.
    """
    mean = mean_barriers(table, each=each) * [1, 100]
    suffixes = {"WM": "", "none": "_not_aligned"}
    return {f"{name}{suffixes[matching]}": row[name] for matching, row in mean.iterrows() for name in mean}


def best_combinations(table: Table, by: str) -> pd.DataFrame:
    """The row of the highest accuracy for each value of a column; the lowest loss breaks ties."""
    frame = pd.DataFrame(table).sort_values(["accuracy", "loss"], ascending=[False, True])
    return frame.drop_duplicates(by).set_index(by).sort_index()


def works_up_to(accuracy: pd.Series, lost: float = 0.05) -> float:
    """The last index before accuracy (in [0, 1]) falls too far below its first value.

    >>> works_up_to(pd.Series([0.9, 0.88, 0.8, 0.89], index=[0, 1, 2, 3]))
    1.0
    """
    return float(accuracy.index[(accuracy.iloc[0] - accuracy > lost).cumsum() == 0].max())


def derangement_costs(table: Table, share: float) -> pd.Series:
    """How much accuracy barriers grow when a share of a layer's pairs is deranged (Csiszarik et al. 2023, Sec. 6.3).

    Args:
        table: rows of `comparisons.derangement_rows`.
        share: in [0, 1]; of each layer the largest k of at most this share counts.

    Returns:
        The growth in each layer, mean over draws and pairs of networks, as a fraction: 0.01 is a point.
    """
    frame = pd.DataFrame(table)
    barrier = frame.groupby(["layer", "k"], sort=False)["accuracy_barrier"].mean()
    reached = frame[frame["k"] <= share * frame["units"]].groupby("layer", sort=False)["k"]
    return pd.Series({layer: barrier[layer, ks.max()] - barrier[layer, ks.min()] for layer, ks in reached})
