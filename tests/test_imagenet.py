"""The notebook of ImageNet, executed on a folder of JPEGs of any size with torchvision's networks."""

import json

import jupytext
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision import transforms
from torchvision.datasets import ImageFolder

from companion.experiments.tables import name_networks
from companion.figures.report import figures_root
from companion.runs import store
from companion.runs.data import project_root

SIDE = 32
NOTEBOOK = project_root() / "notebooks" / "repair" / "05_2_imagenet.py"


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """ImageNet in small: {train,val}/<class>/*.JPEG, a shape of some colour and size somewhere in an image."""
    random = np.random.RandomState(0)
    for half, count in (("train", 12), ("val", 5)):
        for label, draw in enumerate(("ellipse", "rectangle", "line")):
            folder = tmp_path / "shapes" / half / f"n{label:08}"
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = (int(n) for n in random.randint(40, 90, 2))
                image = Image.new("RGB", (width, height), tuple(int(n) for n in random.randint(0, 60, 3)))
                x, y, size = (int(n) for n in random.randint(8, 20, 3))
                colour = [int(n) for n in random.randint(20, 120, 3)]
                colour[label] = 250
                getattr(ImageDraw.Draw(image), draw)((x, y, x + size, y + size), fill=tuple(colour))
                image.save(folder / f"{half}_{i:08}.JPEG", quality=90)
    monkeypatch.setenv("REPAIRLIB_DATA", str(tmp_path))
    return tmp_path / "shapes"


def evaluate(run: str, folder) -> tuple[float, float]:
    """Loss and top-1 on the validation folder, as torchvision's reference evaluates."""
    steps = [transforms.Resize(round(SIDE * 256 / 224)), transforms.CenterCrop(SIDE), transforms.ToTensor(),
             transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]  # fmt: skip
    images = ImageFolder(folder / "val", transforms.Compose(steps))
    x, y = torch.stack([image for image, _ in images]), torch.tensor(images.targets)
    with torch.no_grad():
        logits = store.get(run)(x)
    return float(torch.nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def test_the_notebook_runs_on_a_streamed_folder(shapes, tmp_path):
    name = f"shapes@{SIDE}"
    papermill.execute_notebook(
        nbformat.from_dict(jupytext.read(NOTEBOOK)),
        str(tmp_path / "executed.ipynb"),
        parameters={"scale": "smoke", "data": name},
        kernel_name="python3",
        language="python",
        progress_bar=False,
        cwd=NOTEBOOK.parent,
    )
    made = figures_root() / "smoke" / "repair"
    saved = {item: json.loads((made / f"{item}.json").read_text()) for item in
             ("fig5_left", "fig5_right", "fig8_right", "fig9")}  # fmt: skip
    runs = [f"{name}/torchvision-{model}/smoke/s{seed}" for model in ("resnet18", "resnet50") for seed in (1, 2)]
    assert saved["fig5_right"]["runs"] == runs and saved["fig5_left"]["runs"] == runs[2:]

    table = pd.DataFrame(saved["fig5_left"]["table"])
    table = name_networks(table)
    paths = "not aligned", "aligned", "aligned + RESET", "aligned + REPAIR"
    midpoints = "aligned + REPAIR conv", "aligned + REPAIR bn reset"
    expected = [(network, 3) for network in paths] + [(network, 1) for network in midpoints]
    assert list(table.groupby("network", sort=False).size().items()) == expected
    loss = table.pivot(index="alpha", columns="network", values="loss")
    accuracy = table.pivot(index="alpha", columns="network", values="accuracy")
    for alpha, run in enumerate(runs[2:]):
        expected = evaluate(run, shapes)
        for network in ("not aligned", "aligned", "aligned + REPAIR"):  # REPAIR changes nothing at the ends; RESET does
            found = loss.loc[alpha, network], accuracy.loc[alpha, network]
            assert found == pytest.approx(expected, rel=1e-3), (run, network)
        assert loss.loc[alpha, "aligned + RESET"] != pytest.approx(expected[0], rel=1e-3)
    assert loss.loc[0.5].nunique() == 6  # six networks, and none the same function

    filters = pd.DataFrame(saved["fig9"]["table"])
    assert sorted(filters["matched_unit"]) == list(filters["unit"]) == list(range(64))
    assert saved["fig9"]["summary"]["correlation_matched"] > saved["fig9"]["summary"]["correlation_as_trained"]
    assert (made / "fig9.png").stat().st_size > 10_000
