"""Corrupted test sets: CIFAR-10-C, CIFAR-100-C, Tiny-ImageNet-C (Hendrycks and Dietterich 2019)."""
import re
from pathlib import Path

import numpy as np

from common.data.images import reading
from common.data.lists import HIDDEN, as_files, list_classes
from common.data.memory import MemoryBatches
from common.data.recipe import Recipe
from common.data.sources import decode_files
from common.errors import DataError


def kind(condition: str) -> str:
    """Return 'fog' of 'fog 3', '' of a condition that is no corruption."""
    return condition[:-2] if re.fullmatch(".+ [1-5]", condition) else ""


def find(folder, info) -> list[tuple]:
    """Return (condition, file, function that returns its images and labels) of each severity, 1 to
    5, of <corruption>.npy beside labels.npy, or of <corruption>/<severity>/<class>/*. A DataError
    names what does not fit."""
    root, found = Path(folder).expanduser(), []
    arrays = sorted(file for file in root.glob("*.npy")
                    if file.stem != "labels" and not file.name.startswith(HIDDEN))
    folders = sorted(path for path in root.glob("*")
                     if path.is_dir() and not path.name.startswith(HIDDEN))
    if not arrays and not folders:
        raise DataError(f"{root}: neither <corruption>.npy nor <corruption>/<severity>/<class>/")
    if arrays:                          # labels of one severity, or of one after another
        with reading(root / "labels.npy", "integers (N,)"):
            labels = np.load(root / "labels.npy").ravel().astype(np.int64, casting="same_kind")
    for file in arrays:
        with reading(file, "images (5 N, height, width, 3)"):
            images = np.load(file, mmap_mode="r")
            count = len(images) // 5
        check_images(file, images, info)
        if (len(images) != 5 * count or not count or len(labels) not in (count, 5 * count)
                or (labels.reshape(-1, count) != labels[:count]).any()
                or labels.min() < 0 or labels.max() >= info.num_classes):
            raise DataError(f"{file}: {len(images)} images of five severities, each in the order "
                            f"of the test set, do not fit {len(labels)} labels in labels.npy or "
                            f"these {info.num_classes} classes")
        found += [(f"{file.stem} {severity}", file, lambda part=part:
                   (np.array(part), labels[:len(part)]))
                  for severity, part in enumerate(np.split(images, 5), 1)]
    for part in (folder / severity for folder in folders for severity in "12345"):
        classes = list_classes(part)
        index, listed = np.array(class_index(part, classes, info)), as_files(part, classes)
        check_images(listed.files[0], decode_files(listed.files[:1], None, 1), info)
        found.append((f"{part.parent.name} {part.name}", part, lambda listed=listed, index=index:
                      (decode_files(listed.files, None, 4), index[listed.labels])))
    return found


def check_images(path, images, info):
    """Raise DataError unless `images` are uint8 and as large as those of the test set."""
    if images.dtype != np.uint8 or images.shape[1:] != (info.image_size, info.width, 3):
        raise DataError(f"{path}: {images.dtype} images of {images.shape[1:]}, the network is "
                        f"evaluated on {(info.image_size, info.width, 3)}")


def read(folder, info, batch_size: int, device):
    """Yield ('fog 1', its MemoryBatches), … of all that `find` finds."""
    recipe = Recipe(crop="padded", padding=0, mean=info.mean, std=info.std)
    for condition, path, load in find(folder, info):
        images, labels = load()
        check_images(path, images, info)
        yield condition, MemoryBatches(images, labels, recipe, size=(info.image_size, info.width),
                                       batch_size=batch_size, device=device)


def class_index(folder: Path, names, info) -> list[int]:
    """Return the labels of sorted class folders: by name; of all WordNet's numbers, where the data
    have other names, by order."""
    if set(names) <= set(info.classes):
        return [info.classes.index(name) for name in names]
    wordnet, known = ([bool(re.fullmatch(r"n\d{8}", name)) for name in part]
                      for part in (names, info.classes))
    if len(names) == info.num_classes and all(wordnet) and not any(known):
        return list(range(len(names)))
    odd = sorted(set(names) - set(info.classes))
    raise DataError(f"{folder / odd[0]}: a class that {info.name} lacks")
