"""Data sets made for tests: photographs as class folders, CUB, Stanford Dogs and RecordIO."""
import gc
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from resizemix import make_recordio

HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")


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


def make_cub(place, classes=3, per_class=6, boxes=True):
    """CUB_200_2011/ as it comes: photographs, each with a red box where its object is said to be;
    of each class every third is for testing."""
    root = place / "CUB_200_2011"
    rng = np.random.default_rng(0)
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split",
                                    "bounding_boxes", "classes")}
    for label, photo in enumerate(photographs()[:classes], 1):
        name = f"{label:03}.Some_Bird_{label}"
        tables["classes"].append(f"{label} {name}")
        (root / "images" / name).mkdir(parents=True)
        for number in range(per_class):
            key = len(tables["images"]) + 1
            width, height = rng.integers(70, 130, 2)
            x, y, w, h = 10 + number, 20, width // 2, height // 2
            picture = photo.crop((50, 50, 50 + width, 50 + height))
            picture.paste((255, 0, 0), (x, y, x + w, y + h))
            file = f"{name}/Bird_{key:04}.jpg"
            picture.save(root / "images" / file, quality=95, subsampling=0)
            tables["images"].append(f"{key} {file}")
            tables["image_class_labels"].append(f"{key} {label}")
            tables["train_test_split"].append(f"{key} {int(number % 3 != 2)}")
            tables["bounding_boxes"].append(f"{key} {x}.0 {y}.0 {w}.0 {h}.0")
    for name, lines in tables.items():
        if boxes or name != "bounding_boxes":
            (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def make_dogs(place, classes=3, per_class=4):
    """Stanford Dogs as it comes: Images/, train_list.mat and test_list.mat."""
    from scipy.io import savemat
    lists = {"train": ([], []), "test": ([], [])}
    for label, photo in enumerate(photographs()[:classes], 1):
        name = f"n0{label}-Some_dog{label}"
        (place / "Images" / name).mkdir(parents=True)
        for number in range(per_class):
            file = f"{name}/{number}.jpg"
            photo.crop((10 * number, 0, 100 + 10 * number, 80)).save(place / "Images" / file)
            names, labels = lists["test" if number == per_class - 1 else "train"]
            names.append(file)
            labels.append(label)
    for part, (names, labels) in lists.items():
        cells = np.empty((len(names), 1), object)
        cells[:, 0] = names
        savemat(place / f"{part}_list.mat", {
            "file_list": cells, "labels": np.array(labels, float)[:, None]})
    return place
