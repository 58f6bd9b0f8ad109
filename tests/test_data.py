import math
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from companion.runs import data, files
from companion.runs.data import DataMissing, augment, iterate, load, loading
from companion.runs.data.augmentation import warp


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def write_images(root, name="pets", size=(6, 5), mode="RGB", train=3, test=2):
    """An image folder of two classes; pixels are drawn from a fixed seed. Returns the arrays by path."""
    random, written = np.random.RandomState(0), {}
    for half, count in (("train", train), ("test", test)):
        for label in ("cat", "dog"):
            folder = root / name / half / label
            folder.mkdir(parents=True)
            for i in range(count):
                shape = size[::-1] + ((3,) if mode == "RGB" else ())
                pixels = random.randint(0, 256, shape).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                written[half, label, i] = pixels
    return written


def mnist_bytes(array):
    """The idx format of MNIST's raw files."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def shrink(monkeypatch, name, train, test):
    """Let an archive be as large as a test can write it."""
    source = data.DATASETS[name]
    monkeypatch.setitem(data.DATASETS, name, replace(source, facts=source.facts._replace(train=train, test=test)))


def write_mnist(root, monkeypatch, train=30, test=20):
    """A small MNIST in torchvision's layout, and the sizes to match."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.RandomState(0)
    for prefix, n in (("train", train), ("t10k", test)):
        images = random.randint(0, 256, (n, 28, 28)).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(mnist_bytes(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(mnist_bytes((np.arange(n) % 10).astype(np.uint8)))
    shrink(monkeypatch, "mnist", train, test)
    return raw


# digits


def test_digits_are_scikit_learns_images_enlarged_and_split_by_class(digits):
    from sklearn.datasets import load_digits

    original = load_digits()
    images = torch.cat([digits.train.images, digits.test.images])
    labels = torch.cat([digits.train.labels, digits.test.labels])
    assert images.dtype == torch.uint8 and digits.shape == (1, 16, 16)
    assert labels.bincount().tolist() == np.bincount(original.target).tolist()
    # Enlarging by 2 puts pixels a quarter of the way between neighbours: 3/4 of the nearer and 1/4 of the farther.
    weights = np.zeros((16, 8))
    for i in range(16):
        farther = i // 2 + (1 if i % 2 else -1)
        weights[i, i // 2] += 0.75
        weights[i, min(max(farther, 0), 7)] += 0.25
    enlarged = torch.tensor(weights @ original.images @ weights.T * 255 / 16)
    distance = torch.cdist(images.flatten(1).double(), enlarged.flatten(1), p=torch.inf)
    closest = distance.argmin(1)
    assert distance.min(1).values.max() <= 0.5 + 1e-9  # rounding to uint8
    assert sorted(closest.tolist()) == list(range(1797))  # every image is there exactly once
    assert torch.equal(torch.tensor(original.target)[closest], labels)
    expected = np.bincount(original.target) * 400 / 1797
    assert np.abs(digits.test.labels.bincount().numpy() - expected).max() <= 1


def test_digits_split_never_changes(digits):
    # Facts of the first version: with another split, stored networks would be tested on their training images.
    assert digits.test.labels[:12].tolist() == [4, 5, 6, 9, 4, 7, 8, 9, 9, 6, 9, 9]
    assert int(digits.test.images.long().sum()) == 7933609


@pytest.fixture(scope="module")
def hard():
    return load("digits-hard")


def test_hard_digits_are_the_same_ones_in_the_same_halves(digits, hard):
    assert hard.name == "digits-hard" and hard.shape == digits.shape and hard.classes == 10
    for half in ("train", "test"):
        easy, difficult = getattr(digits, half), getattr(hard, half)
        assert torch.equal(difficult.labels, easy.labels) and difficult.images.dtype == torch.uint8
        # Each image is most like its own original, on average: the moves, neighbours and noise leave that much.
        x, y = (
            F.normalize(h.images.flatten(1).double() - h.images.flatten(1).double().mean(1, True))
            for h in (easy, difficult)
        )
        assert (x * y).sum(1).mean() > (x * y.roll(1, 0)).sum(1).mean() + 0.2
        assert difficult.images.float().std((1, 2, 3)).mean() < easy.images.float().std((1, 2, 3)).mean()


def test_hard_digits_never_change(hard):
    # Facts of the first version, as for the digits themselves.
    assert [int(half.images.long().sum()) for half in (hard.train, hard.test)] == [28016303, 8057797]
    again = load("digits-hard")
    assert torch.equal(again.train.images, hard.train.images) and torch.equal(again.test.images, hard.test.images)


def test_no_part_of_a_test_image_is_in_the_hard_training_set(digits, hard):
    train = data.clutter(data.Split(digits.train.images, digits.train.labels), 0)
    assert torch.equal(train.images, hard.train.images)  # from the training half alone
    assert not torch.equal(data.clutter(digits.train, 1).images, hard.train.images)


def test_hard_digits_draw_for_each_image_and_leave_the_global_generators_alone(digits):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    same = data.Split(digits.test.images[:1].expand(50, -1, -1, -1), digits.test.labels[:1].expand(50))
    out = data.clutter(same, 0)
    assert len(torch.unique(out.images.flatten(1), dim=0)) == 50 and out.images.shape == same.images.shape
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_hard_digits_are_harder(digits, hard):
    nearest, linear = [], []
    for dataset in (digits, hard):
        (x, y), (seen, labels) = ((h.images.flatten(1).double() / 255, h.labels) for h in (dataset.train, dataset.test))
        nearest.append(float((y[torch.cdist(seen, x).argmin(1)] == labels).double().mean()))
        one = torch.ones(len(x), 1).double()
        ridge = torch.cat([x, one], 1)
        weights = torch.linalg.solve(ridge.T @ ridge + torch.eye(ridge.shape[1]), ridge.T @ F.one_hot(y).double())
        found = (torch.cat([seen, one[: len(seen)]], 1) @ weights).argmax(1)
        linear.append(float((found == labels).double().mean()))
    assert nearest[0] > 0.98 and 0.3 < nearest[1] < nearest[0] - 0.2
    assert linear[0] > 0.9 and linear[1] < linear[0] - 0.2


def test_statistics_normalise_the_training_set(digits):
    x = torch.cat([x for x, _ in iterate(digits, "train", 100)]).double()
    assert abs(float(x.mean())) < 1e-6 and abs(float(x.std(correction=0)) - 1) < 1e-6


def test_colour_statistics_are_per_channel_and_a_constant_channel_stays_finite(tmp_path):
    write_images(tmp_path)
    pets = load("pets", tmp_path)
    pixels = pets.train.images.double() / 255
    assert torch.allclose(torch.tensor(pets.mean).double(), pixels.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(pets.std).double(), pixels.std((0, 2, 3), correction=0))
    flat = data.Split(torch.full((4, 1, 8, 8), 7, dtype=torch.uint8), torch.arange(4))
    mean, std = loading._pixel_statistics(flat.images)
    ((x, _),) = iterate(data.Dataset("flat", flat, flat, 4, mean, std))
    assert x.abs().max() < 1e-6


# batches


def test_batches_repeat_and_the_generator_moves_on(digits):
    shared = generator(3)
    first = iterate(digits, "train", 64, ("translate", "flip", "cutout"), shared, shuffle=True)
    second = iterate(digits, "train", 64, ("translate", "flip", "cutout"), shared, shuffle=True)
    again = iterate(digits, "train", 64, ("translate", "flip", "cutout"), generator(3), shuffle=True)
    assert len(first) == len(list(first)) == 22
    passes = [[torch.cat(column) for column in zip(*batches, strict=True)] for batches in (first, first, again, second)]
    for x, y in passes[1:3]:
        assert torch.equal(x, passes[0][0]) and torch.equal(y, passes[0][1])
    assert not torch.equal(passes[3][1], passes[0][1])
    assert torch.equal(passes[3][1].sort().values, digits.train.labels.sort().values)


def test_batches_leave_the_global_generator_alone(digits):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(iterate(digits, "test", 100, ("translate", "cutout"), generator(), shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size,drop_last,sizes", [
    (150, False, [150, 150, 100]), (150, True, [150, 150]), (400, True, [400]), (500, True, []), (500, False, [400]),
])  # fmt: skip
def test_batch_sizes(digits, batch_size, drop_last, sizes):
    batches = iterate(digits, "test", batch_size, drop_last=drop_last)
    assert [len(y) for _, y in batches] == sizes and len(batches) == len(sizes)
    assert [len(y) for _, y in iterate(digits, "test")] == [400]  # on a CPU, unless the caller says


def test_limit_is_the_same_fair_sample_whatever_the_batches(digits):
    labels = torch.cat([y for _, y in iterate(digits, "train", 7, limit=300)])
    other = torch.cat([y for _, y in iterate(digits, "train", 100, limit=300, generator=generator(5))])
    assert torch.equal(labels, other) and len(labels) == 300
    assert labels.bincount(minlength=10).min() > 15  # 30 expected of each class
    longer = torch.cat([x for x, _ in iterate(digits, "train", 400, limit=400)])
    assert torch.equal(longer[:300], torch.cat([x for x, _ in iterate(digits, "train", 100, limit=300)]))
    assert sum(len(y) for _, y in iterate(digits, "train", limit=10**6)) == 1397


@pytest.mark.parametrize("options,words", [
    ({"split": "tests"}, "tests.*'test'"), ({"augment": ["flop"]}, "flop.*'flip'"),
    ({"batch_size": 0}, "at least 1"), ({"limit": 0}, "at least 1"),
])  # fmt: skip
def test_bad_arguments_are_named(digits, options, words):
    with pytest.raises(ValueError, match=words):
        iterate(digits, **options)


# augmentation


def test_translate_shifts_each_image_by_at_most_an_eighth_and_fills_with_zeros():
    images = torch.randint(1, 256, (400, 2, 16, 24), generator=generator(), dtype=torch.uint8)
    shifts = set()
    for before, after in zip(images, augment(images, ["translate"], generator(1)), strict=True):
        padded = torch.nn.functional.pad(before, (3, 3, 2, 2))
        found = [(dy, dx) for dy in range(5) for dx in range(7)
                 if torch.equal(padded[:, dy : dy + 16, dx : dx + 24], after)]  # fmt: skip
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) == 35  # all of them come up


def test_flip_mirrors_about_half():
    images = torch.randint(256, (1000, 1, 4, 5), generator=generator(), dtype=torch.uint8)
    after = augment(images, ["flip"], generator(1))
    mirrored = (after == images.flip(3)).flatten(1).all(1)
    assert ((after == images).flatten(1).all(1) ^ mirrored).all()
    assert 400 < mirrored.sum() < 600


def test_cutout_zeroes_one_square_and_nothing_else():
    images = torch.ones(2000, 3, 32, 32, dtype=torch.uint8)
    hole = augment(images, ["cutout"], generator()) == 0
    assert (hole == hole[:, :1]).all()  # in all channels alike
    rows, columns = hole[:, 0].any(2), hole[:, 0].any(1)
    assert torch.equal(hole[:, 0], rows[:, :, None] & columns[:, None, :])
    for axis in (rows, columns):
        assert axis.sum(1).max() == 8 and axis.sum(1).min() == 4  # centred inside, so at least half is inside
        assert (axis.int().diff(dim=1).abs().sum(1) <= 2).all()  # one interval
    assert (hole.any(0)).all()


def test_augmentation_changes_no_input_and_every_image_draws_for_itself():
    images = torch.randint(1, 256, (64, 1, 32, 32), generator=generator(), dtype=torch.uint8)
    copy = images.clone()
    same = augment(images[:1].expand(64, -1, -1, -1), data.AUGMENTATIONS, generator(2))
    assert len(torch.unique(same.flatten(1), dim=0)) > 55
    augment(images, data.AUGMENTATIONS, generator(2))
    assert torch.equal(images, copy)


def coordinates(height, width):
    """An image whose two channels are each pixel's place (x, y) from the middle, and a third of ones."""
    y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in (height, width)), indexing="ij")
    return torch.stack([x, y, torch.ones(height, width)])


