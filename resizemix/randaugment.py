"""RandAugment (Cubuk et al. 2020) in this paper's two forms, and AutoAugment (2019).

`transform`, of loaded images: ten operations that move no pixel, drawn for each image.
`batch_aug`, of mixed batches: fourteen, five of them geometric, drawn once for the batch.
"""
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


def draw_operations(n: int, generator: torch.Generator, count: int = 2) -> Tensor:
    """Return indices (n, count) into PER_IMAGE, drawn with replacement, on the CPU."""
    return torch.randint(len(PER_IMAGE), (n, count), generator=generator)


def randaugment(images: Tensor, operations: Tensor, magnitude: float = 14) -> Tensor:
    """Return images (B, 3, H, W) uint8 after operations[i, 0], operations[i, 1], ... on image i.

    `operations` (B, count): CPU indices into PER_IMAGE.
    """
    settings = {name: value(*limits, magnitude) for name, limits in PER_IMAGE.items()}
    table = [Operation(name, setting - 1 if name in BLENDS else
                       setting / 255 if name == "Solarize" else int(setting))
             for name, setting in settings.items()]
    return apply_operations(images, [table] * operations.shape[1], operations.T)


def transform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images after two random operations at magnitude 14, as data loaders call it."""
    return randaugment(images, draw_operations(len(images), generator))


class AutoAugment(v2.AutoAugment):
    """torchvision's policies, one drawn for each image: (images, generator) -> images.

    Images (B, 3, H, W) uint8; a CPU generator.
    """

    def __init__(self, policy: v2.AutoAugmentPolicy = v2.AutoAugmentPolicy.CIFAR10):
        super().__init__(policy)
        self.table = functools.cache(self.table)

    def table(self, height: int, width: int) -> tuple[Operation, ...]:
        """Return all operations: of policy p and step q at 4p + 2q, with negative sign one further;
        the last one does nothing."""
        pairs = [both_signs(name, self._AUGMENTATION_SPACE[name], level, 10, height, width)
                 for policy in self._policies for name, _, level in policy]
        return (*sum(pairs, ()), Operation("Identity"))

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        table = self.table(*images.shape[2:])
        policy = torch.randint(len(self._policies), (len(images),), generator=generator)
        applied, negative = torch.rand(2, len(images), 2, generator=generator)
        probability = torch.tensor([[share for _, share, _ in pair] for pair in self._policies])
        chosen = 4 * policy[:, None] + torch.tensor([0, 2]) + (negative < 0.5)
        chosen = chosen.where(applied <= probability[policy], len(table) - 1)
        return apply_operations(images, [table] * 2, chosen.T)


# ------------------------------------------------------------------------------ of mixed batches

def affine(images: Tensor, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0) -> Tensor:
    """Return images whose pixel (x, y) is pixel (ax + by + c, dx + ey + f) of `images`.

    Coordinates from the image's middle; bilinear, black outside. Unlike torchvision's affine,
    without host synchronisation.
    """
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


# Shears and translations in fractions of the side, rotations in degrees; their signs are drawn.
GEOMETRIC = {
    "shear_x": (0, 0.5, lambda x, v: affine(x, b=v, c=v * x.shape[2] / 2)),
    "shear_y": (0, 0.5, lambda x, v: affine(x, d=v, f=v * x.shape[3] / 2)),
    "translate_x": (0, 0.5, lambda x, v: affine(x, c=-round(v * x.shape[3]))),
    "translate_y": (0, 0.5, lambda x, v: affine(x, f=-round(v * x.shape[2]))),
    "rotate": (0, 45, rotate),
}
PER_BATCH = {
    "identity": (0, 1, lambda x, v: x), **GEOMETRIC,
    "autocontrast": (0, 1, lambda x, v: TF.autocontrast(x)),
    "invert": (0, 1, lambda x, v: 1 - x),
    "solarize": (0, 1, TF.solarize),
    "posterize": (4, 8, lambda x, v: TF.posterize(x, int(v))),
    "contrast": (0.1, 1.9, TF.adjust_contrast),
    "color": (0.1, 1.9, TF.adjust_saturation),
    "sharpness": (0.1, 1.9, sharpness),
    "brightness": (0.1, 1.9, TF.adjust_brightness),
}


def draw_batch_operations(generator: torch.Generator, count: int = 2) -> list[tuple[int, int]]:
    """Return `count` pairs (index into PER_BATCH, sign ±1), drawn with replacement."""
    index = torch.randint(len(PER_BATCH), (count,), generator=generator).tolist()
    sign = torch.randint(2, (count,), generator=generator).mul(2).sub(1).tolist()
    return list(zip(index, sign, strict=True))


def batch_randaugment(images: Tensor, operations: list[tuple[int, int]], *, mean, std,
                      magnitude: float = 14) -> Tensor:
    """Return normalised images (B, 3, H, W) after the same `operations` on all."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1).to(images, non_blocking=True)
                 for v in (mean, std))
    pixels = (images * std + mean).clamp_(0, 1)
    for index, sign in operations:
        name = list(PER_BATCH)[index]
        low, high, operation = PER_BATCH[name]
        setting = value(low, high, magnitude)
        pixels = operation(pixels, sign * setting if name in GEOMETRIC else setting)
    return (pixels - mean) / std


def batch_aug(images: Tensor, generator: torch.Generator, *, mean, std) -> Tensor:
    """Return two independent `batch_randaugment` views of a mixed batch: 2B images."""
    return torch.cat([batch_randaugment(images, draw_batch_operations(generator),
                                        mean=mean, std=std) for _ in range(2)])
