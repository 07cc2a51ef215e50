"""RandAugment (Cubuk et al. 2020) in this paper's two forms; the operations are torchvision's.

Of the loader (`randaugment`): ten operations that move no pixel, chosen for each image.
Of the batch (`batch_randaugment`, `batch_aug`): these and five geometric ones, but equalize,
the same operations for all images of an already mixed batch.

An operation's value is magnitude / 30 of the way from its lowest to its highest setting.
"""
import math

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

Draws = list[tuple[int, int]]

# name: (lowest, highest, operation on images and value); values of solarize are in pixel values
PER_IMAGE = {
    "identity": (0, 1, lambda x, v: x),
    "autocontrast": (0, 1, lambda x, v: TF.autocontrast(x)),
    "invert": (0, 1, lambda x, v: TF.invert(x)),
    "equalize": (0, 1, lambda x, v: TF.equalize(x)),
    "solarize": (0, 256, TF.solarize),
    "posterize": (4, 8, lambda x, v: TF.posterize(x, int(v))),
    "contrast": (0.1, 1.9, TF.adjust_contrast),
    "color": (0.1, 1.9, TF.adjust_saturation),
    "brightness": (0.1, 1.9, TF.adjust_brightness),
    "sharpness": (0.1, 1.9, TF.adjust_sharpness),
}


def affine(images: Tensor, *, angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None) -> Tensor:
    """torchvision's affine map, bilinear, black outside; shears in tangents of their angles."""
    return TF.affine(images, angle, list(translate), 1.0,
                     [math.degrees(math.atan(tangent)) for tangent in shear],
                     interpolation=TF.InterpolationMode.BILINEAR, center=center)


# Shears and translations are in fractions of the side, rotations in degrees; their signs are drawn.
GEOMETRIC = {
    "shear_x": (0, 0.5, lambda x, v: affine(x, shear=(v, 0), center=[0, 0])),
    "shear_y": (0, 0.5, lambda x, v: affine(x, shear=(0, v), center=[0, 0])),
    "translate_x": (0, 0.5, lambda x, v: affine(x, translate=(round(v * x.shape[-1]), 0))),
    "translate_y": (0, 0.5, lambda x, v: affine(x, translate=(0, round(v * x.shape[-2])))),
    "rotate": (0, 45, lambda x, v: affine(x, angle=v)),
}
PER_BATCH = {"identity": PER_IMAGE["identity"], **GEOMETRIC,
             **{name: PER_IMAGE[name] for name in ("autocontrast", "invert")},
             "solarize": (0, 1, TF.solarize),
             **{name: PER_IMAGE[name]
                for name in ("posterize", "contrast", "color", "sharpness", "brightness")}}


def value(low: float, high: float, magnitude: float) -> float:
    """Setting of an operation at `magnitude` 0 (`low`) to 30 (`high`)."""
    return low + magnitude / 30 * (high - low)


def draw_operations(n: int, generator: torch.Generator, count: int = 2) -> Tensor:
    """Indices (n, count) into PER_IMAGE, with replacement, on the CPU."""
    return torch.randint(len(PER_IMAGE), (n, count), generator=generator)


def randaugment(images: Tensor, operations: Tensor, magnitude: float = 14) -> Tensor:
    """Applies to image i the operations operations[i], one after the other.

    `images` (B, 3, H, W) uint8; `operations` (B, count) indices into PER_IMAGE on the CPU, so
    that which images an operation takes is known without waiting for the device. Returns new
    uint8 images.
    """
    images = images.clone()
    for column in operations.T:
        for index, (low, high, operation) in enumerate(PER_IMAGE.values()):
            rows = (column == index).nonzero().flatten()
            if index and len(rows):
                rows = rows.to(images.device, non_blocking=True)
                images[rows] = operation(images[rows], value(low, high, magnitude))
    return images


def transform(images: Tensor, generator: torch.Generator) -> Tensor:
    """`randaugment` with its draws made (2 operations, magnitude 14), as data loaders take it."""
    return randaugment(images, draw_operations(len(images), generator))


def draw_batch_operations(generator: torch.Generator, count: int = 2) -> Draws:
    """`count` pairs: index into PER_BATCH, with replacement, and sign (geometric ones use it)."""
    index = torch.randint(len(PER_BATCH), (count,), generator=generator).tolist()
    sign = torch.randint(2, (count,), generator=generator).mul(2).sub(1).tolist()
    return list(zip(index, sign, strict=True))


def batch_randaugment(images: Tensor, operations: Draws, *, mean, std, magnitude: float = 14
                      ) -> Tensor:
    """Applies the same `operations` to all `images` (B, 3, H, W), normalised with `mean`, `std`.

    The operations see pixels in [0, 1] and leave them there; the result is normalised again.
    """
    mean, std = (torch.tensor(v).to(images).view(1, 3, 1, 1) for v in (mean, std))
    pixels = (images * std + mean).clamp_(0, 1)
    for index, sign in operations:
        name = list(PER_BATCH)[index]
        low, high, operation = PER_BATCH[name]
        setting = value(low, high, magnitude)
        pixels = operation(pixels, sign * setting if name in GEOMETRIC else setting)
    return (pixels - mean) / std


def batch_aug(images: Tensor, generator: torch.Generator, *, mean, std) -> Tensor:
    """Two independent `batch_randaugment` passes over a mixed batch, one after the other: (2B, …).

    `--batch_aug`: labels and ratios are to be repeated, `torch.cat([labels, labels])`.
    """
    return torch.cat([batch_randaugment(images, draw_batch_operations(generator),
                                        mean=mean, std=std) for _ in range(2)])
