"""Streaming loaders on a small ImageNet-like set of real photographs, as folders and RecordIO."""
import gc
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import imagenet
from common.data.recordio import RecordFile
from common.runtime import DataError, RunError
from resizemix import make_recordio

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES, PER_CLASS = 8, 5                   # 40 images; 41 with the odd one
HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
LOADERS = pytest.mark.parametrize("loader", [
    pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")),
    "torch"])
SOURCES = pytest.mark.parametrize("source", ["folders", "records"])


def photographs() -> list[Image.Image]:
    """Eight photographs that ship inside scikit-image and scikit-learn."""
    from skimage import data
    from sklearn.datasets import load_sample_image
    arrays = [data.chelsea(), data.coffee(), data.astronaut(), data.rocket(), data.retina(),
              data.immunohistochemistry(), load_sample_image("china.jpg"),
              load_sample_image("flower.jpg")]
    return [Image.fromarray(array) for array in arrays]


def make_photos(folder: Path, per_class: int, sides: tuple[int, int]):
    """JPEG crops with sides of sides[0] to sides[1] pixels, in one folder per class."""
    rng = np.random.default_rng(0)
    for label, photo in enumerate(photographs()):
        place = folder / f"class {label}"
        place.mkdir(parents=True)
        for number in range(per_class):
            width, height = rng.integers(*sides, 2)
            x, y = rng.integers(0, photo.width - width), rng.integers(0, photo.height - height)
            photo.crop((x, y, x + width, y + height)).save(place / f"{number}.jpg", quality=90)


def pack(images, prefix, *flags):
    """make_recordio.py in this process."""
    gc.collect()                # its workers must not inherit a DALI pipeline to clear away
    make_recordio.main([str(value) for value in (images, prefix, "--workers", 2, *flags)])


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
    options = {"mean": MEAN, "std": STD, "seed": 1} | options
    return imagenet.streaming(root, split="train", image_size=image_size, batch_size=batch_size,
                              device=device, loader=loader, workers=workers, train=train, **options)


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
    assert batches.classes == [f"class {i}" for i in range(CLASSES)]
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
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width), np.arange(height)[:, None]
    (tmp_path / "train" / "ramp").mkdir(parents=True)
    for number in range(64):
        Image.fromarray(ramp).save(tmp_path / "train" / "ramp" / f"{number}.png")
    batches = stream(tmp_path, loader, batch_size=64, mean=(0, 0, 0), std=(1 / 255,) * 3)
    images = torch.cat([epoch(batches, number)[0][0] for number in range(4)])
    across = (images[:, 0, 16, 28] - images[:, 0, 16, 3]) * 32 / 25
    down = (images[:, 1, 28, 16] - images[:, 1, 3, 16]) * 32 / 25
    area, aspect = across.abs() * down / (width * height), across.abs() / down
    assert 0.07 < area.min() < 0.2 and 0.8 < area.max() < 1.03
    assert 0.42 < area.mean() < 0.58
    assert 0.7 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.43
    assert 0.35 < (across < 0).float().mean() < 0.65
    batches = stream(tmp_path, loader, batch_size=64, min_scale=0.9, mean=(0, 0, 0),
                     std=(1 / 255,) * 3)
    images = epoch(batches)[0][0]
    across, down = images[:, 0].amax((1, 2)), images[:, 1].amax((1, 2))
    assert (across * down / (width * height)).min() > 0.85


@LOADERS
@pytest.mark.parametrize("options", [{"color_jitter": True}, {"auto_augment": "randaugment"},
                                     {"auto_augment": "autoaugment"}], ids=str)
def test_further_augmentation(photos, loader, options):
    plain = epoch(stream(photos / "folders", loader))
    batches = stream(photos / "folders", loader, **options)
    changed = epoch(batches)
    assert not same(plain, changed) and same(changed, epoch(batches))
    assert torch.equal(torch.cat([labels for _, labels in plain]),
                       torch.cat([labels for _, labels in changed]))


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
    with pytest.raises(DataError, match="no readable image") as fault:
        epoch(stream(damaged / "folders", loader, train=train, batch_size=4))
    assert str(image) in str(fault.value) and "\n" not in str(fault.value)
    if loader == "dali":            # processes forked later would hang in freeing a pipeline
        from nvidia.dali.pipeline import Pipeline
        assert not Pipeline._pipes


@LOADERS
def test_vanished_image_is_named(damaged, loader):
    batches = stream(damaged / "folders", loader, train=False)
    (damaged / "folders" / "train" / "class 0" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"class 0/2\.jpg: No such file"):
        list(batches)


@LOADERS
@pytest.mark.parametrize("train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize("damage", ["image", "magic"])
def test_damaged_record_is_named(damaged, loader, train, damage):
    record = damaged / "records" / "train.rec"
    offset = int(RecordFile(record).offsets[20])
    with record.open("r+b") as file:
        file.seek(offset + (40 if damage == "image" else 0))
        file.write(bytes(400 if damage == "image" else 8))
    batches = stream(damaged / "records", loader, train=train, batch_size=4)
    with pytest.raises(DataError, match=rf"train\.rec: record 20 \(byte {offset}\)"):
        list(batches)


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


def test_missing_data(damaged, tmp_path):
    (damaged / "records" / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train\.idx is missing"):
        stream(damaged / "records", "torch")
    with pytest.raises(DataError, match="holds neither train.rec nor a folder train/"):
        stream(tmp_path / "nowhere", "torch")
    (tmp_path / "void" / "train" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no class folder with images"):
        stream(tmp_path / "void", "torch")
    with pytest.raises(DataError, match="41 images are too few for 50 processes"):
        stream(damaged / "folders", "torch", batch_size=50, world=50)
    with pytest.raises(RunError, match="--batch_size 8 cannot be shared by 3 processes"):
        stream(damaged / "folders", "torch", world=3)


def test_without_dali(photos, monkeypatch):
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
    assert isinstance(stream(photos / "folders", "auto"), imagenet.TorchStream)
    with pytest.raises(RunError, match="DALI is not installed"):
        stream(photos / "folders", "dali")
