"""`load` gives a main.py its training and test batches."""
import dataclasses
import hashlib
import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import distributed
from common.data import sources
from common.data.lists import open_sets
from common.data.memory import MemoryBatches
from common.data.recipe import STATISTICS, Recipe, channel_statistics
from common.data.recordio import UNNAMED
from common.data.sources import IN_MEMORY, NAMES, STREAMED
from common.data.stream import DaliStream, TorchStream
from common.distributed import warn
from common.errors import RunError

__all__ = ["IN_MEMORY", "NAMES", "STREAMED", "Info", "Recipe", "load"]
USUAL = Recipe()                        # what is usual for the data set


@dataclass
class Info:
    """What a program needs to know of a data set; mean and std are of pixels in [0, 1]."""
    name: str
    num_classes: int
    image_size: int                     # height
    mean: tuple
    std: tuple
    classes: list
    num_train: int
    num_test: int
    fingerprint: str
    width: int
    valid: MemoryBatches | None = field(default=None, repr=False)

    def __str__(self):
        return (f"data: {self.name}, {self.num_classes} classes, {self.image_size}×"
                f"{self.width} pixels, {self.num_train} training and {self.num_test} test "
                "images" + (f", {self.valid.count} for validation" if self.valid else ""))


def load(name: str, data_dir: str, recipe: Recipe = USUAL, *, batch_size: int, device,
         seed: int = 0, loader: str = "auto", workers: int = 2, image_size: int | None = None,
         labels_per_class: int | None = None, valid_labels_per_class: int = 0,
         val_split: float | None = None, drop_last: bool = False):
    """Return training batches, test batches and Info of a data set. Raises DataError, RunError.
    Batches yield images (B, 3, H, W) float32, normalised, and labels (B,) int64, on `device`.
    batch_size: images of one step over all processes. val_split: share of each class to test on, of
    a folder or imagenet without a test part. drop_last: no partial batch at an epoch's end (unless
    the whole set is one). workers: threads that decode files or run DALI."""
    if batch_size % distributed.world():
        raise RunError(f"--batch_size {batch_size} is no multiple of the {distributed.world()} "
                       "processes")
    root = Path(os.path.expanduser(data_dir))
    if val_split and name not in ("folder", "imagenet"):
        raise RunError(f"--val_split is for --dataset folder and imagenet; {name} has test images")
    engine = {"batch_size": batch_size, "device": torch.device(device), "seed": seed,
              "workers": max(1, workers), "drop_last": drop_last}
    if name in STREAMED:
        if labels_per_class or valid_labels_per_class:
            raise RunError(f"--(valid_)labels_per_class is for sets that fit in memory, not {name}")
        parts = open_sets(name, root, val_split, seed)
        train, test, info = load_streamed(name, parts, recipe, image_size or 224, loader, engine)
    else:
        crop_later = recipe.crop == "resized" and name not in ("digits", "folder")  # many sizes
        data = sources.read(name, root, None if crop_later else image_size, engine["workers"],
                            val_split, seed)
        train, test, info = load_in_memory(
            name, data, recipe, image_size if crop_later else None, labels_per_class,
            valid_labels_per_class, engine | {"loader": loader})
    if drop_last and info.num_train < batch_size:
        warn(f"--batch_size {batch_size} is above the {info.num_train} training images: "
             "an epoch is one batch of all of them")
    return train, test, info


def load_in_memory(name, data, recipe, crop_size, labels_per_class, valid_labels_per_class, engine):
    """Take subsets of what was read, and fill in what the recipe leaves to the data set."""
    train, test, classes = data
    mean, std = recipe.mean, recipe.std
    if mean is None:                    # of the whole set, also when training on a part of it
        mean, std = STATISTICS.get(name) or channel_statistics(train.images)
    generator = torch.Generator().manual_seed(distributed.seed_of(engine["seed"], "subset"))
    valid = None
    if valid_labels_per_class:
        valid, train = sources.balanced(train, valid_labels_per_class, classes, generator,
                                        "--valid_labels_per_class")
        if not len(train.labels):
            raise RunError(f"--valid_labels_per_class {valid_labels_per_class} leaves no image")
    if labels_per_class:
        train, _ = sources.balanced(train, labels_per_class, classes, generator,
                                    "--labels_per_class")
    size = (crop_size,) * 2 if crop_size else train.images.shape[1:3]
    padding = (2 if size[0] <= 32 else 4) if recipe.padding is None else recipe.padding
    recipe = dataclasses.replace(
        recipe, crop=recipe.crop or "padded", padding=0 if recipe.crop == "resized" else padding,
        flip=name != "digits" if recipe.flip is None else recipe.flip, mean=tuple(mean),
        std=tuple(std))
    batches = MemoryBatches(train.images, train.labels, recipe, size=size, **engine)
    engine |= {"seed": None, "drop_last": False, "loader": "auto"}
    recipe = dataclasses.replace(recipe, crop="padded", padding=0, padding_mode="constant",
                                 flip=False, transform=None, transform_first=False)
    valid, tests = (part and MemoryBatches(part.images, part.labels, recipe, size=size, **engine)
                    for part in (valid, test))
    return batches, tests, Info(
        name, len(classes), size[0], recipe.mean, recipe.std, classes, len(train.labels),
        len(test.labels), sources.fingerprint(train, test), size[1], valid)


def load_streamed(name, parts, recipe, image_size, loader, engine):
    """Make batches of sets that are read as training goes; without class names there are 1000."""
    mean, std = (recipe.mean, recipe.std) if recipe.mean else STATISTICS["imagenet"]
    recipe = dataclasses.replace(
        recipe, crop=recipe.crop or "resized", test_crop=recipe.test_crop or "centre",
        flip=recipe.flip is not False, mean=tuple(mean), std=tuple(std))
    has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    kind = DaliStream if has_dali and loader != "torch" else TorchStream
    train, test = (kind(data, recipe, train=data is parts[0], image_size=image_size,
                        rank=distributed.rank(), world=distributed.world(), **engine)
                   for data in parts)
    classes = parts[0].classes or parts[1].classes or list(map(str, range(UNNAMED)))
    digest = hashlib.blake2b(b"".join(data.facts() for data in parts), digest_size=8)
    return train, test, Info(name, len(classes), image_size, recipe.mean, recipe.std, classes,
                             train.count, test.count, digest.hexdigest(), image_size)
