"""Visits of a borrowed GPU machine: rehearsed on the CPU, and what their parts do when something goes wrong."""

import json
import sys
import time

import pytest
import torch

from companion.figures import report
from companion.runs import models
from companion.runs.data import project_root
from companion.runs.store import Store

sys.path.append(str(project_root() / "benchmarks"))

import gpu_visit  # noqa: E402
from gpu import archive, home, jobs, look, plan, work  # noqa: E402
from gpu.jobs import Job  # noqa: E402
from gpu.machine import Machine  # noqa: E402

NETWORK = "digits/mlp2-plain-w{}/smoke"


def test_rehearsal(tmp_path, capfd):
    assert gpu_visit.rehearse(tmp_path) == [], capfd.readouterr().out
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["timings"]["steps"][0]["ms"] > 0 and results["timings"]["steps"][0]["flops"] > 0
    assert results["timings"]["at once"][0]["processes"] == 2
    assert {row["what"] for row in results["timings"]["methods"] if row["seconds"] > 0} >= {"evaluate", "match_weights"}
    output = report.read_index()["combine/figB22"]["output"]
    made = json.loads((tmp_path / "home" / "figures" / "smoke" / f"{output}.json").read_text())
    stored = Store(tmp_path / "home" / "runs").names()
    assert made["table"] and stored == made["runs"]


# ---------------------------------------------------------------------------------------------------------- archives


def test_an_archive_gives_its_files_back():
    files = {"a/b.webp": bytes(range(256)), "c": b""}
    content = archive.join(files)
    assert dict(archive.split(content)) == files
    found = archive.split(content[:-1])
    with pytest.raises(ValueError, match="ends within 'a/b.webp'"):
        list(found)
    with pytest.raises(ValueError, match="no archive"):
        list(archive.split(content[:20]))
    for path in ("../a", "/a"):
        with pytest.raises(ValueError, match="outside"):
            list(archive.split(archive.join({path: b""})))


