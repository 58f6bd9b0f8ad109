"""What training costs: sizes of data sets, FLOPs, seconds from stored runs or from a few steps."""

import json
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from companion.runs import costs, data, models
from companion.runs.store import Store

MLP, RESNET = "digits/mlp2-fused-w8/smoke/s{}", "digits/resnet8-bn-w0.25/smoke/s{}"
PARENT = "digits/mlp2-bn-w8/quick~stop20/s1"  # the first 20 of 80 epochs
SPEED = {"mlp-bn": [(1000, 1e6), (10_000, 4e6)], "resnet-bn": [(1, 1e8)]}


def write_sidecar(name, seconds, device="cpu", **facts):
    """A stored run, as far as costs are concerned."""
    folder = Store().path(name)
    folder.mkdir(parents=True)
    info = {"run": name, "sha256": "", "recipe": {}, "shape": [], "classes": 10, "metrics": {}}
    info |= {"seconds": seconds, "device": device} | facts
    (folder / "run.json").write_text(json.dumps(info))


@pytest.mark.parametrize("name", ["digits", "digits-hard", "digits-first80"])
def test_facts_are_those_of_the_data(name):
    loaded, facts = data.load(name), costs.find_facts(name)
    assert (facts.test, facts.shape, facts.classes) == (len(loaded.test), loaded.shape, loaded.classes)
    assert abs(facts.train - len(loaded.train)) <= 10  # a half is rounded class by class


def test_facts_of_names(tmp_path):
    assert all(source.facts for source in data.DATASETS.values())
    assert costs.find_facts("imagenet@224", tmp_path) == data.Facts(1_281_167, 50_000, (3, 224, 224), 1000)
    assert costs.find_facts("imagenet@64", tmp_path).shape == (3, 64, 64)
    assert costs.find_facts("cifar100-last80", tmp_path).train == 25_000
    assert costs.find_facts("cifar100", tmp_path).train == 50_000
    assert costs.find_facts("my-photographs", tmp_path) is None
    assert costs.find_facts("cifar10@large", tmp_path) is None


def test_an_image_folder_is_counted(tmp_path):
    for half, n in (("train", 3), ("test", 1)):
        for label in ("cats", "dogs"):
            folder = tmp_path / "pets" / half / label
            folder.mkdir(parents=True)
            (folder / ".hidden").touch()
            for i in range(n):
                Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(folder / f"{i}.png")
    loaded, facts = data.load("pets", tmp_path), costs.find_facts("pets", tmp_path)
    assert facts == data.Facts(6, 2, (3, 5, 7), 2)
    assert (len(loaded.train), len(loaded.test), loaded.shape, loaded.classes) == (6, 2, (3, 5, 7), 2)
    assert costs.find_facts("pets-first80", tmp_path).train == 3
    assert costs.find_facts("pets@32", tmp_path) == data.Facts(6, 2, (3, 32, 32), 2)


def test_flops_and_bytes_of_an_mlp():
    forward, size = costs.cost(models.parse("mlp3-plain-w16"), (1, 16, 16), 10)
    assert forward == 2 * (256 * 16 + 16 * 16 + 16 * 16 + 16 * 10)
    assert size == 4 * (256 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 10 + 10)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 5)).to("meta")
    assert costs.count_flops(network, (3, 3, 3)) == 2 * (27 * 4 + 4 * 5)


def test_work_of_a_run():
    run = costs.describe(MLP.format(1))  # two epochs in batches of 200, of which six are whole
    assert run.train_flops == run.forward * (3 * 2 * 1200 + 1397 + 400)
    assert run.evaluation_flops == run.forward * (400 + 500)
    assert str(run.model) == "mlp2-bn-w8"  # as it is trained
    first, rest = (costs.describe(name).train_flops for name in (PARENT, f"{PARENT}/quick~start20/s2"))
    whole = costs.describe("digits/mlp2-bn-w8/quick/s1").train_flops
    assert first + rest == pytest.approx(whole + run.forward * (1397 + 400))  # each is evaluated once
    assert costs.describe("imagenet@224/torchvision-resnet50/jordan/s1").forward == pytest.approx(8.2e9, rel=0.02)


