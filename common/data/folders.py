"""Image folders: which files a class folder holds, test parts, and training images split in two."""
import os
from collections import Counter
from pathlib import Path

import torch

from common import distributed
from common.data.images import SUFFIXES, reading
from common.distributed import warn
from common.errors import DataError

SPLIT = "--val_split 0.2 tests on a fifth of the training images"


def images_below(folder: str, skipped: Counter, above=()) -> list[str]:
    """Return the image files below a folder, sorted; linked folders too, but not in a circle.

    Hidden files and folders and macOS's __MACOSX are no images; other files that are none, by
    their suffix or as no regular file (a broken link, a FIFO), are counted in `skipped`.
    """
    found, here = [], os.path.realpath(folder)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            suffix = os.path.splitext(entry.name)[1].lower()
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                if os.path.realpath(entry.path) not in (here, *above):
                    found += images_below(entry.path, skipped, (here, *above))
            elif suffix in SUFFIXES and entry.is_file():
                found.append(entry.path)
            else:
                skipped[suffix or entry.name] += 1
    return found


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is none of the data: .name, macOS's __MACOSX."""
    return name[0] == "." or name == "__MACOSX"


def list_classes(folder: Path, names: list[str] | None = None, allow_empty: bool = False
                 ) -> dict[str, list[str]]:
    """Return the image files of each class folder of `folder`, sorted by name.

    names: the classes there are (those of training images): a folder of another name is an error
    unless it is empty, and a class without a folder is none. allow_empty: classes may be empty.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    skipped = Counter()
    with reading(folder, "a readable folder"):
        classes = {sub.name: images_below(str(sub), skipped) for sub in sorted(folder.iterdir())
                   if sub.is_dir() and not is_hidden(sub.name)}
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
    empty = [name for name, files in classes.items() if not files]
    if empty and not allow_empty:
        raise DataError(f"{folder / empty[0]}: a class without images")
    return classes


def numbered(classes: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Return (file, label) of all files of `list_classes`."""
    return [(file, label) for label, files in enumerate(classes.values()) for file in files]


def printable(names) -> list[str]:
    """Return class names with what is not UTF-8 in them replaced, for logs and pictures."""
    return [os.fsencode(name).decode("utf-8", "replace") for name in names]


def test_part(root: Path, *first: str) -> str:
    """Return the part of `first` that `root` holds as a folder or RecordIO, or ""."""
    return next((part for part in first for end in ("", ".rec", ".idx")
                 if (root / f"{part}{end}").exists()), "")


def split_classes(root: Path, share: float, seed: int) -> tuple[dict, dict]:
    """Return class folders of root/train (or of `root`), as training and as test images.

    A seeded `share` of each class is for testing: at least one image, but never all of them.
    Raises DataError where there are test images already.
    """
    part = test_part(root, "test", "val")
    if part:
        raise DataError(f"{root / part}: there are test images, which --val_split would replace")
    generator = torch.Generator().manual_seed(distributed.seed_of(seed, "val_split"))
    train, test = {}, {}
    for name, files in list_classes(root / "train" if (root / "train").is_dir() else root
                                    ).items():
        count = min(max(1, round(share * len(files))), len(files) - 1)
        chosen = set(torch.randperm(len(files), generator=generator)[:count].tolist())
        test[name] = [file for i, file in enumerate(files) if i in chosen]
        train[name] = [file for i, file in enumerate(files) if i not in chosen]
    if not any(test.values()):
        raise DataError(f"{root}: no class has two images to split")
    return train, test
