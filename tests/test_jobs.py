"""The jobs of `make figures`: which, in which order, how far they are; and that they make what is missing, no more."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
from small_notebooks import NAME, copy_tree, write_notebook

from companion.runs.store import Store

SMALL, LARGE = "digits/mlp2-bn-w8/smoke/s{}", "digits/mlp2-bn-w512/quick/s{}"
SPEED = {"mlp-bn": [(1, 1e9)]}


def need(runs=(), after=()):
    return {"runs": list(runs), "reads": [], "after": list(after), "error": ""}


def plan(wanted, **options):
    return jobs.plan_jobs("smoke", [], wanted, "cpu", **{"speed": SPEED} | options)


def test_what_is_soonest_there_comes_first(project):
    wanted = {
        "large": need(map(LARGE.format, (1, 2))),
        "both": need([LARGE.format(2), SMALL.format(3)]),
        "small": need(map(SMALL.format, (1, 2))),
        "reader": need(after=["small"]),
        "broken": need() | {"error": "the cell fails"},
    }
    found = plan(wanted)
    assert [job.key for job in found] == [
        f"train/{SMALL.format(1)}", "notebook/small", "notebook/reader",
        f"train/{LARGE.format(2)}", f"train/{SMALL.format(3)}", "notebook/both",
        f"train/{LARGE.format(1)}", "notebook/large",
    ]  # fmt: skip
    jobs_of = {job.key: job for job in found}
    assert jobs_of[f"train/{SMALL.format(1)}"].runs == [SMALL.format(1), SMALL.format(2)]  # short ones share a job
    assert jobs_of["notebook/large"].after == [f"train/{LARGE.format(1)}", f"train/{LARGE.format(2)}"]
    assert jobs_of["notebook/reader"].after == ["notebook/small"]
    priorities = [job.priority for job in found]
    assert priorities == sorted(priorities, reverse=True) and min(priorities) > 0


def test_after_the_soonest_come_the_longest(project, monkeypatch):
    wanted = {str(count): need(map(LARGE.format, range(10 * count, 11 * count))) for count in range(1, 6)}
    assert [job.name for job in plan(wanted) if not job.runs] == ["1", "2", "3", "5", "4"]
    wanted["4"]["passes"] = 100 * jobs.PASSES  # another one takes longer than it looks
    assert [job.name for job in plan(wanted) if not job.runs] == ["1", "2", "3", "4", "5"]


def test_of_two_that_take_as_long_the_one_that_others_wait_for_comes_first(project):
    wanted = {str(count): need(map(LARGE.format, range(10 * count, 11 * count))) for count in range(1, 4)}
    wanted |= {name: need(map(LARGE.format, range(start, start + 6))) for name, start in (("a", 60), ("b", 70))}
    assert [job.name for job in plan(wanted) if not job.runs] == ["1", "2", "3", "a", "b"]
    wanted["reader"] = need(after=["b"])
    assert [job.name for job in plan(wanted) if not job.runs] == ["1", "2", "3", "b", "a", "reader"]


def test_a_run_that_is_continued_is_trained_first(project):
    child = f"{LARGE.format(1)}/retrain/s2"
    found = plan({"one": need([child])})
    assert [job.key for job in found] == [f"train/{LARGE.format(1)}", f"train/{child}", "notebook/one"]
    assert found[1].after == [found[0].key]
    short = plan({"one": need([f"{SMALL.format(1)}/retrain/s2"])})
    assert short[0].runs == [SMALL.format(1), f"{SMALL.format(1)}/retrain/s2"] and short[0].after == []


def test_what_is_stored_is_not_trained(project, monkeypatch):
    monkeypatch.setattr(Store, "names", lambda self: [SMALL.format(1)])
    assert [job.key for job in plan({"one": need([SMALL.format(1)])})] == ["notebook/one"]
    monkeypatch.setattr(jobs.needs, "is_up_to_date", lambda *_: True)
    assert plan({"one": need([SMALL.format(1)])}) == []


def test_progress_is_read_from_stamps(tmp_path):
    training = jobs.Job("a/s1", 100.0, [SMALL.format(1), SMALL.format(2)])
    notebook = jobs.Job("one", 50.0, [], [training.key])
    progress = jobs.Progress([training, notebook], tmp_path, workers=2)

    def stamp(key, kind, at):
        path = tmp_path / f"{key}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (at, at))

    assert progress.look() == [] and progress.left(1000.0) == pytest.approx(100.0)  # the longest of two at a time
    assert progress.line(1000.0) == "networks 0/2, notebooks 0/1, about 100 s left"
    stamp(training.key, "started", 1000.0)
    assert progress.look() == [] and progress.left(1040.0) == pytest.approx(60.0)
    assert progress.line(1040.0) == "networks 0/2, notebooks 0/1, about 60 s left; now a/s1"
    stamp(training.key, "done", 1200.0)  # twice as long as thought, nearly
    (Store().root / SMALL.format(1)).mkdir(parents=True)
    assert progress.look() == [training.key] and progress.left(1200.0) == pytest.approx(50 * 230 / 130)
    assert progress.line(1200.0).startswith("networks 1/2, notebooks 0/1, about 88 s left")
    stamp(notebook.key, "started", 1200.0)
    stamp(notebook.key, "failed", 1210.0)
    assert progress.look() == [] and progress.left(1210.0) == 0.0
    assert jobs.Progress([jobs.Job("two", math.nan)], tmp_path, 1).line(0.0) == "notebooks 0/1, time left unknown"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_status_is_rewritten_on_a_terminal_and_repeated_now_and_then_elsewhere(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    for out, every in ((terminal, 0.0), (file, 1000.0)):
        screen = jobs.Screen(out, every)
        screen.status("1 of 2")
        screen.say("a result")
        screen.status("2 of 2")
        screen.end()
    assert terminal.getvalue() == "1 of 2\r\033[Ka result\n1 of 2\r\033[K2 of 2\r\033[K"
    assert file.getvalue() == "1 of 2\na result\n"


def test_bad_questions_are_answered(project, capsys):
    assert jobs.main(["--scale", "tiny"]) == 2
    assert "unknown scale 'tiny'" in capsys.readouterr().err
    assert jobs.main(["--notebooks", "repair/3_collapse"]) == 2
    assert "the nearest is 'repair/03_variance_collapse'" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value", "words"), [
    ("--cores", "two", "CORES is how many jobs run at a time, 1 or more, or all, not 'two'"),
    ("--cores", "0", "CORES is how many jobs"),
    ("--gpu-jobs", "x", "GPU_JOBS is how many jobs run at a time, 1 or more, not 'x'"),
    ("--quiet", "foo", "unknown value of QUIET 'foo'"),
    ("--gpus", "yes", "unknown value of GPUS 'yes'"),
    ("--scale", "", "unknown scale ''"),
    ("--profile", "nowhere", "PROFILE is the folder of a Snakemake profile, and nowhere/config.yaml is not there"),
])  # fmt: skip
def test_settings_that_are_none_end_in_one_line(project, capsys, option, value, words):
    assert jobs.main([option, value]) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"ValueError: {words}") and error.count("\n") == 1 and not out


@pytest.mark.parametrize(("name", "value"), [("DEVICE", "gpu"), ("THREADS", "many"), ("SAVE_MINUTES", "soon")])
def test_environment_variables_that_say_nothing_end_in_one_line(tmp_path, name, value):
    environment = os.environ | {f"REPAIRLIB_{name}": value}
    command = [sys.executable, "-m", "companion.runs.store", "--root", str(tmp_path), "train", SMALL.format(1)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and result.stderr.startswith(f"ValueError: REPAIRLIB_{name} is ")
    assert result.stderr.count("\n") == 1


def test_an_executor_that_is_not_installed_is_named(project, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("executor: some-cluster")
    assert jobs.main(["--profile", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    if sys.version_info >= (3, 11):
        assert error.strip().endswith("-m pip install snakemake-executor-plugin-some-cluster")
    else:
        assert "a cluster needs Python 3.11" in error


def test_what_a_job_asks_for():
    job = jobs.Job("digits/mlp2-bn-w8/smoke/s1", 600.0, ["digits/mlp2-bn-w8/smoke/s1"])
    asked = job.described("paper", gpu=True)
    assert (asked["gpu"], asked["cpus"], asked["mem_mb"], asked["runtime"]) == (1, 4, 32000, 60)
    job.seconds = math.nan
    asked = job.described("smoke", gpu=False)
    assert (asked["gpu"], asked["cpus"], asked["mem_mb"], asked["runtime"]) == (0, 1, 3000, 24 * 60)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Snakemake 7 has no --target-jobs")
def test_a_node_reads_the_graph_that_the_planner_has_written(tmp_path):
    """When some jobs are done, a node is told to do one by its name, and must find that one."""
    copy_tree(tmp_path)
    names = [f"digits/mlp2-bn-w8/smoke~lr0.0{seed}~init=uniform/s{seed}" for seed in (1, 2, 3, 4)]
    found = [jobs.Job(name, 1.0, [name], priority=9 - i) for i, name in enumerate(names)]
    found.append(jobs.Job(NAME, 1.0, [], [job.key for job in found]))
    plan = tmp_path / "build" / "plan.json"
    plan.parent.mkdir()
    described = {job.key: job.described("smoke", gpu=True) for job in found}
    plan.write_text(json.dumps({"scale": "smoke", "items": [], "jobs": described}))
    for job in found[:2]:
        (plan.parent / f"{job.key}.done").parent.mkdir(parents=True, exist_ok=True)
        (plan.parent / f"{job.key}.done").touch()

    def dry_run(*options):
        command = [sys.executable, "-m", "snakemake", "-n", "-p", "--nolock", "--cores", "1", *options]
        command += ["--rerun-triggers", "mtime", "--config", f"plan={plan}"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    for name in names[2:]:
        out = dry_run("--target-jobs", f"train:name={name}")
        assert f"companion.runs.store train {name}" in out.replace("'", "") and "gpu=1" in out
        assert all(f"store train {other}" not in out.replace("'", "") for other in names if other != name)
    out = dry_run("--set-resources", "train:mem_mb=7777", "train:gpu=0")
    assert out.count(" mem_mb=7777,") == 2 and out.count(" gpu=0,") == 2 and out.count(" gpu=1,") == 1


def test_the_batch_makes_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    copy_tree(tmp_path)
    runs = '["digits/mlp1-bn-w4/smoke/s1"]'
    write_notebook(tmp_path, runs)
    write_notebook(tmp_path, runs, name="00_quickstart")  # at the same time, so the kernels must not collide
    write_notebook(tmp_path, "[undefined]", name="broken")
    write_notebook(tmp_path, end="1 / 0  # fails", name="failing")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("REPAIRLIB_FIGURES", str(tmp_path / "figures"))

    def make(status=0):
        command = [sys.executable, "workflow/jobs.py", "--scale", "smoke", "--cores", "2"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert result.returncode == status, result.stdout + result.stderr
        return result.stdout, result.stderr

    out, error = make(status=1)
    assert all(f"{name} [smoke]: fig2-left, sec3-theory in" in out for name in (NAME, "00_quickstart"))
    assert "broken.py: the cell tagged `runs` fails: NameError: name 'undefined' is not defined" in error
    assert "1 / 0  # fails" in error and "failed: see build/smoke/failing.partial.ipynb" in out
    assert "networks 0/1, notebooks 0/3, about " in out
    weights = Path(os.environ["REPAIRLIB_RUNS"]) / "digits/mlp1-bn-w4/smoke/s1/model.safetensors"
    trained = weights.stat().st_mtime_ns

    write_notebook(tmp_path, runs, name="broken")  # saves the same files as the others, with the same content
    (tmp_path / "notebooks" / "failing.py").unlink()
    path = tmp_path / "companion" / "figures" / "report.py"  # which all import
    path.touch()
    out, _ = make()
    assert "broken [smoke]" in out and f"{NAME} [smoke]" not in out  # nothing else has changed

    quickstart = tmp_path / "notebooks" / "00_quickstart.py"
    quickstart.write_text(quickstart.read_text() + "\n# edited\n")
    claims = tmp_path / "companion" / "figures" / "claims" / "repair.py"
    claims.write_text(claims.read_text() + "\n# edited\n")
    out, _ = make()
    assert "00_quickstart [smoke]" in out and f"{NAME} [smoke]" not in out and "broken [smoke]" not in out
    assert weights.stat().st_mtime_ns == trained and not list((tmp_path / "build" / "jobs").iterdir())
