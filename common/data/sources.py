"""Which data sets exist, and how those that fit in memory are read: as uint8 arrays (`Split`)."""
import hashlib
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.transforms import functional as TF
from tqdm.contrib.concurrent import thread_map

from common import distributed
from common.data.images import decode, reading
from common.data.lists import inside, open_folders, tiny_imagenet
from common.data.recordio import UNNAMED
from common.distributed import log, warn
from common.errors import DataError

IN_MEMORY = ("digits", "cifar10", "cifar100", "tiny-imagenet-200", "folder", "npz")
STREAMED = ("imagenet", "cub200", "stanford_dogs")
NAMES = (*IN_MEMORY, *STREAMED)
CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
Split = namedtuple("Split", "images, labels")       # (N, H, W, 3) uint8, (N,) int64 of one part


def read(name: str, root: Path, image_size: int | None, workers: int, val_split=None, seed=0):
    """Return training Split, test Split and class names of a data set. Raises DataError.
    image_size: of the images, if not the stored one; files are resized by their shorter side, then
    cropped, arrays to the square. `workers` threads decode image files."""
    image_size = image_size or {"digits": 32, "tiny-imagenet-200": 64}.get(name)
    if name == "digits":
        train, test, classes = read_digits()
    elif name in CIFAR:
        train, test, classes = read_cifar(name, root, workers)
    elif name == "npz":
        train, test, classes = read_npz(root)
    elif name == "tiny-imagenet-200":
        train, test, classes = decode_parts(tiny_imagenet(root), image_size, workers)
    else:
        parts = open_folders(root, ("test", "val"), val_split, seed)
        train, test, classes = decode_parts(parts, image_size, workers)
    if image_size:
        train, test = (part if part.images.shape[1:3] == (image_size, image_size) else
                       Split(resize(part.images, image_size), part.labels)
                       for part in (train, test))
    sides = ["×".join(map(str, part.images.shape[2:0:-1])) for part in (train, test)]
    if sides[0] != sides[1]:
        raise DataError(f"{root}: training images have {sides[0]} pixels, test images {sides[1]}; "
                        "give --image_size")
    return train, test, classes


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Return images (N, H, W, 3) uint8 as (N, size, size, 3), antialiased bilinear, in pieces."""
    pieces = torch.from_numpy(images).permute(0, 3, 1, 2).split(1000)
    return torch.cat([TF.resize(piece, [size, size], antialias=True).permute(0, 2, 3, 1)
                      for piece in pieces]).numpy()


def read_digits():
    """Return scikit-learn's 1,797 handwritten digits; every fifth of a class is test."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = np.repeat((digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, 3)
    labels, test = digits.target.astype(np.int64), np.zeros(len(images), bool)
    for c in range(10):
        test[np.flatnonzero(labels == c)[4::5]] = True
    return *(Split(images[part], labels[part]) for part in (~test, test)), list(map(str, range(10)))


def read_cifar(name: str, root: Path, workers: int):
    """Return CIFAR from <name>.npz, train/ and test/ folders, or torchvision's archive, which is
    downloaded where `root` has none of them; its checksum comes before unpickling."""
    if root.name == CIFAR[name].base_folder:               # the archive's inner folder
        root = root.parent
    folders = inside(root, name)
    file = root if root.suffix == ".npz" else root / f"{name}.npz"
    if file.exists() or file == root:
        train, test, classes = read_npz(file)
    elif (folders / "train").is_dir():
        train, test, classes = decode_parts(open_folders(folders, ("test", "val")), 32, workers)
    else:
        train, test, classes = read_cifar_archive(name, root)
    if train.images.shape[1:] != (32, 32, 3) or len(classes) != int(name.removeprefix("cifar")):
        raise DataError(f"{root}: images of {train.images.shape[1:]}, {len(classes)} classes: not "
                        f"{name}; a set of your own is --dataset folder or npz")
    return train, test, classes


def read_cifar_archive(name: str, root: Path):
    """Return CIFAR as torchvision has it, downloaded by the first process."""
    source = CIFAR[name]
    folder = root / source.base_folder
    try:
        if distributed.rank() == 0 and not folder.is_dir():
            log(f"{root} holds no {name}: downloading it there")
            source(str(root), download=True)
        if distributed.world() > 1:
            torch.distributed.barrier()
        parts = [source(str(root), train=train) for train in (True, False)]
    except (OSError, RuntimeError) as fault:
        raise DataError(f"{folder}: missing or damaged, and {root} holds neither {name}.npz nor "
                        f"train/ and test/ folders ({fault})") from None
    return *(Split(p.data, np.asarray(p.targets, np.int64)) for p in parts), parts[0].classes


