"""CUB-200-2011 and Stanford Dogs as people have them: lists of files that imagenet.py streams."""
from pathlib import Path

from common.data.imagenet import Files, folder
from common.errors import DataError


def cub200(place: Path) -> tuple[Files, Files]:
    """Training and test images of CUB_200_2011/ (or a folder that holds it), with their boxes.

    Read from its images.txt, image_class_labels.txt, train_test_split.txt and classes.txt, and
    bounding_boxes.txt where it is there. Raises DataError naming the file that is missing or wrong.
    """
    place = inside(place, "CUB_200_2011")
    names = table(place / "images.txt")
    classes = table(place / "classes.txt")
    label = table(place / "image_class_labels.txt", like=names)
    is_train = table(place / "train_test_split.txt", like=names)
    boxed = (place / "bounding_boxes.txt").is_file()
    corners = table(place / "bounding_boxes.txt", like=names) if boxed else {}
    number = {key: place_of for place_of, key in enumerate(classes)}
    parts = [], []
    for key, (name, *_) in names.items():
        if label[key][0] not in number:
            raise DataError(f"{place / 'image_class_labels.txt'}: image {key} has class "
                            f"{label[key][0]}, which classes.txt lacks")
        if is_train[key][0] not in ("0", "1"):
            raise DataError(f"{place / 'train_test_split.txt'}: image {key} has "
                            f"{is_train[key][0]}, neither 0 nor 1")
        try:
            box = tuple(map(float, corners[key])) if boxed else None
            if boxed and len(box) != 4:
                raise ValueError
        except ValueError:
            raise DataError(f"{place / 'bounding_boxes.txt'}: image {key} has no x, y, width and "
                            "height") from None
        file = str(place / "images" / name)
        parts[is_train[key][0] == "0"].append((file, number[label[key][0]], box))
    titles = [row[0].split(".")[-1].replace("_", " ") for row in classes.values()]
    return tuple(listed(place, rows, titles, part, boxed)
                 for rows, part in zip(parts, ("training", "test"), strict=True))


def inside(place: Path, name: str) -> Path:
    """place/name where it is a folder, else place itself. DataError where neither is."""
    if (place / name).is_dir():
        return place / name
    if not place.is_dir():
        raise DataError(f"{place}: no such folder")
    return place


def table(file: Path, like: dict | None = None) -> dict[str, list[str]]:
    """A text file of lines `key value …`; its keys must be those of `like`."""
    try:
        rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{file}: {getattr(fault, 'strerror', None) or 'not a text file'}"
                        ) from None
    short = next((row[0] for row in rows if len(row) < 2), None)
    if short or not rows:
        raise DataError(f"{file}: " + (f"nothing beside {short}" if short else "empty"))
    found = {row[0]: row[1:] for row in rows}
    odd = sorted(set(found) ^ set(like)) if like else []
    if odd:
        raise DataError(f"{file}: image {odd[0]} is "
                        + ("missing" if odd[0] in like else "unknown to images.txt"))
    return found


def listed(place: Path, rows: list[tuple], classes: list[str], part: str, boxed=False) -> Files:
    """Files of (path, label, box) rows. DataError where there are none or the first is missing."""
    if not rows:
        raise DataError(f"{place}: lists no {part} images")
    if not Path(rows[0][0]).is_file():
        raise DataError(f"{rows[0][0]}: listed, but there is no such file")
    files, labels, boxes = map(list, zip(*rows, strict=True))
    return Files(place, files, labels, classes, boxes if boxed else None)


def stanford_dogs(place: Path) -> tuple[Files, Files]:
    """Training and test images of Stanford Dogs.

    Read from train_list.mat, test_list.mat (in `place` or its lists/) and Images/, or from
    folders train/<class>/* and test/ (or val/). Raises DataError naming what is missing or wrong.
    """
    place = inside(place, "stanford_dogs")
    lists = inside(place, "lists")
    if (place / "train").is_dir() and not (lists / "train_list.mat").exists():
        parts = folder(place / "train"), folder(
            place / ("test" if (place / "test").is_dir() else "val"))
        return parts
    read = {part: read_list(lists / f"{part}_list.mat") for part in ("train", "test")}
    names = {label: name.split("/")[0] for rows in read.values() for name, label in rows}
    number = {label: place_of for place_of, label in enumerate(sorted(names))}
    titles = [names[label].split("-", 1)[-1].replace("_", " ") for label in number]
    return tuple(listed(place, [(str(place / "Images" / name), number[label], None)
                                for name, label in rows], titles, part)
                 for part, rows in read.items())


def read_list(file: Path) -> list[tuple[str, int]]:
    """(path below Images/, label) of each image of a train_list.mat or test_list.mat."""
    from scipy.io import loadmat
    if not file.is_file():
        raise DataError(f"{file}: no such file (nor folders train/ and test/)")
    try:
        stored = loadmat(file)
        names = [str(cell.item()) for cell in stored["file_list"].ravel()]
        labels = [int(label) for label in stored["labels"].ravel()]
    except Exception as fault:              # scipy raises nearly anything for damaged files
        missing = isinstance(fault, KeyError)
        raise DataError(f"{file}: " + (f"holds no {fault.args[0]}" if missing else
                                       "damaged, or no MATLAB file")) from None
    if len(names) != len(labels):
        raise DataError(f"{file}: {len(names)} files, {len(labels)} labels")
    return list(zip(names, labels, strict=True))
