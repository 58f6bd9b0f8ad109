"""The scorecard: what the papers claim, and whether the tables saved so far show it.

A claim is judged on every item that it rests on, from the table in `figures/<scale>/...json` and nothing else; the
claims of a paper stand in a module of their own (`claims.repair`, `claims.combine`, `claims.rethink`).
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pandas as pd

from companion.experiments.scales import SCALES, check
from companion.figures.claims import Claim, Finding, combine, repair, rethink
from companion.figures.report import saved_items


def claims(paper: str = "") -> dict[str, Claim]:
    """All claims by name, or those of one paper: "repair"."""
    found = {claim.name: claim for module in (repair, combine, rethink) for claim in module.CLAIMS}
    if paper:
        check(paper, {name.partition("/")[0] for name in found}, "paper")
    return {name: claim for name, claim in found.items() if name.startswith(f"{paper}/" if paper else "")}


def judge(
    claim: str | Claim, scale: str, root: str | Path | None = None, items: Collection[str] | None = None
) -> list[dict]:
    """Judge a claim at one scale, on all of its items or on some.

    Returns:
        One row for each of its items that has been made: {claim, statement, item, published, ours, verdict ("holds",
        "holds in part", "does not hold" or "not judged"), scale, networks, device, seeds (in words)}. The verdict is
        on what could be judged.

    Raises:
        ValueError: unknown claim or scale.
    """
    known = claims()
    claim = known[check(claim, known, "claim")] if isinstance(claim, str) else claim
    rows = []
    for item in claim.items:
        if items is not None and item not in items:
            continue
        if (record := saved_items(item, [scale], root).get(scale)) is None:
            continue
        try:
            findings = claim.judge(pd.DataFrame(record["table"]), item) or [Finding("the table is empty", None)]
        except KeyError as error:  # a table of an earlier version
            findings = [Finding(f"the saved table has no {error}; make it again", None)]
        judged = [finding.holds for finding in findings if finding.holds is not None]
        verdict = "holds" if all(judged) else "holds in part" if any(judged) else "does not hold"
        verdict = verdict if judged else "not judged"
        rows.append({"claim": claim.name, "statement": claim.statement, "item": item, "published": claim.published,
                     "ours": "; ".join(map(str, findings)), "verdict": verdict, "scale": scale,
                     "networks": _networks(record["runs"]), "device": record["device"],
                     "seeds": ", ".join(map(str, record["seeds"]))})  # fmt: skip
    return rows


def _networks(runs: Sequence[str]) -> str:
    """Which networks these are, or how many if they are more than three.

    >>> _networks(["digits/vgg11-bn-w1/quick/s1", "digits/vgg11-bn-w1/quick/s2"])
    'digits/vgg11-bn-w1'
    """
    names = list(dict.fromkeys("/".join(run.split("/")[:2]) for run in runs))
    return ", ".join(names) if len(names) <= 3 else f"{len(names)}: {names[0]} to {names[-1]}"


def scorecard(
    paper: str = "",
    scales: Iterable[str] = SCALES[1:],
    root: str | Path | None = None,
    items: Collection[str] | None = None,
) -> list[dict]:
    """All claims of a paper (all papers) as rows of `judge`, claim by claim and item by item, scales side by side.

    Not at `smoke` unless asked for: what is not trained shows nothing. `items` are those to judge on; None is all.
    """
    scales = list(scales)
    rows = []
    for claim in claims(paper).values():
        judged = [row for scale in scales for row in judge(claim, scale, root, items)]
        rows += sorted(judged, key=lambda row: claim.items.index(row["item"]))
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """The rows as a document in Markdown: a heading for each claim, a table of its items below it."""
    lines = [
        "# Scorecard",
        "",
        "What the papers claim, and what the tables made by `make figures` show; verdicts are computed from these.",
        "At `quick` networks are small and on scikit-learn's digits, at `fast` and `paper` on the papers' data.",
        "What a table lacks the networks for is *not judged*, and counts in no verdict.",
    ]
    columns = ["item", "ours", "verdict", "scale", "networks", "device", "seeds"]
    for name, group in pd.DataFrame(rows).groupby("claim", sort=False) if rows else ():
        first = group.iloc[0]
        lines += [
            "",
            f"## {name}",
            "",
            f"{first.statement[0].upper()}{first.statement[1:]}. Published: {first.published}.",
            "",
        ]
        if (caveat := claims()[name].caveat) and set(group["verdict"]) & {"holds in part", "does not hold"}:
            lines += [f"Where it does not hold: {caveat}.", ""]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(str(row[column]).replace('|', '/') for column in columns)} |"
                  for row in group.to_dict("records")]  # fmt: skip
        made = set(group["item"][group["scale"] == "fast"])
        if missing := [item for item in claims()[name].items if item not in made]:
            lines += ["", f"Not made at `fast`, and so not judged there: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"