def seen_maps(name, height=20, width=30, n=300):
    """For each image the fitted (A, b) with seen place = A (x, y) + b, away from the borders; and what was seen."""
    place = coordinates(height, width)
    seen = augment(place.expand(n, -1, -1, -1), [name], generator(3))
    maps = []
    for image in seen:
        # Places in the image's interior, where bilinear interpolation of a linear function is exact.
        inside = (image[0].abs() < (width - 3) / 2) & (image[1].abs() < (height - 3) / 2) & (image[2] > 0.999)
        known = torch.cat([place[:2, inside], torch.ones(1, int(inside.sum()))]).double()
        fit = torch.linalg.lstsq(known.T, image[:2, inside].T.double()).solution
        assert (known.T @ fit - image[:2, inside].T).abs().max() < 1e-3
        maps.append((fit[:2].T, fit[2]))
    return [torch.stack(part) for part in zip(*maps, strict=True)], seen


def test_rotate_turns_by_up_to_thirty_degrees():
    (linear, shift), seen = seen_maps("rotate")
    assert torch.allclose(linear @ linear.transpose(1, 2), torch.eye(2).double(), atol=1e-4)
    angle = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert angle.abs().max() <= 30 and angle.min() < -25 and angle.max() > 25 and angle.mean().abs() < 3
    assert shift.abs().max() < 1e-3
    assert (seen[:, 2, 0, 0] < 0.01).float().mean() > 0.5  # corners come from outside


