import pytest

from companion.experiments.grids import Grid, combine, repair, rethink
from companion.experiments.grids.combine import combined, hypercube, min_max, stitching, width
from companion.figures.report import read_index
from companion.runs.models import parse
from companion.runs.names import recipe_of, seeded
from companion.runs.train import parse_run


@pytest.mark.parametrize("scale", ["smoke", "quick", "fast", "paper"])
def test_every_scale_names_runs_that_exist(scale):
    found, narrow = combined(scale), combined(scale, width=1)
    for run in (found.resnet, found.tiny):
        assert parse_run(f"{run}/s{found.seeds[0]}").model.norm == "ln"
    assert [parse_run(f"{run}/s1").model.width for run in (narrow.resnet, narrow.tiny)] == [1, 1]


def test_the_paper_is_as_printed():
    paper = combined("paper")
    assert parse(paper.resnet.split("/")[1]).width == 32 and parse(paper.tiny.split("/")[1]).width == 16
    assert paper.restarts == 1
    with pytest.raises(ValueError, match="the nearest is 'quick'"):
        combined("quik")


@pytest.mark.parametrize("scale", ["smoke", "quick", "fast", "paper"])
@pytest.mark.parametrize(
    "make",
    [hypercube, stitching, width, min_max, combine.extrapolation, combine.three_models, combine.functional_difference,
     combine.robustness, repair.variance_collapse, repair.repair, repair.normalization,
     repair.width_depth, rethink.renormalization, rethink.same_basin, rethink.many_models, rethink.biases,
     rethink.rescaling, rethink.data_independent, rethink.matching_retains, rethink.precision,
     rethink.learning_rate, rethink.weight_decay, rethink.pruning],
)  # fmt: skip
def test_sections_have_all_items_of_their_notebook_and_runs_that_exist(make, scale):
    grid, index = make(scale), read_index()
    (notebook,) = {index[item]["notebook"] for item in grid.needs}
    assert set(grid.needs) == {item for item, entry in index.items() if entry["notebook"] == notebook}
    assert all(parse_run(run, check_data="imagenet" not in run) for run in grid.runs(grid.needs))


@pytest.mark.parametrize("scale", ["smoke", "quick", "fast", "paper"])
def test_networks_that_continue_others_are_of_the_seed_that_they_should_be(scale):
    run = rethink.vgg(scale, "plain")
    removed = [parse_run(seeded(rethink.without_biases(scale, run), seed), check_data=False) for seed in (1, 2)]
    assert [(name.seed, name.parent.seed, name.model.bias) for name in removed] == [(1, 1, False), (2, 2, False)]
    assert all(recipe_of(name).warmup_epochs == 0 for name in removed)  # App. C has none
    bn = rethink.resnet(scale, "bn")
    children = [parse_run(seeded(rethink.child(scale, bn), seed), check_data=False) for seed in (2, 3)]
    assert [(name.seed, name.parent.seed) for name in children] == [(2, 1), (3, 1)]
    whole = recipe_of(parse_run(seeded(bn, 1), check_data=False)).epochs + (scale == "smoke")
    assert all(recipe_of(c.parent).trained_epochs + recipe_of(c).trained_epochs == whole for c in children)
    (of_one, of_own) = (parse_run(seeded(rethink.copy(scale, bn, *seed), 3), check_data=False) for seed in ([1], []))
    assert [(name.parent.parent.seed, name.parent.seed, name.seed) for name in (of_one, of_own)] == [
        (1, 3, 3),
        (3, 3, 3),
    ]
    first, second = recipe_of(of_one.parent), recipe_of(of_one)
    assert first.schedule == second.schedule == "constant" and second.lr < first.lr


def test_rethink_of_the_paper_is_as_printed():
    assert rethink.vgg("paper", "plain", 8) == "cifar10/vgg16-plain-w8/qu~warmup1"
    assert rethink.vgg("paper", "ln") == "cifar10/vgg16-ln-w1/qu"
    assert rethink.vgg("paper", "nobias", again=True) == "cifar100/vgg11-plain-w1-nobias/qu-cifar100"
    assert rethink.resnet("paper", "plain", 4, again=True) == "cifar100/resnet20-plain-w4-sc1/qu"
    assert rethink.without_biases("paper", "cifar10/vgg16-plain-w1/qu").endswith(
        "/s{seed}/retrain~lr0.01~wd0~epochs10~schedule=constant~nobias"
    )
    assert rethink.copy("paper", "cifar10/vgg16-bn-w1/qu", 1).endswith(
        "/s1/retrain~epochs20~schedule=constant/s{seed}/retrain~lr0.01~epochs5"
    )
    assert rethink.many_models("paper").rounds == 30 and rethink.same_basin("paper").points == 11


def test_three_models_of_the_paper_are_wider_on_the_triangle():
    """Fig. 11b has a width of 40; elsewhere the triangle is of the networks of the path."""
    assert combine.three_models("paper").wide == "cifar10/resnet20-ln-w40/csiszarik"
    assert combine.three_models("quick").wide == combine.three_models("quick").resnet


