import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from companion.runs import store as storing
from companion.runs import train as training
from companion.runs.data import load
from companion.runs.devices import device_name
from companion.runs.models import build
from companion.runs.packing import unpack
from companion.runs.store import CorruptCheckpoint, StaleRun, Store, main

RUN = "digits/mlp2-plain-w16/smoke/s1"
METRICS = {"test_accuracy": 0.5, "shape": (1, 16, 16), "classes": 10, "device": "cpu", "threads": 1, "seconds": 0.1}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


def model(name=RUN, seed=0):
    torch.manual_seed(seed)
    return build(name.split("/")[1], (1, 16, 16), 10)


def save(store, name=RUN, seed=0):
    store.save(name, model(name, seed), METRICS)
    return store.path(name)


def bits(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def tree(root):
    """Every file and folder under a root, with contents; locks aside."""
    paths = (path for path in Path(root).rglob("*") if ".locks" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


def no_training(*args, **kwargs):
    raise AssertionError("trained although the run is stored")


def edit(path, **changes):
    """Change entries of a sidecar."""
    sidecar = path / storing.SIDECAR
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changes))


# get, save, load


def test_get_trains_once_and_then_loads(store, monkeypatch):
    trained = store.get(RUN, train_device="cpu", progress=False)
    fresh, metrics = training.train(RUN, device="cpu", progress=False)
    monkeypatch.setattr(storing, "train", no_training)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded = store.get(RUN)
    assert equal(bits(trained), bits(loaded)) and equal(bits(fresh), bits(loaded))
    assert not loaded.training and torch.equal(torch.get_rng_state(), before)
    info = store.info(RUN)
    assert info["metrics"] == {key: value for key, value in metrics.items() if key.startswith(("train_", "test_"))}
    assert info["sha256"] == hashlib.sha256((store.path(RUN) / "model.safetensors").read_bytes()).hexdigest()
    assert info["run"] == RUN and info["recipe"]["batch_size"] == 200 and info["versions"]["torch"] == torch.__version__
    assert (info["device"], info["threads"]) == ("cpu", metrics["threads"]) and info["seconds"] > 0
    assert info["processor"] == device_name("cpu") and (info["precision"], info["tf32"]) == ("float32", {})
    assert info["data_sha256"] == load("digits").digest()


def test_training_again_after_deleting_gives_the_same_file(store):
    digests = []
    for _ in range(2):
        store.get(RUN, train_device="cpu", progress=False)
        digests.append(store.info(RUN)["sha256"])
        store.delete(RUN)
    assert digests[0] == digests[1]


def test_name_without_width_is_the_same_run(store):
    save(store, "digits/vgg11-bn/smoke/s1")
    assert store.has("digits/vgg11-bn-w1/smoke/s1") and store.names() == ["digits/vgg11-bn-w1/smoke/s1"]


def test_stored_run_is_never_overwritten(store):
    save(store, seed=0)
    before = tree(store.root)
    with pytest.raises(FileExistsError, match="s1"):
        save(store, seed=1)
    assert tree(store.root) == before


def test_loading_writes_nothing(store):
    """So that a read-only root serves what it holds."""
    save(store)
    lock = next((store.root / ".locks").iterdir())
    lock.unlink()
    lock.parent.rmdir()
    times = {path: path.stat().st_mtime_ns for path in [store.root, *store.root.rglob("*")]}
    store.get(RUN), store.info(RUN), store.names()
    assert {path: path.stat().st_mtime_ns for path in [store.root, *store.root.rglob("*")]} == times


def test_stored_run_loads_without_its_data_set(store, tmp_path):
    (tmp_path / "data" / "pets" / "train").mkdir(parents=True)
    (tmp_path / "data" / "pets" / "test").mkdir()
    name = RUN.replace("digits", "pets")
    with_data = Store(store.root, data_root=tmp_path / "data")
    save(with_data, name)
    assert Store(store.root, tmp_path / "elsewhere").has(name)
    assert equal(bits(Store(store.root, tmp_path / "elsewhere").get(name)), bits(model()))
    with pytest.raises(ValueError, match="unknown data set 'pets'"):
        Store(store.root, tmp_path / "elsewhere").get(name.replace("s1", "s2"))


@pytest.mark.parametrize("name,words", [
    ("digits/mlp2-plain-w16/smok/s1", "'smoke'"), ("digits/mlp2-plain-w16/smoke/1", "'s1'"), ("/etc", "is not <data>"),
    ("../mlp2-plain-w16/smoke/s1", "unknown data set '..'"), ("digit/mlp2-plain-w16/smoke/s1", "'digits'"),
])  # fmt: skip
def test_bad_names_are_errors_everywhere_and_create_nothing(store, name, words):
    for ask in (store.get, store.load, store.has, store.info, store.delete, store.path):
        with pytest.raises(ValueError, match=words):
            ask(name)
    assert not store.root.exists()


def test_what_is_not_stored_is_named_with_the_nearest(store):
    with pytest.raises(FileNotFoundError, match="is not stored in"):
        store.load(RUN)
    save(store, RUN.replace("s1", "s2"))
    for ask in (store.load, store.info, store.delete):
        with pytest.raises(FileNotFoundError, match=f"run {RUN} is not stored.*nearest that is: {RUN[:-1]}2"):
            ask(RUN)


