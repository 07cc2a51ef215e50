"""Data sets in their on-disk forms, and the batches made of them."""
import io
import os
import pickle
import re
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from common import data, distributed
from common.data import Recipe, sources
from common.data import images as image_files
from common.data.memory import MemoryBatches, draw_boxes, resize_boxes
from common.data.recipe import STATISTICS, to_uint8
from common.errors import DataError, RunError
from resizemix import main as resizemix

CPU = torch.device("cpu")
HALF = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3)


def make_arrays(per_class=12, classes=4, size=32, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    images = rng.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    return images, labels


def save_npz(path, per_class=12, classes=4, **changes):
    images, labels = make_arrays(per_class, classes)
    tests, test_labels = make_arrays(3, classes, seed=1)
    np.savez(path, **({"train_images": images, "train_labels": labels, "test_images": tests,
                       "test_labels": test_labels} | changes))
    return path


def save_folders(root, sizes=(32, 32), per_class=4, classes=("cat", "dog")):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (*sizes, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def load(name, place, **options):
    options = {"batch_size": 10, "device": CPU, "seed": 3} | options
    recipe = Recipe(**{field: options.pop(field) for field in vars(Recipe()) if field in options})
    return data.load(name, str(place), recipe, **options)


def in_memory(pixels, labels, batch_size, seed=0, **recipe):
    recipe = Recipe(**{"crop": "padded", "padding": 0, "mean": HALF.mean, "std": HALF.std} | recipe)
    return MemoryBatches(pixels, labels, recipe, size=pixels.shape[1:3], batch_size=batch_size,
                         device=CPU, seed=seed)


def train_images(batches, epoch=0):
    batches.set_epoch(epoch)
    return torch.cat([images for images, _ in batches])


# ------------------------------------------------------------------------------------- on disk

def test_digits_are_real_and_split_evenly():
    train, test, info = load("digits", "")
    assert (info.num_classes, info.image_size, info.num_train + info.num_test) == (10, 32, 1797)
    labels = torch.cat([labels for _, labels in test])
    assert torch.bincount(labels).min() >= 34
    images = train_images(train)
    assert abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.1


def test_npz_and_folder_hold_the_same(tmp_path):
    save_folders(tmp_path / "f")
    files = sorted((tmp_path / "f" / "train").rglob("*.png"))
    stored = np.stack([np.asarray(Image.open(f)) for f in files])
    tests = np.stack([np.asarray(Image.open(f))
                      for f in sorted((tmp_path / "f" / "test").rglob("*.png"))])
    np.savez(tmp_path / "a.npz", train_images=stored, train_labels=np.repeat([0, 1], 4),
             test_images=tests, test_labels=np.repeat([0, 1], 4), classes=["cat", "dog"])
    one, _, folder = load("folder", tmp_path / "f")
    two, _, npz = load("npz", tmp_path / "a.npz")
    assert folder.classes == npz.classes == ["cat", "dog"] and folder.mean == npz.mean
    assert torch.equal(train_images(one), train_images(two))


def test_cifar_in_its_three_forms(tmp_path, monkeypatch):
    images, labels = make_arrays(10, 10)
    (tmp_path / "npz").mkdir()
    save_npz(tmp_path / "npz" / "cifar10.npz", per_class=10, classes=10)
    reference = load("cifar10", tmp_path / "npz")[0]
    assert torch.equal(train_images(load("cifar10", tmp_path / "npz" / "cifar10.npz")[0]),
                       train_images(reference))

    classes = [f"c{i}" for i in range(10)]
    for part, (pixels, answer) in (("train", (images, labels)),
                                   ("test", make_arrays(3, 10, seed=1))):
        for i, (image, label) in enumerate(zip(pixels, answer, strict=True)):
            folder = tmp_path / "dirs" / "cifar10" / part / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:03}.png")
    assert torch.equal(train_images(load("cifar10", tmp_path / "dirs")[0]), train_images(reference))

    source = sources.torchvision.datasets.CIFAR10
    base = tmp_path / "archive" / source.base_folder
    base.mkdir(parents=True)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return name, sources.torchvision.datasets.utils.calculate_md5(base / name)

    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    tests, answers = make_arrays(3, 10, seed=1)
    monkeypatch.setattr(source, "train_list", [
        write("data_batch_1", {"data": flat, "labels": labels.tolist()})])
    monkeypatch.setattr(source, "test_list", [
        write("test_batch", {"data": tests.transpose(0, 3, 1, 2).reshape(30, -1),
                             "labels": answers.tolist()})])
    name, md5 = write("batches.meta", {"label_names": classes})
    monkeypatch.setattr(source, "meta", source.meta | {"filename": name, "md5": md5})
    for place in (tmp_path / "archive", base):
        assert torch.equal(train_images(load("cifar10", place)[0]), train_images(reference))
    (base / "data_batch_1").write_bytes(b"cos\nsystem\n(S'echo harm'\ntR.")      # never unpickled
    with pytest.raises(DataError, match="cifar-10-batches-py: missing or damaged"):
        load("cifar10", tmp_path / "archive")


@pytest.mark.parametrize("sorted_val", [False, True])
def test_tiny_imagenet_layouts(tmp_path, sorted_val):
    rng = np.random.default_rng(0)
    names = ["n01", "n02"]
    root = tmp_path / "tiny-imagenet-200"
    notes = []
    for k, name in enumerate(names):
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
                root / "train" / name / "images" / f"{name}_{i}.JPEG")
        folder = root / "val" / (f"{name}/images" if sorted_val else "images")
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(2):
            grey = np.full((64, 64, 3), 50 + 100 * k, np.uint8)
            Image.fromarray(grey).save(folder / f"v{k}{i}.JPEG")
            notes.append(f"v{k}{i}.JPEG\t{name}\t0\t0\t62\t62")
    if not sorted_val:
        (root / "val" / "val_annotations.txt").write_text("\n".join(notes) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\n")
    train, test, info = load("tiny-imagenet-200", tmp_path, batch_size=4)
    assert info.classes == ["goldfish", "bullfrog"] and info.image_size == 64
    images, labels = next(iter(test))
    assert torch.equal((images.mean((1, 2, 3)) > 0).long(), labels)        # dark are 0, bright 1
    if sorted_val:                          # by hand: the notes stay, and perhaps a folder
        (root / "val" / "val_annotations.txt").write_text("gone.JPEG\tn01\t0\t0\t62\t62\n")
        (root / "val" / "images").mkdir()
        assert load("tiny-imagenet-200", tmp_path)[2].num_test == 4
        shutil.copy(root / "val" / "n01" / "images" / "v00.JPEG", root / "val" / "images")
        with pytest.raises(DataError, match="val/images: a class that the training images lack"):
            load("tiny-imagenet-200", tmp_path)


def test_images_of_other_sizes_are_resized(tmp_path):
    save_folders(tmp_path, sizes=(48, 40))
    Image.new("RGB", (40, 44)).save(tmp_path / "train" / "dog" / "2.png")
    with pytest.raises(DataError, match="image_size"):
        load("folder", tmp_path, batch_size=4)
    images, _ = next(iter(load("folder", tmp_path, batch_size=4, image_size=24)[0]))
    assert images.shape[2:] == (24, 24)


def test_images_that_are_not_square_keep_their_shape(tmp_path):
    root = save_folders(tmp_path, sizes=(32, 48))
    train, test, info = load("folder", tmp_path, batch_size=4)
    assert next(iter(train))[0].shape[2:] == next(iter(test))[0].shape[2:] == (32, 48)
    assert (info.image_size, info.width) == (32, 48) and "32×48 pixels" in str(info)
    for file in (root / "test").rglob("*.png"):
        with Image.open(file) as image:
            image.crop((0, 0, 32, 32)).save(file)
    with pytest.raises(DataError, match="have 48×32 pixels, test images 32×32"):
        load("folder", tmp_path, batch_size=4)
    assert next(iter(load("folder", tmp_path, batch_size=4, image_size=24)[1]))[0].shape[3] == 24


def test_test_images_of_another_size_are_resized(tmp_path):
    file = save_npz(tmp_path / "a.npz", test_images=np.zeros((12, 48, 48, 3), np.uint8))
    for part in load("npz", file, image_size=32)[:2]:
        assert next(iter(part))[0].shape[2:] == (32, 32)


# ------------------------------------------------------------------------------------- bad data

def test_faults_name_the_file(tmp_path):
    def fault(name, place, match, **options):
        with pytest.raises(DataError, match=match):
            load(name, place, **options)

    fault("npz", tmp_path / "none.npz", "none.npz: No such file")
    (tmp_path / "empty.npz").write_bytes(b"")
    fault("npz", tmp_path / "empty.npz", "empty.npz: damaged")
    good = save_npz(tmp_path / "good.npz")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:5000])
    fault("npz", tmp_path / "cut.npz", "cut.npz: damaged")
    flipped = bytearray(good.read_bytes())
    flipped[len(flipped) // 3] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    fault("npz", tmp_path / "flipped.npz", "flipped.npz: damaged")
    for labels, match in ((np.zeros(3, int), "train_labels"), (np.full(48, -1), "train_labels"),
                          (np.array([{}] * 48), "damaged")):          # objects would be pickles
        fault("npz", save_npz(tmp_path / "odd.npz", train_labels=labels), f"odd.npz: .*{match}")

    fault("folder", tmp_path / "absent", "absent/train: No such file")
    save_folders(tmp_path / "plain")
    fault("folder", tmp_path / "plain" / "train", "train/train: no such folder.*--val_split 0.2")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    fault("folder", tmp_path / "bare", "bare/train: holds no class")
    root = save_folders(tmp_path / "f")
    (root / "train" / "emu").mkdir()
    fault("folder", root, "train/emu: a class without images")
    (root / "train" / "emu").rmdir()
    picture = root / "train" / "dog" / "2.png"
    picture.write_bytes(picture.read_bytes()[:100])
    fault("folder", root, "dog/2.png: damaged, or not an image")
    fault("cifar10", save_folders(tmp_path / "g"), "2 classes: not cifar10")


@pytest.mark.parametrize("name", ["folder", "imagenet"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_folder_without_test_images_is_split(tmp_path, name, direct):
    root = save_folders(tmp_path, per_class=10)
    shutil.copytree(root / "train" / "dog", root / "train" / "emu")
    for i in range(5):
        (root / "train" / "emu" / f"{i}.png").unlink()
    with pytest.raises(DataError, match="test: there are test images, which --val_split"):
        load(name, root, val_split=0.2)
    shutil.rmtree(root / "test")
    with pytest.raises(DataError, match="--val_split 0.2 tests on a fifth"):
        load(name, root)
    place = root / "train" if direct else root
    options = {"val_split": 0.2, "image_size": 32, "loader": "torch"}
    train, test, info = load(name, place, **options)
    assert (info.num_train, info.num_test, info.classes) == (20, 5, ["cat", "dog", "emu"])
    assert torch.cat([labels for _, labels in test]).tolist() == [0, 0, 1, 1, 2]
    assert load(name, place, **options)[2].fingerprint == info.fingerprint
    assert load(name, place, **options, seed=4)[2].fingerprint != info.fingerprint
    if name == "imagenet":
        assert not set(train.data.files) & set(test.data.files)
        with pytest.raises(RunError, match="--val_split is for .* digits has test images"):
            load("digits", "", val_split=0.2)


# ------------------------------------------------------------------------------------- batches

def test_subsets_are_balanced_and_seeded(tmp_path):
    place = save_npz(tmp_path / "a.npz")
    train, _, info = load("npz", place, labels_per_class=5, valid_labels_per_class=2)
    assert torch.equal(torch.bincount(train.labels), torch.full((4,), 5))
    assert info.valid.count == 8 and info.num_train == 20
    same = load("npz", place, labels_per_class=5, valid_labels_per_class=2)[0]
    other = load("npz", place, labels_per_class=5, valid_labels_per_class=2, seed=4)[0]
    assert torch.equal(train.windows, same.windows)
    assert not torch.equal(train.windows, other.windows)
    validation = {image.numpy().tobytes() for image in info.valid.windows[:, 0, 0]}
    training = {image.numpy().tobytes() for image in train.windows[:, 2, 2]}
    assert len(validation) == 8 and not validation & training


def test_more_is_asked_for_than_there_is(tmp_path, capsys):
    place = save_npz(tmp_path / "a.npz")
    train = load("npz", place, labels_per_class=20, batch_size=100, drop_last=True)[0]
    assert [len(labels) for _, labels in train] == [48]
    said = capsys.readouterr().err
    assert "--labels_per_class 20: class 0 has only 12 images" in said
    assert "--batch_size 100 is above the 48 training images" in said
    resizemix.main(["--dataset", "npz", "--data_dir", str(place), "--preview",
                    str(tmp_path / "mixed.png"), "--initial_channels", "4", "--device", "cpu"])
    assert (tmp_path / "mixed.png").stat().st_size > 9999


@pytest.mark.parametrize("first", [False, True])
def test_dali_and_torch_give_the_same_batches(tmp_path, first):
    pytest.importorskip("nvidia.dali")
    place = save_npz(tmp_path / "a.npz")

    def darken(images, generator):
        return images // torch.randint(1, 4, (len(images), 1, 1, 1), generator=generator).byte()

    one, two = (load("npz", place, loader=loader, transform=darken, transform_first=first)[0]
                for loader in ("torch", "dali"))
    for epoch, start in ((0, 0), (1, 0), (1, 2)):
        one.set_epoch(epoch, start)
        two.set_epoch(epoch, start)
        batches = list(zip(one, two, strict=True))
        assert len(batches) == 5 - start
        for (images, labels), (others, same) in batches:
            assert torch.equal(images, others) and torch.equal(labels, same)


def test_augmentation_is_flip_and_padded_crop(tmp_path):
    images, labels = make_arrays(200, 1)
    train = in_memory(images, labels, 200, padding=2, flip=True)
    batch, _ = next(iter(train))
    batch = to_uint8(batch, HALF)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    counts = np.zeros((2, 5, 5), int)
    for i, image in zip(train.order.tolist(), batch, strict=True):
        found = [(f, y, x) for f in range(2) for y in range(5) for x in range(5)
                 if np.array_equal(padded[i, y:y + 32, x:x + 32][:, ::1 - 2 * f],
                                   image.permute(1, 2, 0))]
        assert len(found) == 1
        counts[found[0]] += 1
    assert counts.sum((1, 2)).min() > 60                                # flips: about half
    assert counts.sum((0, 2)).min() > 20 and counts.sum((0, 1)).min() > 20   # all five offsets


def test_order_depends_on_seed_and_epoch_and_resumes_inside_an_epoch(tmp_path):
    train = load("npz", save_npz(tmp_path / "a.npz"))[0]
    first, second = train_images(train), train_images(train, 1)
    assert not torch.equal(first, second) and torch.equal(first, train_images(train))
    assert len(first) == 48                                             # the last partial batch too
    train.set_epoch(0, start_step=3)
    assert torch.equal(first[30:], torch.cat([images for images, _ in train]))
    assert sorted(train.order.tolist()) == list(range(48))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_each_batch(tmp_path, monkeypatch, world):
    place = save_npz(tmp_path / "a.npz")
    whole, tests, _ = load("npz", place, batch_size=12)
    alone, in_order = train_images(whole), torch.cat([images for images, _ in tests])
    parts, test_parts = [], []
    for rank in range(world):
        monkeypatch.setattr(distributed, "world", lambda: world)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        train, test, _ = load("npz", place, batch_size=12)
        parts.append(list(train))
        test_parts += [images for images, _ in test]
    for step in range(len(parts[0])):
        together = torch.stack([part[step][0] for part in parts], 1).flatten(0, 1)
        assert torch.equal(together[:12], alone[step * 12:step * 12 + 12])
    seen = torch.cat(test_parts)
    assert len(seen) == len(in_order)
    assert {i.numpy().tobytes() for i in seen} == {i.numpy().tobytes() for i in in_order}


def test_partial_training_batch_keeps_ranks_in_step(tmp_path, monkeypatch):
    place = save_npz(tmp_path / "a.npz", per_class=12, classes=4)       # 48 = 4 × 10 + 8, world 3
    monkeypatch.setattr(distributed, "world", lambda: 3)
    sizes = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sizes.append([len(labels) for _, labels in load("npz", place, batch_size=15)[0]])
    assert sizes == [[5, 5, 5, 1]] * 3


def test_reflected_padding():
    images, labels = make_arrays(50, 1)
    for first in (False, True):
        train = in_memory(images, labels, 50, padding=4, padding_mode="reflect",
                          transform_first=first, transform=lambda images, generator: images)
        batch = to_uint8(next(iter(train))[0], HALF)
        padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), "reflect")
        for i, (y, x), image in zip(train.order.tolist(), train.shifts.T.tolist(), batch,
                                    strict=True):
            assert np.array_equal(padded[i, y:y + 32, x:x + 32], image.permute(1, 2, 0))


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 20), (32, 32), (75, 75)])
def test_resized_crops_are_torchvisions(filter, size):
    images = torch.from_numpy(make_arrays(6, 1, size=32)[0]).permute(0, 3, 1, 2)
    boxes = torch.tensor([[0, 3, 5, 0, 20, 9], [0, 8, 1, 31, 0, 3], [32, 20, 27, 1, 12, 10],
                          [32, 20, 9, 1, 30, 29]])
    ours = resize_boxes(images, boxes, size, filter)
    mode = TF.InterpolationMode(filter)
    for image, box, one in zip(images, boxes.T.tolist(), ours, strict=True):
        expected = TF.resized_crop(image.float(), *box, size, mode, antialias=True)
        assert (expected.clamp(0, 255) - one).abs().max() <= 0.51