def test_widths_of_the_paper_end_where_it_ends():
    needs = width("paper").needs
    assert [network["width"] for network in needs["combine/fig7"]] == [1, 2, 4, 8, 16, 32]
    assert [network["width"] for network in needs["combine/figB21"]] == [1, 2, 4, 8, 16]
    assert needs["combine/fig7"][0]["model"] == "resnet20-ln"


@pytest.mark.parametrize("make", [repair.imagenet, repair.split_data, repair.summary])
@pytest.mark.parametrize("scale", ["smoke", "quick", "fast", "paper"])
def test_repair_names_runs_that_exist(make, scale):
    grid = make(scale)
    for run in grid.runs(grid.needs):
        parse_run(run, check_data=False)
    assert all(item in grid.needs for item in grid.reads)


@pytest.mark.parametrize("scale", ["smoke", "quick", "fast", "paper"])
def test_the_quickstart_trains_nothing_of_its_own(scale):
    """Its two networks are Section 3's."""
    runs = repair.quickstart(scale).runs(["quickstart"])
    assert len(runs) == 2 and set(runs) <= set(repair.variance_collapse(scale).runs(["repair/fig2-middle"]))


def test_sections_3_to_5_1_of_the_paper_are_as_printed():
    paper = repair.repair("paper")
    assert (paper.depths[0], paper.depths[-1]) == (2, 50)
    assert [network["depth"] for network in paper.needs["repair/fig3-right"]] == paper.depths
    needs = repair.normalization("paper").needs
    assert [network["width"] for network in needs["repair/fig8-left"]] == [1, 2, 4, 8, 16, 32]
    assert {network["series"] for network in needs["repair/fig4-left"]} == {"bn", "ln", "fixup"}
    assert {network["width"] for network in needs["repair/fig4-right"]} == {4}


def test_another_folder_of_images_has_the_networks_of_torchvision():
    grid = repair.imagenet("smoke", data="photos@224", recipe="imported")
    assert grid.networks(["repair/fig5-right"]) == [
        {"run": "photos@224/torchvision-resnet18/imported", "series": "ResNet18"},
        {"run": "photos@224/torchvision-resnet50/imported", "series": "ResNet50"},
    ]
    assert grid.runs(["repair/fig9"]) == [f"photos@224/torchvision-resnet50/imported/s{seed}" for seed in (1, 2)]


def test_halves_of_the_data_are_paired_in_a_circle():
    pairs = repair.split_pairs("quick")
    assert [pair["pair"] for pair in pairs] == ["1-2", "2-3", "3-1"] * 2
    assert pairs[2] == {
        "pair": "3-1",
        "halves": ["digits-hard-first80/mlp3-fused-w256/quick/s3", "digits-hard-last80/mlp3-fused-w256/quick/s1"],
        "whole": "digits-hard/mlp3-fused-w256/quick/s3",
    }
    assert repair.split_data("quick").seeds == (1, 2, 3)


# ------------------------------------------------------------------------------------------- what cannot be had


def test_a_grid_keeps_what_can_be_had():
    networks = [{"run": "cifar10/a/r", "width": 1}, {"run": "cifar10/b/r", "width": 2, "seeds": (1, 2, 3)}]
    grid = Grid(needs={"both": networks, "whole": [networks[0], "digits/c/r/s1"], "nothing": []}, seeds=(1, 2, 3))

    def needs(*there):
        return grid.only(lambda run: run in there).needs

    everything = [f"cifar10/{name}/r/s{seed}" for name in "ab" for seed in (1, 2, 3)] + ["digits/c/r/s1"]
    assert needs(*everything) == grid.needs
    pair = {"run": "cifar10/a/r", "width": 1, "seeds": (1, 3)}
    assert needs("cifar10/a/r/s1", "cifar10/a/r/s3", "cifar10/b/r/s1", "cifar10/b/r/s2") == {
        "both": [pair],  # b has seeds of its own, and needs them all
        "nothing": [],
    }
    assert needs("cifar10/a/r/s1", "cifar10/a/r/s3", "digits/c/r/s1")["whole"] == [pair, "digits/c/r/s1"]
    assert needs("cifar10/a/r/s1") == needs("digits/c/r/s1") == {"nothing": []}
    assert grid.only(lambda run: False).networks(["both"]) == []


def test_an_item_that_compares_kinds_of_networks_is_not_made_of_one():
    networks = [{"run": f"cifar10/{name}/r", "series": name[0]} for name in ("bn1", "bn2", "ln1")]
    grid = Grid(needs={"each": networks, "compared": networks}, seeds=(1, 2), compares={"compared": "series"})
    assert grid.only(lambda run: "bn1" in run).needs == {"each": networks[:1]}
    assert grid.only(lambda run: "bn2" not in run).needs == dict.fromkeys(grid.needs, networks[::2])
    fast = repair.normalization("fast").only(lambda run: "resnet20-bn-w1" in run)
    assert "repair/fig4-middle" not in fast.needs and "repair/fig4-left" in fast.needs