def test_names_are_in_natural_order(store):
    names = [f"digits/mlp{depth}-plain-w4/smoke/s{seed}" for depth in (2, 10) for seed in (1, 2, 10)]
    for name in random.Random(0).sample(names, len(names)):
        save(store, name)
    assert store.names() == names


def test_root_by_option_and_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("REPAIRLIB_RUNS", str(tmp_path / "environment"))
    save(Store())
    monkeypatch.setattr(storing, "train", no_training)
    assert equal(bits(storing.get(RUN)), bits(model())) and (tmp_path / "environment" / RUN).is_dir()
    assert not Store(tmp_path / "option").has(RUN)
    monkeypatch.delenv("REPAIRLIB_RUNS")
    assert Store().root == storing.project_root() / "data" / "runs"


# damaged checkpoints


def truncate(path):
    weights = path / storing.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-7])
    return weights, "was altered or truncated"


def empty(path):
    (path / storing.WEIGHTS).write_bytes(b"")
    return path / storing.WEIGHTS, "was altered or truncated.*0 bytes"


def flip_a_bit(path):
    content = bytearray((path / storing.WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (path / storing.WEIGHTS).write_bytes(content)
    return path / storing.WEIGHTS, "was altered or truncated"


def lose_weights(path):
    (path / storing.WEIGHTS).unlink()
    return path / storing.WEIGHTS, "is missing"


def lose_sidecar(path):
    (path / storing.SIDECAR).unlink()
    return path / storing.SIDECAR, "is missing"


def truncate_sidecar(path):
    sidecar = path / storing.SIDECAR
    sidecar.write_text(sidecar.read_text()[:100])
    return sidecar, "is not valid JSON"


def scalar_sidecar(path):
    (path / storing.SIDECAR).write_text("3")
    return path / storing.SIDECAR, "is not the sidecar of a run"


def binary_sidecar(path):
    (path / storing.SIDECAR).write_bytes(b"\xff\xfe\x00")
    return path / storing.SIDECAR, "is not valid JSON"


def partial_sidecar(path):
    (path / storing.SIDECAR).write_text("{}")
    return path / storing.SIDECAR, "lacks classes, metrics, recipe, run, sha256, shape, or has"


def altered_sidecar(words, **changes):
    """A sidecar that something else has written into."""

    def damage(path):
        edit(path, **changes)
        return path / (storing.WEIGHTS if "shape" in changes else storing.SIDECAR), words

    return damage


def foreign_content(content, words):
    """Weights that are what was saved, as the digest shows, but not of this network."""

    def damage(path):
        (path / storing.WEIGHTS).write_bytes(content)
        edit(path, sha256=hashlib.sha256(content).hexdigest())
        return path / storing.WEIGHTS, words

    return damage


def with_nan():
    state = bits(model())
    state["fc2.weight"][3, 4] = float("nan")
    return safetensors.torch.save(state)


DAMAGES = {
    "truncated": truncate, "empty": empty, "one bit": flip_a_bit, "no weights": lose_weights,
    "no sidecar": lose_sidecar, "cut sidecar": truncate_sidecar, "scalar": scalar_sidecar, "binary": binary_sidecar,
    "partial": partial_sidecar,
    "list for recipe": altered_sidecar("lacks recipe, or has something else in its place", recipe=[]),
    "word for a number": altered_sidecar("lacks seconds, or has something else", seconds="long"),
    "word for a metric": altered_sidecar("has a metric that is no number", metrics={"test_accuracy": "good"}),
    "wrong shape": altered_sidecar("does not fit the model", shape=["wide"]),
    "other seed": altered_sidecar("is of another run, .*/s2, and not of .*/s1", run=RUN.replace("s1", "s2")),
    "other data": altered_sidecar("is of another run", run=RUN.replace("digits", "digits-hard")),
    "no safetensors": foreign_content(b"not weights at all", "does not fit the model mlp2-plain-w16"),
    "other network": foreign_content(safetensors.torch.save({"fc9.bias": torch.ones(2)}), "does not fit.*fc9.bias"),
    "not finite": foreign_content(with_nan(), "holds non-finite values in fc2.weight"),
}  # fmt: skip


def test_a_folder_of_another_run_under_this_name_is_refused(store):
    """As left by somebody who has copied or renamed folders by hand."""
    other = RUN.replace("s1", "s2")
    store.get(other, train_device="cpu", progress=False)
    shutil.copytree(store.path(other), store.path(RUN))
    with pytest.raises(CorruptCheckpoint, match=f"is of another run, {other}, and not of {RUN}"):
        store.load(RUN)


@pytest.mark.parametrize("kind", ["file", "link to nothing", "file above"])
def test_what_lies_where_a_run_belongs_is_found_before_training(store, kind, monkeypatch):
    monkeypatch.setattr(storing, "train", lambda *_, **__: pytest.fail("it is trained in vain"))
    place = store.path(RUN).parent if kind == "file above" else store.path(RUN)
    place.parent.mkdir(parents=True)
    if kind == "link to nothing":
        place.symlink_to(place.parent / "nowhere")
    else:
        place.write_text("")
    with pytest.raises(FileExistsError, match=f"{re.escape(str(place))} is a file, or a link to nothing: move it away"):
        store.get(RUN, progress=False)


@pytest.mark.parametrize(
    "name", ["/mlp2-plain-w16/smoke/s1", "../mlp2-plain-w16/smoke/s1", "./mlp2-plain-w16/smoke/s1"]
)
def test_run_names_do_not_leave_the_store(store, name):
    for ask in (store.path, store.has, store.load, store.get, store.delete):
        with pytest.raises(ValueError, match="unknown data set"):
            ask(name)


def test_a_network_of_another_number_of_threads_is_not_served_silently(store, monkeypatch):
    store.get(RUN, train_device="cpu", progress=False)
    monkeypatch.setenv("REPAIRLIB_THREADS", "2")
    with pytest.warns(UserWarning, match=f"run {RUN} was trained with 1 threads, and REPAIRLIB_THREADS is 2 now"):
        store.load(RUN)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_named_and_comes_back(store, damage):
    store.get(RUN, train_device="cpu", progress=False)
    good = bits(store.load(RUN))
    path, words = damage(store.path(RUN))
    with pytest.raises(CorruptCheckpoint, match=words) as caught:
        store.get(RUN)
    message = str(caught.value)
    assert message.startswith(str(path)) and f"get({RUN!r}) trains it again" in message
    command = message.split("`")[1].split()
    assert command[:3] == ["python", "-m", "companion.runs.store"]
    assert main(command[3:]) == 0  # the way out that the message gives
    assert equal(bits(store.get(RUN, train_device="cpu", progress=False)), good)


def test_every_altered_byte_is_found(store):
    path = save(store) / storing.WEIGHTS
    content = path.read_bytes()
    for position in random.Random(0).sample(range(len(content)), 40) + [0, len(content) - 1]:
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        with pytest.raises(CorruptCheckpoint):
            store.load(RUN)
    path.write_bytes(content)
    store.load(RUN)


def test_non_finite_weights_are_not_saved(store):
    bad = model()
    with torch.no_grad():
        bad.fc1.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"run {RUN} is not saved: fc1.weight holds non-finite values"):
        store.save(RUN, bad, METRICS)
    assert not store.has(RUN)


# recipes that changed


def test_changed_recipe_makes_a_run_stale(store, monkeypatch):
    save(store)
    smoke = training.RECIPES["smoke"]
    monkeypatch.setitem(smoke, "mlp", replace(smoke["mlp"], lr=0.123))
    with pytest.raises(StaleRun, match=f"{RUN} was trained with lr=0.1, and its recipe now has 0.123") as caught:
        store.get(RUN)
    assert main(str(caught.value).split("`")[1].split()[3:]) == 0 and not store.has(RUN)


def test_other_families_of_the_recipe_may_change(store, monkeypatch):
    save(store)
    smoke = training.RECIPES["smoke"]
    monkeypatch.setitem(smoke, "vgg", replace(smoke["vgg"], lr=0.123))
    store.get(RUN)


def test_field_that_an_old_sidecar_lacks_counts_as_its_default(store, monkeypatch):
    path = save(store)
    recipe = store.info(RUN)["recipe"]
    del recipe["nesterov"], recipe["label_smoothing"]
    edit(path, recipe=recipe)
    store.get(RUN)
    smoke = training.RECIPES["smoke"]
    monkeypatch.setitem(smoke, "mlp", replace(smoke["mlp"], nesterov=True))
    with pytest.raises(StaleRun, match="nesterov=False, and its recipe now has True"):
        store.get(RUN)


def test_field_that_is_unknown_today_makes_a_run_stale(store):
    edit(save(store), recipe=store.info(RUN)["recipe"] | {"clipping": 1.0})
    with pytest.raises(StaleRun, match="clipping=1.0"):
        store.get(RUN)


# data whose order changed


@pytest.mark.parametrize("data", ["cifar10", "cifar10-first80"])
def test_a_run_in_the_old_order_of_its_images_is_stale(store, data):
    name = RUN.replace("digits", data)
    path = save(store, name)
    with pytest.raises(StaleRun, match=f"{name} was trained on the images of {data} in another order") as caught:
        store.get(name)
    edit(path, data_sha256="0" * 64)  # as sidecars have it since the order changed
    store.get(name)
    assert main(str(caught.value).split("`")[1].split()[3:]) == 0 and not store.has(name)


def test_an_imported_run_does_not_know_the_order_of_its_images(store):
    imported = RUN.replace("digits", "cifar10").replace("smoke", "imported")
    save(store, imported)
    save(store, child := f"{imported}/smoke/s1")
    store.get(imported)
    with pytest.raises(StaleRun, match=f"{child} was trained on the images of cifar10 in another order"):
        store.get(child)


# runs that continue others

CHILD = f"{RUN}/retrain/s2"


def test_a_parent_is_trained_first_and_its_digest_kept(store, monkeypatch):
    child = store.get(CHILD, train_device="cpu", progress=False)
    assert store.names() == [RUN, CHILD] and store.children(RUN) == [CHILD] and store.children(CHILD) == []
    assert store.info(CHILD)["parent"] == {"run": RUN, "sha256": store.info(RUN)["sha256"]}
    assert "parent" not in store.info(RUN) and store.path(CHILD).is_relative_to(store.path(RUN))
    alone, _ = training.train(CHILD, device="cpu", progress=False)  # a name is enough, without a store
    assert equal(bits(child), bits(alone)) and not equal(bits(child), bits(store.load(RUN)))
    monkeypatch.setattr(storing, "train", no_training)
    assert equal(bits(store.get(CHILD)), bits(child)) and store.get(RUN)


def test_children_begin_with_the_weights_of_the_parent(store):
    again = training.find_recipe("smoke", "mlp", "digits")
    parent = store.get(RUN, train_device="cpu", progress=False)
    child, _ = training.train(CHILD, parent=parent, recipe=replace(again, epochs=0), device="cpu", progress=False)
    assert equal(bits(child), bits(parent))


def test_biases_are_taken_out_of_the_parent(store):
    name = f"{RUN}/retrain~nobias/s1"
    assert not any(key.endswith("bias") for key in bits(store.get(name, train_device="cpu", progress=False)))
    assert store.load(name).head.bias is None and store.load(RUN).head.bias is not None
    parent, recipe = store.load(RUN), replace(training.find_recipe("smoke", "mlp", "digits"), epochs=0)
    child, _ = training.train(name, parent=parent, recipe=recipe, device="cpu", progress=False)
    assert equal(bits(child), {key: value for key, value in bits(parent).items() if not key.endswith("bias")})


def test_a_fused_parent_is_continued_as_the_plain_network_that_it_is(store):
    name = "digits/mlp2-fused-w8/smoke/s1/smoke~lr0.01/s1"
    child = store.get(name, train_device="cpu", progress=False)
    assert bits(child).keys() == bits(store.load("digits/mlp2-fused-w8/smoke/s1")).keys()


def test_spawned_runs(store):
    """Of one first epoch, two runs: all steps of the schedule, and no checkpoint between the first and the last."""
    first = "digits/mlp2-plain-w16/smoke~epochs3~stop1/s1"
    a, b = (f"{first}/smoke~epochs3~start1/s{seed}" for seed in (1, 2))
    nets = [bits(store.get(name, train_device="cpu", progress=False)) for name in (a, b)]
    assert not equal(*nets) and store.names() == [first, a, b]


def test_a_parent_trained_again_to_other_weights_makes_its_children_stale(store):
    save(store)
    save(store, CHILD, seed=1)
    store.load(CHILD)
    edit(store.path(RUN), sha256="0" * 64)
    with pytest.raises(StaleRun, match=f"{CHILD} continues other weights than those that {RUN} has now") as caught:
        store.get(CHILD)
    assert main(str(caught.value).split("`")[1].split()[3:]) == 0 and store.names() == [RUN]


def test_a_changed_recipe_of_the_parent_makes_all_stale(store, monkeypatch):
    save(store)
    save(store, CHILD)
    save(store, grandchild := f"{CHILD}/smoke/s3")
    smoke = training.RECIPES["smoke"]
    monkeypatch.setitem(smoke, "mlp", replace(smoke["mlp"], lr=0.123))
    for name in (RUN, CHILD, grandchild):
        with pytest.raises(StaleRun, match="was trained with lr=0.1"):
            store.load(name)
    monkeypatch.undo()
    monkeypatch.setitem(smoke, "mlp", replace(smoke["mlp"], weight_decay=0.123))
    with pytest.raises(StaleRun, match="was trained with weight_decay") as caught:
        store.load(RUN)
    assert main(str(caught.value).split("`")[1].split()[3:]) == 0 and store.names() == []


def test_a_parent_is_not_deleted_before_its_children(store, capsys):
    for name in (RUN, CHILD, f"{CHILD}/smoke/s3", RUN.replace("s1", "s11")):
        save(store, name)
    with pytest.raises(ValueError, match=f"{RUN} is not removed, because these continue it: {CHILD}, {CHILD}/smoke/s3"):
        store.delete(RUN)
    root = ["--root", str(store.root)]
    assert main([*root, "delete", RUN]) == 1 and "delete --children" in capsys.readouterr().err
    assert main([*root, "check"]) == 0 and len(capsys.readouterr().out.splitlines()) == len(store.names()) == 4
    assert main([*root, "delete", CHILD, f"{CHILD}/smoke/s3"]) == 0  # in whatever order they are named
    store.delete(RUN, children=True)
    assert store.names() == [RUN.replace("s1", "s11")]


def test_a_parent_whose_files_are_gone_says_how_to_begin_again(store):
    for name in (RUN, CHILD):
        save(store, name)
    for file in (storing.WEIGHTS, storing.SIDECAR):
        (store.path(RUN) / file).unlink()
    for name in (RUN, CHILD):
        with pytest.raises(CorruptCheckpoint, match=f"{RUN}/run.json is missing") as caught:
            store.get(name)
    assert main(str(caught.value).split("`")[1].split()[3:]) == 0 and store.names() == []


def test_changed_recipes_have_their_own_folders(store):
    name = RUN.replace("smoke", "smoke~lr0.03~init=uniform")
    store.get(name.replace("0.03", "3e-2"), train_device="cpu", progress=False)
    assert store.names() == [name] and store.info(name)["recipe"]["lr"] == 0.03
    assert not equal(bits(store.load(name)), bits(training.train(RUN, device="cpu", progress=False)[0]))


# interrupted saves


class Full:
    """Stands in for a function of `os`: works so many times, then the disk is full."""

    def __init__(self, function, works):
        self.function, self.works = function, works

    def __call__(self, *args):
        self.works -= 1
        if self.works < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.function(*args)


@pytest.mark.parametrize("works", [0, 1, 2])
def test_full_disk_leaves_the_old_state(store, monkeypatch, works):
    other = RUN.replace("s1", "s2")
    save(store, other)
    before = tree(store.root)
    with monkeypatch.context() as patch:
        patch.setattr(storing.os, "fsync", Full(os.fsync, works))
        with pytest.raises(OSError, match="No space left on device"):
            save(store)
    assert tree(store.root) == before and not store.has(RUN)
    store.load(other)
    save(store)  # once there is space again
    assert equal(bits(store.load(RUN)), bits(model()))


def test_full_disk_names_the_file(store, monkeypatch):
    monkeypatch.setattr(storing.os, "fsync", Full(os.fsync, 1))
    with pytest.raises(OSError, match=r"while writing.*run\.json"):
        save(store)


CHILDREN = """
import os, signal, sys
import torch
from companion.runs import store as storing
from companion.runs.data import load
from companion.runs.devices import device_name
from companion.runs.models import build

RUN, METRICS, root, job = {run!r}, {metrics!r}, sys.argv[1], sys.argv[2]
store = storing.Store(root)

def fork(function):
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    return pid

if job == "kill":
    for works in range(4):
        def child():
            fsync, calls = os.fsync, []
            def dying(handle):
                calls.append(handle)
                if len(calls) > works:
                    os.kill(os.getpid(), signal.SIGKILL)
                fsync(handle)
            storing.os.fsync = dying
            store.save(RUN.replace("s1", f"s{{works}}"), build("mlp2-plain-w16", (1, 16, 16), 10), METRICS)
        _, status = os.waitpid(fork(child), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, status
else:
    train = storing.train
    def counted(*args, **kwargs):
        with open(sys.argv[3], "a") as log:
            log.write(f"{{os.getpid()}}\\n")
        return train(*args, **kwargs)
    storing.train = counted
    children = [fork(lambda: store.get(RUN, train_device="cpu")) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
"""


def run_children(*arguments):
    script = CHILDREN.format(run=RUN, metrics=METRICS)
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_saves_leave_no_run_and_no_lock(store):
    """Processes killed after so many writes: weights, sidecar, folder; the fourth was already renamed."""
    run_children(store.root, "kill")
    names = [RUN.replace("s1", f"s{works}") for works in range(4)]
    assert [store.has(name) for name in names] == [False, False, False, True] and store.names() == names[3:]
    store.load(names[3])
    assert any(".s0." in path for path in tree(store.root))  # the dead left something behind
    for name in names[:3]:
        save(store, name)  # the lock is free
        store.load(name)
    assert not [path for path in tree(store.root) if "/." in path]  # and it is gone


def test_processes_that_ask_for_one_run_train_it_once(store, tmp_path):
    out = run_children(store.root, "train", tmp_path / "log")
    assert len((tmp_path / "log").read_text().split()) == 1
    assert out.count("test accuracy") == 1
    store.load(RUN)


def test_interrupted_deletion_leaves_no_half_run(store, monkeypatch):
    save(store)
    with monkeypatch.context() as patch:
        patch.setattr(storing.shutil, "rmtree", no_training)
        with pytest.raises(AssertionError):
            store.delete(RUN)
    assert not store.has(RUN) and store.names() == []
    save(store)
    assert store.names() == [RUN] and not [path for path in tree(store.root) if "/." in path]


# networks that were trained elsewhere

IMPORTED = RUN.replace("smoke", "imported")


def write_state(path, changes=None, name=RUN):
    """A safetensors file of a network; a change to None leaves a key out."""
    state = bits(model(name, seed=3)) | (changes or {})
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items() if value is not None}, path)
    return path