def test_drawn_boxes_are_torchvisions_in_distribution():
    scale, ratio = (0.3, 0.9), (0.6, 1.5)
    for height, width in ((40, 40), (40, 10)):
        generator = torch.Generator().manual_seed(0)
        ours = draw_boxes(4000, (height, width), scale, ratio, generator).double()
        image = torch.empty(3, height, width)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio)
                               for _ in range(4000)]).double().T
        assert torch.allclose(ours.mean(1), theirs.mean(1), atol=0.06 * height ** 0.5)
        assert torch.allclose(ours.std(1), theirs.std(1), rtol=0.08, atol=0.02)
        assert (ours[:2] >= 0).all() and (ours[0] + ours[2]).max() <= height
        assert (ours[1] + ours[3]).max() <= width and ours[2:].min() > 0


def test_resized_crops_of_a_set(tmp_path):
    place = save_npz(tmp_path / "a.npz")
    crop = {"crop": "resized", "scale": (0.3, 0.9), "interpolation": "bicubic"}
    train, test, info = load("npz", place, image_size=48, flip=False, **crop)
    images, labels = next(iter(train))
    assert images.shape == (10, 3, 48, 48) and info.image_size == 48
    stored = torch.from_numpy(make_arrays()[0]).permute(0, 3, 1, 2)
    for place_of, image in enumerate(to_uint8(images, info)):
        box = train.boxes[:, place_of].tolist()
        expected = TF.resized_crop(stored[train.order[place_of]].float(), *box, [48, 48],
                                   TF.InterpolationMode.BICUBIC, antialias=True)
        assert (expected.clamp(0, 255) - image).abs().max() <= 0.51
    whole = to_uint8(next(iter(test))[0], info)
    pixels = torch.from_numpy(make_arrays(3, 4, seed=1)[0][:10]).permute(0, 3, 1, 2).float()
    expected = TF.resize(pixels, [48, 48], TF.InterpolationMode.BICUBIC, antialias=True)
    assert (expected.clamp(0, 255) - whole).abs().max() <= 0.51
    assert not torch.equal(train_images(train, 0), train_images(train, 1))
    unsized = load("npz", place, **crop)[0]
    assert next(iter(unsized))[0].shape[2:] == (32, 32)