def test_two_halves_are_the_folder(tmp_path):
    source, target = tmp_path / "here" / "images", tmp_path / "there"
    for number in range(9):
        (source / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        (source / f"{number % 2}" / f"{number}.png").write_bytes(bytes(100))
    halves = archive.halves(source)
    assert abs(len(halves[0]) - len(halves[1])) < 150
    archive.unpack(halves[0], target)
    assert not archive.is_whole(target / "images")
    archive.unpack(halves[1], target)
    assert archive.is_whole(target / "images")
    assert sorted(p.name for p in target.rglob("*.png")) == [f"{number}.png" for number in range(9)]


# -------------------------------------------------------------------------------------------------------------- jobs


@pytest.fixture
def run(tmp_path):
    """Runs jobs of (name, shell command, other fields); gives their outcomes by name."""

    def call(*described: tuple, places: int = 1, seconds: float = 30, **options) -> dict[str, str]:
        todo = [
            Job(name, "k", ("sh", "-c", command), **(rest[0] if rest else {})) for name, command, *rest in described
        ]
        deadline = time.monotonic() + seconds
        rows = jobs.run(todo, {"k": places}, deadline, {"PATH": "/usr/bin:/bin"}, tmp_path, cwd=tmp_path, **options)
        return {row["name"]: row["outcome"] for row in rows}

    return call


def test_a_job_that_fails_stops_only_those_that_need_it(run, tmp_path):
    outcomes = run(
        ("a", "echo reason; exit 5"), ("b", "touch b", {"needs": ("a",)}), ("c", "touch c"),
        ("d", "touch d", {"needs": ("c",)}), ("e", "true", {"needs": ("b",)}), places=2,
    )  # fmt: skip
    assert outcomes == {"a": "failed (5): reason", "b": "not started: a is not there", "c": "done", "d": "done",
                        "e": "not started: b is not there"}  # fmt: skip
    assert not (tmp_path / "b").exists() and (tmp_path / "d").exists()


def test_a_job_that_does_not_fit_is_not_started_and_a_shorter_one_is(run, tmp_path):
    outcomes = run(("long", "touch long", {"seconds": 26}), ("short", "touch short", {"seconds": 20}), seconds=30)
    assert outcomes == {"long": "not started: it would take 26 s", "short": "done"}
    assert not (tmp_path / "long").exists()


def test_jobs_that_slow_one_another_down_start_only_if_both_will_be_done(run, tmp_path):
    both = [("a", "sleep 1.2; touch a", {"seconds": 2}), ("b", "test -e a", {"seconds": 2})]
    assert set(run(*both, places=2, seconds=4, slows={"k": 0.0}).values()) == {"done", "failed (1): it printed nothing"}
    (tmp_path / "a").unlink()
    outcomes = run(*both, places=2, seconds=4, slows={"k": 1.0})
    assert outcomes == {"a": "done", "b": "done"} or outcomes["b"].startswith("not started")


def test_what_runs_at_the_deadline_is_ended_with_its_children(run, tmp_path):
    start = time.monotonic()
    outcomes = run(("a", "sh -c 'sleep 3; touch late' & sleep 60"), ("b", "touch b"), seconds=1)
    assert outcomes["a"] == "stopped at the deadline" and outcomes["b"].startswith("not started")
    assert time.monotonic() - start < 3
    time.sleep(2.5)
    assert not (tmp_path / "late").exists() and not (tmp_path / "b").exists()


def test_jobs_that_must_be_alone_take_turns(run):
    command = "mkdir lock && sleep 0.3 && rmdir lock"
    assert set(run(("a", command), ("b", command), places=2).values()) != {"done"}
    alone = {"alone": "notebook"}
    assert set(run(("a", f"rm -rf lock; {command}", alone), ("b", command, alone), places=2).values()) == {"done"}


def test_a_network_with_something_wrong_stops_its_figure(run):
    outcomes = run(("a", "true"), ("b", "true", {"needs": ("a",)}), finished=lambda job: "TOO BAD")
    assert outcomes == {"a": "TOO BAD", "b": "not started: a is not there"}


# -------------------------------------------------------------------------------------------------------------- plan


def test_the_plan_names_items_that_there_are():
    items = plan.items_of()
    assert len(items) == len(set(items)) and set(items) <= set(report.read_index())


def test_networks_come_from_the_grids_and_before_their_figures(monkeypatch):
    name = "repair/fig3-middle"
    found, left = plan.find("smoke", [name, "repair/fig3-left"])
    assert found[name] and not left
    stored = found[name][0]
    model = models.build("resnet18-bn-w0.0625", (1, 16, 16), 10)
    Store().save(stored, model, {"shape": (1, 16, 16), "classes": 10, "test_accuracy": 0.1})
    todo = plan.make_jobs("smoke", found, ["digits/mlp2-plain-w8/smoke/s1/retrain/s2"], dict.fromkeys(found[name], 7.0))
    names = [job.name for job in todo]
    assert names[0] == found[name][1] and stored not in names and names.count(names[0]) == 1
    by_name = {job.name: job for job in todo}
    both = by_name[f"{name},repair/fig3-left"]  # one execution of their notebook
    assert both.needs == (names[0],) and both.alone == "repair/04_repair" and both.command[-1] == both.name
    assert by_name[names[0]].seconds == 7 + plan.START
    assert by_name["digits/mlp2-plain-w8/smoke/s1/retrain/s2"].needs == ("digits/mlp2-plain-w8/smoke/s1",)


def test_what_cannot_or_need_not_be_made_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("REPAIRLIB_DATA", str(tmp_path))
    monkeypatch.setenv("REPAIRLIB_TRAIN", "0")
    assert plan.find("fast", ["repair/fig2-middle"]) == ({}, {"repair/fig2-middle": "lacks every network"})
    monkeypatch.setenv("REPAIRLIB_TRAIN", "1")
    assert plan.find("fast", ["repair/fig2-middle"]) == ({}, {"repair/fig2-middle": "needs cifar10"})
    for half in ("train", "test"):
        (tmp_path / "cifar10" / half / "cat").mkdir(parents=True)
    found, left = plan.find("fast", ["repair/fig2-middle"], again=True)
    assert all(run.startswith("cifar10/vgg11") for run in found["repair/fig2-middle"]) and not left
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "index.yml").write_bytes((project_root() / "figures" / "index.yml").read_bytes())
    monkeypatch.setattr(report, "project_root", lambda: tmp_path)
    (tmp_path / "figures" / "fast" / "repair").mkdir(parents=True)
    saved = tmp_path / "figures" / "fast" / "repair" / "fig2_middle.json"
    for runs, reason in ((found["repair/fig2-middle"], {"repair/fig2-middle": "is committed"}), (["other"], {})):
        saved.write_text(json.dumps({"runs": runs}))
        assert plan.find("fast", ["repair/fig2-middle"])[1] == reason


