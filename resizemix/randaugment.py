"""RandAugment (Cubuk et al. 2020) of loaded images and of mixed batches, and AutoAugment (2019)."""
import functools
import math

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import v2

from common.randaugment import BLENDS, Operation, apply_operations, blur, both_signs

# lowest and highest setting; of Solarize in pixel values, of Posterize in bits, else factors
PER_IMAGE = {"Identity": (0, 1), "AutoContrast": (0, 1), "Invert": (0, 1), "Equalize": (0, 1),
             "Solarize": (0, 256), "Posterize": (4, 8), "Contrast": (0.1, 1.9),
             "Color": (0.1, 1.9), "Brightness": (0.1, 1.9), "Sharpness": (0.1, 1.9)}


def value(low: float, high: float, magnitude: float) -> float:
    """Return an operation's setting at `magnitude` 0 (`low`) to 30 (`high`)."""
    return low + magnitude / 30 * (high - low)


def randaugment(images: Tensor, operations: Tensor, magnitude: float = 14) -> Tensor:
    """Return images uint8 after `operations` (B, count), CPU indices into PER_IMAGE, on each."""
    settings = {name: value(*limits, magnitude) for name, limits in PER_IMAGE.items()}
    table = [Operation(name, setting - 1 if name in BLENDS else
                       setting / 255 if name == "Solarize" else int(setting))
             for name, setting in settings.items()]
    return apply_operations(images, [table] * operations.shape[1], operations.T)


def transform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images after two random operations, drawn with replacement, at magnitude 14."""
    drawn = torch.randint(len(PER_IMAGE), (len(images), 2), generator=generator)
    return randaugment(images, drawn)


@functools.cache
def _policies(kind: v2.AutoAugmentPolicy, height: int, width: int):
    """Return probabilities (P, 2) of the steps of torchvision's policies, and all operations: of
    policy p and step q at 4p + 2q, with negative sign one further; the last one does nothing."""
    theirs = v2.AutoAugment(kind)
    pairs = [both_signs(name, theirs._AUGMENTATION_SPACE[name], level, 10, height, width)
             for policy in theirs._policies for name, _, level in policy]
    shares = [[share for _, share, _ in policy] for policy in theirs._policies]
    return torch.tensor(shares), (*sum(pairs, ()), Operation("Identity"))


def autoaugment(images: Tensor, generator: torch.Generator, kind: v2.AutoAugmentPolicy) -> Tensor:
    """Return images (B, 3, H, W) uint8, each after a random one of torchvision's policies."""
    probability, table = _policies(kind, *images.shape[2:])
    policy = torch.randint(len(probability), (len(images),), generator=generator)
    applied, negative = torch.rand(2, len(images), 2, generator=generator)
    chosen = 4 * policy[:, None] + torch.tensor([0, 2]) + (negative < 0.5)
    chosen = chosen.where(applied <= probability[policy], len(table) - 1)
    return apply_operations(images, [table] * 2, chosen.T)


def affine(images: Tensor, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0) -> Tensor:
    """Return images whose pixel (x, y), from the middle, is pixel (ax + by + c, dx + ey + f) of
    `images`; bilinear, black outside. torchvision's affine waits for the device."""
    height, width = images.shape[2:]
    y, x = (torch.arange(side, device=images.device) - (side - 1) / 2 for side in (height, width))
    y = y[:, None]
    grid = torch.stack([(a * x + b * y + c) * (2 / width), (d * x + e * y + f) * (2 / height)], 2)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Return images rotated clockwise about their middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return affine(images, a=cos, b=sin, d=-sin, e=cos)


def sharpness(images: Tensor, factor: float) -> Tensor:
    """Return torchvision's adjust_sharpness of images in [0, 1], without its tensor of weights."""
    change = F.pad(blur(images) - images[..., 1:-1, 1:-1], (1, 1, 1, 1))
    return images.add(change, alpha=1 - factor).clamp_(0, 1)


# Lowest and highest setting: of shears and translations fractions of the side, of rotate degrees
PER_BATCH = {
    "identity": (0, 1, lambda x, v: x),
    "shear_x": (0, 0.5, lambda x, v: affine(x, b=v, c=v * x.shape[2] / 2)),
    "shear_y": (0, 0.5, lambda x, v: affine(x, d=v, f=v * x.shape[3] / 2)),
    "translate_x": (0, 0.5, lambda x, v: affine(x, c=-round(v * x.shape[3]))),
    "translate_y": (0, 0.5, lambda x, v: affine(x, f=-round(v * x.shape[2]))),
    "rotate": (0, 45, rotate),
    "autocontrast": (0, 1, lambda x, v: TF.autocontrast(x)),
    "invert": (0, 1, lambda x, v: 1 - x),
    "solarize": (0, 1, TF.solarize),
    "posterize": (4, 8, lambda x, v: TF.posterize(x, int(v))),
    "contrast": (0.1, 1.9, TF.adjust_contrast),
    "color": (0.1, 1.9, TF.adjust_saturation),
    "sharpness": (0.1, 1.9, sharpness),
    "brightness": (0.1, 1.9, TF.adjust_brightness)}
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")      # with a sign


def draw_batch_operations(generator: torch.Generator) -> list[tuple[int, int]]:
    """Return two pairs (index into PER_BATCH, sign ±1), drawn with replacement."""
    index = torch.randint(len(PER_BATCH), (2,), generator=generator).tolist()
    sign = torch.randint(2, (2,), generator=generator).mul(2).sub(1).tolist()
    return list(zip(index, sign, strict=True))


def batch_randaugment(images: Tensor, operations: list[tuple[int, int]], *, mean, std) -> Tensor:
    """Return normalised images (B, 3, H, W) after the same `operations` at magnitude 14."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1).to(images, non_blocking=True)
                 for v in (mean, std))
    pixels = (images * std + mean).clamp_(0, 1)
    for index, sign in operations:
        name = list(PER_BATCH)[index]
        low, high, operation = PER_BATCH[name]
        setting = value(low, high, 14)
        pixels = operation(pixels, sign * setting if name in GEOMETRIC else setting)
    return (pixels - mean) / std


def batch_aug(images: Tensor, generator: torch.Generator, *, mean, std) -> Tensor:
    """Return two views of a mixed batch, 2B images, each by operations drawn for all of it."""
    return torch.cat([batch_randaugment(images, draw_batch_operations(generator),
                                        mean=mean, std=std) for _ in range(2)])
