"""README, CONTRIBUTING and the pages of docs/: README's example runs, and what they link to and name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data/README.md",
    ROOT / "benchmarks/README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
MADE_LATER = ("build/", "data/runs", "figures/gallery.html", "figures/scorecard.md", "figures/quick/")


def own_prose() -> list[Path]:
    """The pages without those that a script writes."""
    written = ("scorecard", "gallery", "fidelity", "combining", "pruning", "released", "torchvision")
    return [page for page in PAGES if page.stem not in written]


def test_readmes_example_runs_as_pasted(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "repairlib.align" in block]
    assert len([line for line in example.splitlines() if line and not line.startswith("#")]) <= 10
    exec(example, {})
    found = re.findall(r"^(\w+): test loss .* accuracy (\d+\.\d)%$", capsys.readouterr().out, re.MULTILINE)
    accuracy = {name: float(percent) for name, percent in found}
    assert accuracy.keys() == {"A", "B", "average", "merged"}
    assert accuracy["average"] < accuracy["merged"]  # by 13 points where README was written


def test_readmes_pruned_network_is_repaired(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "pruning.prune" in block]
    exec("import repairlib\n" + example.replace("resnet8-bn-w1/quick", "resnet8-bn-w0.25/quick"), {})
    dense, pruned, repaired = map(float, re.findall(r"(\d+\.\d)%", capsys.readouterr().out))
    assert pruned < repaired <= dense + 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        target, _, anchor = (link[0] or link[1]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", own_prose(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_paths_and_targets_exist(page: Path):
    """Files between backticks, targets of make, and modules that are run."""
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
    for module in re.findall(r"python -m (companion[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{page.name}: {module}"
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)", text):
        if not name.startswith(MADE_LATER):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 100 and max(map(len, lines)) <= 120


def test_the_papers_are_cited():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert all(number in text for number in ("2211.08403", "2402.05966", "2308.11511"))