@pytest.mark.parametrize("options", [
    {"padding_mode": "reflect"}, {"image_size": 24, "crop": "resized", "scale": (0.2, 1)}],
    ids=["reflect", "resized_crop"])
def test_dali_makes_these_crops_too(tmp_path, options):
    pytest.importorskip("nvidia.dali")
    place = save_npz(tmp_path / "a.npz")
    for filter in ("bilinear", "bicubic"):
        one, two = (train_images(load("npz", place, loader=loader, mean=(0, 0, 0),
                                      std=(1 / 255,) * 3, interpolation=filter, **options)[0])
                    for loader in ("torch", "dali"))
        assert torch.equal(one, two)


def test_normalisation_round_trip():
    images, labels = make_arrays(4, 2)
    mean, std = STATISTICS["cifar100"]
    batches = in_memory(images, labels, 8, seed=None, mean=mean, std=std)
    normal, _ = next(iter(batches))
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 -
                torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(normal, expected, atol=1e-5)
    back = to_uint8(normal, SimpleNamespace(mean=mean, std=std))
    assert np.array_equal(back.permute(0, 2, 3, 1), images)


# --------------------------------------------------------------------------- what image files mean

def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_samples_of_every_mode_mean_the_same():
    """A grey ramp in every mode: the same picture from `decode` and from what DALI is fed."""
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1)))
    deep = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    files = [encoded(ramp.convert(mode), kind) for mode, kind in (
        ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "TIFF"), ("RGBA", "PNG"),
        ("CMYK", "TIFF"), ("L", "GIF"), ("L", "PPM"))] + [
        encoded(deep, "PNG"), encoded(deep, "TIFF"), encoded(deep, "PPM")]
    for file in files:
        pixels = np.asarray(image_files.decode(file)).astype(int)
        assert np.abs(pixels - np.asarray(ramp)[..., None]).max() <= 3
        header, body = image_files.for_dali(file).tobytes().split(b"255\n", 1)
        assert header == b"P6 64 48 " and body == np.asarray(image_files.decode(file)).tobytes()
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="no agreed range"):
            image_files.decode(encoded(ramp.convert(mode), "TIFF"))
    assert image_files.for_dali(encoded(ramp.convert("CMYK"), "JPEG")).tobytes()[:3] == b"P6 "
    assert not image_files.is_plain_jpeg(encoded(ramp.convert("CMYK"), "JPEG"))
    assert image_files.is_plain_jpeg(encoded(ramp, "JPEG"))
    assert image_files.for_dali(encoded(ramp, "JPEG")).tobytes() == encoded(ramp, "JPEG")


