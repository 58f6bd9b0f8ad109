"""The gallery as a page for a browser, and as docs/gallery.md."""

import io
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from companion.figures import gallery, report


class Links(HTMLParser):
    """Collects links, and complains about tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "img", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "p":
            assert self.open.pop() == tag


def test_gallery_shows_every_item_with_the_papers_numbers(project):
    report.save_item("repair/sec3-theory", "smoke", [{"layer": 1}], {"corr": 0.5}, plt.figure())
    report.save_item("repair/equivalence", "quick", [{"layer": 1, "frozen": True}], {"error": 1.25e-7})
    page = gallery.write_gallery()
    text = page.read_text()
    for item in report.read_index():
        assert f'id="{item}"' in text
    assert "<td>final layer decay</td><td>&gt;10x</td>" in text  # printed in the paper, not made here
    assert "<td>corr</td><td>0.4</td><td>0.5</td>" in text  # the paper's beside ours
    assert "1.25e-07" in text and "<td>yes</td>" in text
    # A claim that rests on what was made, and was not made with what it needs.
    assert '<td><a href="#repair/equivalence">repair/equivalence</a></td>' in text and "not judged" in text
    assert "| repair/equivalence | " in (page.parent / "scorecard.md").read_text()
    parser = Links()
    parser.feed(text)
    assert parser.open == []
    pictures = [link for link in parser.links if link.endswith(".png")]
    assert len(pictures) == 2 and all((page.parent / link).exists() for link in pictures)
    assert "<script" not in text and "http" not in text


def test_gallery_links_notebooks_with_their_output(project):
    report.save_item("repair/sec3-theory", "smoke", [{"layer": 1}], {"corr": 0.5}, plt.figure())
    page = report.figures_root() / "smoke" / "repair" / "03_variance_collapse.html"
    assert "smoke/repair/03_variance_collapse.html" not in gallery.write_gallery().read_text()
    page.write_text("")
    assert '<a href="smoke/repair/03_variance_collapse.html">' in gallery.write_gallery().read_text()


def drawing():
    figure, axes = plt.subplots()
    axes.plot([1, 2], [0.7, 0.4])
    return figure


def test_docs_show_every_item_with_small_pictures(project, monkeypatch):
    report.save_item("repair/sec3-theory", "quick", [{"layer": 1}], {"corr": 0.5}, drawing())
    report.save_item("repair/equivalence", "quick", [{"layer": 1}], {"error": 1.25e-7})  # a table
    page = gallery.write_docs()
    assert page == project / "docs" / "gallery.md"
    text = page.read_text()
    assert all(f"### {item}\n" in text for item in report.read_index())
    assert "| | paper | `quick` |" in text and "| corr | 0.4 | 0.5 |" in text and "| error | 1.25e-07 |" in text
    assert "make figures SCALE=fast ITEMS=repair/samples" in text  # not made
    assert "](../notebooks/repair/03_variance_collapse.ipynb)" in text
    (picture,) = (page.parent / "gallery").iterdir()
    assert f"![repair/sec3-theory at quick](gallery/{picture.name})" in text
    with Image.open(picture) as image:
        assert image.width == gallery.WIDTH and image.mode == "P"
    monkeypatch.setattr(gallery, "LIMIT", 1000)
    with pytest.raises(ValueError, match="the pictures of docs/gallery.md take 0.0 MB"):
        gallery.write_docs()


def test_thin_lines_keep_their_colours_beside_broad_bands(tmp_path):
    colors, (figure, axes) = ["#0072B2", "#009E73", "#E69F00", "#CC79A7", "#000000"], plt.subplots(2, 2)
    for ax in axes.flat:
        for i, color in enumerate(colors):
            ax.plot(range(7), [i, 3 - i, i, i + 1, 2, i, 3], color=color, marker="o")
            ax.fill_between(range(7), i - 1, [i + 3 * (j % 2) for j in range(7)], color=color, alpha=0.15, linewidth=0)
    figure.savefig(tmp_path / "lines.png", dpi=150)
    with Image.open(io.BytesIO(gallery._small(tmp_path / "lines.png"))) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for color in colors:
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(pixels - rgb).max(1).min() <= 16, color


def test_docs_show_fast_beside_quick(project):
    for scale, seeds in {"quick": (1, 2, 3), "fast": (1, 2)}.items():
        runs = [f"digits/mlp2-bn-w8/quick/s{seed}" for seed in seeds]
        report.save_item("repair/sec3-theory", scale, [{"layer": 1}], {"corr": seeds[-1] / 8}, drawing(), runs=runs)
    report.save_item("repair/fig2-left", "fast", [{"layer": 1}], {"decay": 3}, drawing())  # there only
    (project / "docs" / "gallery").mkdir(parents=True)
    (project / "docs" / "gallery" / "of_before.png").write_bytes(b"")
    text = gallery.write_docs().read_text()
    here = report.device_name(report.default_device())
    assert (
        f"""
| `quick` | `fast` |
| --- | --- |
| ![repair/sec3-theory at quick](gallery/repair_sec3_theory.png) \
| ![repair/sec3-theory at fast](gallery/repair_sec3_theory_fast.png) |
| {here}; seeds 1, 2, 3 | {here}; seeds 1, 2 |

| | paper | `quick` | `fast` |
|---|---|---|---|
| corr | 0.4 | 0.375 | 0.25 |
| variance | 0.7 |  |  |
"""
        in text
    )
    assert (
        f"| `fast` |\n| --- |\n| ![repair/fig2-left at fast](gallery/repair_fig2_left_fast.png) |\n| {here} |" in text
    )
    assert {path.name for path in (project / "docs" / "gallery").iterdir()} == {
        "repair_sec3_theory.png", "repair_sec3_theory_fast.png", "repair_fig2_left_fast.png"
    }  # fmt: skip
