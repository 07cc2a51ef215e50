"""Which data sets exist and how each lies on disk.

Sets in memory are read as uint8 arrays (`Split`); streamed sets as lists of files (`Files`) or
RecordIO.
"""
import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.transforms import functional as TF
from tqdm import tqdm

from common import distributed
from common.data.folders import (
    SPLIT,
    list_classes,
    numbered,
    printable,
    split_classes,
    test_part,
)
from common.data.images import decode, read_file, read_text, reading, table
from common.distributed import log, warn
from common.errors import DataError

IN_MEMORY = ("digits", "cifar10", "cifar100", "tiny-imagenet-200", "folder", "npz")
STREAMED = ("imagenet", "cub200", "stanford_dogs")
NAMES = (*IN_MEMORY, *STREAMED)
CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
UNNAMED = 1000                          # labels up to here need no names
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass
class Split:
    """Images (N, H, W, 3) uint8 and labels (N,) int64 of one part of a data set."""
    images: np.ndarray
    labels: np.ndarray

    def take(self, index) -> "Split":
        return Split(self.images[index], self.labels[index])


def read(name: str, root: Path, image_size: int | None, workers: int,
         val_split: float | None = None, seed: int = 0):
    """Reads a data set: (train Split, test Split, class names).

    image_size resizes where the stored images are of another size: image files by their shorter
    side, then a central crop; arrays to the square. `workers` threads decode image files.
    Raises DataError naming the file or folder that is missing, empty or damaged.
    """
    if name == "digits":
        return read_digits(image_size or 32)
    if name in ("cifar10", "cifar100"):
        train, test, classes = read_cifar(name, root, workers)
    elif name == "tiny-imagenet-200":
        return read_tiny_imagenet(root, image_size or 64, workers)
    elif name == "npz":
        train, test, classes = read_npz(root)
    else:
        train, test, classes = read_folder(root, image_size, workers, val_split, seed)
    if image_size and (image_size, image_size) != train.images.shape[1:3]:
        train, test = (Split(resize(part.images, image_size), part.labels)
                       for part in (train, test))
    sides = ["×".join(map(str, part.images.shape[2:0:-1])) for part in (train, test)]
    if sides[0] != sides[1]:
        raise DataError(f"{root}: training images have {sides[0]} pixels, test images {sides[1]}; "
                        "give --image_size")
    return train, test, classes


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W, 3) uint8 to (N, size, size, 3), antialiased bilinear, in pieces."""
    def one(piece):
        piece = torch.from_numpy(piece).permute(0, 3, 1, 2)
        return TF.resize(piece, [size, size], antialias=True).permute(0, 2, 3, 1).numpy()
    return np.concatenate([one(images[i:i + 1000]) for i in range(0, len(images), 1000)])


def read_digits(size: int):
    """scikit-learn's 1,797 handwritten digits, 8×8, enlarged; every fifth of a class is test."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = resize(np.repeat((digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, 3), size)
    position = np.empty(len(images), np.int64)             # position within the own class
    for c in range(10):
        position[digits.target == c] = np.arange((digits.target == c).sum())
    data, test = Split(images, digits.target.astype(np.int64)), position % 5 == 4
    return data.take(~test), data.take(test), [str(c) for c in range(10)]


def read_cifar(name: str, root: Path, workers: int):
    """CIFAR from <name>.npz, from train/ and test/ folders, or from torchvision's archive.

    Where none of them is in `root` the archive is downloaded (its checksum verified before
    anything in it is unpickled).
    """
    source = CIFAR[name]
    if root.name == source.base_folder:                    # the archive's inner folder
        root = root.parent
    archive = root / name if (root / name).is_dir() else root
    file = root if root.suffix == ".npz" else root / f"{name}.npz"
    if file.suffix == ".npz" and file.exists():
        train, test, classes = read_npz(file)
        if train.images.shape[1:] != (32, 32, 3):
            raise DataError(f"{file}: images of {train.images.shape[1:]}, {name} has (32, 32, 3)")
    elif (archive / "train").is_dir():
        train, test, classes = read_folder(archive, 32, workers)
    else:
        train, test, classes = read_cifar_archive(source, name, root)
    if len(classes) != (10 if name == "cifar10" else 100):
        raise DataError(f"{root}: {len(classes)} classes, {name} has {name.removeprefix('cifar')}"
                        "; a set of your own is --dataset folder or npz")
    return train, test, classes