def test_transparency_is_white_and_orientation_is_honoured():
    hidden = np.zeros((4, 6, 4), np.uint8)
    assert np.asarray(image_files.decode(encoded(Image.fromarray(hidden), "PNG"))).min() == 255
    exif = Image.Exif()
    exif[0x112] = 6
    for kind in ("PNG", "JPEG"):
        data = encoded(Image.new("RGB", (6, 4)), kind, exif=exif)
        assert image_files.decode(data).size == (4, 6)


def test_which_files_a_class_folder_holds(tmp_path, capsys):
    root = save_folders(tmp_path / "f", per_class=2)
    cat = root / "train" / "cat"
    for place in (cat / ".hidden.png", cat / "notes.txt"):
        place.write_bytes(b"nothing")
    (root / "train" / "__MACOSX").mkdir()
    (cat / "folder.png").mkdir()
    (cat / "circle").symlink_to(cat)
    os.mkfifo(cat / "pipe.png")
    Image.new("L", (32, 32)).save(cat / "a.pgm")
    shutil.copytree(root / "train" / "dog", tmp_path / "elsewhere")
    (cat / "linked").symlink_to(tmp_path / "elsewhere")
    shutil.rmtree(root / "test" / "dog")
    assert load("folder", root)[2].num_train == 7
    said = capsys.readouterr().err
    assert "2 files are no images and left out" in said and "one class" not in said
    (tmp_path / "deep").mkdir()
    for part in ("train", "test"):
        shutil.copytree(root / "train", tmp_path / "deep" / part / "images", symlinks=True,
                        ignore=shutil.ignore_patterns("pipe.png"))
    load("folder", tmp_path / "deep")
    assert "one class, images; class folders lie directly in" in capsys.readouterr().err
    (root / "test" / "emu").mkdir()
    shutil.copy(cat / "0.png", root / "test" / "emu")
    for name in ("folder", "imagenet"):
        with pytest.raises(DataError, match="emu: a class that the training images lack"):
            load(name, root)