def test_resize_scales_and_crops_or_pads():
    (linear, shift), seen = seen_maps("resize")
    scale = 1 / linear[:, 0, 0]
    assert torch.allclose(linear, torch.eye(2).double() / scale.view(-1, 1, 1), atol=1e-4)
    assert 0.8 - 1e-6 <= scale.min() < 0.82 and 1.18 < scale.max() <= 1.2 + 1e-6
    room = (1 - 1 / scale).abs()[:, None] * torch.tensor([15, 10])  # half of what the larger has more than the smaller
    assert (shift.abs() <= room + 1e-3).all() and (shift.abs() / room).median() > 0.3
    enlarged = scale > 1.1
    assert (seen[enlarged, 2, 1:-1, 1:-1] > 0.99).all()  # a crop of the image, without padding
    assert (seen[scale < 0.9, 2].flatten(1).min(1).values < 0.01).all()


def test_resized_crop_shows_a_window_inside_the_image():
    (linear, shift), seen = seen_maps("resized-crop")
    across, down = linear[:, 0, 0], linear[:, 1, 1]
    assert linear[:, 0, 1].abs().max() < 1e-3 and linear[:, 1, 0].abs().max() < 1e-3
    assert 0.07 < (across * down).min() < 0.12 and 0.7 < (across * down).max() <= 1 + 1e-4
    assert (across / down).max() <= 4 / 3 + 1e-3 and (across / down).min() >= 3 / 4 - 1e-3
    assert (shift.abs() <= (1 - torch.stack([across, down], 1)) * torch.tensor([15, 10]) + 1e-3).all()
    assert (seen[:, 2, 1:-1, 1:-1] > 0.99).all()