# ------------------------------------------------------------------------------------------------------------ seconds


def test_speed_is_interpolated_over_the_logarithm():
    run = costs.describe(MLP.format(1))

    def seconds(speed):
        return costs.train_seconds([run], "cpu", speed=speed)[run.name]

    at = math.log(run.forward / 1000) / math.log(10)
    assert seconds(SPEED) == pytest.approx(run.train_flops / (1e6 * 4**at))
    assert seconds({"mlp-bn": [(run.forward // 2, 5e6)]}) == pytest.approx(run.train_flops / 5e6)
    assert seconds({"resnet-bn": [(1, 1e8)]}) == pytest.approx(run.train_flops / 1e8)  # none of its kind is known


def test_calibration_times_real_steps():
    names = [f"digits/mlp{depth}-fused-w{width}/smoke/s1" for depth in (1, 2) for width in (4, 64)]
    runs = [costs.describe(name) for name in [*names, RESNET.format(1), "somebody/mlp2-bn-w8/smoke/s1"]]
    speed = costs.calibrate(runs, "cpu", budget=60)
    assert {kind: len(points) for kind, points in speed.items()} == {"mlp-bn": 3, "resnet-bn": 1}
    points = speed["mlp-bn"]
    assert points[0][0] == runs[0].forward and points[-1][0] == runs[3].forward and points == sorted(points)
    assert all(1e5 < rate < 1e15 for points in speed.values() for _, rate in points)


def test_measuring_stops_at_its_budget():
    runs = [costs.describe(name) for name in (MLP.format(1), RESNET.format(1))]
    assert {kind: len(points) for kind, points in costs.calibrate(runs, "cpu", budget=0).items()} == {"mlp-bn": 1}


def test_stored_runs_tell_how_long_it_takes():
    write_sidecar(MLP.format(1), 3.0)
    write_sidecar(MLP.format(2), 5.0)
    write_sidecar(MLP.format(3), 100.0, device="cuda:0")  # tells nothing about this processor
    missing, seconds = costs.estimate([MLP.format(seed) for seed in (1, 4, 5, 4)], "cpu")
    assert missing == [MLP.format(4), MLP.format(5)] and seconds == pytest.approx(8.0)
    small, large = (costs.describe(f"digits/mlp2-fused-w{width}/smoke/s1") for width in (8, 64))
    _, seconds = costs.estimate([large.name], "cpu")  # another network of that kind, at the speed of those
    rate = (small.train_flops / 3 + small.train_flops / 5) / 2
    assert seconds == pytest.approx(large.train_flops / rate)


def test_runs_that_come_with_the_repository_are_not_missing(monkeypatch, tmp_path):
    write_sidecar(MLP.format(1), 1000.0, processor="another processor")
    Store().root.rename(tmp_path / "networks")
    monkeypatch.setenv("REPAIRLIB_NETWORKS", str(tmp_path / "networks"))
    assert costs.estimate([MLP.format(1)], "cpu") == ([], 0)
    write_sidecar(MLP.format(2), 3.0)
    assert costs.estimate([MLP.format(3)], "cpu") == ([MLP.format(3)], 3.0)  # and tell nothing about this processor


def test_the_run_that_is_continued_is_missing_too():
    assert costs.estimate([f"{PARENT}/quick~start20/s2"], "cpu")[0] == [PARENT, f"{PARENT}/quick~start20/s2"]


def test_an_estimate_is_soon_there():
    names = [*map(MLP.format, range(3)), RESNET.format(1), "digits/mlp2-bn-w8/imported/s1"]
    costs.cost.cache_clear()
    start, generator = time.process_time(), torch.get_rng_state()
    missing, seconds = costs.estimate(names, "cpu")
    assert torch.equal(torch.get_rng_state(), generator)
    assert time.process_time() - start < 10  # about one second on a free machine
    assert missing == names and 0 < seconds < 600
    assert math.isnan(costs.estimate(["somebody/mlp2-bn-w8/smoke/s1"], "cpu")[1])
    with pytest.raises(ValueError, match="unknown recipe 'smok'; the nearest is 'smoke'"):
        costs.estimate(["digits/mlp2-fused-w8/smok/s1"])
