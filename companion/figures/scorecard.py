"""The scorecard: what the papers claim, and whether the tables saved so far show it.

A claim is judged on every item that it rests on, from the table in `figures/<scale>/...json` and nothing else; the
claims of a paper stand in a module of their own (`claims.repair`, `claims.combine`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from companion.experiments.scales import SCALES, check
from companion.figures.claims import Claim, Finding, combine, repair
from companion.figures.report import load_item


def claims(paper: str = "") -> dict[str, Claim]:
    """All claims by name, or those of one paper: "repair"."""
    found = {claim.name: claim for module in (repair, combine) for claim in module.CLAIMS}
    if paper:
        check(paper, {name.partition("/")[0] for name in found}, "paper")
    return {name: claim for name, claim in found.items() if name.startswith(f"{paper}/" if paper else "")}


def judge(claim: str | Claim, scale: str, root: str | Path | None = None) -> list[dict]:
    """Judge a claim at one scale.

    Returns:
        One row for each of its items that has been made: {claim, statement, item, published, ours, verdict ("holds",
        "holds in part", "does not hold" or "not judged"), scale, device, seeds (in words)}.

    Raises:
        ValueError: unknown claim or scale.
    """
    known = claims()
    claim = known[check(claim, known, "claim")] if isinstance(claim, str) else claim
    rows = []
    for item in claim.items:
        try:
            record = load_item(item, scale, root)
        except FileNotFoundError:
            continue
        try:
            findings = claim.judge(pd.DataFrame(record["table"]), item)
            held = sum(finding.holds for finding in findings)
            verdict = "holds" if held == len(findings) else "holds in part" if held else "does not hold"
        except KeyError as error:  # a table of an earlier version
            findings, verdict = [Finding(f"the saved table has no {error}; make it again", False)], "not judged"
        # In a finding that did not come out as claimed, a reader should not have to look for the reason.
        ours = "; ".join(finding.text if finding.holds else f"**not**: {finding.text}" for finding in findings)
        rows.append({"claim": claim.name, "statement": claim.statement, "item": item, "published": claim.published,
                     "ours": ours, "verdict": verdict, "scale": scale, "device": record["device"],
                     "seeds": ", ".join(map(str, record["seeds"]))})  # fmt: skip
    return rows


def scorecard(paper: str = "", scales: Iterable[str] = SCALES[1:], root: str | Path | None = None) -> list[dict]:
    """All claims of a paper (all papers) as rows of `judge`, claim by claim, then scale by scale.

    Not at `smoke` unless asked for: what is not trained shows nothing.
    """
    scales = list(scales)
    return [row for claim in claims(paper) for scale in scales for row in judge(claim, scale, root)]


def markdown(rows: Sequence[dict]) -> str:
    """The rows as a document in Markdown: a heading for each claim, a table of its items below it."""
    lines = [
        "# Scorecard",
        "",
        "What the papers claim, and what the tables made by `make figures` show; verdicts are computed from these.",
        "At `quick` networks are small and on scikit-learn's digits, at `fast` and `paper` on the papers' data.",
    ]
    columns = ["item", "ours", "verdict", "scale", "device", "seeds"]
    for name, group in pd.DataFrame(rows).groupby("claim", sort=False) if rows else ():
        first = group.iloc[0]
        lines += [
            "",
            f"## {name}",
            "",
            f"{first.statement[0].upper()}{first.statement[1:]}. Published: {first.published}.",
            "",
        ]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(str(row[column]).replace('|', '/') for column in columns)} |"
                  for row in group.to_dict("records")]  # fmt: skip
    return "\n".join(lines) + "\n"
