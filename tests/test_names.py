"""Run names: changes of the recipe, and runs that continue others."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.runs.data import AUGMENTATIONS, DATASETS
from companion.runs.models import FAMILIES, INITS
from companion.runs.names import lineage, parse_run, recipe_of
from companion.runs.recipes import CHANGES, RECIPES, SCHEDULES, Recipe, find_recipe
from companion.runs.store import Store

QU = "cifar10/vgg16-plain-w1/qu/s1"


def parse(name):
    return parse_run(name, check_data=False)


positive = st.floats(1e-9, 1e6)
VALUES = {
    "lr": positive, "wd": st.just(0.0) | positive, "epochs": st.integers(10, 500), "batch": st.integers(1, 4000),
    "warmup": st.floats(0.1, 9), "momentum": st.just(0.0) | st.floats(0.01, 0.99), "smoothing": st.floats(0.01, 0.9),
    "schedule": st.sampled_from(SCHEDULES), "augment": st.lists(st.sampled_from(AUGMENTATIONS), unique=True),
    "init": st.sampled_from(list(INITS)), "until": st.floats(0.1, 1), "stop": st.integers(1, 9),
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES), st.randoms())
def test_changes_survive_the_name_in_any_order(values, random):
    """Whatever the order and the form of numbers, a run has one name, and the name has every bit of the values."""
    values = {key: tuple(value) if key == "augment" else value for key, value in values.items()}
    base = find_recipe("qu", "vgg-plain", "cifar10")
    values = {key: value for key, value in values.items() if value != getattr(base, CHANGES[key].field)}

    def text(key, value):
        words = "+".join(value) or "none" if key == "augment" else value
        return f"~{key}={words}" if key in ("augment", "schedule", "init") else f"~{key}{value!r}".replace("e+", "e")

    parts = [text(key, value) for key, value in values.items()]
    random.shuffle(parts)
    run = parse("cifar10/vgg16-plain/qu" + "".join(parts) + "/s1")
    assert parse(str(run)) == run and str(parse(str(run))) == str(run)
    found = recipe_of(run)
    assert all(getattr(found, CHANGES[key].field) == value for key, value in values.items())
    same = {CHANGES[key].field: getattr(base, CHANGES[key].field) for key in values} | {"milestones": base.milestones}
    assert replace(found, name=base.name, **same) == base


@pytest.mark.parametrize("changes,canonical", [
    ("~wd0.0005~lr0.030", "~lr0.03~wd5e-4"), ("~lr=3e-2", "~lr0.03"), ("~wd0", "~wd0"), ("~epochs20", "~epochs20"),
    ("~lr1e-3", "~lr1e-3"), ("~lr0.0125", "~lr0.0125"), ("~augment=none", "~augment=none"), ("~lr2.0", "~lr2"),
    ("~init=uniform~warmup1", "~warmup1~init=uniform"), ("~milestones=0.5+0.75", "~milestones=0.5+0.75"),
    ("~schedule=cosine", "~schedule=cosine"), ("~augment=flip", "~augment=flip"), ("~until0.9", "~until0.9"),
])  # fmt: skip
def test_one_form_of_changes(changes, canonical):
    assert str(parse(QU.replace("/s1", f"{changes}/s1"))) == QU.replace("/s1", f"{canonical}/s1")


@pytest.mark.parametrize("recipe,words", [
    ("qu~rl0.03", "unknown change 'rl0.03'; the nearest is 'lr0.03'"), ("qu~lr0.1", "'lr0.1' is what 'qu' does anyway"),
    ("qu~init=unifrm", "nearest is 'uniform'"), ("qu~augment=flp", "augmentation 'flp'; the nearest is 'flip'"),
    ("qu~lr0.03~lr0.05", "the second of lr"), ("qu~lr1,5", "'1,5' is not a number like"), ("qu~", "unknown change ''"),
    ("qu~epochs1.5", "not a whole number"), ("qu~stop160", "must lie in order within 160 epochs"),
    ("qu~schedule=constant~milestones=0.5", "step needs them, and only it"), ("qu~nobias1", "takes no value"),
    ("quick~single", "is what .quick. does anyway"),
    ("qv~lr0.03", "unknown recipe 'qv'; the nearest is 'qu'"), ("imported~lr0.1", "cannot be changed"),
    ("qu~start1", "name that run before it, like <data>/<model>/<recipe>~stop1/s1/qu~start1/s2"),
    ("qu~nobias", "name that run before it, or end the name of the model in -nobias"),
    ("retrain", "retrain trains a stored run once more"),
    ("qu/s1/imported", "'imported' does not train, and so continues no run"),
    ("imported/s1/retrain", "<recipe> is not imported"), ("qu/s1/qu~init=uniform", "changes the initial weights"),
    ("qu/s01/retrain", "'s01' is not a seed"), ("qu/s1/retrian", "nearest is 'retrain'"),
    ("qu/s1/retrain~nobias/s1/retrain~nobias", "takes the biases out"), ("qu/s1/retrain~epochs160", "does anyway"),
])  # fmt: skip
def test_impossible_names_say_what_would_be_possible(recipe, words):
    name = QU.replace("/qu/", f"/{recipe}/")
    with pytest.raises(ValueError, match=words) as caught:
        parse(name)
    assert str(caught.value).startswith(f"run name {name!r}: ")


def test_half_a_child_is_no_name():
    with pytest.raises(ValueError, match="is not <data>/<model>/<recipe>/s<seed>, .* two more parts"):
        parse(f"{QU}/retrain")


def test_parents():
    name = f"{QU}/retrain~nobias/s2/qu~start1/s3"
    run = parse(name)
    assert str(run) == name and str(run.parent) == f"{QU}/retrain~nobias/s2" and str(run.parent.parent) == QU
    assert run.parent.parent.parent is None
    assert lineage(name) == lineage(run) == [QU, f"{QU}/retrain~nobias/s2", name] and lineage(QU) == [QU]
    assert [str(r.model) for r in (run, run.parent, run.parent.parent)] == [
        "vgg16-plain-w1-nobias", "vgg16-plain-w1-nobias", "vgg16-plain-w1"
    ]  # fmt: skip
    assert parse("cifar10/vgg16-fused/fast/s1/retrain/s2").model.norm == "plain"


def test_retrain_is_the_recipe_of_the_parent():
    parent = parse("cifar10/vgg16-ln/qu~lr0.05~init=uniform~until0.9~stop3/s1")
    child = recipe_of(parse(f"{parent}/retrain~epochs1/s2"))
    assert recipe_of(parent).warmup_epochs == 1  # of networks that begin anew
    changes = {"epochs": 1, "warmup_epochs": 0, "init": Recipe.init, "until": None, "stop": None}
    assert child == replace(recipe_of(parent), name="retrain~epochs1", **changes)
    grandchild = recipe_of(parse(f"{parent}/retrain~epochs1/s2/retrain/s3"))
    assert grandchild == replace(child, name="retrain")


def test_digits_are_mirrored_only_if_asked():
    assert find_recipe("fast", "vgg-bn", "mnist").augment == ("translate",)
    assert find_recipe("fast~augment=flip+translate", "vgg-bn", "mnist").augment == ("flip", "translate")


def test_every_field_that_changes_is_one_of_a_recipe():
    fields = set(Recipe.__dataclass_fields__)
    assert {change.field for change in CHANGES.values()} <= fields - {"name"}
    assert not set("~/ ") & set("".join([*RECIPES, *CHANGES, *INITS, *AUGMENTATIONS, *SCHEDULES]))


def test_constant_schedule_has_its_warmup():
    how = Recipe("test", 4, 1, 0.3, "constant", warmup_epochs=1)
    assert [round(how.lr_at(step, 2), 9) for step in range(8)] == [0.15] + [0.3] * 7


# docs/runs.md

PAGE = Path(__file__).parents[1] / "docs" / "runs.md"


def test_the_page_of_names_is_complete():
    text = PAGE.read_text()
    assert re.findall(r"^\| `~([a-z]+)", text, re.M) == list(CHANGES)
    recipes = text.partition("## Recipes")[2].partition("###")[0]
    assert set(re.findall(r"`([a-z0-9-]+)`", "".join(re.findall(r"^\|(.*?)\|", recipes, re.M)))) == {
        *RECIPES,
        "retrain",
    }
    for word in (*INITS, *AUGMENTATIONS, *SCHEDULES, *(name for name in DATASETS if name != "imagenet")):
        assert f"`{word}`" in text, word
    for name in re.findall(r"`\.\.\.(/[^`]*)`", text):
        assert str(parse_run(f"cifar10/vgg16-plain-w1{name}", check_data=False)).endswith(name)


def test_code_of_the_page_of_names_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("REPAIRLIB_RUNS", str(tmp_path))
    known = [dict(registry) for registry in (FAMILIES, RECIPES)]
    names = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
            exec(block.replace("resnet20-bn-w1/quick", "mlp2-plain-w8/smoke"), names)
    finally:
        for registry, before in zip((FAMILIES, RECIPES), known, strict=True):
            for key in set(registry) - set(before):
                del registry[key]
    assert Store().names() == ["digits/mlp2-plain-w8/smoke/s1", "digits/mynet-w2/gentle~epochs5/s1"]
    assert names["run"].model.flags == ("nobias",) and 0 < len(names["losses"]) <= 4 * 13
