"""RandAugment (Cubuk et al. 2020), and any policy of torchvision's operations, on batches of bytes.

Every image has its own operations. Instead of one call per image, images with operations of one
kind are put side by side: the draws are made on the CPU, so the sizes of these groups are known
without asking the device.
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = ("Identity", *WARPS, *BLENDS, "Posterize", "Solarize", "AutoContrast", "Equalize")
ORDER = (*OPERATIONS[:-2], "Invert", *OPERATIONS[-2:])      # what is computed together: neighbours
SPACE = v2.RandAugment()._AUGMENTATION_SPACE


class Operation(NamedTuple):
    """An operation of torchvision's, by one of the names in ORDER, and its magnitude.

    Shear: tangent of the angle; Translate: pixels; Rotate: degrees; blends: factor - 1;
    Posterize: bits; Solarize: threshold in [0, 1].
    """
    name: str
    magnitude: float = 0.0


def both_signs(name: str, space: tuple, level: int | None, bins: int, height: int, width: int):
    """The operation `name` at `level` of `bins`, and the same with the other sign if it has one.

    space: the operation's entry in torchvision's _AUGMENTATION_SPACE; height, width: the images'.
    """
    values, signed = space[0](bins, height, width), space[1]
    magnitude = 0.0 if values is None or not values.ndim else float(values[level])
    return Operation(name, magnitude), Operation(name, -magnitude if signed else magnitude)


# -------------------------------------------------------------------------------------- RandAugment

def draw_randaugment(n: int, generator=None, num_ops: int = 2):
    """Draws for n images: ops (num_ops, n) int64, indices of OPERATIONS; negative (num_ops, n).

    Uniform, with replacement; `negative` (bool) turns the operations around that have a sign.
    """
    ops = torch.randint(len(OPERATIONS), (num_ops, n), generator=generator)
    return ops, torch.rand(num_ops, n, generator=generator) < 0.5


def rand_augment(images: Tensor, ops: Tensor, negative: Tensor, levels: list[int] | None = None
                 ) -> Tensor:
    """Applies ops[0] at levels[0] (None: all at 9), then ops[1] at levels[1], ... to each image.

    images (B, 3, H, W) uint8 on any device, at least 3 pixels a side; ops and negative
    (num_ops, B) as `draw_randaugment` makes them, on the CPU; levels 0 to 30. Operations and
    arithmetic are those of torchvision's RandAugment() on tensors. Returns (B, 3, H, W) uint8.
    Raises ValueError for images of another type.
    """
    tables = [_table(level, *images.shape[2:]) for level in levels or [9] * len(ops)]
    return apply_operations(images, tables, 2 * ops + negative)


def randaugment(images: Tensor, generator, level: float = 9.0, std: float = 0.0) -> Tensor:
    """`rand_augment` with its draws made, as data loaders take it.

    The level of each of two operations is normal around `level` (of 30) with deviation `std`,
    drawn for the whole batch.
    """
    draws = draw_randaugment(len(images), generator)
    levels = level + std * torch.randn(2, generator=generator) if std else torch.full((2,), level)
    return rand_augment(images, *draws, levels.clamp(0, 30).round().int().tolist())


@functools.lru_cache(maxsize=64)
def _table(level, height, width):
    """The operations at a level: 2k is operation k, 2k + 1 the same with a negative sign."""
    return tuple(op for name in OPERATIONS
                 for op in both_signs(name, SPACE[name], level, 31, height, width))


# ---------------------------------------------------------------------------------- any operations

def apply_operations(images: Tensor, tables: list[tuple[Operation, ...]], chosen: Tensor) -> Tensor:
    """Applies tables[0][chosen[0, i]], then tables[1][chosen[1, i]], ... to image i.

    images (B, 3, H, W) uint8 on any device, at least 3 pixels a side; chosen (len(tables), B)
    int64 on the CPU. Nearest pixels, black outside. Returns (B, 3, H, W) uint8. Raises ValueError
    for images of another type.
    """
    if images.dtype != torch.uint8 or images.shape[1] != 3:
        raise ValueError("augmentation takes uint8 images (B, 3, H, W), not "
                         f"{images.dtype} {tuple(images.shape)}")
    place = torch.arange(len(images))                       # the image that lies at each place
    for table, codes in zip(tables, chosen, strict=True):
        sort = sorted(range(len(table)), key=lambda k, table=table: ORDER.index(table[k].name))
        codes, order = torch.tensor(sort).argsort()[codes[place]].sort()
        counts = torch.bincount(codes, minlength=len(table))
        images = _apply(images[_send(order, images)], [table[k] for k in sort], counts)
        place = place[order]
    return images[_send(place.argsort(), images)]


def _send(values, images):
    """A small CPU tensor to the device of the images, without waiting for the device."""
    return values.to(images.device, non_blocking=True)


def _apply(images, table, counts):
    """table[0] to the first counts[0] images, table[1] to the next counts[1], ...; in ORDER."""
    sizes = torch.zeros(len(ORDER), dtype=torch.int64).index_add(
        0, torch.tensor([ORDER.index(op.name) for op in table]), counts).tolist()
    families = [sizes[0], sum(sizes[1:6]), sum(sizes[6:10]), sizes[10], sum(sizes[11:13]),
                *sizes[13:]]
    values = torch.tensor([op.magnitude for op in table], dtype=torch.float64)
    _, _, changes, bits, thresholds, *_ = (
        part[:, None, None, None] for part in values.repeat_interleave(counts).split(families))
    same, warped, blended, posterized, solarized, stretched, equalized = images.split(families)
    warps = [k for k, op in enumerate(table) if op.name in WARPS]
    masks = _send((256 - 2 ** (8 - bits)).to(torch.uint8), images)
    bright = (solarized >= _send(255 * thresholds.float(), images)).to(torch.uint8)
    return torch.cat([
        same, _warp(warped, tuple(table[k] for k in warps), counts[warps]),
        _blend(blended, changes, sizes[6:10]), posterized & masks,
        solarized ^ bright.neg_(), TF.autocontrast(stretched), TF.equalize(equalized)])


def _warp(images, warps, counts):
    """Shear, translation, rotation: one table tells where the pixels of each come from."""
    sources = _sources(*images.shape[2:], warps, images.device)
    index = sources.repeat_interleave(_send(counts, images), 0, output_size=len(images))
    padded = F.pad(images.flatten(2), (1, 0))               # pixel 0: black
    return padded.gather(2, index[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


@functools.lru_cache(maxsize=16)
def _sources(height, width, warps, device):
    """(len(warps), H * W) int64: the source of each pixel, counted from 1; 0: none.

    Filled in by torchvision's own functions, applied to a picture of pixel numbers.
    """
    numbers = torch.arange(1.0, height * width + 1).view(1, height, width)
    maps = [torch.empty(0, height, width)]
    for name, magnitude in warps:
        shear, shift, centre, axis = [0.0, 0.0], [0, 0], None, int(name.endswith("Y"))
        if name == "Rotate":
            maps.append(TF.rotate(numbers, magnitude))
            continue
        if name.startswith("Shear"):
            shear[axis] = math.degrees(math.atan(magnitude))
            centre = [0, 0]
        else:
            shift[axis] = int(magnitude)
        maps.append(TF.affine(numbers, 0.0, shift, 1.0, shear, center=centre))
    return torch.cat(maps).long().flatten(1).to(device)


def _blend(images, changes, counts):
    """Brightness, colour, contrast, sharpness: factor * image + (1 - factor) * a lesser image.

    changes (B, 1, 1, 1): factor - 1, float64 on the CPU; counts: images of each kind, in order.
    """
    factors = 1 + changes
    factor, rest = _send(torch.stack([factors, 1 - factors]).float(), images)
    pixels = images.float()
    bright, coloured, contrasted, sharp = pixels.split(counts)
    grey = TF.rgb_to_grayscale(torch.cat([coloured, contrasted])).floor_()
    mean = grey[counts[1]:].mean((1, 2, 3), keepdim=True)
    inner = sharp[..., 1:-1, 1:-1]                          # the border stays as it is
    blurred = blur(sharp).round_()
    scaled = len(images) - len(sharp)
    base = torch.cat([pixels[:scaled] * factor[:scaled], sharp])
    lesser = torch.cat([torch.zeros_like(bright), grey[:counts[1]].expand_as(coloured),
                        mean.expand_as(contrasted), F.pad(blurred - inner, (1, 1, 1, 1))])
    return torch.addcmul(base, lesser, rest).clamp_(0, 255).to(torch.uint8)


def blur(images: Tensor) -> Tensor:
    """Inner pixels (B, C, H - 2, W - 2) of the images, smoothed as sharpness does: 5/13 of each
    and 1/13 of its eight neighbours."""
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]     # avg_pool2d is 8 times slower
    return sums.add_(images[..., 1:-1, 1:-1], alpha=4).div_(13)
