"""The plan of `make figures`: how long notebooks take, and what is counted in the sums."""

import json
import math

import jobs
import needs
import plan
import pytest

from companion.figures import report
from companion.runs import costs
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
    done = {
        "notebook": name,
        "scale": scale,
        "items": [],
        "files": list(dict(items)),
        "seconds": seconds,
        "device": device,
    }
    (folder / f"{name}.done.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.done.json").write_text(json.dumps(done))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two notebooks that share a run."""
    monkeypatch.setattr(needs, "project_root", lambda: tmp_path)
    write_notebook(tmp_path, "one", repr([MLP.format(1), MLP.format(2), RESNET.format(1)]))
    write_notebook(tmp_path, "two", repr([MLP.format(1)]))
    return tmp_path


def make_plan(**options):
    return plan.plan("smoke", device="cpu", **{"speed": SPEED, "to_execute": ["one", "two"]} | options)


def line(text, start):
    found = [each for each in text.splitlines() if each.strip().startswith(start)]
    assert len(found) == 1, f"{len(found)} lines start with {start!r} in\n{text}"
    return found[0].split()


# ------------------------------------------------------------------------------------------------------------ seconds


def test_a_notebook_is_scaled_from_its_last_execution(project):
    small, large = (costs.describe(name) for name in (MLP.format(1), RESNET.format(1)))

    def seconds():
        return jobs.notebook_seconds("two", "quick", [MLP.format(1)], DEVICE, costs.describe)

    assert math.isnan(seconds()[0]) and "run it at quick first" in seconds()[1]
    write_done("two", "smoke", 14.0, device="another device")
    assert math.isnan(seconds()[0])
    write_done("two", "smoke", 14.0, {"a.json": [RESNET.format(1)]})  # it needed another network then
    assert seconds()[0] == pytest.approx(
        plan.START + (14 - plan.START) * small.evaluation_flops / large.evaluation_flops
    )
    write_done("two", "quick", 9.0)  # the nearest scale counts
    assert seconds() == (9.0, "the work of 9 s at quick")
    write_done("two", "quick", 9.0, {"a.json": ["somebody/mlp2-bn-w8/smoke/s1"]})
    assert math.isnan(seconds()[0])


def test_a_notebook_that_never_ran_is_guessed_as_passes_at_the_speed_of_training(project):
    runs = [costs.describe(name) for name in (MLP.format(1), RESNET.format(1))]
    training = {run.name: seconds for run, seconds in zip(runs, (3.0, 5.0), strict=True)}

    def seconds(**how):
        return jobs.notebook_seconds("two", "quick", list(training), DEVICE, costs.describe, **how)

    one_pass = sum(training[run.name] * run.evaluation_flops / run.train_flops for run in runs)
    assert seconds(training=training)[0] == pytest.approx(plan.START + plan.PASSES * one_pass)
    assert seconds(training=training, passes=70)[0] == pytest.approx(plan.START + 70 * one_pass)
    assert "guessed as 70 passes" in seconds(training=training, passes=70)[1]
    for unknown in (math.nan, 0.0):  # of unknown data, and imported
        assert math.isnan(seconds(training=training | {runs[0].name: unknown})[0])
    assert math.isnan(seconds()[0])
    text = make_plan(to_execute=["two"])  # at the FLOP/s of SPEED
    known = costs.train_seconds(runs[:1], "cpu", speed=SPEED)[runs[0].name]
    guess = plan.START + plan.PASSES * known * runs[0].evaluation_flops / runs[0].train_flops
    assert line(text, "Notebooks to execute")[3:] == ["1", "of", "2", *costs.rough(guess).split()]


# --------------------------------------------------------------------------------------------------------------- plan


def test_sums(project):
    write_done("one", "smoke", 60.0)
    write_done("two", "smoke", 10.0)
    seconds = [
        costs.train_seconds([costs.describe(name)], "cpu", speed=SPEED)[name]
        for name in (MLP.format(1), RESNET.format(1))
    ]
    training = 2 * seconds[0] + seconds[1]  # the shared run once
    text = make_plan(jobs=2)
    assert line(text, "Networks to train")[3:] == ["3", "of", "3", *costs.rough(training).split()]
    assert line(text, "Notebooks to execute")[3:] == ["2", "of", "2", *costs.rough(70).split()]
    total = training + 70 + 5 * plan.START
    assert line(text, "In all, one")[-2:] == costs.rough(total).split()
    chain = max(seconds) + 60 + 2 * plan.START  # longer than half of everything
    assert chain > total / 2 and line(text, "In all, 2 at the same time")[-2:] == costs.rough(chain).split()
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
    assert "Not in these sums: 1 to execute that need unknown data" in text


def test_imported_runs_are_not_trained(project):
    write_notebook(project, "one", "['digits/mlp2-bn-w8/imported/s1']")
    text = make_plan(notebooks="one", to_execute=[])
    assert line(text, "digits/")[1:] == ["to", "import", "0", "0", "s"]
    assert line(text, "Networks to train")[3:] == ["0", "of", "1", "0", "s"]
    assert "Not in these sums: 1 to import" in text


def test_planning_changes_nothing(project, tmp_path, capsys):
    def tree():
        roots = [tmp_path, Store().root, report.figures_root()]
        return {path: path.stat().st_mtime_ns for root in roots for path in [root, *root.rglob("*")] if path.exists()}

    before = tree()
    assert plan.main(["--scale", "smoke"]) == 0 and "Nothing is made now" in capsys.readouterr().out
    assert tree() == before


def test_bad_questions_are_answered(project, capsys):
    assert plan.main(["--scale", "tiny"]) == 2
    assert "unknown scale 'tiny'" in capsys.readouterr().err
    write_notebook(project, "one", "['digits/mlp2-fused-w8/smok/s1']")
    text = make_plan()  # of the other notebook
    assert "fails: " in text and "unknown recipe 'smok'; the nearest is 'smoke'" in text
    assert line(text, "Notebooks to execute")[3:6] == ["1", "of", "2"]


def test_a_notebook_that_nothing_is_left_of_is_not_planned_and_is_said(project, monkeypatch):
    gone = "class section: runs, reads, items, left_out, gone = [], [], [], {'repair/fig6-left': ['a/b/fast/s1']}, "
    write_notebook(project, "two", f"[]\n{gone}['repair/fig6-left']")
    write_notebook(project, "one", "[]\nreads = ['repair/fig6-left']")
    index = {"repair/fig6-left": {"notebook": "two", "output": "x"}}
    monkeypatch.setattr(report, "read_index", lambda: index)
    text = make_plan(to_execute=["one"])
    assert "Notebooks to execute                         1 of 1" in text
    assert "Left out, because they are not trained: a/b/fast.\nNot made, because they lack too much" in text
    wanted = needs.find_needs("smoke")[1]
    assert jobs.due("smoke", [], wanted) == {"one"}
