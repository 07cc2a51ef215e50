"""RandAugment (Cubuk et al. 2020) on a batch of bytes: every image its own operations.

Operations, magnitudes and arithmetic are those of torchvision's RandAugment() on tensors (levels 0
to 30, by default two operations at level 9; nearest pixels, black outside). Instead of one call per
image, images with the same operation are put side by side: the draws are made on the CPU, so the
sizes of the groups are known without asking the device.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

# The order matters: operations of one family are neighbours and computed together.
WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = ("Identity", *WARPS, *BLENDS, "Posterize", "Solarize", "AutoContrast", "Equalize")
SPACE = v2.RandAugment()._AUGMENTATION_SPACE


def draw_randaugment(n: int, generator=None, num_ops: int = 2):
    """Draws for n images: ops (num_ops, n) int64, indices of OPERATIONS; negative (num_ops, n).

    Uniform, with replacement; `negative` (bool) turns the operations around that have a sign.
    """
    ops = torch.randint(len(OPERATIONS), (num_ops, n), generator=generator)
    return ops, torch.rand(num_ops, n, generator=generator) < 0.5


def rand_augment(images: torch.Tensor, ops: torch.Tensor, negative: torch.Tensor,
                 levels: list[int] | None = None) -> torch.Tensor:
    """Applies ops[0] at levels[0] (None: all at 9), then ops[1] at levels[1], ... to each image.

    images (B, 3, H, W) uint8 on any device, at least 3 pixels a side; ops and negative
    (num_ops, B) as `draw_randaugment` makes them, on the CPU. Returns (B, 3, H, W) uint8.
    Raises ValueError for images of another type.
    """
    if images.dtype != torch.uint8 or images.shape[1] != 3:
        raise ValueError("RandAugment takes uint8 images (B, 3, H, W), not "
                         f"{images.dtype} {tuple(images.shape)}")
    place = torch.arange(len(images))                       # the image that lies at each place
    for op, minus, level in zip(ops, negative, levels or [9] * len(ops), strict=True):
        codes, order = (2 * op + minus)[place].sort()
        sizes = torch.bincount(codes, minlength=2 * len(OPERATIONS)).tolist()
        images = _apply(images[_send(order, images)], sizes, level)
        place = place[order]
    return images[_send(place.argsort(), images)]


def _send(values, images):
    """A small CPU tensor to the device of the images, without waiting for the device."""
    return values.to(images.device, non_blocking=True)


def _setting(name, level, size=(1, 1)):
    """torchvision's setting of an operation on images of `size` (height, width)."""
    return float(SPACE[name][0](31, *size)[level])


def _apply(images, sizes, level):
    """One operation on each image; `sizes` counts them by 2 * operation + negative, in order."""
    counts = [plus + minus for plus, minus in zip(sizes[::2], sizes[1::2], strict=True)]
    same, warped, blended, posterized, solarized, stretched, equalized = images.split(
        [counts[0], sum(counts[1:6]), sum(counts[6:10]), *counts[10:]])
    return torch.cat([same, _warp(warped, sizes[2:12], level),
                      _blend(blended, sizes[12:20], level),
                      TF.posterize(posterized, int(_setting("Posterize", level))),
                      TF.solarize(solarized, 255 * _setting("Solarize", level)),
                      TF.autocontrast(stretched), TF.equalize(equalized)])


def _warp(images, sizes, level):
    """Shear, translation, rotation: one table tells where the pixels of each come from."""
    counts = _send(torch.tensor(sizes), images)
    index = _sources(*images.shape[2:], level, images.device).repeat_interleave(
        counts, 0, output_size=len(images))
    padded = F.pad(images.flatten(2), (1, 0))               # pixel 0: black
    return padded.gather(2, index[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


@functools.lru_cache(maxsize=16)
def _sources(height, width, level, device):
    """(10, H * W) int64: per warp and sign, the source of each pixel, counted from 1; 0: none.

    Filled in by torchvision's own functions, applied to a picture of pixel numbers.
    """
    numbers = torch.arange(1.0, height * width + 1).view(1, height, width)
    maps = []
    for name in WARPS:
        setting = _setting(name, level, (height, width))
        for sign in (1, -1):
            shear, shift, centre, axis = [0.0, 0.0], [0, 0], None, int(name.endswith("Y"))
            if name == "Rotate":
                maps.append(TF.rotate(numbers, sign * setting))
                continue
            if name.startswith("Shear"):
                shear[axis] = math.degrees(math.atan(sign * setting))
                centre = [0, 0]
            else:
                shift[axis] = sign * int(setting)
            maps.append(TF.affine(numbers, 0.0, shift, 1.0, shear, center=centre))
    return torch.cat(maps).long().flatten(1).to(device)


def _blend(images, sizes, level):
    """Brightness, colour, contrast, sharpness: factor * image + (1 - factor) * a lesser image."""
    change = _setting("Color", level)                       # of all four
    factors = torch.tensor([1 + change, 1 - change] * len(BLENDS), dtype=torch.float64)
    factors = factors.repeat_interleave(torch.tensor(sizes))[:, None, None, None]
    factor, rest = _send(factors.float(), images), _send((1 - factors).float(), images)
    counts = [plus + minus for plus, minus in zip(sizes[::2], sizes[1::2], strict=True)]
    pixels = images.float()
    bright, coloured, contrasted, sharp = pixels.split(counts)
    grey = TF.rgb_to_grayscale(torch.cat([coloured, contrasted])).floor_()
    mean = grey[counts[1]:].mean((1, 2, 3), keepdim=True)
    inner = sharp[..., 1:-1, 1:-1]                          # the border stays as it is
    blurred = F.avg_pool2d(sharp, 3, 1, divisor_override=1).add_(inner, alpha=4).div_(13).round_()
    scaled = len(images) - len(sharp)
    base = torch.cat([pixels[:scaled] * factor[:scaled], sharp])
    lesser = torch.cat([torch.zeros_like(bright), grey[:counts[1]].expand_as(coloured),
                        mean.expand_as(contrasted), F.pad(blurred - inner, (1, 1, 1, 1))])
    return torch.addcmul(base, lesser, rest).clamp_(0, 255).to(torch.uint8)


def randaugment(images: torch.Tensor, generator, level: float = 7.0, std: float = 0.5):
    """`rand_augment` as the recipes of DeiT and Swin have it, with its draws made.

    The magnitude, normal around `level` of 10 with deviation `std`, is drawn for the batch and each
    of two operations.
    """
    draws = draw_randaugment(len(images), generator)
    levels = (level + std * torch.randn(2, generator=generator)).clamp(0, 10)
    return rand_augment(images, *draws, [round(3 * value) for value in levels.tolist()])
