"""Which files a set on disk holds: image folders, RecordIO, Tiny ImageNet, CUB, Stanford Dogs."""
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from common import distributed
from common.data.images import SUFFIXES, reading, table
from common.data.recordio import RecordFile
from common.distributed import warn
from common.errors import DataError

HIDDEN = (".", "__MACOSX")              # how names begin that are none of the data


@dataclass
class Files:
    """A list of image files: len, [i] -> (label, encoded image), name(i)."""
    path: Path                          # the set's folder
    classes: list[str]
    files: list[str]
    labels: list[int]
    boxes: list[tuple] | None = None    # (x, y, width, height) of the objects, in pixels
    in_file_order = False

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        return self.labels[i], Path(self.files[i]).read_bytes()

    def name(self, i: int) -> str:
        return self.files[i]

    def facts(self) -> bytes:
        """Return what tells this set from a changed one: names, labels, sizes of up to 20,000."""
        names = "\n".join(name[len(str(self.path)):] for name in self.files)
        some = self.files[::-(-len(self.files) // 20000)]
        with reading(self.path):
            return repr((names, self.labels, [os.stat(file).st_size for file in some])).encode()


def images_below(folder: str, skipped: Counter, above=()) -> list[str]:
    """Return the image files below a folder, sorted, linked folders too, but not in a circle;
    hidden ones are left out, files that are no images counted in `skipped`, by suffix."""
    found, here = [], os.path.realpath(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(HIDDEN):
            continue
        if entry.is_dir():
            if os.path.realpath(entry.path) not in (here, *above):
                found += images_below(entry.path, skipped, (here, *above))
        elif suffix in SUFFIXES and entry.is_file():
            found.append(entry.path)
        else:
            skipped[suffix or entry.name] += 1
    return found


def list_classes(folder: Path, names: list[str] | None = None, allow_empty=False) -> dict:
    """Return {class: image files} of the class folders of `folder`, sorted; names: all classes,
    which may be empty or lack here. Raises DataError for others, and for folders without images."""
    skipped = Counter()
    with reading(folder):
        classes = {sub.name: images_below(str(sub), skipped) for sub in sorted(folder.iterdir())
                   if sub.is_dir() and not sub.name.startswith(HIDDEN)}
    if skipped:
        warn(f"{folder}: {skipped.total()} files are no images and left out ("
             + ", ".join(f"{n} {suffix}" for suffix, n in skipped.most_common(5)) + ")")
    if not any(classes.values()):
        raise DataError(f"{folder}: holds no class folders with images")
    if names is not None:
        odd = [name for name, files in classes.items() if files and name not in names]
        if odd:
            raise DataError(f"{folder / odd[0]}: a class that the training images lack")
        return {name: classes.get(name, []) for name in names}
    if len(classes) == 1:
        warn(f"{folder}: one class, {next(iter(classes))}; class folders lie directly in {folder}")
    empty = [name for name, files in classes.items() if not files]
    if empty and not allow_empty:
        raise DataError(f"{folder / empty[0]}: a class without images")
    return classes


def as_files(path: Path, classes: dict[str, list[str]]) -> Files:
    """Return the image files of `list_classes` as one list; labels number the classes."""
    files = [(file, label) for label, files in enumerate(classes.values()) for file in files]
    return Files(path, printable(classes), *map(list, zip(*files, strict=True)))


def printable(names) -> list[str]:
    """Return class names with what is not UTF-8 in them replaced, for logs and pictures."""
    return [os.fsencode(name).decode("utf-8", "replace") for name in names]


def inside(root: Path, name: str) -> Path:
    """Return root/name where it is a folder, else root itself."""
    return root / name if (root / name).is_dir() else root


def open_folders(root: Path, parts: tuple, val_split: float | None = None, seed: int = 0) -> tuple:
    """Return the Files of train/<class>/* and of the first of `parts`; val_split: of root/train
    (or `root`) without and with a seeded share of each class, of one image to all but one."""
    if not val_split:
        if root.is_dir() and not (root / "train").is_dir():
            raise DataError(f"{root / 'train'}: no such folder; of class folders in {root} itself "
                            "--val_split 0.2 tests on a fifth")
        train = list_classes(root / "train")
        test = root / test_part(root, *parts)
        return as_files(root / "train", train), as_files(test, list_classes(test, list(train)))
    for part in parts:
        if (root / part).exists():
            raise DataError(f"{root / part}: there are test images, which --val_split replaces")
    generator = torch.Generator().manual_seed(distributed.seed_of(seed, "val_split"))
    train, test = {}, {}
    for name, files in list_classes(inside(root, "train")).items():
        count = min(max(1, round(val_split * len(files))), len(files) - 1)
        order = torch.randperm(len(files), generator=generator).tolist()
        test[name], train[name] = ([files[i] for i in sorted(part)]
                                   for part in (order[:count], order[count:]))
    if not any(test.values()):
        raise DataError(f"{root}: no class has two images to split")
    return as_files(root, train), as_files(root, test)


def test_part(root: Path, *parts: str) -> str:
    """Return the first of `parts` that `root` holds as a folder or RecordIO. Raises DataError."""
    for part in parts:
        if any((root / f"{part}{end}").exists() for end in ("", ".rec", ".idx")):
            return part
    raise DataError(f"{root} holds neither {parts[0]} nor {parts[1]} (folders, or .rec and .idx); "
                    "of class folders --val_split 0.2 tests on a fifth")


def open_sets(dataset: str, root: Path, val_split: float | None = None, seed: int = 0) -> tuple:
    """Return training and test images of a streamed set, Files or RecordFile. Raises DataError."""
    if dataset == "cub200":
        return cub200(inside(root, "CUB_200_2011"))
    if dataset == "stanford_dogs":
        root = inside(root, "stanford_dogs")
        if not (root / "train").is_dir() or (inside(root, "lists") / "train_list.mat").exists():
            return stanford_dogs(root)
    if val_split or not any((root / f"train.{end}").exists() for end in ("rec", "idx")):
        return open_folders(root, ("val", "test"), val_split, seed)
    part = test_part(root, "val", "test")
    train, test = (RecordFile(root / f"{name}.rec") for name in ("train", part))
    if train.classes != test.classes and train.classes and test.classes:
        raise DataError(f"{root}: train_classes.txt and {part}_classes.txt differ: pack again, "
                        "with make_recordio.py --classes")
    return train, test


def cub200(root: Path) -> tuple[Files, Files]:
    """Return training and test images of CUB_200_2011/, with their boxes where these are there."""
    names, classes, labels, is_train = (table(root / f"{name}.txt") for name in (
        "images", "classes", "image_class_labels", "train_test_split"))
    boxes = root / "bounding_boxes.txt"
    corners = table(boxes) if boxes.is_file() else {}
    number = {key: label for label, key in enumerate(classes)}
    titles = [row[0].split(".")[-1].replace("_", " ") for row in classes.values()]
    parts = {"1": [], "0": []}
    with reading(root, "a whole CUB_200_2011: its tables do not fit one another"):
        for key, (name, *_) in names.items():
            box = [tuple(map(float, corners[key]))] if corners else []
            row = str(root / "images" / name), number[labels[key][0]], *box
            parts[is_train[key][0]].append(row)
        return tuple(Files(root, titles, *map(list, zip(*rows, strict=True)))
                     for rows in parts.values())


def stanford_dogs(root: Path) -> tuple[Files, Files]:
    """Return training and test images by train_list.mat and test_list.mat, below Images/."""
    from scipy.io import loadmat
    read = []
    for part in ("train", "test"):
        file = inside(root, "lists") / f"{part}_list.mat"
        with reading(file, "a MATLAB file of file_list and labels"):
            stored = loadmat(str(file))
            names = [str(cell.item()) for cell in stored["file_list"].ravel()]
            read.append(list(zip(names, map(int, stored["labels"].ravel()), strict=True)))
    folders = dict(sorted((label, name.split("/")[0]) for rows in read for name, label in rows))
    titles = [folder.split("-", 1)[-1].replace("_", " ") for folder in folders.values()]
    number = {label: i for i, label in enumerate(folders)}
    return tuple(Files(root, titles, [str(root / "Images" / name) for name, _ in rows],
                       [number[label] for _, label in rows]) for rows in read)


def tiny_imagenet(root: Path) -> tuple[Files, Files]:
    """Return images of tiny-imagenet-200/, val/ by its annotations or sorted into class folders."""
    root = inside(root, "tiny-imagenet-200")
    classes, val, words = list_classes(root / "train"), root / "val", root / "words.txt"
    train, names = as_files(root / "train", classes), list(classes)
    titles = table(words, "\t") if words.is_file() else {}
    train.classes = [(titles.get(name) or [name])[0].split(",")[0] for name in train.classes]
    if any((val / name).is_dir() for name in names):        # sorted by hand: nothing may be left
        return train, as_files(val, list_classes(val, names))
    notes = table(val / "val_annotations.txt", "\t")
    with reading(val / "val_annotations.txt", "lines of an image and a class of train/"):
        labels = [names.index(row[0]) for row in notes.values()]
    return train, Files(val, train.classes, [str(val / "images" / name) for name in notes], labels)
