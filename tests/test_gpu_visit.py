"""Visits of a borrowed GPU machine: rehearsed on the CPU, and what their parts do when something goes wrong."""

import io
import json
import sys
import tarfile
import time

import pytest
import torch

from companion.figures import report
from companion.runs import models, packing, train
from companion.runs.data import project_root
from companion.runs.steps import Step
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
    output = report.read_index()["repair/fig2-left"]["output"]
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


NAMES = [f"{NETWORK.format(width)}/s1" for width in (8, 16, 512)]  # from small to large


def sizes(machine: Machine) -> dict[str, int]:
    folders = {name: machine.scratch / "runs" / name for name in NAMES}
    return {name: len(packing.pack((path / "model.safetensors").read_bytes())) for name, path in folders.items()}


def bring_home(machine: Machine, *names: str, expected: dict[str, int] | None = None) -> work.Parcel:
    """What is written when these are done, in this order, and the visit has not ended yet."""
    parcel = work.Parcel(machine, "smoke", expected or {})
    for name in names or NAMES:
        assert parcel.add(Job(name, "train", ())) == ""
    for each in parcel.waiting:
        each.result()
    return parcel


def test_a_large_network_leaves_room_to_smaller_ones_and_none_is_overwritten(trained, tmp_path, monkeypatch, capsys):
    small, middle, large = NAMES
    expected = sizes(trained)
    monkeypatch.setattr(work, "HOME", work.RESULTS + expected[large] + 10_000)  # for it alone, or for both others
    bring_home(trained, large, small, middle, expected=expected).close()
    assert sorted(path.name for path in trained.out.iterdir()) == ["results.tar.gz", "runs.0"]
    assert home.fold([trained.out], tmp_path / "gpu.json") == 0
    store, there = Store(), Store(trained.scratch / "runs")
    assert store.names() == [small, middle] and store.info(small) == there.info(small)
    store.load(middle)
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1
    assert "stored before; nothing is overwritten" in capsys.readouterr().out
    store.delete(small)
    with torch.no_grad():
        model = there.load(small)
        next(model.parameters()).add_(1)
    store.save(small, model, there.info(small)["metrics"] | {"shape": (1, 16, 16), "classes": 10})
    digest = store.info(small)["sha256"]
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1
    assert "NOT STORED, another is there" in capsys.readouterr().out and store.info(small)["sha256"] == digest


def test_a_large_network_that_waited_comes_home_if_there_is_room_in_the_end(trained, tmp_path, monkeypatch):
    small, middle, large = NAMES
    expected = sizes(trained)
    monkeypatch.setattr(work, "HOME", work.RESULTS + expected[large] + 10_000)
    parcel = bring_home(trained, large, expected=expected)
    assert [path.name for path in trained.out.iterdir()] == ["results.tar.gz"]
    parcel.close()  # the smaller ones were not trained
    assert home.fold([trained.out], tmp_path / "gpu.json") == 0 and Store().names() == [large]


def test_a_kill_while_pieces_are_written_loses_no_network_that_was_safe(trained, tmp_path, monkeypatch, capsys):
    small, middle, large = NAMES
    monkeypatch.setattr(work, "PIECE", 2**14 + 500_000)
    parcel = bring_home(trained, small)
    first = trained.out / "runs.0"
    before = first.read_bytes()
    for name in (large, middle):
        parcel.add(Job(name, "train", ()))
    parcel.close()
    pieces = sorted(trained.out.glob("runs.*"))
    assert len(pieces) == 3 and all(path.stat().st_size <= work.PIECE for path in pieces)
    after = first.read_bytes()
    first.write_bytes(before)
    (trained.out / "unfinished").write_bytes(after[:1000])
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1
    assert f"{large}: ValueError: came back without model.packed.1of3" in capsys.readouterr().out
    assert small in Store().names() and large not in Store().names()
    first.write_bytes(after)
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1  # small was stored before
    assert Store().names() == NAMES
    Store().load(large)


def test_no_more_comes_home_than_may(trained, monkeypatch):
    monkeypatch.setattr(work, "PIECE", 2**14 + 500_000)
    monkeypatch.setattr(work, "PIECES", 2)
    parcel = bring_home(trained, *reversed(NAMES))  # the largest needs three pieces
    parcel.close()
    assert [path.name for path in trained.out.glob("runs.*")] == ["runs.0"]
    (trained.scratch / "logs" / "a.log").write_bytes(bytes(20_000))
    (trained.scratch / "logs" / "b.log").write_bytes(bytes(100))
    with tarfile.open(fileobj=io.BytesIO(parcel._results(10_000))) as results:
        names = results.getnames()
    assert "logs/b.log" in names and "logs/a.log" not in names


