"""Corrupted test sets: CIFAR-10-C, CIFAR-100-C, Tiny-ImageNet-C (Hendrycks and Dietterich 2019)."""
import re
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.data import sources
from common.data.recipe import mean_std
from common.errors import DataError

SEVERITIES = 5


def kind(condition: str) -> str:
    """Return 'fog' of 'fog 3', '' of a condition that is no corruption."""
    found = re.fullmatch(rf"(.+) [1-{SEVERITIES}]", condition)
    return found[1] if found else ""


class Corrupted:
    """Batches (images normalised, labels) of one corruption at one severity; this rank's share.

    images: (N, H, W, 3) uint8, perhaps mapped from a file, or a list of N image files.
    """

    def __init__(self, images, labels, info, batch_size: int, device):
        self.images, self.labels, self.info = images, labels, info
        self.batch_size, self.device = batch_size, device

    def __len__(self):
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self):
        mean, std = mean_std(self.info, self.device)
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start + distributed.rank(), start + self.batch_size, distributed.world())
            images, labels = self.images[part], self.labels[part]
            if not len(labels):
                return
            if isinstance(images, list):
                files = images
                images = sources.decode_files([(file, 0) for file in files], None, 4).images
                check_size(files[0], images, self.info)
            images = torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2)
            yield ((images.float() / 255 - mean) / std,
                   torch.as_tensor(labels, device=self.device))


def check_size(file: Path, images: np.ndarray, info):
    """Raise DataError naming the file unless images are (N, H, W, 3) uint8 of the data's size."""
    if images.dtype != np.uint8 or images.shape[1:] != (info.image_size, info.width, 3):
        raise DataError(f"{file}: {images.dtype} images of {images.shape[1:]}, the network is "
                        f"evaluated on ({info.image_size}, {info.width}, 3)")


def read(folder, info, batch_size: int, device):
    """Yield ('fog 1', Corrupted) for each corruption and severity in `folder`.

    It holds <corruption>.npy, severities 1 to 5 after one another, beside labels.npy; or
    <corruption>/<severity>/<class>/*. Raises DataError naming the file that does not fit.
    """
    root = Path(folder).expanduser()
    arrays = sorted(file for file in root.glob("*.npy") if file.stem != "labels")
    folders = sorted(path for path in root.glob("[!.]*") if path.is_dir())
    if not arrays and not folders:
        raise DataError(f"{root}: neither <corruption>.npy nor <corruption>/<severity>/<class>/ "
                        "folders are there")
    for file in arrays:
        images = np.load(file, mmap_mode="r")
        check_size(file, images, info)
        count = len(images) // SEVERITIES
        labels = np.load(root / "labels.npy").astype(np.int64)      # once, or for each severity
        if (len(labels) not in (count, len(images)) or len(images) % SEVERITIES
                or labels.max() >= info.num_classes):
            raise DataError(f"{file}: {len(images)} images do not fit {len(labels)} labels up to "
                            f"{labels.max()} in labels.npy, or these {info.num_classes} classes")
        for severity in range(SEVERITIES):
            part = images[severity * count:(severity + 1) * count]
            yield f"{file.stem} {severity + 1}", Corrupted(
                part, labels[:count], info, batch_size, device)
    for folder in folders:
        for severity in range(1, SEVERITIES + 1):
            classes = sources.list_classes(folder / str(severity))
            index = class_index(folder / str(severity), classes, info)
            files = [file for members in classes.values() for file in members]
            own = np.repeat([index[name] for name in classes], list(map(len, classes.values())))
            yield f"{folder.name} {severity}", Corrupted(files, own, info, batch_size, device)


def class_index(folder: Path, names, info) -> dict[str, int]:
    """Return labels of class folders: by name, or of all WordNet's numbers by their order."""
    if set(names) <= set(info.classes):
        return {name: info.classes.index(name) for name in names}
    if len(names) == info.num_classes and all(re.fullmatch(r"n\d{8}", name) for name in names):
        return {name: label for label, name in enumerate(sorted(names))}
    odd = sorted(set(names) - set(info.classes))
    raise DataError(f"{folder / odd[0]}: a class that {info.name} lacks")