def test_looking_straight_changes_nothing_and_integers_are_rounded():
    images = torch.randint(256, (5, 3, 9, 7), generator=generator(), dtype=torch.uint8)
    assert torch.equal(warp(images), images)
    turned = warp(images, angle=torch.tensor(math.pi).expand(5))
    assert torch.equal(turned, images.flip(2, 3)) and turned.dtype == torch.uint8
    half = warp(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2), x=1.0)
    assert half.tolist() == [[[[255, 0]]]]  # a half side to the right, zeros beyond


# image folders


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_image_folder_in_alphabetical_order(tmp_path, mode):
    written = write_images(tmp_path, mode=mode)
    (tmp_path / "pets" / "train" / "cat" / ".hidden").write_text("no image")
    pets = load("pets", tmp_path)
    assert pets.classes == 2 and pets.shape == (3 if mode == "RGB" else 1, 5, 6)
    assert pets.train.labels.tolist() == [0] * 3 + [1] * 3 and pets.test.labels.tolist() == [0] * 2 + [1] * 2
    pixels = torch.tensor(written["train", "dog", 1])
    assert torch.equal(pets.train.images[4], pixels.permute(2, 0, 1) if mode == "RGB" else pixels[None])


def test_one_colour_image_makes_all_colour(tmp_path):
    written = write_images(tmp_path, mode="L")
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "pets" / "test" / "dog" / "9.png")
    pets = load("pets", tmp_path)
    assert pets.shape == (3, 5, 6)
    assert torch.equal(pets.train.images[0], torch.tensor(written["train", "cat", 0]).expand(3, 5, 6))


