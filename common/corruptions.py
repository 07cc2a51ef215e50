"""Corrupted test sets: CIFAR-10-C, CIFAR-100-C, Tiny-ImageNet-C (Hendrycks and Dietterich 2019)."""
import re
from pathlib import Path

import numpy as np

from common.data.lists import as_files, list_classes
from common.data.memory import MemoryBatches
from common.data.recipe import Recipe
from common.data.sources import decode_files
from common.errors import DataError


def kind(condition: str) -> str:
    """Return 'fog' of 'fog 3', '' of a condition that is no corruption."""
    return condition[:-2] if re.fullmatch(".+ [1-5]", condition) else ""


def read(folder, info, batch_size: int, device):
    """Yield ('fog 1', its MemoryBatches), … of <corruption>.npy, severities 1 to 5 in order, beside
    labels.npy, or of <corruption>/<severity>/<class>/*. A DataError names what does not fit."""
    recipe = Recipe(crop="padded", padding=0, mean=info.mean, std=info.std)
    size = info.image_size, info.width

    def batches(path, images, labels):
        if images.dtype != np.uint8 or images.shape[1:] != (*size, 3):
            raise DataError(f"{path}: {images.dtype} images of {images.shape[1:]}, the network is "
                            f"evaluated on {(*size, 3)}")
        return MemoryBatches(images, labels, recipe, size=size, batch_size=batch_size,
                             device=device)

    root = Path(folder).expanduser()
    arrays = sorted(file for file in root.glob("*.npy") if file.stem != "labels")
    folders = sorted(path for path in root.glob("[!.]*") if path.is_dir())
    if not arrays and not folders:
        raise DataError(f"{root}: neither <corruption>.npy nor <corruption>/<severity>/<class>/")
    for file in arrays:
        images = np.load(file, mmap_mode="r")
        count = len(images) // 5
        labels = np.load(root / "labels.npy").astype(np.int64)      # once, or for each severity
        if (len(labels) not in (count, len(images)) or len(images) % 5
                or labels.max() >= info.num_classes):
            raise DataError(f"{file}: {len(images)} images do not fit {len(labels)} labels up to "
                            f"{labels.max()} in labels.npy, or these {info.num_classes} classes")
        for severity in range(5):
            part = np.array(images[severity * count:][:count])
            yield f"{file.stem} {severity + 1}", batches(file, part, labels[:count])
    for part in (folder / severity for folder in folders for severity in "12345"):
        classes = list_classes(part)
        found = as_files(part, classes)
        labels = np.array(class_index(part, classes, info))[found.labels]
        yield f"{part.parent.name} {part.name}", batches(
            part, decode_files(found.files, None, 4), labels)


def class_index(folder: Path, names, info) -> list[int]:
    """Return the labels of sorted class folders: by name, or of all WordNet's numbers by order."""
    if set(names) <= set(info.classes):
        return [info.classes.index(name) for name in names]
    if len(names) == info.num_classes and all(re.fullmatch(r"n\d{8}", name) for name in names):
        return list(range(len(names)))
    odd = sorted(set(names) - set(info.classes))
    raise DataError(f"{folder / odd[0]}: a class that {info.name} lacks")