def read_cifar_archive(source, name: str, root: Path):
    """CIFAR as torchvision has it, downloaded by the first process; DataError when damaged."""
    folder = root / source.base_folder
    if distributed.rank() == 0 and not folder.is_dir():
        log(f"{root} holds no {name}: downloading it there")
        try:
            root.mkdir(parents=True, exist_ok=True)
            source(str(root), download=True)
        except (OSError, RuntimeError) as fault:
            raise DataError(f"{root} holds neither {name}.npz, nor train/ and test/ folders, nor "
                            f"{source.base_folder}/, and the download failed ({fault})") from None
    if distributed.world() > 1:
        torch.distributed.barrier()
    try:
        parts = [source(str(root), train=train) for train in (True, False)]
    except (OSError, RuntimeError) as fault:
        names = [f for f, md5 in source.train_list + source.test_list
                 if not torchvision.datasets.utils.check_integrity(str(folder / f), md5)]
        raise DataError(f"{folder}: missing or damaged: {', '.join(names) or fault}") from None
    return *(Split(p.data, np.asarray(p.targets, np.int64)) for p in parts), parts[0].classes


def read_npz(file: Path):
    """An .npz of train_images, train_labels, test_images, test_labels (and perhaps classes)."""
    if not file.is_file():
        raise DataError(f"{file}: no such .npz file (--data_dir names it)")
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file}: damaged, or not an .npz file of the arrays {', '.join(ARRAYS)}")
    with reading(file, "an .npz file of arrays that fit into the memory"), \
            np.load(file, allow_pickle=False) as stored:
        missing = [name for name in ARRAYS if name not in stored]
        if missing:
            raise DataError(f"{file}: holds no {', '.join(missing)}")
        arrays = {name: stored[name] for name in ARRAYS}
        classes = [str(c) for c in stored["classes"]] if "classes" in stored else None
    splits = []
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 \
                or 0 in images.shape[1:]:
            raise DataError(f"{file}: {part}_images is {images.dtype} {images.shape}, "
                            "not uint8 (N, height, width, 3)")
        if not len(images) or labels.shape not in ((len(images),), (len(images), 1)) \
                or labels.dtype.kind not in "iu":
            raise DataError(f"{file}: {part}_labels {labels.dtype} {labels.shape} do not fit "
                            f"{len(images)} images")
        if labels.max() >= max(len(images), UNNAMED) and not classes:
            raise DataError(f"{file}: {part}_labels go up to {labels.max()}, which numbers no "
                            f"class of {len(images)} images")
        splits.append(Split(images, labels.astype(np.int64).ravel()))
    count = len(classes) if classes else int(splits[0].labels.max()) + 1
    for part, split in zip(("train", "test"), splits, strict=True):
        if split.labels.min() < 0 or split.labels.max() >= count:
            raise DataError(f"{file}: {part}_labels run from {split.labels.min()} to "
                            f"{split.labels.max()}, beyond the {count} classes")
    empty = np.flatnonzero(np.bincount(splits[0].labels, minlength=count) == 0)
    if len(empty):
        warn(f"{file}: class {empty[0]} has no training image"
             + (f", nor have {len(empty) - 1} others" if len(empty) > 1 else ""))
    return *splits, classes or [str(c) for c in range(count)]


# -------------------------------------------------------------------------------- image folders

def read_folder(root: Path, image_size: int | None, workers: int, val_split=None, seed=0):
    """train/<class>/* and test/<class>/* (or val/<class>/*); val_split: see `split_classes`."""
    if val_split:
        train, test = split_classes(root, val_split, seed)
    else:
        train, part = list_classes(root / "train"), test_part(root, "test", "val")
        if not part:
            raise DataError(f"{root} holds neither test/ nor val/; {SPLIT}")
        test = list_classes(root / part, list(train))
    splits = []
    for classes in (train, test):
        splits.append(decode_files(numbered(classes), image_size, workers))
        height, width = splits[0].images.shape[1:3]
        if height == width:
            image_size = height                             # test images follow the training ones
    return *splits, printable(train)