def test_import_stores_the_network_with_its_metrics_and_source(store, tmp_path, monkeypatch, capsys):
    file = write_state(tmp_path / "mine.safetensors")
    assert main(["--root", str(store.root), "import", IMPORTED, str(file)]) == 0
    monkeypatch.setattr(storing, "train", no_training)
    net, info = store.get(IMPORTED), store.info(IMPORTED)
    assert equal(bits(net), bits(model(seed=3))) and not net.training
    loss, accuracy = training.evaluate(net, training.iterate(training.load("digits"), "test"))
    assert info["metrics"] == {"test_loss": pytest.approx(loss), "test_accuracy": accuracy}
    assert info["source"] == {"file": "mine.safetensors", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert capsys.readouterr().out == f"{IMPORTED}: imported, test accuracy {accuracy:.2%}\n"
    with pytest.raises(FileExistsError, match="is not overwritten"):
        store.add(IMPORTED, file)
    path, _ = flip_a_bit(store.path(IMPORTED))
    with pytest.raises(CorruptCheckpoint, match=f"{path} was altered.* and import it again$"):
        store.get(IMPORTED)


@pytest.mark.parametrize(("change", "words"), [
    ({"fc1.weight": torch.ones(16, 256, dtype=torch.int8)}, "fc1.weight as torch.int8, and weights are floating"),
    ({"fc1.weight": torch.ones(16, 256, dtype=torch.bool)}, "fc1.weight as torch.bool"),
    ({"fc1.weight": torch.ones(16, 256, dtype=torch.complex64)}, "fc1.weight as torch.complex64"),
])  # fmt: skip
def test_weights_that_are_no_real_numbers_are_not_imported(store, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        store.add(IMPORTED, write_state(tmp_path / "x.safetensors", change))


def test_negative_variances_are_not_imported(store, tmp_path):
    name = "digits/vgg11-bn-w0.125/imported/s1"
    file = write_state(tmp_path / "x.safetensors", {"bn3.running_var": -torch.ones(32)}, name=name)
    with pytest.raises(ValueError, match=r"has negative variances in bn3.running_var"):
        store.add(name, file)


def test_import_without_evaluation_or_counts_of_batches(store, tmp_path):
    name = "digits/vgg11-bn-w0.125/imported/s1"
    counts = {key: None for key in model(name).state_dict() if key.endswith("num_batches_tracked")}
    file = write_state(tmp_path / "mine.safetensors", counts, name)
    assert len(counts) == 8
    assert main(["--root", str(store.root), "import", name, str(file), "--no-evaluate"]) == 0
    assert store.info(name)["metrics"] == {} and equal(bits(store.get(name)), bits(model(name, seed=3)))
    doubled = write_state(tmp_path / "double.safetensors", {k: v.double() for k, v in bits(model(seed=3)).items()})
    store.add(IMPORTED, doubled, evaluate=False)
    assert equal(bits(store.get(IMPORTED)), bits(model(seed=3)))


@pytest.mark.parametrize("changes,words", [
    ({"fc2.weight": None}, "lacks fc2.weight, which mlp2-plain-w16 has"),
    ({"fc9.bias": torch.ones(2)}, "has fc9.bias, which mlp2-plain-w16 has not; nearest: fc1.bias"),
    ({"fc1.bias": torch.ones(17)}, r"fc1.bias of shape \(17,\); mlp2-plain-w16 with 10 classes and .* has \(16,\)"),
    ({"fc1.bias": torch.full((16,), torch.nan)}, "holds non-finite values in fc1.bias"),
])  # fmt: skip
def test_what_does_not_fit_is_not_imported(store, tmp_path, changes, words):
    with pytest.raises(ValueError, match=f"mine.safetensors {words}|mine.safetensors has {words}"):
        store.add(IMPORTED, write_state(tmp_path / "mine.safetensors", changes))
    assert not store.has(IMPORTED)


def test_pickles_are_not_loaded_and_the_message_says_how_to_convert_them(store, tmp_path, monkeypatch):
    torch.save(bits(model(seed=3)), tmp_path / "mine.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="mine.pth is not a whole safetensors file") as caught:
        store.add(IMPORTED, "mine.pth")
    exec(str(caught.value).split("`")[1].replace("FILE", "mine"), {"torch": torch, "safetensors": safetensors})
    store.add(IMPORTED, "mine.safetensors")
    assert equal(bits(store.get(IMPORTED)), bits(model(seed=3)))


def test_imported_runs_are_never_trained_and_others_never_imported(store, tmp_path):
    file = write_state(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=f"run {RUN} cannot be imported.*name it {IMPORTED}"):
        store.add(RUN, file)
    with pytest.raises(ValueError, match=f"{IMPORTED} is not trained here") as caught:
        store.get(IMPORTED, train_device="cpu")
    command = str(caught.value).split("`")[1].replace("FILE.safetensors", str(file)).split()
    assert main(["--root", str(store.root), *command[3:]]) == 0 and store.has(IMPORTED)
    for name in ("vgg16-ln", "resnet20-fixup", "tiny10-plain-nobias", "torchvision-resnet50"):
        assert training.parse_run(f"cifar10/{name}/imported/s1").recipe == "imported"


# networks that come with the repository


@pytest.fixture
def shipping(tmp_path):
    """A folder of networks with one in it, which was trained in 31 minutes."""
    origin = Store(tmp_path / "origin", shipped=tmp_path / "networks")
    origin.save(RUN, model(), METRICS | {"processor": "AMD EPYC", "seconds": 1860.0})
    origin.ship(RUN)
    return origin


@pytest.fixture
def user(tmp_path, shipping):
    """A store that has nothing but what comes with the repository."""
    return Store(tmp_path / "runs", shipped=tmp_path / "networks")


def test_a_shipped_run_is_copied_once_and_never_trained(user, shipping, monkeypatch, capsys):
    monkeypatch.setattr(storing, "train", no_training)
    assert user.has(RUN) and user.names() == [RUN] and user.info(RUN) == shipping.info(RUN)
    assert equal(bits(user.load(RUN)), bits(model())) and not user.root.exists()  # looking and loading writes nothing
    assert equal(bits(user.get(RUN)), bits(model()))
    said = f"{RUN}: comes with repairlib (trained in 31 min on AMD EPYC; test accuracy 50.0%)\n"
    assert capsys.readouterr().out == said
    assert tree(user.path(RUN)) == tree(shipping.path(RUN)) and user.names() == [RUN]  # bit for bit
    assert equal(bits(user.get(RUN)), bits(model())) and capsys.readouterr().out == ""
    user.delete(RUN)
    assert equal(bits(user.get(RUN, progress=False)), bits(model())) and capsys.readouterr().out == ""


def test_a_root_that_cannot_be_written_reads_shipped_runs(shipping, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storing, "train", no_training)
    (tmp_path / "file").touch()
    user = Store(tmp_path / "file" / "runs", shipped=shipping.shipped.root)
    for _ in range(2):
        assert equal(bits(user.get(RUN)), bits(model())) and capsys.readouterr().out == ""  # nothing was copied
    before = tree(shipping.shipped.root)
    with monkeypatch.context() as patch:
        patch.setattr(storing.os, "fsync", Full(os.fsync, 1))
        full = Store(tmp_path / "full", shipped=shipping.shipped.root)
        assert equal(bits(full.get(RUN)), bits(model())) and not full.path(RUN).exists()
    assert tree(shipping.shipped.root) == before


def test_a_shipped_run_is_unpacked_once(user, shipping, tmp_path, monkeypatch):
    unpacked = []
    monkeypatch.setattr(storing, "unpack", lambda packed: unpacked.append(packed) or unpack(packed))
    user.get(RUN, progress=False)
    user.get(RUN)  # the copy
    assert len(unpacked) == 1
    (tmp_path / "file").touch()
    Store(tmp_path / "file" / "runs", shipped=shipping.shipped.root).get(RUN)  # cannot be written
    assert len(unpacked) == 2


def test_what_was_trained_here_wins_over_what_ships(user, monkeypatch):
    user.save(RUN, model(seed=1), METRICS)
    monkeypatch.setattr(storing, "train", no_training)
    assert equal(bits(user.get(RUN)), bits(model(seed=1)))


def test_the_default_store_has_what_ships_and_others_have_not(shipping, monkeypatch, tmp_path):
    monkeypatch.setenv("REPAIRLIB_NETWORKS", str(shipping.shipped.root))
    monkeypatch.setattr(storing, "train", no_training)
    assert Store().names() == [RUN] and not Store(tmp_path / "other").has(RUN)
    assert equal(bits(storing.get(RUN)), bits(model())) and (Store().root / RUN).is_dir()
    monkeypatch.delenv("REPAIRLIB_NETWORKS")
    assert Store().shipped.root == storing.project_root() / "data" / "networks"


def test_shipped_runs_need_no_data_set(shipping, tmp_path, monkeypatch):
    name = RUN.replace("digits", "pets")
    for half in ("train", "test"):
        (tmp_path / "data" / "pets" / half).mkdir(parents=True)
    save(origin := Store(shipping.root, tmp_path / "data", shipping.shipped.root), name)
    origin.ship(name)
    monkeypatch.setattr(storing, "train", no_training)
    assert equal(bits(Store(tmp_path / "runs", tmp_path / "none", shipping.shipped.root).get(name)), bits(model()))


def cut_packed(path):
    packed = path / storing.PACKED
    packed.write_bytes(packed.read_bytes()[:-9])
    return packed, "was altered or truncated"


def other_packed(path):
    (path / storing.PACKED).write_bytes(storing.pack(safetensors.torch.save(bits(model(seed=7)))))
    return path / storing.PACKED, "was altered or truncated.*sha256"


def no_packed(path):
    (path / storing.PACKED).unlink()
    return path / storing.WEIGHTS, "is missing"


@pytest.mark.parametrize("damage", [cut_packed, other_packed, no_packed, lose_sidecar, truncate_sidecar])
def test_a_damaged_shipped_run_is_named_and_can_be_trained(user, damage):
    path, words = damage(user.shipped.path(RUN))
    for ask in (user.get, user.load):
        with pytest.raises(CorruptCheckpoint, match=words) as caught:
            ask(RUN)
        assert str(caught.value).startswith(str(path)) and not user.path(RUN).exists()
    assert main(str(caught.value).split("`")[1].split()[3:]) == 0  # the way out that the message gives
    assert not user.has(RUN)
    user.get(RUN, train_device="cpu", progress=False)
    assert user.info(RUN)["metrics"]["test_accuracy"] != METRICS["test_accuracy"]  # trained


def test_a_damaged_copy_of_a_shipped_run_is_copied_again(user, monkeypatch):
    monkeypatch.setattr(storing, "train", no_training)
    user.get(RUN)
    flip_a_bit(user.path(RUN))
    with pytest.raises(CorruptCheckpoint, match="copies it again") as caught:
        user.get(RUN)
    assert main(str(caught.value).split("`")[1].split()[3:]) == 0
    assert equal(bits(user.get(RUN)), bits(model()))


def test_a_shipped_run_of_another_recipe_is_stale(user, monkeypatch):
    smoke = training.RECIPES["smoke"]
    monkeypatch.setitem(smoke, "mlp", replace(smoke["mlp"], lr=0.123))
    with pytest.raises(StaleRun, match=f"{RUN} was trained with lr=0.1, and its recipe now has 0.123") as caught:
        user.get(RUN)
    assert not user.path(RUN).exists()
    assert main(str(caught.value).split("`")[1].split()[3:]) == 0 and not user.has(RUN)


def test_shipping_by_the_command_line(store, tmp_path, monkeypatch, capsys):
    networks, root = tmp_path / "networks", ["--root", str(store.root)]
    monkeypatch.setenv("REPAIRLIB_NETWORKS", str(networks))
    other = RUN.replace("s1", "s2")
    save(store)
    save(store, other, seed=1)
    assert main([*root, "ship", RUN]) == 0 and main([*root, "ship", RUN]) == 0  # a second time changes nothing
    line, again = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in (networks / RUN).iterdir())
    assert line == again == f"{RUN}: ships; all networks together take {size / 1e6:.2f} MB"
    assert (networks / RUN / "run.json").read_bytes() == (store.path(RUN) / "run.json").read_bytes()
    assert main([*root, "list"]) == 0
    assert capsys.readouterr().out == f"{RUN}  50.00%  comes with the repository\n{other}  50.00%\n"
    assert main([*root, "delete", RUN]) == 0 and main([*root, "check"]) == 0
    assert capsys.readouterr().out == f"{RUN}  ok\n{other}  ok\n"
    assert main([*root, "delete", RUN]) == 1
    command = capsys.readouterr().err.split("`")[1].split()  # removes it from where it comes from
    cut_packed(networks / RUN)
    assert main([*root, "check"]) == 1 and f"{networks / RUN}/model.packed was altered" in capsys.readouterr().err
    save(store)  # a run that is whole in the store does not hide that
    assert main([*root, "check"]) == 1 and "was altered" in capsys.readouterr().err
    assert main(command[3:]) == 0 and not (networks / RUN).exists()


def test_what_does_not_ship(shipping, monkeypatch):
    other = RUN.replace("s1", "s2")
    save(shipping, CHILD)
    with pytest.raises(ValueError, match=f"run {CHILD} continues {RUN}, and only runs that continue none"):
        shipping.ship(CHILD)
    with pytest.raises(FileNotFoundError, match="is not stored"):
        shipping.ship(other)
    flip_a_bit(save(shipping, other))
    with pytest.raises(CorruptCheckpoint):
        shipping.ship(other)
    shipping.delete(other)
    save(shipping, other)
    size = sum(path.stat().st_size for path in shipping.shipped.path(RUN).iterdir())
    monkeypatch.setattr(storing, "SHIPPED", int(1.9 * size))
    with pytest.raises(ValueError, match=rf"together may take .* MB; there are:\n   0.0\d MB  {RUN}$"):
        shipping.ship(other)
    shipping.delete(RUN, children=True)
    save(shipping, RUN, seed=9)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="is not overwritten"):
        shipping.ship(RUN)
    assert shipping.shipped.names() == [RUN] and equal(bits(shipping.shipped.load(RUN)), bits(model()))


# several processes


def torchrun(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script]
    env = os.environ | {"REPAIRLIB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=env)


def test_two_processes_train_one_network_together(store):
    name = "digits/mlp2-plain-w8/smoke/s1"
    done = torchrun(["-m", "companion.runs.store"], "--root", store.root, "train", name)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("test accuracy") == 1 and store.names() == [name]
    alone, metrics = training.train(name, device="cpu", progress=False)
    together = bits(store.load(name))
    assert all(torch.allclose(value, together[key], rtol=1e-4, atol=1e-5) for key, value in bits(alone).items())
    assert store.info(name)["metrics"]["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-4)


def test_nothing_is_saved_if_one_of_the_processes_fails(store, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
from companion.runs import store, train

def failing(*args, **options):
    raise OSError("no more data")

if train.processes()[0] == 1:
    train._check_losses = failing  # after the first step
sys.exit(store.main(["--root", sys.argv[1], "train", {RUN!r}, "digits/mlp1-plain-w4/smoke/s1"]))
""")
    done = torchrun([script], store.root)
    assert done.returncode != 0 and "OSError: no more data" in done.stderr
    assert store.names() == [] and "test accuracy" not in done.stdout


# command line


def test_command_line(store, capsys):
    root = ["--root", str(store.root)]
    assert main([*root, "train", RUN]) == 0 and store.has(RUN)
    assert main([*root, "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{RUN}  ")
    other = RUN.replace("s1", "s2")
    truncate(save(store, other))
    assert main([*root, "check"]) == 1
    out = capsys.readouterr()
    assert f"{RUN}  ok" in out.out and out.err.startswith("CorruptCheckpoint: ") and other in out.err
    assert main([*root, "delete", RUN, other]) == 0 and store.names() == []
    assert main([*root, "train", RUN, "digits/mlp2-plain-w16/smok/s1"]) == 1
    assert "nearest is 'smoke'" in capsys.readouterr().err and store.names() == [RUN]


def test_command_line_as_a_module(store):
    command = [sys.executable, "-W", "error", "-m", "companion.runs.store", "--root", str(store.root), "delete", RUN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("FileNotFoundError: ") and len(done.stderr.splitlines()) == 1
