"""How images are cropped, resized, flipped, augmented and normalised, in torchvision's words."""
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import RunError

# Channel means and standard deviations in [0, 1] as the papers' programs have them
STATISTICS = {
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "cifar100": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    "tiny-imagenet-200": ((0.4802458, 0.44807219, 0.39754776),
                          (0.27698641, 0.26906449, 0.28208191)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Recipe:
    """What is done to images; memory.py and stream.py both read it (None: the data set's usual).
    crop: "padded", RandomCrop of the image with `padding` pixels around it; "resized",
    RandomResizedCrop; "random", RandomCrop; "centre", the whole central square (streamed sets).
    Usual: padded for sets in memory (by 2 up to 32 pixels a side, else 4), resized for others."""
    resize: str | None = None           # before the crop: "shorter" to image_size·256/224, "square"
    crop: str | None = None
    padding: int | None = None
    padding_mode: str = "constant"      # zeros, or "reflect"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"     # "bicubic", "lanczos" (bilinear to shrink); antialiased
    flip: bool | None = None            # RandomHorizontalFlip; usual: all sets but digits
    color_jitter: float = 0.0           # ColorJitter of brightness, contrast and saturation
    transform: Callable | None = None   # (uint8 (B, 3, H, W), CPU generator) -> uint8; after all
    transform_first: bool = False       # before crop and flip
    test_crop: str | None = None        # "centre", of "shorter" made image_size·256/224; "whole"
    mean: tuple[float, ...] | None = None   # of pixels in [0, 1], as std
    std: tuple[float, ...] | None = None

    def check(self, engine: str, **possible):
        """Raise RunError naming a field whose value is not among the `possible` ones."""
        for name, values in possible.items():
            if getattr(self, name) not in values:
                raise RunError(f"{engine} cannot be loaded with {name} {getattr(self, name)!r}, "
                               f"but with {' or '.join(map(repr, values))}")


def channel_statistics(images: np.ndarray) -> tuple[tuple, tuple]:
    """Return per-channel mean and standard deviation of (N, H, W, 3) uint8 images, in [0, 1]."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for piece in torch.from_numpy(images).split(2000):
        piece = piece.reshape(-1, 3).double() / 255
        sums += torch.stack([piece.sum(0), (piece * piece).sum(0)])
    mean, square = sums / images[..., 0].size
    std = (square - mean * mean).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


@functools.cache
def _on_device(mean: tuple, std: tuple, device):
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return mean, std, 1 / (255 * std), mean / std


def mean_std(info, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return info.mean and info.std as (3, 1, 1) tensors, made once: a GPU synchronises."""
    return _on_device(tuple(info.mean), tuple(info.std), device)[:2]


def normalise(images: torch.Tensor, info) -> torch.Tensor:
    """Return uint8 images (B, 3, H, W) as float32 in units of info.std, contiguous."""
    _, _, scale, shift = _on_device(tuple(info.mean), tuple(info.std), images.device)
    return images.contiguous().float().mul_(scale).sub_(shift)


def unnormalise(images: torch.Tensor, info) -> torch.Tensor:
    """Return normalised images (..., 3, H, W) as pixels in [0, 1]."""
    mean, std = mean_std(info, images.device)
    return images * std + mean


def to_uint8(images: torch.Tensor, info) -> torch.Tensor:
    """Return normalised images as uint8 pixels, rounded."""
    return unnormalise(images, info).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