def test_image_folder_wins_over_the_archive(tmp_path, monkeypatch):
    write_mnist(tmp_path, monkeypatch)
    assert load("mnist", tmp_path).shape == (1, 28, 28)
    write_images(tmp_path, name="mnist")
    assert load("mnist", tmp_path).shape == (3, 5, 6)


def damage_size(folder):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "test" / "dog" / "1.png")


def damage_file(folder):
    path = folder / "train" / "cat" / "2.png"
    path.write_bytes(path.read_bytes()[:60])


def damage_classes(folder):
    (folder / "train" / "eel").mkdir()


def damage_empty(folder):
    for half in ("train", "test"):
        (folder / half / "ape").mkdir()


@pytest.mark.parametrize("damage,words", [
    (damage_size, r"dog/1\.png is 9x9 pixels, the first image 6x5"),
    (damage_file, r"cat/2\.png is not a readable image"),
    (damage_classes, "'eel' is only in one of"), (damage_empty, "train/ape holds no images"),
])  # fmt: skip
def test_bad_image_folder_names_the_file(tmp_path, damage, words):
    write_images(tmp_path)
    damage(tmp_path / "pets")
    with pytest.raises(DataMissing, match=words):
        load("pets", tmp_path)


# biased halves


def places(half, whole):
    """Where each image of a half is in the whole, whose images are all different."""
    index = {image.numpy().tobytes(): i for i, image in enumerate(whole.images)}
    assert len(index) == len(whole)
    found = [index[image.numpy().tobytes()] for image in half.images]
    assert torch.equal(whole.labels[found], half.labels)
    return found


@pytest.mark.parametrize("base,percent", [("digits", 80), ("digits-hard", 80), ("digits", 51), ("digits", 99)])
def test_biased_halves_are_disjoint_and_together_the_whole(base, percent):
    whole, first, last = (load(name) for name in (base, f"{base}-first{percent}", f"{base}-last{percent}"))
    assert (first.name, last.name) == (f"{base}-first{percent}", f"{base}-last{percent}")
    kept = [places(half.train, whole.train) for half in (first, last)]
    assert sorted(kept[0] + kept[1]) == list(range(1397)) and all(k == sorted(k) for k in kept)
    sizes = whole.train.labels.bincount()
    for half, shares in ((first, (percent, 100 - percent)), (last, (100 - percent, percent))):
        expected = sizes * torch.tensor(shares).repeat_interleave(5) / 100
        assert ((half.train.labels.bincount(minlength=10) - expected).abs() <= 0.5).all()
        assert half.mean == whole.mean and half.std == whole.std and half.classes == 10
        assert torch.equal(half.test.images, whole.test.images) and torch.equal(half.test.labels, whole.test.labels)
    # Random within a class, but always the same.
    zeros = [i for i in kept[0] if whole.train.labels[i] == 0]
    assert zeros != (whole.train.labels == 0).nonzero().flatten().tolist()[: len(zeros)]
    assert torch.equal(load(first.name).train.images, first.train.images)


