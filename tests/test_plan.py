"""The plan of `make figures`: sizes of data sets, FLOPs, and what is counted in the sums."""

import json
import math
import shutil

import batch
import numpy as np
import plan
import pytest
from PIL import Image

from companion.figures import report
from companion.runs import data, models
from companion.runs.store import Store

NOTEBOOK = """\
# %% tags=["parameters"]
scale: str = "smoke"
items: str = ""

# %% tags=["runs"]
runs = RUNS

# %%
"""
MLP, RESNET = "digits/mlp2-fused-w8/smoke/s{}", "digits/resnet8-bn-w0.25/smoke/s{}"
SPEED = {"mlp-bn": [(1000, 1e6), (10_000, 4e6)], "resnet-bn": [(1, 1e8)]}
DEVICE = report.device_name("cpu")


def write_notebook(project, name, runs):
    path = project / "notebooks" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NOTEBOOK.replace("RUNS", runs))


def write_done(name, scale, seconds, items=(), device=DEVICE):
    """What batch.execute leaves; items: {file: runs}."""
    folder = report.figures_root() / scale
    for file, runs in dict(items).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps({"runs": runs}))
    done = {"notebook": name, "items": [], "files": list(dict(items)), "seconds": seconds, "device": device}
    (folder / f"{name}.done.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.done.json").write_text(json.dumps(done))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two notebooks that share a run."""
    for module in (batch, plan):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    write_notebook(tmp_path, "one", repr([MLP.format(1), MLP.format(2), RESNET.format(1)]))
    write_notebook(tmp_path, "two", repr([MLP.format(1)]))
    return tmp_path


def make_plan(**options):
    return plan.plan("smoke", device="cpu", **{"speed": SPEED, "to_execute": ["one", "two"]} | options)


def line(text, start):
    found = [each for each in text.splitlines() if each.strip().startswith(start)]
    assert len(found) == 1, f"{len(found)} lines start with {start!r} in\n{text}"
    return found[0].split()


# -------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("name", ["digits", "digits-hard", "digits-first80"])
def test_facts_are_those_of_the_data(name):
    loaded, facts = data.load(name), plan.find_facts(name)
    assert (facts.test, facts.shape, facts.classes) == (len(loaded.test), loaded.shape, loaded.classes)
    assert abs(facts.train - len(loaded.train)) <= 10  # a half is rounded class by class


def test_facts_of_names(tmp_path):
    assert set(data.ARCHIVES) < set(plan.FACTS)
    assert plan.find_facts("imagenet@224", tmp_path) == plan.Facts(1_281_167, 50_000, (3, 224, 224), 1000)
    assert plan.find_facts("imagenet@64", tmp_path).shape == (3, 64, 64)
    assert plan.find_facts("cifar100-last80", tmp_path).train == 25_000
    assert plan.find_facts("cifar100", tmp_path).train == 50_000
    assert plan.find_facts("my-photographs", tmp_path) is None
    assert plan.find_facts("cifar10@large", tmp_path) is None


def test_an_image_folder_is_counted(tmp_path):
    for half, n in (("train", 3), ("test", 1)):
        for label in ("cats", "dogs"):
            folder = tmp_path / "pets" / half / label
            folder.mkdir(parents=True)
            (folder / ".hidden").touch()
            for i in range(n):
                Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(folder / f"{i}.png")
    loaded, facts = data.load("pets", tmp_path), plan.find_facts("pets", tmp_path)
    assert facts == plan.Facts(6, 2, (3, 5, 7), 2)
    assert (len(loaded.train), len(loaded.test), loaded.shape, loaded.classes) == (6, 2, (3, 5, 7), 2)
    assert plan.find_facts("pets-first80", tmp_path).train == 3
    assert plan.find_facts("pets@32", tmp_path) == plan.Facts(6, 2, (3, 32, 32), 2)


def test_flops_and_bytes_of_an_mlp():
    forward, size = plan.cost(models.parse("mlp3-plain-w16"), (1, 16, 16), 10)
    assert forward == 2 * (256 * 16 + 16 * 16 + 16 * 16 + 16 * 10)
    assert size == 4 * (256 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 10 + 10)


def test_work_of_a_run():
    run = plan.describe(MLP.format(1))  # two epochs in batches of 200, of which six are whole
    assert run.work == run.forward * (3 * 2 * 1200 + 1397 + 400) and run.look == run.forward * (400 + 1397)
    assert str(run.model) == "mlp2-bn-w8"  # as it is trained
    assert plan.describe("imagenet@224/torchvision-resnet50/jordan/s1").forward == pytest.approx(8.2e9, rel=0.02)


# ------------------------------------------------------------------------------------------------------------ seconds


def test_speed_is_interpolated_over_the_logarithm():
    run = plan.describe(MLP.format(1))
    at = math.log(run.forward / 1000) / math.log(10)
    assert plan.train_seconds(run, SPEED) == pytest.approx(run.work / (1e6 * 4**at))
    assert plan.train_seconds(run, {"mlp-bn": [(run.forward // 2, 5e6)]}) == pytest.approx(run.work / 5e6)


def test_calibration_times_real_steps():
    names = [f"digits/mlp{depth}-fused-w{width}/smoke/s1" for depth in (1, 2) for width in (4, 64)]
    runs = [plan.describe(name) for name in [*names, RESNET.format(1), "somebody/mlp2-bn-w8/smoke/s1"]]
    speed = plan.calibrate(runs, "cpu")
    assert {kind: len(points) for kind, points in speed.items()} == {"mlp-bn": 3, "resnet-bn": 1}
    points = speed["mlp-bn"]
    assert points[0][0] == runs[0].forward and points[-1][0] == runs[3].forward and points == sorted(points)
    assert all(1e5 < rate < 1e15 for points in speed.values() for _, rate in points)


def test_a_notebook_is_scaled_from_its_last_execution(project):
    small, large = (plan.describe(name) for name in (MLP.format(1), RESNET.format(1)))

    def seconds():
        return plan.notebook_seconds("two", "quick", "", DEVICE, plan.describe)

    assert math.isnan(seconds()[0]) and "run it at quick first" in seconds()[1]
    write_done("two", "smoke", 14.0, device="another device")
    assert math.isnan(seconds()[0])
    write_done("two", "smoke", 14.0, {"a.json": [RESNET.format(1)]})  # it needed another network then
    assert seconds()[0] == pytest.approx(plan.START + (14 - plan.START) * small.look / large.look)
    write_done("two", "quick", 9.0)  # the nearest scale counts
    assert seconds() == (9.0, "the work of 9 s at quick")
    write_done("two", "quick", 9.0, {"a.json": ["somebody/mlp2-bn-w8/smoke/s1"]})
    assert math.isnan(seconds()[0])


# --------------------------------------------------------------------------------------------------------------- plan


def test_sums(project):
    write_done("one", "smoke", 60.0)
    write_done("two", "smoke", 10.0)
    seconds = [plan.train_seconds(plan.describe(name), SPEED) for name in (MLP.format(1), RESNET.format(1))]
    training = 2 * seconds[0] + seconds[1]  # the shared run once
    text = make_plan(jobs=2)
    assert line(text, "Networks to train")[3:] == ["3", "of", "3", *plan.rough(training).split()]
    assert line(text, "Notebooks to execute")[3:] == ["2", "of", "2", *plan.rough(70).split()]
    total = training + 70 + 5 * plan.START
    assert line(text, "In all, one")[-2:] == plan.rough(total).split()
    chain = max(seconds) + 60 + 2 * plan.START  # longer than half of everything
    assert chain > total / 2 and line(text, "In all, 2 at the same time")[-2:] == plan.rough(chain).split()
    assert line(text, MLP.format("1,s2"))[1:4] == ["to", "train", "2"]
    assert "as above" in " ".join(line(text, f"{MLP.format(1)} "))
    assert max(map(len, text.splitlines())) <= 120
    assert text == make_plan(jobs=2)


def test_what_is_there_costs_nothing(project):
    for name in (MLP.format(1), MLP.format(2), RESNET.format(1)):
        (Store().root / name).mkdir(parents=True)
    text = make_plan(to_execute=[], speed=None)
    assert line(text, RESNET.format(1))[1:] == ["stored", "1", "0", "s"]
    assert line(text, "Networks to train")[3:] == ["0", "of", "3", "0", "s"]
    assert line(text, "Notebooks to execute")[3:] == ["0", "of", "2", "0", "s"]
    assert line(text, "In all, one")[-2:] == ["0", "s"]
    assert line(text, "Checkpoints to write")[-2:] == ["0", "MB"]


def test_unknown_data_and_notebooks_that_never_ran_are_left_out_and_named(project):
    write_notebook(project, "one", repr(["somebody/mlp2-bn-w8/smoke/s1", RESNET.format(1)]))
    (Store().root / RESNET.format(1)).mkdir(parents=True)
    text = make_plan(notebooks="one", to_execute=["one"])
    assert line(text, "somebody/")[1:] == ["unknown", "data", "2", "?"]
    assert line(text, "the notebook")[-1] == "?"
    assert line(text, "In all, one")[-2:] == ["0", "s"]
    assert "Not in these sums: 1 to train of unknown data." in text
    assert "Not in these sums: 1 to execute that never ran here or need unknown data." in text


def test_imported_runs_are_not_trained(project):
    write_notebook(project, "one", "['digits/mlp2-bn-w8/imported/s1']")
    text = make_plan(notebooks="one", to_execute=[])
    assert line(text, "digits/")[1:] == ["to", "import", "0", "0", "s"]
    assert line(text, "Networks to train")[3:] == ["0", "of", "1", "0", "s"]
    assert "Not in these sums: 1 to import" in text


def test_bad_questions_are_answered(project, capsys):
    assert plan.main(["--scale", "tiny"]) == 2
    assert "unknown scale 'tiny'" in capsys.readouterr().err
    write_notebook(project, "one", "['digits/mlp2-fused-w8/smok/s1']")
    with pytest.raises(ValueError, match="unknown recipe 'smok'; the nearest is 'smoke'"):
        make_plan()


def test_snakemake_says_which_notebooks_are_due(tmp_path, monkeypatch):
    for name in ("repairlib", "companion", "workflow", "figures/index.yml", "Snakefile", "pyproject.toml"):
        source, target = data.project_root() / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    monkeypatch.setattr(plan, "project_root", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("one", "two"):
        write_notebook(tmp_path, name, "[]")
    write_done("one", "smoke", 10.0)
    (tmp_path / "build" / "smoke").mkdir(parents=True)
    (tmp_path / "build" / "smoke" / "one.done").touch()
    assert plan.pending("smoke") == {"two"}
    (tmp_path / "Snakefile").unlink()
    with pytest.raises(RuntimeError, match="Snakemake cannot plan this"):
        plan.pending("smoke")
