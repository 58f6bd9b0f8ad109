import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from companion.runs import store
from companion.runs import train as training
from companion.runs.data import DATASETS, DataMissing, Source, Split, folders, iterate, load
from companion.runs.models import build
from companion.runs.train import find_recipe, fit, parse_run

SIZES = ((50, 37), (37, 50), (36, 36), (20, 90), (90, 31), (33, 64))  # (width, height)
RUN = "shapes@32/torchvision-resnet18/smoke/s1"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def root(tmp_path):
    """An image folder of three classes, by brightness, in several formats and sizes."""
    random = np.random.RandomState(0)
    for half, count in (("train", 12), ("test", 4)):
        for label in range(3):
            folder = tmp_path / "shapes" / half / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = SIZES[i % len(SIZES)]
                pixels = np.clip(random.normal(60 + 70 * label, 40, (height, width, 3)), 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels)
                if i % 4 == 0:
                    image.convert("L").save(folder / f"{i:02}.png")
                elif i % 4 == 1:
                    image.quantize(16).save(folder / f"{i:02}.png")
                else:
                    image.save(folder / f"{i:02}.jpg")
    return tmp_path


def picture(path):
    with Image.open(path) as image:
        return image.mode, image.convert("RGB")


def collect(batches):
    return [torch.cat(column) for column in zip(*batches, strict=True)]