def test_biased_halves_never_change():
    # A fact of the first version: stored networks would be of other halves.
    assert int(load("digits-first80").train.images.long().sum()) == 13998747


def test_biased_halves_of_an_image_folder_and_a_folder_called_so(tmp_path):
    write_images(tmp_path, train=5)
    first, last = (load(f"pets-{which}80", tmp_path) for which in ("first", "last"))
    assert first.train.labels.tolist() == [0] * 4 + [1] and last.train.labels.tolist() == [0] + [1] * 4
    write_images(tmp_path, name="pets-first80", size=(4, 4))
    assert load("pets-first80", tmp_path).shape == (3, 4, 4)
    assert load("pets-last80", tmp_path).shape == (3, 5, 6)


# torchvision's archives


@pytest.fixture
def offline(monkeypatch):
    """torchvision's download fails as it does without a network; the list counts the attempts."""
    attempts = []

    def fail(*args, **kwargs):
        attempts.append(args)
        raise OSError("Network is unreachable")

    import torchvision.datasets.utils as utils

    monkeypatch.setattr(utils.urllib.request, "urlopen", fail)
    return attempts


@pytest.mark.parametrize("name", list(data.archives.CLASSES))
def test_offline_and_missing_says_what_to_put_where(tmp_path, offline, name, capsys):
    with pytest.raises(DataMissing) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert offline and f"{tmp_path}/{name}/{{train,test}}/<class>" in message and "REPAIRLIB_DATA" in message
    assert str(tmp_path / data.DATASETS[name].files) in message and "downloading it failed" in message
    assert [p.name for p in tmp_path.iterdir() if p.name != ".download.lock"] == []


def test_no_download_asks_no_network(tmp_path, offline):
    with pytest.raises(DataMissing, match="'mnist' is not"):
        load("mnist", tmp_path, download=False)
    assert not offline and not list(tmp_path.iterdir())


def test_read_only_root_that_holds_the_data_is_read(tmp_path, monkeypatch, offline):
    raw = write_mnist(tmp_path, monkeypatch)
    for folder in (raw, raw.parent, tmp_path):
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        mnist = load("mnist", tmp_path)
        assert mnist.shape == (1, 28, 28) and len(mnist.train) == 30 and len(mnist.test) == 20 and not offline
        if os.geteuid() != 0:  # root may write anywhere
            with pytest.raises(DataMissing, match="downloading it failed.*REPAIRLIB_DATA"):
                load("svhn", tmp_path)
    finally:
        for folder in (tmp_path, raw.parent, raw):
            folder.chmod(stat.S_IRWXU)


def test_truncated_archive_is_not_used(tmp_path, monkeypatch, offline):
    raw = write_mnist(tmp_path, monkeypatch)
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataMissing, match="'mnist' is not \\(whole\\)"):
        load("mnist", tmp_path)


def test_download_replaces_a_damaged_archive_whole(tmp_path, monkeypatch):
    raw = write_mnist(tmp_path / "root", monkeypatch)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"broken")

    def fetch(archive):
        write_mnist(Path(archive.root), monkeypatch)

    import torchvision

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    assert len(load("mnist", tmp_path / "root").train) == 30
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == [".download.lock", "MNIST"]
    assert len(load("mnist", tmp_path / "root", download=False).test) == 20