def read_npz(file: Path):
    """Return an .npz of train_images, train_labels, test_images, test_labels (perhaps classes)."""
    with reading(file, f"an .npz file of {', '.join(ARRAYS)}"):
        file.open("rb").close()                                 # or is_zipfile hides the reason
        if not zipfile.is_zipfile(file):                        # which numpy takes for a pickle
            raise ValueError("no zip archive")
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ARRAYS}
            classes = stored["classes"].astype(str).tolist() if "classes" in stored else []
    splits = []
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 \
                or not images.size or labels.size != len(images) or labels.dtype.kind not in "iu":
            raise DataError(f"{file}: {part}_images {images.dtype} {images.shape} and "
                            f"{part}_labels {labels.dtype} {labels.shape} are not uint8 "
                            "(N, height, width, 3) and integers (N,)")
        labels = labels.astype(np.int64).ravel()
        if not classes:
            count = min(int(labels.max()) + 1, max(len(labels), UNNAMED))
            classes = [str(c) for c in range(count)]
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(f"{file}: {part}_labels run from {labels.min()} to {labels.max()}, "
                            f"beyond the {len(classes)} classes")
        splits.append(Split(images, labels))
    empty = np.flatnonzero(np.bincount(splits[0].labels, minlength=len(classes)) == 0)
    if len(empty):
        warn(f"{file}: no training image of class {', '.join(map(str, empty[:9]))}")
    return *splits, classes


def decode_parts(parts, image_size: int | None, workers: int):
    """Return training Split, test Split and class names of two lists of image files."""
    splits = []
    for part in parts:
        splits.append(Split(decode_files(part.files, image_size, workers), np.array(part.labels)))
        height, width = splits[0].images.shape[1:3]
        if height == width:
            image_size = height                             # test images follow the training ones
    return *splits, parts[0].classes


def decode_files(files: list[str], image_size: int | None, workers: int) -> np.ndarray:
    """Return image files as (N, H, W, 3) uint8. image_size None: the size all of them share."""
    def read_image(file) -> np.ndarray:
        with reading(file, "an image"):
            image = decode(Path(file).read_bytes())
        if image_size and image.size != (image_size, image_size):
            image = TF.center_crop(TF.resize(image, image_size, antialias=True), [image_size] * 2)
        return np.asarray(image)

    first = read_image(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)

    def store(i: int):
        image = read_image(files[i])
        if image.shape != first.shape:
            raise DataError(f"{files[i]}: {image.shape[1]}×{image.shape[0]} pixels, others "
                            f"{first.shape[1]}×{first.shape[0]}; give --image_size")
        images[i] = image

    thread_map(store, range(len(files)), max_workers=workers, desc="decoding", leave=False,
               disable=distributed.rank() != 0 or len(files) < 5000)
    return images


def balanced(split: Split, per_class: int, classes: list[str], generator, flag: str):
    """Return a Split of up to `per_class` random images of each class, and one of the rest."""
    order = torch.randperm(len(split.labels), generator=generator).numpy()
    members = [order[split.labels[order] == c] for c in range(len(classes))]
    least = min(range(len(classes)), key=lambda c: len(members[c]))
    if len(members[least]) < per_class:
        warn(f"{flag} {per_class}: class {classes[least]} has only {len(members[least])} images "
             "left; all of them are taken")
    taken = np.sort(np.concatenate([rows[:per_class] for rows in members]))
    rest = np.setdiff1d(order, taken)
    return tuple(Split(split.images[rows], split.labels[rows]) for rows in (taken, rest))


def fingerprint(*splits: Split) -> str:
    """Return a short digest of all labels and pixels: tells when data changed between runs."""
    digest = hashlib.blake2b(digest_size=8)
    for split in splits:
        digest.update(repr(split.images.shape).encode())
        digest.update(split.labels.tobytes())
        digest.update(np.ascontiguousarray(split.images))
    return digest.hexdigest()