def pixels(x):
    """Batches as they were before normalisation, in 0..255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (folders.MEAN, folders.STD))
    return (x * std + mean) * 255


@pytest.mark.parametrize("side", [32, 24])
def test_evaluation_is_torchvisions(root, side):
    shapes = load(f"shapes@{side}", root)
    assert shapes.shape == (3, side, side) and shapes.classes == 3 and (len(shapes.train), len(shapes.test)) == (36, 12)
    assert shapes.name == f"shapes@{side}" and {picture(path)[0] for path in shapes.train.paths} == {
        "L",
        "P",
        "RGB",
    }
    assert shapes.to("meta").device.type == shapes.to("meta").test.labels.device.type == "meta"
    x, y = collect(iterate(shapes, "train", batch_size=5))
    assert y.tolist() == [0] * 12 + [1] * 12 + [2] * 12 and x.dtype == torch.float32
    files = sorted((root / "shapes" / "train").rglob("*.*"))
    assert list(shapes.train.paths) == [str(path) for path in files]
    for image, path in zip(x, files, strict=True):
        _, whole = picture(path)
        seen = vision.center_crop(vision.resize(whole, [round(side * 256 / 224)]), [side, side])
        expected = vision.normalize(vision.to_tensor(seen), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert torch.allclose(image, expected, atol=1e-5)


def test_random_crops_are_windows_of_the_whole_image(root):
    shapes = load("shapes@32", root)
    batches = iterate(shapes, "train", 7, ("resized-crop",), generator(3), shuffle=True)
    x, y = collect(batches)
    order = torch.randperm(36, generator=generator(batches.seed))
    assert torch.equal(y, shapes.train.labels[order])
    for image, i in zip(pixels(x), order.tolist(), strict=True):
        _, whole = picture(shapes.train.paths[i])
        window = folders._window(*whole.size, folders.random.Random(f"{batches.seed} {i}"))
        expected = torch.tensor(np.asarray(whole.crop(window).resize((32, 32), Image.Resampling.BILINEAR)))
        assert (image - expected.permute(2, 0, 1)).abs().max() < 0.01


@pytest.mark.parametrize("size", [(500, 375), (100, 100), (30, 300)])
def test_windows_cover_8_to_100_percent_within_the_image(size):
    windows = np.array([folders._window(*size, folders.random.Random(f"0 {i}")) for i in range(3000)])
    (left, top, right, bottom), (width, height) = windows.T, size
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    across, down = right - left, bottom - top
    area, ratio = across * down / (width * height), across / down
    assert ratio.min() > 0.70 and ratio.max() < 1.43  # 3/4 and 4/3, each side rounded
    assert left.min() == 0 and right.max() == width
    if height > 2 * width:  # no window of more than 1/7 of it has such a ratio: the middle
        assert np.median(area) == 30 * 40 / 9000 and (np.median(top), np.median(bottom)) == (130, 170)
    else:
        assert 0.075 < area.min() < 0.1 and area.max() > 0.9 and 0.3 < np.median(area) < 0.6
        assert top.min() == 0 and bottom.max() == height


@pytest.mark.parametrize("augment", [(), ("flip", "resized-crop"), ("translate", "cutout")])
def test_batches_do_not_depend_on_the_number_of_threads(root, augment, monkeypatch):
    shapes, passes = load("shapes@32", root), []
    for workers in (1, 5):
        monkeypatch.setattr(folders, "_workers", lambda workers=workers: workers)
        batches = iterate(shapes, "train", 8, augment, generator(1), shuffle=True)
        passes += [collect(batches), collect(batches)]
    assert all(torch.equal(a, b) for other in passes[1:] for a, b in zip(passes[0], other, strict=True))
    other, _ = collect(iterate(shapes, "train", 8, augment, generator(2), shuffle=True))
    assert not torch.equal(other, passes[0][0])


def test_crops_do_not_depend_on_the_batch_size(root):
    shapes = load("shapes@32", root)
    first, second = (collect(iterate(shapes, "train", n, ("resized-crop",), generator(1)))[0] for n in (5, 36))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["shapes@32", "digits"])
def test_parts_of_batches_are_together_the_batches(root, name):
    data = load(name, root)
    augment = ("resized-crop", "flip", "translate", "rotate")
    options = {"augment": augment, "shuffle": True, "drop_last": True, "limit": 60}
    whole = list(iterate(data, "train", 12, generator=generator(4), **options))
    parts = [list(iterate(data, "train", 12, generator=generator(4), part=(i, 3), **options)) for i in range(3)]
    assert all(len(y) == 4 for part in parts for _, y in part)
    for (x, y), *own in zip(whole, *parts, strict=True):
        assert torch.equal(y, torch.cat([labels for _, labels in own]))
        assert torch.allclose(x, torch.cat([images for images, _ in own]), atol=1e-6)


def test_limit_is_the_sample_of_a_resident_set_and_stays_in_memory(root, monkeypatch):
    shapes, opened = load("shapes@32", root), []
    real = folders._open
    monkeypatch.setattr(folders, "_open", lambda path: opened.append(path) or real(path))
    limited = iterate(shapes, "train", 4, limit=10)
    x, y = collect(limited)
    assert len(opened) == 10 and torch.equal(x, collect(limited)[0]) and len(opened) == 10
    sample = torch.randperm(36, generator=generator())[:10]
    assert opened == [shapes.train.paths[i] for i in sample.tolist()]
    assert torch.equal(y, shapes.train.labels[sample])
    whole, _ = collect(iterate(shapes, "train", 36))
    assert torch.allclose(x, whole[sample], atol=1e-6)
    again = iterate(shapes, "train", 36)
    collect(again), collect(again)
    assert len(opened) == 10 + 3 * 36  # the whole set is decoded each time
    monkeypatch.setattr(folders, "KEPT", 10 * 3 * 32 * 32 - 1)
    large = iterate(shapes, "train", 4, limit=10)
    assert torch.equal(collect(large)[0], x) and torch.equal(collect(large)[0], x)
    assert len(opened) == 10 + 3 * 36 + 2 * 10


def test_few_batches_are_decoded_ahead_and_a_pass_may_be_left(root, monkeypatch):
    opened = []
    real = folders._open
    monkeypatch.setattr(folders, "_open", lambda path: opened.append(path) or real(path))
    shapes = load("shapes@32", root)
    assert not opened  # loading only lists
    for x, _ in itertools.islice(iterate(shapes, "train", 4), 1):
        assert len(x) == 4
    assert 4 <= len(opened) <= 4 * (1 + folders.AHEAD)


def damage(root):
    path = root / "shapes" / "train" / "class1" / "02.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return path


def test_damaged_image_is_named(root):
    path = damage(root)
    shapes = load("shapes@32", root)
    with pytest.raises(DataMissing, match=f"{path} is not a readable image"):
        collect(iterate(shapes, "train", 6))
    with pytest.raises(DataMissing, match=f"{path} is not a readable image"):
        fit(
            build("mlp1-plain-w4", (3, 32, 32), 3),
            shapes,
            replace(find_recipe("smoke", "mlp", "shapes@32"), batch_size=36),
        )


def test_imagenets_own_folders(root):
    (root / "shapes" / "test").rename(root / "shapes" / "val")
    assert len(load("shapes@32", root).test) == 12
    (root / "shapes" / "test").mkdir()
    (root / "shapes" / "test" / "unlabelled.jpg").write_bytes(b"")
    assert len(load("shapes@32", root).test) == 12
    (root / "shapes" / "val" / "class9").mkdir()
    with pytest.raises(DataMissing, match=r"'class9' is only in one of .*train and .*val"):
        load("shapes@32", root)


def test_hidden_folders_are_no_classes(root):
    (root / "shapes" / "train" / ".ipynb_checkpoints").mkdir()
    assert load("shapes@32", root).classes == 3


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_no_image_is_reported(root, kind):
    path = root / "shapes" / "train" / "class1" / "more"
    if kind == "folder":
        path.mkdir()
        words = "is a folder: images lie in their class's folder itself"
    else:
        path.symlink_to("nowhere.png")
        words = "is a link to nothing"
    with pytest.raises(DataMissing, match=f"{path} {words}"):
        load("shapes@32", root)


def test_half_a_folder_says_which_half_it_lacks(root):
    (root / "shapes" / "test").rename(root / "elsewhere")
    with pytest.raises(ValueError, match=r"shapes has train/ and neither test/ nor val/; it needs two halves"):
        load("shapes@32", root)


def test_grey_images_of_16_bits_keep_their_range(tmp_path):
    values = np.array([[0, 257, 300, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert np.asarray(folders._open(str(tmp_path / "grey.png"))).tolist() == [[0, 1, 1, 128, 255]]


def test_cameras_notes_of_how_they_were_held_are_followed(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    notes = Image.Exif()
    notes[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=notes)
    upright = folders._open(str(tmp_path / "turned.png"))
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


def test_an_image_that_is_too_large_is_named(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataMissing, match=r"large\.png is not a readable image .*decompression bomb"):
        folders._open(str(tmp_path / "large.png"))


def test_images_of_several_sizes_are_only_streamed(root):
    with pytest.raises(DataMissing, match=r"resize all images of .*shapes to one size, or .*: shapes@"):
        load("shapes", root)


# decoded once


@pytest.fixture
def pets(tmp_path):
    """An image folder of 24 images of one size."""
    random = np.random.RandomState(0)
    for half, count in (("train", 9), ("test", 3)):
        for label in ("cats", "dogs"):
            folder = tmp_path / "pets" / half / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(random.randint(256, size=(5, 7, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """Paths of the images that are decoded, in their order."""
    paths, real = [], folders._open
    monkeypatch.setattr(folders, "_open", lambda path: paths.append(path) or real(path))
    return paths


def same(first, second):
    return first.digest() == second.digest() and first.mean == second.mean and first.std == second.std


def test_a_folder_is_decoded_once(pets, opened):
    first = load("pets", pets)
    assert len(opened) == 24 and [path.name for path in (pets / ".decoded").iterdir()] == ["pets.safetensors"]
    again, half = load("pets", pets), load("pets-first75", pets)
    assert len(opened) == 24 and same(first, again) and torch.equal(half.test.images, first.test.images)
    assert again.shape == (3, 5, 7) and again.train.images.dtype == torch.uint8
    with pytest.raises(ValueError, match="unknown data set '.decoded'"):
        load(".decoded", pets)
    with pytest.raises(ValueError) as caught:
        load("pet", pets)
    assert ".decoded" not in str(caught.value)
    load("pets@4", pets)  # a streamed folder has no copy
    assert len([*(pets / ".decoded").iterdir()]) == 1


def changed(folder):
    Image.new("RGB", (7, 5), "red").save(folder / "0.png")


def added(folder):
    Image.new("RGB", (7, 5), "red").save(folder / "99.png")


def removed(folder):
    (folder / "0.png").unlink()


def renamed(folder):
    (folder / "0.png").rename(folder / "9.png")  # the last one now


def moved(folder):
    (folder / "0.png").rename(folder.parent / "cats" / "99.png")  # another label


@pytest.mark.parametrize("change", [changed, added, removed, renamed, moved])
def test_the_copy_is_renewed_when_a_file_changes(pets, opened, change, tmp_path_factory):
    before = load("pets", pets)
    change(pets / "pets" / "train" / "dogs")
    opened.clear()
    after = load("pets", pets)
    assert len(opened) == len(after.train) + len(after.test) and not same(before, after)
    assert same(after, load("pets", pets)) and len(opened) == len(after.train) + len(after.test)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "pets").symlink_to(pets / "pets")
    assert same(after, load("pets", elsewhere))  # decoded anew


def test_grey_images_keep_their_one_channel_in_the_copy(pets, opened):
    for path in (pets / "pets").rglob("*.png"):
        picture(path)[1].convert("L").save(path)
    assert load("pets", pets).shape == load("pets", pets).shape == (1, 5, 7) and len(opened) == 24


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", None])
def test_a_damaged_copy_is_written_anew(pets, opened, content):
    first, copy = load("pets", pets), pets / ".decoded" / "pets.safetensors"
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-5] if content is None else content)
    assert same(load("pets", pets), first) and len(opened) == 48 and copy.read_bytes() == whole


def test_a_root_that_cannot_be_written_has_no_copy(pets, opened):
    (pets / ".decoded").touch()  # no folder, and so nothing can be written below it
    assert same(load("pets", pets), load("pets", pets)) and len(opened) == 48
    assert sorted(path.name for path in pets.iterdir()) == [".decoded", "pets"]


def test_the_order_of_a_registered_data_set_comes_after_decoding(pets, opened, monkeypatch):
    unsorted = load("pets", pets)
    source = Source("pets", None, sort=True)
    monkeypatch.setitem(DATASETS, "pets", source)
    by_content = load("pets", pets)
    assert len(opened) == 24 and torch.equal(by_content.train.images, unsorted.train.sorted().images)
    assert not torch.equal(by_content.train.images, unsorted.train.images)


def test_one_image_in_two_classes_has_one_order():
    images = torch.tensor([7, 9, 7, 7], dtype=torch.uint8).reshape(4, 1, 1, 1)
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    halves = [Split(images, torch.tensor([2, 0, 1, 2])).take(order).sorted() for order in orders]
    assert len({half.digest() for half in halves}) == 1


def test_processes_that_decode_at_the_same_time_agree(pets):
    script = "import sys; from companion.runs.data import load; print(load('pets', sys.argv[1]).digest())"
    start = {"stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", script, str(pets)], **start) for _ in range(2)]
    digests = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert digests == {load("pets", pets).digest()}
    assert [path.name for path in (pets / ".decoded").iterdir()] == ["pets.safetensors"]


@pytest.mark.parametrize("name,words", [
    ("shapes@", "'shapes'"), ("shapes@0", "'shapes'"), ("shape@224", "'shapes@224'"), ("shapes@big", "'shapes'"),
    ("digits@16", "'digits'"), ("shapes@32@32", "'shapes@"), ("shapes@224-first20", "'shapes@224-first80'"),
])  # fmt: skip
def test_unknown_streams_give_the_nearest(root, name, words):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'; the nearest is {words}"):
        load(name, root)


def test_biased_halves_are_streamed_too(root):
    first, last = (load(f"shapes@32-{which}75", root) for which in ("first", "last"))
    assert first.train.labels.bincount().tolist() == [9, 3, 3] and last.train.labels.bincount().tolist() == [3, 9, 9]
    assert not set(first.train.paths) & set(last.train.paths) and first.mean == last.mean == folders.MEAN
    assert str(parse_run(RUN.replace("@32", "@32-first75"), root)).startswith("shapes@32-first75/")


def test_digits_stay_upright(root):
    recipes = [find_recipe("jordan", "torchvision", name).augment for name in ("svhn@64-first80", "shapes@64")]
    assert recipes == [(), ("flip", "resized-crop")]


def test_network_of_torchvision_learns_by_name(root, monkeypatch):
    how = replace(find_recipe("smoke", "torchvision", "shapes@32"), epochs=6, batch_size=12, lr=0.02)
    how = replace(how, augment=("flip", "resized-crop"))
    monkeypatch.setitem(training.RECIPES["smoke"], "torchvision", how)
    runs = store.Store(data_root=root)
    model, info = runs.get(RUN, train_device="cpu", progress=False), runs.info(RUN)
    assert info["shape"] == [3, 32, 32] and info["classes"] == 3 and info["metrics"]["train_accuracy"] > 0.6
    loss, accuracy = training.evaluate(model, iterate(load("shapes@32", root), "test"))
    # A training evaluates its network in the layout that it trained in, so that the loss is another to rounding.
    assert accuracy == info["metrics"]["test_accuracy"]
    assert loss == pytest.approx(info["metrics"]["test_loss"], rel=1e-4)
    again, metrics = training.train(RUN, data_root=root, device="cpu", progress=False, recipe=replace(how, epochs=1))
    assert not model.training and not torch.equal(again.fc.weight, model.fc.weight) and metrics["shape"] == (3, 32, 32)
