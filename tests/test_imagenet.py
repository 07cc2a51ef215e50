"""Streaming loaders on a small ImageNet-like set of real photographs, as folders and RecordIO."""
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from pictures import HAS_DALI, make_cub, make_dogs, make_photos, pack, photographs
from PIL import Image

from common import data
from common.data import Recipe, recordio
from common.data.lists import as_files, list_classes
from common.data.recordio import RecordFile
from common.data.stream import DaliStream, TorchStream
from common.errors import DataError, RunError
from resizemix import randaugment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES, PER_CLASS = 8, 5                   # 40 images; 41 with the odd one
LOADERS = pytest.mark.parametrize("loader", [
    pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")),
    "torch"])
SOURCES = pytest.mark.parametrize("source", ["folders", "records"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train/ with class folders and, beside it, train.rec and train.idx in a folder each."""
    root = tmp_path_factory.mktemp("photos")
    make_photos(root / "folders" / "train", PER_CLASS, (60, 120))
    extra = root / "folders" / "train" / "class 3" / "odd.jpg"      # 41 images: shards differ
    shutil.copy(root / "folders" / "train" / "class 3" / "0.jpg", extra)
    pack(root / "folders" / "train", root / "records" / "train")
    return root


def stream(root, loader, device="cpu", *, batch_size=8, train=True, image_size=32, workers=2,
           **options):
    """Batches of train.rec or train/ in the folder `root`, or of Files."""
    options = {"mean": MEAN, "std": STD, "seed": 1, "crop": "resized", "test_crop": "centre",
               "flip": True, "interpolation": "lanczos"} | options
    recipe = Recipe(**{field: options.pop(field) for field in vars(Recipe()) if field in options})
    if isinstance(root, Path):
        root = RecordFile(root / "train.rec") if any(root.glob("train.*")) else \
            as_files(root / "train", list_classes(root / "train"))
    kind = DaliStream if loader == "dali" else TorchStream
    return kind(root, recipe, image_size=image_size, batch_size=batch_size, device=device,
                workers=workers, train=train, **options)


def epoch(loader, number=0, start_step=0):
    loader.set_epoch(number, start_step)
    return list(loader)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, second, strict=True))


@LOADERS
@SOURCES
def test_training_batches(photos, source, loader, device):
    batches = stream(photos / source, loader, device)
    assert len(batches) == 6 and batches.count == 41
    assert batches.data.classes == [f"class {i}" for i in range(CLASSES)]
    first = epoch(batches)
    assert [len(labels) for _, labels in first] == [8] * 5 + [1]
    for images, labels in first:
        assert images.shape == (len(labels), 3, 32, 32) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and images.device.type == labels.device.type
        assert images.device.type == device.type
    labels = torch.cat([labels for _, labels in first])
    assert torch.bincount(labels).tolist() == [5, 5, 5, 6, 5, 5, 5, 5]
    assert labels.tolist() != sorted(labels.tolist())
    pixels = torch.cat([images for images, _ in first]) * torch.tensor(STD, device=device).view(
        3, 1, 1) + torch.tensor(MEAN, device=device).view(3, 1, 1)
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5 and pixels.std() > 0.1


@LOADERS
@SOURCES
def test_partial_batches_may_be_dropped(photos, source, loader):
    batches = stream(photos / source, loader, batch_size=12, drop_last=True)
    assert [len(labels) for _, labels in epoch(batches)] == [12] * 3 and len(batches) == 3
    assert len(stream(photos / source, loader, batch_size=12, drop_last=True, train=False)) == 4
    assert [len(labels) for _, labels in epoch(stream(
        photos / source, loader, batch_size=50, drop_last=True))] == [41]


@LOADERS
@SOURCES
def test_an_epoch_is_a_function_of_seed_and_number(photos, source, loader):
    batches = stream(photos / source, loader)
    history = [epoch(batches, number) for number in range(3)]
    assert not same(history[0], history[1])
    resumed = stream(photos / source, loader, workers=1)
    assert same(epoch(resumed, 2), history[2]) and same(epoch(resumed, 1), history[1])
    assert same(epoch(resumed, 1, start_step=2), history[1][2:])
    assert not same(epoch(stream(photos / source, loader, seed=2)), history[0])


@LOADERS
@SOURCES
@pytest.mark.parametrize("world, batch_size", [(2, 8), (2, 40), (3, 42)])
def test_evaluation_counts_every_image_once(photos, source, loader, world, batch_size):
    shards = [stream(photos / source, loader, train=False, rank=rank, world=world,
                     batch_size=batch_size) for rank in range(world)]
    parts = [epoch(shard) for shard in shards]
    whole = epoch(stream(photos / source, loader, train=False, batch_size=64))
    assert [len(part) for part in parts] == [len(shard) for shard in shards]
    together = [torch.cat([batch[k] for part in parts for batch in part]) for k in range(2)]
    assert torch.equal(together[1], whole[0][1])
    assert torch.equal(together[0], whole[0][0])


@LOADERS
@SOURCES
def test_ranks_take_equal_steps_and_all_images(photos, source, loader):
    """41 images on 2 ranks, 20 a step each: 21 images a rank, so both take a second step."""
    shards = [stream(photos / source, loader, batch_size=40, rank=rank, world=2)
              for rank in range(2)]
    for number in range(2):
        parts = [epoch(shard, number) for shard in shards]
        assert [[len(labels) for _, labels in part] for part in parts] == [[20, 1]] * 2
        labels = torch.cat([labels for part in parts for _, labels in part])
        seen = torch.bincount(labels) - torch.tensor([5, 5, 5, 6, 5, 5, 5, 5])
        assert seen.min() == 0 and seen.sum() == 1                  # one image is seen twice


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
@SOURCES
@pytest.mark.parametrize("image_size", [32, 224])
def test_evaluation_of_both_loaders_agrees(photos, source, image_size):
    """Decoders and filters are the same; what is left is the rounding of their sums and edges."""
    options = {"train": False, "image_size": image_size, "mean": (0, 0, 0), "std": (1 / 255,) * 3}
    dali, pillow = (epoch(stream(photos / source, loader, **options))
                    for loader in ("dali", "torch"))
    for (images, labels), (others, other_labels) in zip(dali, pillow, strict=True):
        assert torch.equal(labels, other_labels)
        assert (images - others).abs().mean((1, 2, 3)).max() < 3    # of 255


@LOADERS
def test_training_crops(tmp_path, loader):
    """A ramp shows which crop was taken: areas and aspects as drawn, half of them mirrored."""
    width, height = 200, 150
    ramps(tmp_path, width, height)
    batches = stream(tmp_path, loader, batch_size=64, mean=(0, 0, 0), std=(1 / 255,) * 3)
    images = torch.cat([epoch(batches, number)[0][0] for number in range(4)])
    across = (images[:, 0, 16, 28] - images[:, 0, 16, 3]) * 32 / 25
    down = (images[:, 1, 28, 16] - images[:, 1, 3, 16]) * 32 / 25
    area, aspect = across.abs() * down / (width * height), across.abs() / down
    assert 0.07 < area.min() < 0.2 and 0.8 < area.max() < 1.03
    assert 0.42 < area.mean() < 0.58
    assert 0.7 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.43
    assert 0.35 < (across < 0).float().mean() < 0.65
    batches = stream(tmp_path, loader, batch_size=64, scale=(0.9, 1), mean=(0, 0, 0),
                     std=(1 / 255,) * 3)
    images = epoch(batches)[0][0]
    across, down = images[:, 0].amax((1, 2)), images[:, 1].amax((1, 2))
    assert (across * down / (width * height)).min() > 0.85


@LOADERS
@pytest.mark.parametrize("options", [{"color_jitter": 0.4}, {"transform": randaugment.transform}],
                         ids=["color_jitter", "transform"])
def test_further_augmentation(photos, loader, options):
    plain = epoch(stream(photos / "folders", loader))
    batches = stream(photos / "folders", loader, **options)
    changed = epoch(batches)
    assert not same(plain, changed) and same(changed, epoch(batches))
    assert torch.equal(torch.cat([labels for _, labels in plain]),
                       torch.cat([labels for _, labels in changed]))


RAW = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}


def ramps(root, width=200, height=150, count=64):
    """PNGs whose first channel is the column, the second the row, as a set of one class."""
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width), np.arange(height)[:, None]
    (root / "train" / "ramp").mkdir(parents=True)
    for number in range(count):
        Image.fromarray(ramp).save(root / "train" / "ramp" / f"{number}.png")
    return root


def extents(images):
    """Width and height (N, 2) of what 56×56 images of ramps show, in pixels of the file."""
    across = (images[:, 0, 28, 50] - images[:, 0, 28, 5]) * 56 / 45
    return torch.stack([across.abs(), (images[:, 1, 50, 28] - images[:, 1, 5, 28]) * 56 / 45], 1)


@LOADERS
def test_crop_after_resizing(tmp_path, loader):
    """Of 200×150 pixels made 64×64 (square) or 85×64 (shorter), 56×56 are shown."""
    ramps(tmp_path)
    for resize, shown in (("square", (200 * 56 / 64, 150 * 56 / 64)),
                          ("shorter", (200 * 56 / 85, 150 * 56 / 64))):
        batches = stream(tmp_path, loader, batch_size=64, image_size=56, crop="random",
                         resize=resize, interpolation="bilinear", **RAW)
        images = epoch(batches)[0][0]
        assert torch.allclose(extents(images), torch.tensor(shown).expand(64, 2), atol=2)
        corner = torch.stack([images[:, 0].amin((1, 2)), images[:, 1].amin((1, 2))])
        slack = torch.tensor([200 - shown[0], 150 - shown[1]])
        assert corner.amin(1).max() < 4 and (corner.amax(1) > slack - 4).all()  # all places occur
        assert (corner.amax(1) < slack + 2).all()


@LOADERS
def test_all_places_of_a_crop_are_alike(tmp_path, loader):
    ramps(tmp_path)
    batches = stream(tmp_path, loader, batch_size=64, image_size=56, crop="random",
                     resize="square", interpolation="bilinear", **RAW)
    images = torch.cat([epoch(batches, number)[0][0] for number in range(4)])
    places = (images[:, 0].amin((1, 2)) * 64 / 200).round()
    ends = torch.isin(places, torch.tensor([0.0, 8.0])).float().mean()
    assert set(places.tolist()) == set(range(9)) and 0.15 < ends < 0.3, ends    # 2/9; once 1/8


@LOADERS
def test_training_images_as_in_tests(tmp_path, loader):
    """What a linear probe is fitted on."""
    ramps(tmp_path, count=8)
    options = {"image_size": 56, "crop": "centre", "resize": "shorter", "flip": False} | RAW
    fitted, tested = (epoch(stream(tmp_path, loader, train=train, **options))[0][0]
                      for train in (True, False))
    assert torch.equal(fitted, tested)                      # all ramps are the same


@LOADERS
@pytest.mark.parametrize("resize", [None, "shorter"])
def test_range_of_crops(tmp_path, loader, resize):
    ramps(tmp_path)
    batches = stream(tmp_path, loader, batch_size=64, image_size=56, scale=(0.4, 0.6),
                     ratio=(1, 1.3), resize=resize, interpolation="bicubic", **RAW)
    sides = extents(torch.cat([epoch(batches, number)[0][0] for number in range(4)]))
    area, aspect = sides.prod(1) / (200 * 150), sides[:, 0] / sides[:, 1]
    assert 0.38 < area.min() < 0.43 and 0.57 < area.max() < 0.62
    assert 0.97 < aspect.min() < 1.04 and 1.25 < aspect.max() < 1.34


@LOADERS
def test_the_whole_central_square(tmp_path, loader):
    """What Soft Augmentation trains on: of 200×150 pixels always the 150×150 in the middle."""
    ramps(tmp_path, count=8)
    images = epoch(stream(tmp_path, loader, image_size=56, crop="centre", **RAW))[0][0]
    assert torch.allclose(extents(images), torch.tensor(150.0), atol=2)
    assert (images.mean((2, 3))[:, :2] - torch.tensor([99.5, 74.5])).abs().max() < 2


@LOADERS
def test_evaluation_of_the_whole_image(tmp_path, loader):
    ramps(tmp_path, count=2)
    for test_crop, shown in (("whole", (200, 150)), ("centre", (200 * 56 / 85, 150 * 56 / 64))):
        batches = stream(tmp_path, loader, train=False, image_size=56, test_crop=test_crop,
                         interpolation="bilinear", **RAW)
        images = epoch(batches)[0][0]
        assert torch.allclose(extents(images), torch.tensor(shown).float().expand(2, 2), atol=2)
        assert abs(images[0, 0].mean() - 99.5) < 1.5 and abs(images[0, 1].mean() - 74.5) < 1.5


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("image_size", [40, 224])
def test_filters_of_both_loaders_agree(photos, filter, image_size):
    options = {"train": False, "image_size": image_size, "interpolation": filter,
               "test_crop": "whole"}
    dali, pillow = (epoch(stream(photos / "folders", loader, **options, **RAW))
                    for loader in ("dali", "torch"))
    for (images, _), (others, _) in zip(dali, pillow, strict=True):
        assert (images - others).abs().mean((1, 2, 3)).max() < 1.5


ABANDONED = """
import multiprocessing, sys, time
sys.path.insert(0, {root!r})
from common.data import stream
stream.GRACE = 1

def work(ready):
    stream.leave_signals(0)
    ready.set()
    time.sleep(1000)

fork = multiprocessing.get_context("fork")
ready = fork.Event()
fork.Process(target=work, args=(ready,), daemon=True).start()
ready.wait()
"""


def test_a_program_ends_though_a_worker_is_left():
    """Python ends daemonic processes by SIGTERM and waits for them: for ever, were it ignored."""
    subprocess.run([sys.executable, "-c", ABANDONED.format(root=str(ROOT))], check=True,
                   timeout=100)


def test_workers_leave_signals_to_the_program(photos):
    """Slurm and Ctrl-C send them to all processes of a job; the program ends the step and saves."""
    loader = stream(photos / "folders", "torch", batch_size=4, workers=1)
    batches = iter(loader)
    next(batches)
    for child in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(child.pid, number)
    assert len(list(batches)) == len(loader) - 1 > 5


# ----------------------------------------------------------------------------------- fine-grained

def load_set(name, place, loader="torch", **recipe):
    return data.load(name, str(place), Recipe(**recipe, **RAW), batch_size=4, seed=1,
                     device=torch.device("cpu"), image_size=64, loader=loader, workers=1)


@LOADERS
def test_cub_with_its_boxes(tmp_path, loader):
    root = make_cub(tmp_path)
    for place in (tmp_path, root):
        train, test, info = load_set("cub200", place, loader, crop="random", resize="square",
                                     test_crop="whole")
    assert info.classes == ["Some Bird 1", "Some Bird 2", "Some Bird 3"]
    assert (info.num_train, info.num_test, info.image_size, info.name) == (12, 6, 64, "cub200")
    assert torch.cat([labels for _, labels in epoch(train)]).bincount().tolist() == [4] * 3
    images, labels = (torch.cat(part) for part in zip(*epoch(test), strict=True))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    boxes = test.boxes()
    assert boxes.shape == (6, 4) and boxes.dtype == torch.float32
    for image, box in zip(images, boxes, strict=True):      # the red box is where it is said to be
        red = (image[0] > 200) & (image[1:].amax(0) < 60)
        rows, columns = red.any(1).nonzero().ravel(), red.any(0).nonzero().ravel()
        seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        assert (box - seen).abs().max() < 1.6
    shards = [stream(test.data, "torch", image_size=64, batch_size=4, rank=rank, world=2,
                     train=False, test_crop="whole").boxes() for rank in range(2)]
    assert torch.equal(torch.cat(shards), boxes)
    assert load_set("cub200", root)[1].boxes() is None      # of crops
    make_cub(tmp_path / "without", boxes=False)
    assert load_set("cub200", tmp_path / "without", test_crop="whole")[1].boxes() is None
    assert info.fingerprint != load_set("cub200", make_cub(tmp_path / "b", 2))[2].fingerprint


@LOADERS
def test_stanford_dogs_in_its_forms(tmp_path, loader):
    make_dogs(tmp_path / "mat")
    train, test, info = load_set("stanford_dogs", tmp_path / "mat", loader, test_crop="whole")
    assert info.classes == ["Some dog1", "Some dog2", "Some dog3"]
    assert (info.num_train, info.num_test) == (9, 3) and test.boxes() is None
    images, labels = epoch(test)[0]
    assert labels.tolist() == [0, 1, 2] and images.shape == (3, 3, 64, 64)
    (tmp_path / "mat" / "lists").mkdir()
    for part in ("train", "test"):
        shutil.move(tmp_path / "mat" / f"{part}_list.mat", tmp_path / "mat" / "lists")
        for name in sorted((tmp_path / "mat" / "Images").iterdir()):
            for file in sorted(name.iterdir())[3:] if part == "test" else sorted(
                    name.iterdir())[:3]:
                (tmp_path / "dirs" / part / name.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "dirs" / part / name.name)
    moved = load_set("stanford_dogs", tmp_path / "mat", loader)
    folders = load_set("stanford_dogs", tmp_path / "dirs", loader)
    assert moved[2].fingerprint == info.fingerprint
    assert same(epoch(moved[0]), epoch(folders[0]))
    assert folders[2].classes == [f"n0{i}-Some_dog{i}" for i in (1, 2, 3)]


def replace(file, before, after):
    file.write_text(file.read_text().replace(before, after, 1))


CUB_FAULTS = {
    "images.txt": [(None, "No such file"), ("", "do not fit")],
    "classes.txt": [(None, "No such file"), (("3 003.", "4 003."), "do not fit one another .*3")],
    "image_class_labels.txt": [(None, "No such file"), (("5 1\n", ""), "do not fit .*5")],
    "train_test_split.txt": [(("5 1\n", "5 2\n"), "do not fit .*2"),
                             (("18 0", "19 0"), "do not fit .*18")],
    "bounding_boxes.txt": [(("1 10.0", "1 left"), "do not fit .*left")]}


@pytest.mark.parametrize("name, number", [(name, number) for name, faults in CUB_FAULTS.items()
                                          for number in range(len(faults))])
def test_faults_in_cubs_tables_name_the_file(tmp_path, name, number):
    change, match = CUB_FAULTS[name][number]
    file = make_cub(tmp_path) / name
    if change is None:
        file.unlink()
    elif change == "":
        file.write_text("\n")
    else:
        replace(file, *change)
    with pytest.raises(DataError, match=match) as fault:
        load_set("cub200", tmp_path)
    assert (name if change is None else "CUB_200_2011") in str(fault.value)
    assert "\n" not in str(fault.value)


def test_faults_of_fine_grained_sets(tmp_path):
    def fault(name, place, match):
        with pytest.raises(DataError, match=match):
            load_set(name, place)

    fault("cub200", tmp_path / "absent", r"absent/images\.txt: No such file")
    fault("cub200", tmp_path, r"images\.txt: No such file")
    root = make_cub(tmp_path / "cub")
    split = root / "train_test_split.txt"
    lines = split.read_text()
    split.write_text(lines.replace(" 0", " 1"))
    fault("cub200", root, "cub/CUB_200_2011: damaged, or not a whole CUB_200_2011")
    split.write_text(lines)
    shutil.rmtree(root / "images" / "001.Some_Bird_1")
    fault("cub200", root, r"Bird_0001\.jpg: No such file")
    fault("stanford_dogs", tmp_path, r"train_list\.mat: No such file")
    dogs = make_dogs(tmp_path / "dogs")
    whole = (dogs / "test_list.mat").read_bytes()
    (dogs / "test_list.mat").write_bytes(whole[:200])
    fault("stanford_dogs", dogs, r"test_list\.mat: damaged")
    from scipy.io import savemat
    savemat(dogs / "test_list.mat", {"labels": np.ones((3, 1))})
    fault("stanford_dogs", dogs, r"test_list\.mat: .*file_list")
    savemat(dogs / "test_list.mat", {"file_list": np.array([["a"]], object),
                                     "labels": np.ones((3, 1))})
    fault("stanford_dogs", dogs, r"test_list\.mat: damaged")
    with pytest.raises(RunError, match="--.valid_.labels_per_class .* not cub200"):
        data.load("cub200", str(root), batch_size=4, device=torch.device("cpu"),
                  labels_per_class=3)


# ----------------------------------------------------------------------------------------- faults

@pytest.fixture
def damaged(photos, tmp_path):
    """A copy of the photographs to damage."""
    shutil.copytree(photos, tmp_path / "set")
    return tmp_path / "set"


DAMAGE = {"truncated": lambda data: data[:len(data) // 2], "empty": lambda data: b"",
          "garbage": lambda data: bytes(range(200)) * 3}


@LOADERS
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
def test_damaged_image_is_named(damaged, loader, damage, train):
    image = damaged / "folders" / "train" / "class 4" / "3.jpg"
    image.write_bytes(DAMAGE[damage](image.read_bytes()))
    with pytest.raises(DataError, match="a readable image") as fault:
        epoch(stream(damaged / "folders", loader, train=train, batch_size=4))
    assert str(image) in str(fault.value) and "\n" not in str(fault.value)
    assert not multiprocessing.active_children()    # though the fault is still at hand
    if loader == "dali":            # processes forked later would hang in freeing a pipeline
        from nvidia.dali.pipeline import Pipeline
        assert not Pipeline._pipes


@LOADERS
def test_vanished_image_is_named(damaged, loader):
    batches = stream(damaged / "folders", loader, train=False)
    (damaged / "folders" / "train" / "class 0" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"class 0/2\.jpg: No such file"):
        list(batches)


def test_records_are_read_where_there_is_no_pread(damaged, monkeypatch):
    record = damaged / "records" / "train.rec"
    wanted = [RecordFile(record)[i] for i in (3, 0)]
    monkeypatch.delattr(os, "pread")                        # Windows
    file = RecordFile(record)
    assert [file[i] for i in (3, 0)] == wanted


@LOADERS
@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize("damage", ["image", "magic"])
def test_damaged_record_is_named(damaged, loader, train, damage):
    record = damaged / "records" / "train.rec"
    offset = int(RecordFile(record).offsets[20])
    with record.open("r+b") as file:
        file.seek(offset + (40 if damage == "image" else 0))
        file.write(bytes(400 if damage == "image" else 8))
    with pytest.raises(DataError, match=rf"train\.rec: record 20 \(byte {offset}\)"):
        list(stream(damaged / "records", loader, train=train, batch_size=4))


@LOADERS
@pytest.mark.parametrize("labels, image, message", [
    ((2.0, 7.0), True, ""), ((0.5,), True, "has the label 0.5, but there are 1000 classes"),
    ((None,) * 99, True, "."), ((3.0, 1.0), False, "a readable image"),
    ((1e9,), True, r"has the label 1e\+09"), ((float("nan"),), True, "has the label nan")])
def test_records_of_other_makers(tmp_path, loader, labels, image, message):
    """Several labels (the first counts), labels of no class, a flag without labels, no image."""
    file = io.BytesIO()
    photographs()[0].resize((40, 30)).save(file, "JPEG")
    given = [label for label in labels if label is not None]
    body = recordio.HEADER.pack(len(labels), 0, 0, 0) + np.float32(given).tobytes() \
        + file.getvalue()[:image * (10**9 if given else 50)]
    (tmp_path / "train.rec").write_bytes(
        recordio.FRAME.pack(recordio.MAGIC, len(body)) + body + bytes(-len(body) % 4))
    (tmp_path / "train.idx").write_text("0\t0\n")
    if not message:
        assert next(iter(stream(tmp_path, loader, batch_size=1)))[1].tolist() == [2]
        (tmp_path / "train.idx").write_text("0\t0\n1\t99999\n")
        message = "truncated"
    with pytest.raises(DataError, match=rf"train\.rec: record \d .*{message}"):
        list(stream(tmp_path, loader, batch_size=1))


@LOADERS
def test_truncated_records(damaged, loader):
    record = damaged / "records" / "train.rec"
    batches = stream(damaged / "records", loader, train=False)
    with record.open("r+b") as file:            # between two epochs, say
        file.truncate(record.stat().st_size // 2)
    with pytest.raises(DataError, match=r"train\.rec: record \d+ .*truncated"):
        list(batches)
    with pytest.raises(DataError, match=r"train\.rec: record 40 .*truncated"):
        stream(damaged / "records", loader)


@LOADERS
def test_label_without_a_class_is_named(damaged, loader):
    for path in (damaged / "records").glob("*_classes.txt"):
        path.unlink()
    record = damaged / "records" / "train.rec"
    offset = int(RecordFile(record).offsets[20])
    batches = stream(damaged / "records", loader, train=False)
    assert len(list(batches)) == 6
    with record.open("r+b") as file:
        file.seek(offset + 12)
        file.write(np.float32(1000).tobytes())
    with pytest.raises(DataError, match="record 20 .* has the label 1000, but there are 1000"):
        list(stream(damaged / "records", loader, train=False))


def test_hidden_folders_are_no_classes(damaged):
    (damaged / "folders" / "train" / ".ipynb_checkpoints").mkdir()
    batches = stream(damaged / "folders", "torch")
    assert batches.data.classes == [f"class {i}" for i in range(CLASSES)]


def test_missing_data(damaged, tmp_path):
    (damaged / "records" / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train\.idx: No such file"):
        stream(damaged / "records", "torch")
    with pytest.raises(DataError, match="nowhere/train: No such file"):
        load_set("imagenet", tmp_path / "nowhere")
    (tmp_path / "void" / "train" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no class folders with images"):
        stream(tmp_path / "void", "torch")


def test_without_dali(photos, monkeypatch):
    (photos / "folders" / "val").symlink_to(photos / "folders" / "train")
    kinds = []
    for found in (True, None):
        monkeypatch.setattr(data.importlib.util, "find_spec", lambda name, found=found: found)
        kinds.append(type(load_set("imagenet", photos / "folders", "auto")[0]))
    assert kinds == [DaliStream, TorchStream]
