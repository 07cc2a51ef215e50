"""`load` gives a main.py its training and test batches.

Sets that fit in memory: sets.py reads them, batches.py augments. imagenet, cub200, stanford_dogs:
imagenet.py streams them from disk.
"""
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common import distributed
from common.data import fine_grained, imagenet, sets
from common.data.batches import Batches, ResizedCrop
from common.errors import DataError, RunError

NAMES = sets.NAMES


@dataclass
class Info:
    """What a program needs to know of a data set; mean and std are of pixels in [0, 1].

    image_size is the images' height, as a rule also their width.
    """
    name: str
    num_classes: int
    image_size: int
    mean: tuple
    std: tuple
    classes: list
    num_train: int
    num_test: int
    fingerprint: str
    width: int
    valid: Batches | None = field(default=None, repr=False)

    def __str__(self):
        return (f"data: {self.name}, {self.num_classes} classes, {self.image_size}×"
                f"{self.width} pixels, {self.num_train} training and {self.num_test} test "
                "images" + (f", {self.valid.count} for validation" if self.valid else ""))


def load(dataset: str, data_dir: str, *, batch_size: int, device, seed: int = 0,
         loader: str = "auto", image_size: int | None = None, padding: int | None = None,
         flip: bool | None = None, labels_per_class: int | None = None,
         valid_labels_per_class: int = 0, mean=None, std=None, transform=None,
         transform_first: bool = False, drop_last: bool = False, workers: int = 2,
         streaming: dict | None = None, reflect: bool = False,
         resized_crop: ResizedCrop | None = None):
    """Training batches, test batches and Info of a data set.

    Batches yield images (B, 3, H, W) float32, normalised, and labels (B,) int64, on `device`.
    batch_size counts the images of one step over all processes. padding: zero pixels (reflect: its
    reflection) around the image before a random crop (default 2 up to 32 pixels a side, else 4);
    resized_crop: instead of padding random crops resized to image_size, to which test images are
    resized whole; flip: random horizontal flips (default: all sets but digits). transform(images
    uint8, generator): a further augmentation of training batches, before normalisation and after
    the crop (transform_first: before flip and crop). workers: threads that decode files or run
    DALI.
    streaming: of the sets that are read from disk as training goes and have their own crops
    (imagenet, cub200, stanford_dogs), further options of `imagenet.streaming`; what is said above
    from padding to transform_first is not for them.
    Raises DataError for data that are not there.
    """
    distributed.per_rank(batch_size)                            # or RunError
    if dataset in sets.STREAMED:
        if labels_per_class or valid_labels_per_class:
            raise RunError("--labels_per_class is for sets that fit in memory, "
                                   f"not for {dataset}")
        mean, std = (mean, std) if mean else sets.STATISTICS["imagenet"]
        return load_streaming(dataset, data_dir, image_size or 224, mean, std, streaming or {},
                              batch_size=batch_size, device=device, seed=seed, loader=loader,
                              workers=max(1, workers), drop_last=drop_last)
    crop_later = resized_crop and dataset not in ("digits", "folder")   # whose files differ in size
    train, test, classes = sets.read(dataset, data_dir, None if crop_later else image_size,
                                     max(1, workers))
    if mean is None:                    # of the whole set, also when training on a part of it
        mean, std = sets.STATISTICS.get(dataset) or statistics(train.images)
    generator = torch.Generator().manual_seed(distributed.seed_of(seed, "subset"))
    valid = None
    if valid_labels_per_class:
        valid, train = sets.balanced(train, valid_labels_per_class, classes, generator,
                                     "--valid_labels_per_class")
    if labels_per_class:
        train, _ = sets.balanced(train, labels_per_class, classes, generator, "--labels_per_class")
    sides = (image_size,) * 2 if crop_later and image_size else train.images.shape[1:3]
    padding = (2 if sides[0] <= 32 else 4) if padding is None else padding
    flip = dataset != "digits" if flip is None else flip
    common = {"batch_size": batch_size, "device": device, "mean": mean, "std": std,
              "resized_crop": resized_crop, "size": sides}
    batches = Batches(train.images, train.labels, seed=seed, padding=padding, flip=flip,
                      transform=transform, transform_first=transform_first, drop_last=drop_last,
                      loader=loader, workers=max(1, workers), reflect=reflect, **common)
    info = Info(dataset, len(classes), sides[0], tuple(mean), tuple(std), classes,
                len(train.labels), len(test.labels), sets.fingerprint(train, test), sides[1],
                Batches(valid.images, valid.labels, **common) if valid else None)
    return batches, Batches(test.images, test.labels, **common), info


def load_streaming(dataset: str, data_dir: str, image_size: int, mean, std, options: dict,
                   **common):
    """Sets read from disk. imagenet, or any set like it: train and val (or test), each a .rec file
    or class folders.

    Names of the classes are the folders', or those that make_recordio.py left beside the .rec
    file; without any there are 1000.
    """
    place = Path(data_dir).expanduser()

    def holds(part: str) -> bool:
        return any((place / f"{part}{end}").exists() for end in ("", ".rec", ".idx"))

    part = "test" if holds("test") and not holds("val") else "val"
    sources = {"cub200": fine_grained.cub200, "stanford_dogs": fine_grained.stanford_dogs}
    parts = sources[dataset](place) if dataset in sources else (place, place)
    common |= {"image_size": image_size, "mean": mean, "std": std, "rank": distributed.rank(),
               "world": distributed.world()}
    train = imagenet.streaming(parts[0], split="train", train=True, **options, **common)
    common |= {key: options[key] for key in ("test_crop", "filter") if key in options}
    test = imagenet.streaming(parts[1], split=part, train=False, **common)
    if train.classes and test.classes and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{place}: train and {part} differ in their classes"
                                + (f": {odd[0]}" if odd else "' order"))
    classes = train.classes or test.classes or [str(label) for label in range(1000)]
    train.num_classes = test.num_classes = len(classes)
    digest = hashlib.blake2b(digest_size=8)
    for data in (train.data, test.data):        # names and sizes tell sets apart
        digest.update(data.facts())
    return train, test, Info(dataset, len(classes), image_size, tuple(mean), tuple(std), classes,
                             train.count, test.count, digest.hexdigest(), image_size)


def statistics(images):
    """Per-channel mean and standard deviation of (N, H, W, 3) uint8 images, in [0, 1]."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for piece in torch.from_numpy(images).split(2000):
        piece = piece.reshape(-1, 3).double() / 255
        sums += torch.stack([piece.sum(0), (piece * piece).sum(0)])
    mean, square = sums / images[..., 0].size
    std = (square - mean * mean).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