def test_training_takes_steps_times_what_was_measured():
    run = f"{NETWORK.format(8)}/s1"
    row = {"network": NETWORK.format(8), "ms": 10.0}
    timings = {"steps": [row | {"how": "as is"}, row | {"how": "graph", "ms": 4.0}], "choice": {}}
    steps = 2 * (1397 // 200)
    assert plan.training_seconds([run], "cpu", timings) == {run: pytest.approx(steps * 0.010)}
    timings["choice"]["graph"] = True
    assert plan.training_seconds([run], "cpu", timings) == {run: pytest.approx(steps * 0.004)}
    assert plan.training_seconds([run], "cpu", {})[run] > 0


@pytest.mark.parametrize("change, ms, graph", [(0.001, 5, True), (0.1, 5, False), (0.001, 10, False)])
def test_graphs_are_used_only_if_they_agree_and_are_quicker(tmp_path, change, ms, graph):
    eager = {"network": "n", "how": "as is", "ms": 10, "losses": [2.0, 1.0]}
    replayed = {"network": "n", "how": "graph", "ms": ms, "losses": [2.0, 1.0 + change]}
    timings = {"steps": [eager, replayed], "at once": [{"gain": 2.1, "processes": 3}, {"gain": 1.9, "processes": 2}]}
    look.choose(Machine(tmp_path, tmp_path, tmp_path), timings)
    assert timings["choice"]["graph"] is graph and timings["choice"]["trainers"] == 3


# --------------------------------------------------------------------------------------------------------- come home


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A machine on which networks of three widths are trained, and what is to come home of them."""
    machine = Machine(tmp_path / "machine", tmp_path / "packed", tmp_path / "out")
    there = Store(machine.scratch / "runs")
    for width in (8, 16, 512):
        model = models.build(f"mlp2-plain-w{width}", (1, 16, 16), 10)
        there.save(f"{NETWORK.format(width)}/s1", model, {"shape": (1, 16, 16), "classes": 10, "test_accuracy": 0.1})
    return machine


def bring_home(machine: Machine) -> None:
    parcel = work.Parcel(machine, "smoke")
    for name in Store(machine.scratch / "runs").names():
        assert parcel.add(Job(name, "train", ())) == ""
    parcel.close()


def test_small_networks_come_home_first_and_none_is_overwritten(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(work, "PIECE", 12_000)
    monkeypatch.setattr(work, "FILES", 10)
    monkeypatch.setattr(work, "HOME", 2**16 + 80_000)
    bring_home(trained)
    files = sorted(path.name for path in trained.out.iterdir())
    assert files == ["results.tar.gz", "runs.0", "runs.1", "runs.2"]  # of 5 and 22 kB; the largest has 2.1 MB
    names = [f"{NETWORK.format(width)}/s1" for width in (8, 16)]
    assert home.fold([trained.out], tmp_path / "gpu.json") == 0
    store, there = Store(), Store(trained.scratch / "runs")
    assert store.names() == names and [store.info(n) for n in names] == [there.info(n) for n in names]
    store.load(names[1])
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1
    assert "stored before; nothing is overwritten" in capsys.readouterr().out
    store.delete(names[0])
    with torch.no_grad():
        model = there.load(names[0])
        next(model.parameters()).add_(1)
    store.save(names[0], model, there.info(names[0])["metrics"] | {"shape": (1, 16, 16), "classes": 10})
    digest = store.info(names[0])["sha256"]
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1
    assert "NOT STORED, another is there" in capsys.readouterr().out and store.info(names[0])["sha256"] == digest


def test_what_was_cut_off_or_altered_is_not_stored(trained, tmp_path, capsys):
    bring_home(trained)
    (piece,) = trained.out.glob("runs.*")
    content = piece.read_bytes()
    piece.write_bytes(content[:-10])
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1
    assert "ends within" in capsys.readouterr().out
    assert len(Store().names()) == 2  # those before it
    altered = content.replace(b'"sha256": "', b'"sha256": "0', 1)
    files = dict(archive.split(content))
    name = f"{NETWORK.format(8)}/s1/run.json"
    sidecar = json.loads(files[name]) | {"sha256": "0" * 64}
    piece.write_bytes(archive.join(files | {name: json.dumps(sidecar).encode()}))
    Store().delete(f"{NETWORK.format(8)}/s1")
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1 and altered != content
    assert "other weights than it left with" in capsys.readouterr().out
    assert not Store().has(f"{NETWORK.format(8)}/s1")


def test_inaccurate_networks_are_reported(trained):
    parcel = work.Parcel(trained, "fast")
    assert parcel.add(Job(f"{NETWORK.format(8)}/s1", "train", ())) == "TOO INACCURATE: 10.0% ON THE TEST SET"
    parcel.close()


def test_runs_that_travel_are_stored_there(tmp_path, monkeypatch):
    (tmp_path / "data" / "cifar10" / "train").mkdir(parents=True)
    monkeypatch.setenv("REPAIRLIB_DATA", str(tmp_path / "data"))
    run = f"{NETWORK.format(8)}/s1"
    model = models.build("mlp2-plain-w8", (1, 16, 16), 10)
    Store().save(run, model, {"shape": (1, 16, 16), "classes": 10, "test_accuracy": 0.5})
    home.pack(tmp_path / "packed", "abc", [run], wheels=False)
    machine = Machine(tmp_path / "machine", tmp_path / "packed", tmp_path / "out")
    assert work.unpack_runs(machine) == "1"
    there = Store(machine.scratch / "runs")
    assert there.info(run) == Store().info(run) and torch.equal(
        next(there.load(run).parameters()), next(model.parameters())
    )
    assert machine.environment()["REPAIRLIB_COMMIT"] == "abc"


def test_figures_join_those_that_are_there(tmp_path):
    name, there = "03_variance_collapse", report.figures_root() / "fast"
    came = tmp_path / "figures" / "fast"
    for folder, item, gpu in ((there, "fig2_left", "cpu"), (came, "fig2_middle", "gpu")):
        (folder / "repair").mkdir(parents=True)
        (folder / "repair" / f"{item}.json").write_text(gpu)
        (folder / "environment.json").write_text(json.dumps({gpu: {"device": gpu}}))
        done = {"items": [item], "files": [f"repair/{item}.json"], "saw": {item: {}}, "device": gpu}
        (folder / "repair" / f"{name}.done.json").write_text(json.dumps(done))
    home._take_figures(came, "fast")
    assert {path.name for path in (there / "repair").glob("fig*")} == {"fig2_left.json", "fig2_middle.json"}
    assert json.loads((there / "environment.json").read_text()) == {"cpu": {"device": "cpu"}, "gpu": {"device": "gpu"}}
    done = json.loads((there / "repair" / f"{name}.done.json").read_text())
    assert done["items"] == ["fig2_left", "fig2_middle"] == sorted(done["saw"]) and done["device"] == "gpu"
