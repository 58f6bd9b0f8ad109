"""What Csiszarik et al. 2023, Table A.1, prints, beside what is built and trained here."""

from companion.experiments.architectures import layer_rows, recipe_rows
from companion.runs import models
from companion.runs.train import find_recipe


def test_tiny10_is_as_printed():
    rows = layer_rows(*(models.build(name, (3, 32, 32), 10) for name in ("tiny10-ln", "tiny10-ln-w2")))
    convolutions = [row for row in rows if "kernel" in row]
    printed = [(3, 16), (3, 16), (3, 32), (3, 32), (3, 32), (3, 64), (3, 64), (1, 64)]
    assert [(row["kernel"], row["channels"]) for row in convolutions] == printed
    assert [row["channels_here"] for row in convolutions] == [2 * channels for _, channels in printed]
    assert {row["then"] for row in convolutions} == {"LN-ReLU"}
    assert [row["name"] for row in rows[len(convolutions) :]] == ["average pooling", "linear"]


def test_recipes_are_as_printed():
    kinds = {name: find_recipe("csiszarik", f"{name}-ln", "cifar10") for name in ("tiny", "resnet")}
    tiny, resnet = recipe_rows(kinds)
    assert (tiny["epochs"], tiny["lr"], tiny["schedule"], tiny["lr_divided_at"]) == (300, 0.01, "step", "0.33, 0.67")
    assert (resnet["epochs"], resnet["lr"], resnet["schedule"], resnet["lr_divided_at"]) == (250, 0.1, "cosine", "")
    assert tiny["augment"] == resnet["augment"] == "resize+flip+rotate"
