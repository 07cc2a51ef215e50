"""RandAugment (Cubuk et al. 2020) and other policies of torchvision's operations, on uint8 batches:
images with one kind of operation are computed together, their number known on the CPU."""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from common.mixing import send
from common.precision import full_precision

WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = ("Identity", *WARPS, *BLENDS, "Posterize", "Solarize", "AutoContrast", "Equalize")
ORDER = (*OPERATIONS[:-2], "Invert", *OPERATIONS[-2:])      # groups are neighbours


class Operation(NamedTuple):
    """One of torchvision's operations (a name in ORDER) and its magnitude: tangent of a shear,
    pixels, degrees, factor - 1 of BLENDS, bits of Posterize, threshold in [0, 1] of Solarize."""
    name: str
    magnitude: float = 0.0


def both_signs(name: str, space: tuple, level: int | None, bins: int, height: int, width: int):
    """Return operation `name` at `level` of `bins` and its negative, by torchvision's `space`."""
    values, signed = space[0](bins, height, width), space[1]
    magnitude = 0.0 if values is None or not values.ndim else float(values[level])
    return Operation(name, magnitude), Operation(name, -magnitude if signed else magnitude)


@functools.lru_cache(maxsize=64)
def _table(level, height, width):
    """RandAugment's operations at a level: 2k is OPERATIONS[k], 2k + 1 its negative."""
    space = v2.RandAugment()._AUGMENTATION_SPACE
    return tuple(op for name in OPERATIONS
                 for op in both_signs(name, space[name], level, 31, height, width))


def draw_randaugment(n: int, generator=None):
    """Return uniform draws for two operations: indices of OPERATIONS, negative signs, (2, n)."""
    ops = torch.randint(len(OPERATIONS), (2, n), generator=generator)
    return ops, torch.rand(2, n, generator=generator) < 0.5


def rand_augment(images: Tensor, ops: Tensor, negative: Tensor, levels=(9, 9)) -> Tensor:
    """Return images after ops[0] at levels[0] of 30, then ops[1], …; equal to torchvision's."""
    tables = [_table(level, *images.shape[2:]) for level, _ in zip(levels, ops, strict=False)]
    return apply_operations(images, tables, 2 * ops + negative)


def randaugment(images: Tensor, generator, level: float = 9.0, std: float = 0.0) -> Tensor:
    """Return images after two random operations, at a level N(level, std²) for the whole batch."""
    draws = draw_randaugment(len(images), generator)
    levels = level + std * torch.randn(2, generator=generator) if std else torch.full((2,), level)
    return rand_augment(images, *draws, levels.clamp(0, 30).round().int().tolist())


def apply_operations(images: Tensor, tables: list[tuple[Operation, ...]], chosen: Tensor) -> Tensor:
    """Return images after tables[0][chosen[0, i]], then tables[1][chosen[1, i]], … for image i:
    images (B, 3, H, W) uint8, H and W at least 3; chosen (len(tables), B) int64 on the CPU."""
    position = torch.arange(len(images))                    # row -> original image
    for table, codes in zip(tables, chosen, strict=True):
        kinds = torch.tensor([ORDER.index(op.name) for op in table])[codes[position]]
        order = kinds.argsort()
        position = position[order]
        sizes = torch.bincount(kinds, minlength=len(ORDER)).tolist()
        images = _apply(images[send(order, images.device)], table, codes[position], sizes)
    return images[send(position.argsort(), images.device)]


def _apply(images, table, codes, sizes):
    """Return image i after table[codes[i]]; `sizes`: images of each operation, in its ORDER."""
    groups = [sizes[0], sum(sizes[1:6]), sum(sizes[6:10]), sizes[10], sum(sizes[11:13]),
              *sizes[13:]]
    values = torch.tensor([op.magnitude for op in table], dtype=torch.float64)[codes]
    _, _, changes, bits, thresholds, *_ = (
        part[:, None, None, None] for part in values.split(groups))
    same, warped, blended, posterized, solarized, stretched, equalized = images.split(groups)
    is_warp = torch.tensor([op.name in WARPS for op in table])
    warps = (is_warp.cumsum(0) - 1)[codes].split(groups)[1]
    sources = _sources(*images.shape[2:], tuple(op for op in table if op.name in WARPS),
                       images.device)
    index = sources[send(warps, images.device)][:, None].expand(-1, 3, -1)
    padded = F.pad(warped.flatten(2), (1, 0))               # pixel 0: black
    masks = send((256 - 2 ** (8 - bits)).to(torch.uint8), images.device)
    bright = (solarized >= send(255 * thresholds.float(), images.device)).to(torch.uint8)
    return torch.cat([
        same, padded.gather(2, index).view(warped.shape), _blend(blended, changes, sizes[6:10]),
        posterized & masks, solarized ^ bright.neg_(), TF.autocontrast(stretched),
        TF.equalize(equalized)])


@functools.lru_cache(maxsize=64)
def _sources(height, width, warps, device):
    """Return each pixel's source under each warp, (len(warps), H * W) int64 from 1; 0: outside."""
    # torchvision's own functions, of a picture of pixel numbers
    numbers = torch.arange(1.0, height * width + 1).view(1, height, width)
    maps = [torch.empty(0, height, width)]
    with full_precision("cpu"):                             # low precision moves some pixels
        for name, magnitude in warps:
            along = [magnitude, 0.0] if name.endswith("X") else [0.0, magnitude]
            shear = [math.degrees(math.atan(tangent)) for tangent in along]
            maps.append(
                TF.rotate(numbers, magnitude) if name == "Rotate" else
                TF.affine(numbers, 0.0, [0, 0], 1.0, shear, center=[0, 0]) if name[0] == "S" else
                TF.affine(numbers, 0.0, [int(shift) for shift in along], 1.0, [0.0, 0.0]))
    return send(torch.cat(maps).long().flatten(1), device)


def _blend(images, changes, counts):
    """Brightness, colour, contrast, sharpness: factor * image + (1 - factor) * a plainer image.
    changes (B, 1, 1, 1): factor - 1, float64 on the CPU; counts: images of each of the four."""
    factors = 1 + changes
    factor, rest = send(torch.stack([factors, 1 - factors]).float(), images.device)
    pixels = images.float()
    bright, coloured, contrasted, sharp = pixels.split(counts)
    grey = TF.rgb_to_grayscale(torch.cat([coloured, contrasted])).floor_()
    mean = grey[counts[1]:].mean((1, 2, 3), keepdim=True)
    detail = blur(sharp).round_() - sharp[..., 1:-1, 1:-1]  # the border stays as it is
    scaled = len(images) - len(sharp)
    base = torch.cat([pixels[:scaled] * factor[:scaled], sharp])
    plainer = torch.cat([torch.zeros_like(bright), grey[:counts[1]].expand_as(coloured),
                         mean.expand_as(contrasted), F.pad(detail, (1, 1, 1, 1))])
    return torch.addcmul(base, plainer, rest).clamp_(0, 255).to(torch.uint8)


def blur(images: Tensor) -> Tensor:
    """Return the inner pixels (B, C, H - 2, W - 2), weighed 5/13, their eight neighbours 1/13."""
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]     # avg_pool2d is 8 times slower
    return sums.add_(images[..., 1:-1, 1:-1], alpha=4).div_(13)
