"""What somebody adds is known everywhere by its name, and takes one entry each: a family of networks, a data set, a
recipe, a matching, a renormalisation and a figure."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import repairlib
from companion.experiments.grids import Grid
from companion.experiments.methods import MATCHINGS, RENORMS, MatchingMethod, Renormalisation
from companion.experiments.tables import barriers
from companion.figures import gallery, report
from companion.figures.plots import repair as plots
from companion.figures.section import Section
from companion.runs import costs, data, models
from companion.runs.data import DATASETS, Facts, Source, Split
from companion.runs.models import FAMILIES, Family
from companion.runs.names import parse_run
from companion.runs.recipes import RECIPES, Recipe, find_recipe
from companion.runs.store import Store


class Pyramid(nn.Module):
    """Somebody's own network: each layer has half of the units of the one before it."""

    def __init__(self, inputs: int, units: int, classes: int):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, units), nn.Linear(units, units // 2)
        self.head = nn.Linear(units // 2, classes)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


def build_pyramid(name, shape, classes):
    return Pyramid(shape[0] * shape[1] * shape[2], int(16 * name.width), classes)


def read_stripes(root, download):
    """Two classes of 8x8 images: stripes across and down, with noise."""
    generator = torch.Generator().manual_seed(0)

    def half(n):
        labels = torch.arange(n) % 2
        stripes = (torch.arange(8) % 2 * 200).expand(8, 8)
        images = torch.stack([stripes if label else stripes.T for label in labels])
        noise = torch.randint(50, images.shape, generator=generator)
        return Split((images + noise).to(torch.uint8).unsqueeze(1), labels)

    return half(200), half(60)


@pytest.fixture
def added(monkeypatch, tmp_path):
    """A family, a data set and a recipe; forgotten after the test."""
    for registry in (FAMILIES, DATASETS, RECIPES):
        for key in ("pyramid", "stripes", "gentle"):
            monkeypatch.delitem(registry, key, raising=False)
    models.register(Family("pyramid", build_pyramid, "Pyramid", recipes="mlp"))
    data.register(Source("stripes", read_stripes, Facts(200, 60, (1, 8, 8), 2), "Stripes", upright=True))
    RECIPES["gentle"] = {"mlp": Recipe("gentle", 4, 20, 0.05, "cosine", augment=("flip",))}
    yield Store(tmp_path / "runs")
    del FAMILIES["pyramid"], DATASETS["stripes"], RECIPES["gentle"]


@pytest.mark.parametrize("recipe", ["smoke", "quick", "gentle", "gentle~epochs3~init=uniform"])
def test_a_network_on_a_data_set_by_a_recipe_all_of_ones_own(added, recipe):
    name = f"stripes/pyramid-w1/{recipe}/s1"
    network = added.get(name, progress=False)
    assert isinstance(network, Pyramid) and added.names() == [name]
    assert added.info(name)["shape"] == [1, 8, 8] and added.info(name)["metrics"]["test_accuracy"] > 0.9
    again = added.get(name)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())


def test_they_are_continued_aligned_and_counted(added):
    names = [f"stripes/pyramid-w{width}/gentle/s{seed}" for width, seed in ((2, 1), (2, 2))]
    a, b = (added.get(name, progress=False) for name in names)
    loader = data.iterate(data.load("stripes"), "train", 100)
    assert repairlib.align(a, b, loader).first.weight.shape == (32, 64)
    child = added.get(f"{names[0]}/retrain~epochs1/s3", progress=False)
    assert not torch.equal(child.first.weight, a.first.weight)
    run = costs.describe(names[0], added.names())
    assert run.stored and run.facts == Facts(200, 60, (1, 8, 8), 2) and run.forward == 2 * (64 * 32 + 32 * 16 + 16 * 2)


def test_they_have_titles_and_their_own_rules(added):
    run = parse_run("stripes/pyramid/gentle/s1")
    assert str(run) == "stripes/pyramid-w1/gentle/s1" and run.model.kind == "pyramid" and run.model.title == "Pyramid"
    assert data.title_of("stripes") == "Stripes" and data.title_of("stripes-first80") == "Stripes first80"
    assert find_recipe("gentle", "pyramid", "stripes").augment == ()  # stripes are upright
    assert find_recipe("gentle", "pyramid", "cifar10").augment == ("flip",)


@pytest.mark.parametrize("name,words", [
    ("stripes/pyramyd-w1/smoke/s1", "nearest valid name is 'pyramid-w1'"), ("strips/pyramid/smoke/s1", "is 'stripes'"),
    ("stripes/pyramid-bn/smoke/s1", "nearest valid name is 'pyramid'"), ("stripes/pyramid/gentel/s1", "is 'gentle'"),
    ("stripes/pyramid-w0/smoke/s1", "width 0 is not possible"), ("stripes/pyramid3/smoke/s1", "name is 'pyramid'"),
    ("stripes/resnet8-bn/gentle/s1", "recipe 'gentle' is for mlp, not for resnet-bn; the nearest that is"),
    ("stripes/pyramid/smoke/s1/smoke~nobias/s1", "takes the biases out of a plain network"),
])  # fmt: skip
def test_errors_know_them(added, name, words):
    with pytest.raises(ValueError, match=words):
        parse_run(name)


def test_a_family_without_recipes_says_how_to_get_some(added, monkeypatch):
    monkeypatch.setitem(FAMILIES, "pyramid", replace(FAMILIES["pyramid"], recipes=""))
    with pytest.raises(ValueError, match="not for pyramid; register the family with recipes='vgg'"):
        parse_run("stripes/pyramid/smoke/s1")


def test_names_are_taken_once(added):
    with pytest.raises(ValueError, match="'pyramid' cannot name a family.*taken are .*pyramid"):
        models.register(Family("pyramid", build_pyramid))
    with pytest.raises(ValueError, match="'stripes' cannot name a data set"):
        data.register(Source("stripes", read_stripes))
    for bad in ("Pyramid", "my-net", "2d", ""):
        with pytest.raises(ValueError, match="cannot name a family, for which small letters"):
            models.register(Family(bad, build_pyramid))
    with pytest.raises(ValueError, match="'a/b' cannot name a data set"):
        data.register(Source("a/b", read_stripes))


def match_nothing(model_a, model_b, data):
    """A matching that leaves every unit where it is."""
    spec = repairlib.permutation_spec(model_a, next(iter(data))[0])
    return repairlib.Matching(spec, {group.name: torch.arange(group.size) for group in spec.groups})


def halved(model_a, model_b, data):
    """A renormalisation that halves all weights."""

    def path(alpha):
        model = repairlib.interpolate_models(model_a, model_b, alpha)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.5)
        return model

    return path


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """A matching, a renormalisation and an item of the index; forgotten after the test."""
    monkeypatch.setenv("REPAIRLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("REPAIRLIB_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setitem(MATCHINGS, "stay", MatchingMethod("left where they are", match_nothing))
    monkeypatch.setitem(RENORMS, "halved", Renormalisation("halved", halved, moves_ends=True))
    index = report.read_index() | {
        "repair/mine": {
            "notebook": "repair/04_repair", "output": "repair/mine", "kind": "figure", "what": "A path of my own.",
            "paper": {"section": "0", "figure": "none"}, "published": {"midpoint_mine": 50.0},
        }
    }  # fmt: skip
    for module in (report, gallery):
        monkeypatch.setattr(module, "read_index", lambda: index, raising=False)
    monkeypatch.setattr("companion.figures.section.read_index", lambda: index)
    return tmp_path / "figures"


def test_a_matching_a_renormalisation_and_a_figure_of_ones_own(figure):
    def grid(scale):
        return Grid(needs={"repair/mine": [{"run": "digits/mlp2-plain-w8/smoke"}]}, seeds=(1, 2))

    fig = Section(grid, "smoke").item("repair/mine")
    table = fig.rows(matchings=["none", "stay"], renorms=["none", "halved"], calibration=200)
    assert set(table["matching"]) == {"none", "stay"} and set(table["renorm"]) == {"none", "halved"}
    paths = barriers(table).set_index(["matching", "renorm"])["loss_barrier"]
    assert paths["none", "none"] == paths["stay", "none"] != paths["stay", "halved"]
    fig.save(table, plots.path(table), {"midpoint_mine": 100 * table["accuracy"].mean()})
    assert (figure / "smoke/repair/mine.png").exists()
    page = gallery.write_gallery().read_text()
    assert "repair/mine" in page and "A path of my own." in page and "smoke/repair/mine.png" in page