def test_cifar_archive_and_image_folder_are_the_same_data(tmp_path, monkeypatch):
    import torchvision

    class Fake:
        def __init__(self, root, train):
            n = 8 if train else 4
            self.data = np.random.RandomState(n).randint(0, 256, (n, 32, 32, 3)).astype(np.uint8)
            self.targets = [i % 2 for i in range(n)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    shrink(monkeypatch, "cifar10", 8, 4)
    archive = load("cifar10", tmp_path / "archive")
    assert archive.shape == (3, 32, 32)
    for half, split in ((archive.train, Fake(None, True)), (archive.test, Fake(None, False))):
        images = [torch.tensor(image).permute(2, 0, 1) for image in split.data]
        places = [next(i for i, image in enumerate(images) if torch.equal(image, each)) for each in half.images]
        assert sorted(places) == list(range(len(images))) != places  # all of them, in another order
        assert half.labels.tolist() == [split.targets[i] for i in places]

    for name, split in (("train", Fake(None, True)), ("test", Fake(None, False))):
        for i, (image, label) in enumerate(zip(split.data, split.targets, strict=True)):
            path = tmp_path / "folder" / "cifar10" / name / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    folder = load("cifar10", tmp_path / "folder")
    assert torch.equal(folder.train.images, archive.train.images) and folder.digest() == archive.digest()
    other = replace(archive, test=archive.test.take(torch.tensor([1, 0, 2, 3])))
    assert other.digest() != archive.digest()


def test_draws_of_a_whole_pass_are_those_of_one_batch_after_the_other(digits):
    names = ["translate", "flip", "cutout", "resize", "rotate"]
    batches = list(iterate(digits, "train", 300, names, generator(5), drop_last=True))
    seed = int(torch.randint(2**62, (), generator=generator(5)))
    draws = generator(seed)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (digits.mean, digits.std))
    for start, (x, _) in zip(range(0, 1200, 300), batches, strict=True):  # one batch after the other gives the same
        alone = augment(digits.train.images[start : start + 300], names, draws)
        assert torch.equal(x, torch.addcmul(-mean / std, alone.float(), 1 / (255 * std)))


@pytest.mark.parametrize("name,words", [("minst", "'mnist'"), ("CIFAR10", "'cifar10'"), ("", "digits"),
                                        ("../pets", "nearest is 'pets'"), ("pet", "'pets'"),
                                        ("cifar100-first50", "'cifar100-first80'.*51 to 99"),
                                        ("-last80", "'svhn-last80'"), ("digits-last080", "'digits-last80'"),
                                        ("pets-frist80", "'pets-first80'")])  # fmt: skip
def test_unknown_name_gives_the_nearest(tmp_path, name, words):
    write_images(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(name, tmp_path)


def test_root_by_option_and_by_environment(tmp_path, monkeypatch):
    write_images(tmp_path / "option")
    write_images(tmp_path / "environment", size=(4, 4))
    monkeypatch.setenv("REPAIRLIB_DATA", str(tmp_path / "environment"))
    assert load("pets").shape == (3, 4, 4)
    assert load("pets", tmp_path / "option").shape == (3, 5, 6)
    monkeypatch.delenv("REPAIRLIB_DATA")
    assert data.data_root() == data.project_root() / "data"


def test_installed_elsewhere_the_working_folder_is_the_project(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site-packages" / "companion" / "runs" / "files.py"))
    monkeypatch.chdir(tmp_path)
    assert data.project_root() == tmp_path


def test_to_moves_everything(digits):
    meta = digits.to("meta")
    assert meta.device.type == meta.test.labels.device.type == "meta" and meta.mean == digits.mean


def test_real_mnist_where_it_is_at_hand():
    try:
        mnist = load("mnist", download=False)
    except DataMissing:
        pytest.skip("MNIST is not in REPAIRLIB_DATA")
    assert len(mnist.train) == 60_000 and len(mnist.test) == 10_000 and mnist.shape == (1, 28, 28)
    assert mnist.mean[0] == pytest.approx(0.1307, abs=1e-4) and mnist.std[0] == pytest.approx(0.3081, abs=1e-4)
    assert mnist.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