def read_tiny_imagenet(root: Path, image_size: int, workers: int):
    """tiny-imagenet-200 as unzipped: val/ by its annotation file, or sorted into class folders."""
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    train = list_classes(root / "train")
    names, val, notes = list(train), root / "val", root / "val" / "val_annotations.txt"
    rows = table(notes, "\t") if notes.is_file() else {}
    unknown = next((image for image, row in rows.items() if row[0] not in train), None)
    if unknown:
        raise DataError(f"{notes}: a class unknown to train/ at {unknown}")
    tried = {image: [val / "images" / image, val / row[0] / image, val / row[0] / "images" / image]
              for image, row in rows.items()}
    found = {image: [file for file in files if file.is_file()] for image, files in tried.items()}
    if rows and all(found.values()):
        test = [(files[0], names.index(rows[image][0])) for image, files in found.items()]
    else:                               # sorted by hand: nothing may be left unsorted
        sorted_ones = any((val / name).is_dir() for name in names)
        if not sorted_ones:
            missing = next((files[0] for image, files in tried.items() if not found[image]), notes)
            raise DataError(f"{missing}: missing, and val/ holds no class folder of train/")
        test = numbered(list_classes(val, names))
    words = root / "words.txt"
    titles = dict(line.split("\t", 1) for line in read_text(words).splitlines()
                  if "\t" in line) if words.is_file() else {}
    return (decode_files(numbered(train), image_size, workers),
            decode_files(test, image_size, workers),
            [titles.get(name, name).split(",")[0] for name in printable(names)])


def decode_files(files: list[tuple[str, int]], image_size: int | None, workers: int) -> Split:
    """Decodes image files in threads. image_size None: the size all of them share."""
    def read_image(file) -> np.ndarray:
        with reading(file, "an image"):
            image = decode(read_file(file))
        if image_size and image.size != (image_size, image_size):
            image = TF.center_crop(TF.resize(image, image_size, antialias=True), [image_size] * 2)
        return np.asarray(image)

    first = read_image(files[0][0])
    images = np.empty((len(files), *first.shape), np.uint8)

    def store(i: int):
        image = read_image(files[i][0])
        if image.shape != first.shape:
            raise DataError(f"{files[i][0]}: {image.shape[1]}×{image.shape[0]} pixels, others "
                            f"{first.shape[1]}×{first.shape[0]}; give --image_size")
        images[i] = image

    with ThreadPoolExecutor(workers) as pool:
        bar = tqdm(pool.map(store, range(len(files))), total=len(files), desc="decoding",
                   leave=False, disable=distributed.rank() != 0 or len(files) < 5000, mininterval=1)
        for _ in bar:
            pass
    return Split(images, np.array([label for _, label in files], np.int64))


def balanced(split: Split, per_class: int, classes: list[str], generator, flag: str):
    """Take up to `per_class` images of each class at random: (taken Split, the rest).

    A class that has fewer gives all; that is said once, with `flag`.
    """
    order = torch.randperm(len(split.labels), generator=generator).numpy()
    members = [order[split.labels[order] == c] for c in range(len(classes))]
    least = min(range(len(classes)), key=lambda c: len(members[c]))
    if len(members[least]) < per_class:
        warn(f"{flag} {per_class}: class {classes[least]} has only {len(members[least])} images "
             "left; all of them are taken")
    taken = np.sort(np.concatenate([rows[:per_class] for rows in members]))
    return split.take(taken), split.take(np.setdiff1d(np.arange(len(split.labels)), taken))


def fingerprint(*splits: Split) -> str:
    """A short digest of all labels and pixels: tells when data changed between runs."""
    digest = hashlib.blake2b(digest_size=8)
    for split in splits:
        digest.update(repr(split.images.shape).encode())
        digest.update(split.labels.tobytes())
        digest.update(np.ascontiguousarray(split.images))
    return digest.hexdigest()