def test_what_was_cut_off_or_altered_is_not_stored_and_the_rest_is(trained, tmp_path, capsys):
    bring_home(trained).close()
    (piece,) = trained.out.glob("runs.*")
    content = piece.read_bytes()
    piece.write_bytes(content[:-10])
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1
    assert "runs.0: the archive ends within" in capsys.readouterr().out
    assert Store().names() == NAMES[:2]  # those before it
    files = dict(archive.split(content))
    sidecar = json.loads(files[f"{NAMES[0]}/run.json"]) | {"sha256": "0" * 64}
    piece.write_bytes(archive.join(files | {f"{NAMES[0]}/run.json": json.dumps(sidecar).encode()}))
    Store().delete(NAMES[0])
    assert home.fold([trained.out], tmp_path / "gpu.json") == 1
    assert f"{NAMES[0]}: ValueError: came back with other weights than it left with" in capsys.readouterr().out
    assert Store().names() == NAMES[1:]


def test_a_network_comes_home_with_the_one_that_it_continues(trained, tmp_path):
    there, child = Store(trained.scratch / "runs"), f"{NAMES[0]}/retrain/s2"
    metrics = {"shape": (1, 16, 16), "classes": 10, "test_accuracy": 0.1}
    there.save(child, models.build("mlp2-plain-w8", (1, 16, 16), 10), metrics)
    bring_home(trained, child, NAMES[0]).close()
    assert home.fold([trained.out], tmp_path / "gpu.json") == 0
    assert Store().names() == [NAMES[0], child]


def test_a_sidecar_says_if_a_graph_was_used(monkeypatch):
    class Recorded(Step):
        graph = True

    Store().get(NAMES[0], progress=False)
    monkeypatch.setattr(train, "Step", Recorded)
    Store().get(NAMES[1], progress=False)
    assert "graph" not in Store().info(NAMES[0]) and Store().info(NAMES[1])["graph"] is True


def test_inaccurate_networks_are_reported(trained):
    parcel = work.Parcel(trained, "fast", {})
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


@pytest.fixture
def figures(tmp_path):
    """Two folders of figures of one notebook: those that are there, and those that came."""
    there, came = report.figures_root() / "fast" / "repair", tmp_path / "figures" / "fast" / "repair"

    def write(folder, gpu: str, **runs: list[str]) -> None:
        folder.mkdir(parents=True)
        for item, names in runs.items():
            (folder / f"{item}.json").write_text(json.dumps({"item": f"repair/{item}", "runs": names, "made": gpu}))
            (folder / f"{item}.png").write_text(gpu)
        (folder.parent / "environment.json").write_text(json.dumps({"repair/03": {"device": gpu}, gpu: {}}))
        done = {
            "items": [f"repair/{item}" for item in runs], "files": [f"repair/{item}.json" for item in runs],
            "saw": {f"repair/{item}": {"by": gpu} for item in runs}, "device": gpu,
        }  # fmt: skip
        (folder / "03.done.json").write_text(json.dumps(done))
        (folder / "03.html").write_text(gpu)

    return there, came, write


def test_figures_join_those_that_are_there(figures):
    there, came, write = figures
    write(there, "cpu", left=["a"], middle=["b"])
    write(came, "gpu", middle=["c", "d"], right=["a"])
    problems = []
    home._take_figures(came.parent, "fast", problems)
    assert not problems and json.loads((there / "middle.json").read_text())["made"] == "gpu"
    environment = json.loads((there.parent / "environment.json").read_text())
    assert environment == {"cpu": {}, "gpu": {}, "repair/03": {"device": "gpu"}}
    done = json.loads((there / "03.done.json").read_text())
    assert done["items"] == [f"repair/{item}" for item in ("left", "middle", "right")] == sorted(done["saw"])
    assert done["saw"]["repair/middle"] == {"by": "gpu"} and done["device"] == "gpu"


@pytest.mark.parametrize("others", [{}, {"right": ["a"]}])
def test_a_figure_of_more_networks_stays(figures, others):
    there, came, write = figures
    write(there, "cpu", left=["a", "b", "c"])
    write(came, "gpu", left=["c", "a"], **others)
    problems = []
    home._take_figures(came.parent, "fast", problems)
    assert problems == ["repair/left: stays as it is, of 3 networks; 2 of them came back"]
    assert json.loads((there / "left.json").read_text())["made"] == (there / "left.png").read_text() == "cpu"
    done = json.loads((there / "03.done.json").read_text())
    assert done["saw"]["repair/left"] == {"by": "cpu"}
    page = "gpu" if others else "cpu"  # without the other, nothing of the notebook is taken in
    environment = json.loads((there.parent / "environment.json").read_text())
    assert (there / "03.html").read_text() == page == done["device"] == environment["repair/03"]["device"]
