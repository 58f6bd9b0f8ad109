"""A training that is killed goes on from its saved state, and ends with the weights of an undisturbed one."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from companion.runs.data import iterate, load
from companion.runs.models import build
from companion.runs.recipes import Recipe
from companion.runs.resume import SavedState, seconds_between_saves
from companion.runs.store import Store
from companion.runs.train import fit

RECIPE = Recipe("some", 2, 50, 0.1, "cosine", 1e-3, ("translate",), momentum=0.9)


class Killed(BaseException):
    pass


class KilledAt(SavedState):
    """Saves after every step, and dies after some of them."""

    def __init__(self, path, steps, facts=()):
        super().__init__(path, dict(facts), 0.0)
        self.steps = steps

    def save(self, model, optimizer, losses):
        super().save(model, optimizer, losses)
        if len(losses) in self.steps:
            raise Killed


@pytest.fixture(scope="module")
def digits():
    whole = load("digits")
    return replace(whole, train=whole.train.take(torch.arange(230)))


def network(name="resnet8-bn-w0.25"):
    torch.manual_seed(0)
    return build(name, (1, 16, 16), 10)


def train(digits, state=None, recipe=RECIPE, name="resnet8-bn-w0.25"):
    model = network(name)
    losses = fit(model, digits, recipe, 3, state=state)
    return model.state_dict(), losses


def assert_equal(found, expected):
    (state, losses), (state_of_undisturbed, losses_of_undisturbed) = found, expected
    assert torch.equal(losses, losses_of_undisturbed)
    assert all(torch.equal(state[key], value) for key, value in state_of_undisturbed.items())


@pytest.mark.parametrize("steps", [[1], [3, 4, 6], [7]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"momentum": 0.0}, {"nesterov": True, "start": 1}], ids=str)
def test_the_weights_are_those_of_an_undisturbed_training(digits, tmp_path, steps, changes):
    recipe = replace(RECIPE, **changes)
    per_epoch = len(digits.train) // recipe.batch_size
    steps = [step for step in steps if step < recipe.trained_epochs * per_epoch]
    path = tmp_path / "state.safetensors"
    for _ in steps:
        with pytest.raises(Killed):
            train(digits, KilledAt(path, steps), recipe)
    assert_equal(train(digits, KilledAt(path, []), recipe), train(digits, None, recipe))


def test_no_step_is_taken_twice(digits, tmp_path, capsys):
    path = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        train(digits, KilledAt(path, [5]))
    capsys.readouterr()
    train(digits, KilledAt(path, []))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "model: goes on from step 5 of 8" and out[1].startswith("model: step 6 of 8, loss ")


def test_a_training_that_stops_early_stops_there(digits, tmp_path):
    recipe = replace(RECIPE, epochs=6, until=0.3)
    expected = train(digits, None, recipe)
    steps = len(expected[1])
    assert 4 <= steps < 24
    path = tmp_path / "state.safetensors"
    for killed_at in (2, steps):  # in the middle of an epoch, and after the last step, before its end is noticed
        path.unlink(missing_ok=True)
        with pytest.raises(Killed):
            train(digits, KilledAt(path, [killed_at]), recipe)
        assert_equal(train(digits, KilledAt(path, []), recipe), expected)


def test_another_trainings_state_and_a_damaged_one_are_not_used(digits, tmp_path, capsys):
    path, expected = tmp_path / "state.safetensors", train(digits)

    def goes_on(state, name="resnet8-bn-w0.25"):
        capsys.readouterr()
        found = train(digits, state, name=name)
        if name == "resnet8-bn-w0.25":
            assert_equal(found, expected)
        return "goes on" in capsys.readouterr().out

    def killed():
        path.unlink(missing_ok=True)
        with pytest.raises(Killed):
            train(digits, KilledAt(path, [5], {"threads": 1}))
        return path.read_bytes()

    killed()
    assert goes_on(KilledAt(path, [], {"threads": 1}))
    killed()
    assert not goes_on(KilledAt(path, [], {"threads": 2}))
    killed()
    assert not goes_on(KilledAt(path, [], {"threads": 1}), name="resnet8-bn-w0.5")
    content = killed()
    for damaged in (b"", content[:-7], content[:-100] + b"\x00" * 100, b"nothing of the kind"):
        path.write_bytes(damaged)
        assert not goes_on(KilledAt(path, [], {"threads": 1}))


def test_a_full_disk_does_not_stop_a_training(digits, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    state = SavedState(tmp_path / "file" / "state.safetensors", {}, 0.0)  # no folder can be made there
    assert_equal(train(digits, state), train(digits))
    assert "step 8 of 8; its state is not saved: " in capsys.readouterr().err


def test_with_a_callback_no_state_is_kept(digits, tmp_path):
    with pytest.raises(ValueError, match="a callback would miss the steps"):
        fit(network(), digits, RECIPE, state=KilledAt(tmp_path / "state", []), callback=lambda *_: None)


def test_batches_after_some_that_are_skipped_are_the_same(digits):
    def batches(skip):
        generator = torch.Generator().manual_seed(0)
        return iterate(digits, "train", 50, ("flip", "translate"), generator, shuffle=True, drop_last=True, skip=skip)

    whole = list(batches(0))
    for skip in range(5):
        some = batches(skip)
        assert len(some) == 4 - skip == len(list(some))
        for (x, y), (same_x, same_y) in zip(some, whole[skip:], strict=True):
            assert torch.equal(x, same_x) and torch.equal(y, same_y)


def test_a_killed_process_goes_on(tmp_path):
    run = "digits/resnet8-bn-w0.25/smoke/s1/retrain~epochs2/s1"
    environment = os.environ | {"REPAIRLIB_SAVE_MINUTES": "0", "REPAIRLIB_DEVICE": "cpu"}

    def start(root):
        command = [sys.executable, "-m", "companion.runs.store", "--root", str(tmp_path / root), "train", run]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    undisturbed = start("undisturbed")
    process = start("killed")
    for line in process.stdout:
        if "retrain" in line and "step 3 of" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL and list(tmp_path.glob("killed/.training/*.safetensors"))
    again = start("killed")
    out, _ = again.communicate(timeout=300)
    undisturbed.communicate(timeout=300)
    assert again.returncode == undisturbed.returncode == 0
    assert f"{run}: goes on from step " in out and not list(tmp_path.glob("killed/.training/*"))
    stored = [Store(tmp_path / root).info(run)["sha256"] for root in ("undisturbed", "killed")]
    assert stored[0] == stored[1]


def test_minutes_between_saves(monkeypatch):
    monkeypatch.delenv("REPAIRLIB_SAVE_MINUTES", raising=False)
    assert seconds_between_saves() == 600
    monkeypatch.setenv("REPAIRLIB_SAVE_MINUTES", "0.5")
    assert seconds_between_saves() == 30
    for bad in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv("REPAIRLIB_SAVE_MINUTES", bad)
        with pytest.raises(ValueError, match="REPAIRLIB_SAVE_MINUTES is a number of minutes"):
            seconds_between_saves()