def test_faults_of_npz_are_one_line(tmp_path, capsys):
    for name, content in (("random", os.urandom(999)), ("array", encoded(
            Image.new("L", (9, 9)), "PNG"))):
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(DataError, match="damaged, or not an .npz file of train_images"):
            load("npz", tmp_path / f"{name}.npz")
    with pytest.raises(DataError, match="Is a directory"):
        load("npz", tmp_path)
    with np.load(save_npz(tmp_path / "n.npz")) as stored:
        np.savez(tmp_path / "named.npz", **stored, classes=np.array([b"a", b"b", b"c", b"d"]))
    assert load("npz", tmp_path / "named.npz")[2].classes == [*"abcd"]
    for match, changes in (("uint8", {"train_images": np.uint8(3)}),
                           ("uint8", {"train_images": np.zeros((48, 0, 32, 3), np.uint8)}),
                           ("beyond the 1000", {"train_labels": np.array([0] * 47 + [2**62])})):
        with pytest.raises(DataError, match=match):
            load("npz", save_npz(tmp_path / "odd.npz", **changes))
    column = np.repeat(np.arange(4), 12)[:, None]
    assert load("npz", save_npz(tmp_path / "k.npz", train_labels=column))[2].num_train == 48
    load("npz", save_npz(tmp_path / "one.npz", train_labels=np.repeat([1, 2, 3, 3], 12)))
    assert "no training image of class 0" in capsys.readouterr().err
    whole, patched = save_npz(tmp_path / "whole.npz").read_bytes(), tmp_path / "patched.npz"
    for field, value, match in ((0, 1, "encrypted"), (2, 99, "compression")):
        changed = bytearray(whole)          # zip's flags and method, in each head
        for head, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            for found in re.finditer(head, whole):
                changed[found.start() + at + field] = value
        patched.write_bytes(changed)
        with pytest.raises(DataError, match=f"patched.npz: damaged, or not .*{match}"):
            load("npz", patched)
    with zipfile.ZipFile(patched, "w") as file:
        for name in sources.ARRAYS:
            file.writestr(f"{name}.npy", b"\x93NUMPY\1\0\x20\0{'descr': 7" + bytes(99))
    np.save(tmp_path / "single.npy", np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    for name in ("patched", "single"):
        with pytest.raises(DataError, match=f"{name}.npz: damaged, or not an .npz file of"):
            load("npz", tmp_path / f"{name}.npz")
    with pytest.raises(DataError, match="~no-such-user"):
        load("npz", "~no-such-user/x.npz")
