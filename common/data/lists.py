"""Streamed sets as lists of files: image folders, CUB-200-2011, Stanford Dogs; or RecordIO."""
import os
from pathlib import Path

from common.data.folders import (
    SPLIT,
    list_classes,
    numbered,
    printable,
    split_classes,
    test_part,
)
from common.data.images import read_file, reading, table
from common.data.recordio import RecordFile
from common.errors import DataError


class Files:
    """A list of image files: len, [i] -> (label, encoded image), name(i), classes.

    `path`: the set's folder; `files`: paths as text; `labels`: ints; `boxes`: of the objects, (x,
    y, width, height) in pixels of each file, or None.
    """
    in_file_order = False

    def __init__(self, path: Path, files: list[str], labels: list[int], classes: list[str],
                 boxes: list[tuple] | None = None):
        self.path, self.files, self.labels, self.classes = path, files, labels, classes
        self.boxes = boxes

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        with reading(self.files[i]):
            return self.labels[i], read_file(self.files[i])

    def name(self, i: int) -> str:
        return self.files[i]

    def facts(self) -> bytes:
        """Return what tells this set from a changed one: names, labels, sizes of up to 20,000."""
        names = "\n".join(name[len(str(self.path)):] for name in self.files)
        some = self.files[::-(-len(self.files) // 20000)]
        try:
            return repr((names, self.labels, [os.stat(file).st_size for file in some])).encode()
        except OSError as fault:
            raise DataError(f"{fault.filename}: {fault.strerror}") from None


def folder(path: Path, names: list[str] | None = None) -> tuple[Files, list[str]]:
    """Return images in one folder per class (of `names`, see `list_classes`), and the folders."""
    classes = list_classes(path, names)
    return of_classes(path, classes), list(classes)


def of_classes(path: Path, classes: dict[str, list[str]]) -> Files:
    """Return the image files of each class folder as one list."""
    files, labels = map(list, zip(*numbered(classes), strict=True))
    return Files(path, files, labels, printable(classes))


def open_sets(dataset: str, root: Path, val_split: float | None = None, seed: int = 0
              ) -> tuple[Files | RecordFile, Files | RecordFile]:
    """Return training and test images of a streamed set.

    imagenet, or any set like it: train and val (or test), each a .rec file or class folders.
    Raises DataError naming what is missing or wrong.
    """
    if dataset == "cub200":
        return cub200(root)
    if dataset == "stanford_dogs":
        root = inside(root, "stanford_dogs")
        if not (root / "train").is_dir() or (inside(root, "lists") / "train_list.mat").exists():
            return stanford_dogs(root)
    if val_split:
        return tuple(of_classes(root, part) for part in split_classes(root, val_split, seed))
    parts, names = [], None
    for part in ("train", test_part(root, "val", "test") or "val"):
        if any((root / f"{part}.{end}").exists() for end in ("rec", "idx")):
            parts.append(RecordFile(root / f"{part}.rec"))
        elif (root / part).is_dir():
            files, names = folder(root / part, names)
            parts.append(files)
        else:
            raise DataError(f"{root} holds neither {part}.rec nor a folder {part}/ with one "
                            f"folder per class; {SPLIT}")
    classes = [data.classes for data in parts]
    if all(classes) and classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise DataError(f"{root}: train and {part} differ in their classes"
                        + (f": {odd[0]}" if odd else "' order"))
    return tuple(parts)


def cub200(root: Path) -> tuple[Files, Files]:
    """Training and test images of CUB_200_2011/ (or a folder that holds it), with their boxes.

    Read from its images.txt, image_class_labels.txt, train_test_split.txt and classes.txt, and
    bounding_boxes.txt where it is there. Raises DataError naming the file that is missing or wrong.
    """
    root = inside(root, "CUB_200_2011")
    names = table(root / "images.txt")
    classes = table(root / "classes.txt")
    label = table(root / "image_class_labels.txt", like=names)
    is_train = table(root / "train_test_split.txt", like=names)
    boxed = (root / "bounding_boxes.txt").is_file()
    corners = table(root / "bounding_boxes.txt", like=names) if boxed else {}
    number = {key: i for i, key in enumerate(classes)}
    parts = [], []
    for key, (name, *_) in names.items():
        if label[key][0] not in number:
            raise DataError(f"{root / 'image_class_labels.txt'}: image {key} has class "
                            f"{label[key][0]}, which classes.txt lacks")
        if is_train[key][0] not in ("0", "1"):
            raise DataError(f"{root / 'train_test_split.txt'}: image {key} has "
                            f"{is_train[key][0]}, neither 0 nor 1")
        with reading(root / "bounding_boxes.txt", f"image {key} has no x, y, width and height"):
            x, y, width, height = map(float, corners[key]) if boxed else (0, 0, 0, 0)
        file = str(root / "images" / name)
        parts[is_train[key][0] == "0"].append((file, number[label[key][0]], (x, y, width, height)))
    titles = [row[0].split(".")[-1].replace("_", " ") for row in classes.values()]
    return tuple(listed(root, rows, titles, part, boxed)
                 for rows, part in zip(parts, ("training", "test"), strict=True))


def inside(root: Path, name: str) -> Path:
    """root/name where it is a folder, else root itself. DataError where neither is."""
    if (root / name).is_dir():
        return root / name
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    return root


def listed(root: Path, rows: list[tuple], classes: list[str], part: str, boxed=False) -> Files:
    """Files of (path, label, box) rows. DataError where there are none or the first is missing."""
    if not rows:
        raise DataError(f"{root}: lists no {part} images")
    if not Path(rows[0][0]).is_file():
        raise DataError(f"{rows[0][0]}: listed, but there is no such file")
    files, labels, boxes = map(list, zip(*rows, strict=True))
    return Files(root, files, labels, classes, boxes if boxed else None)


def stanford_dogs(root: Path) -> tuple[Files, Files]:
    """Training and test images of Stanford Dogs: train_list.mat, test_list.mat and Images/."""
    from scipy.io import loadmat
    read = {}
    for part in ("train", "test"):
        file = inside(root, "lists") / f"{part}_list.mat"
        if not file.is_file():
            raise DataError(f"{file}: no such file (nor folders train/ and test/)")
        with reading(file, "a MATLAB file of file_list and labels"):
            stored = loadmat(file)
            names = [str(cell.item()) for cell in stored["file_list"].ravel()]
            read[part] = list(zip(names, map(int, stored["labels"].ravel()), strict=True))
    folders = {label: name.split("/")[0] for rows in read.values() for name, label in rows}
    number = {label: i for i, label in enumerate(sorted(folders))}
    titles = [folders[label].split("-", 1)[-1].replace("_", " ") for label in number]
    return tuple(listed(root, [(str(root / "Images" / name), number[label], None)
                                for name, label in rows], titles, part)
                 for part, rows in read.items())
