"""SLIC superpixels (Achanta et al. 2012), a whole batch at a time on the device of the images.

k-means over (colour, position) with scikit-image's grid, Lab colours and compactness, then its
rule of connectivity: components below half a cell of the grid join a neighbour, here the one
of the most similar colour. Nothing waits for the device; on a CPU loops end once converged.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from common.precision import full_precision

LEAST_SIZE = 0.5               # of the mean cell; smaller components join a neighbour
MERGE_ROUNDS = 2               # more change the explained colour by less than a hundredth
CHUNK = 2 ** 19                # distances computed at once on a CPU: what its cache holds
NONE = torch.iinfo(torch.int64).max          # in place of a region

# sRGB to XYZ divided by the white point D65
XYZ = ((0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
       (0.212671, 0.715160, 0.072169),
       (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883))


def grid(n_segments: int | Tensor, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    """scikit-image's regular grid of about n_segments centres for each image.

    Returns first centre (batch, 2) and spacing (batch, 2) in pixels (y, x), and the number of rows
    and columns (batch, 2), all int64 on the CPU.
    """
    n = torch.as_tensor(n_segments).cpu().double().expand(batch)[:, None]
    if (n < 1).any():
        raise ValueError(f"n_segments must be at least 1, not {n.min().item():g}")
    sides = torch.tensor([height, width])
    size = (sides.prod() / n).sqrt()                         # a number / n would round twice
    short = sides.amin().double()
    # where a square cell is higher than the image the short side is one cell
    size = torch.where(size <= short, size.expand(-1, 2),
                       torch.where(sides == short, short, sides / n))
    step, first = size.round().long().clamp(min=1), (size // 2).long()
    return first, step, (sides - first + step - 1) // step


def least_sizes(cells: Tensor, pixels: int) -> Tensor:
    """Pixels (B,) below which a component is no superpixel, for (B, 2) rows and columns."""
    return (LEAST_SIZE * pixels / cells.prod(1)).long().clamp(min=1)


def most_superpixels(n_segments: int | Tensor, height: int, width: int) -> int:
    """Upper bound of what `slic` returns for n_segments, known without looking at the images."""
    n = torch.as_tensor(n_segments).view(-1)
    cells = grid(n, len(n), height, width)[2]
    return int((height * width // least_sizes(cells, height * width)).max())


def rgb_to_lab(pixels: Tensor) -> Tensor:
    """CIE Lab (D65) of sRGB colours (B, 3, N) in [0, 1]."""
    linear = torch.where(pixels > 0.04045, ((pixels + 0.055) / 1.055).pow(2.4), pixels / 12.92)
    r, g, b = linear.unbind(1)
    x, y, z = (torch.where(t > 0.008856, t.clamp(min=1e-3).pow(1 / 3), 7.787 * t + 16 / 116)
               for t in (r * row[0] + g * row[1] + b * row[2] for row in XYZ))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def nearest(centres: Tensor, points: Tensor) -> Tensor:
    """Index (B, N) of the nearest of centres (B, K, 7) for points (B, 7, N), whose product is the
    squared distance (see `kmeans`).

    The index replaces the lowest bits of the distance, whose order as an integer is that of the
    float: one minimum then finds both, where min with indices is ten times slower on a CPU.
    """
    batch, count = centres.shape[:2]
    bits = 1 << (count - 1).bit_length()
    number = torch.arange(count, dtype=torch.int32, device=points.device)[:, None]
    pieces = batch * count * points.shape[2] // CHUNK if points.device.type == "cpu" else 0
    labels = []
    for piece in points.tensor_split(max(1, pieces), 2):
        distances = torch.bmm(centres, piece).view(torch.int32)
        labels.append(distances.bitwise_and_(-bits).bitwise_or_(number).amin(1))
    return torch.cat(labels, 1).bitwise_and_(bits - 1).long()


def kmeans(colour: Tensor, first: Tensor, step: Tensor, cells: Tensor, height: int, width: int,
           iterations: int) -> Tensor:
    """Clusters (B, H, W) of pixels by |difference of colour|² + |distance in steps|².

    `colour` (B, 3, N), divided by the compactness; grid as `grid` returns it. The first of
    the iterations is by position alone, as in scikit-image. In images of 128 pixels and more the
    centres are means over every second pixel in both directions.
    """
    batch, device = len(colour), colour.device
    count = int(cells.prod(1).max())
    exists = (torch.arange(count) < cells.prod(1, keepdim=True)).to(device, non_blocking=True)
    first, step, cells = (t[..., None].to(device, non_blocking=True) for t in (first, step, cells))
    place = [torch.arange(side, device=device) for side in (height, width)]
    row, column = (((p - first[:, i] + step[:, i] // 2) // step[:, i]).clamp(min=0)
                   .minimum(cells[:, i] - 1) for i, p in enumerate(place))
    labels = row[:, :, None] * cells[:, 1, None] + column[:, None, :]
    scale = step.amax(1, keepdim=True)
    position = torch.stack(torch.meshgrid(*place, indexing="ij")).view(1, 2, -1) / scale
    points = torch.cat([colour, position, torch.ones_like(colour[:, :1])], 1)
    # 7 numbers a pixel: (p, 1, |p|²); 7 a centre: (-2c, |c|², 1); a little more than the
    # squared distance, so that rounding leaves it positive
    points = torch.cat([points, (points[:, :5] ** 2).sum(1, keepdim=True) + 1e-3], 1)
    stride = 2 if min(height, width) >= 128 else 1
    sample = points.view(batch, 7, height, width)[:, :, ::stride, ::stride].flatten(2)
    centres = colour.new_zeros(batch, 5, count)
    for left in reversed(range(iterations - 1)):
        index = (labels[:, ::stride, ::stride] if labels.ndim == 3 else labels).flatten(1)
        sums = colour.new_zeros(batch, 6, count)
        sums.scatter_add_(2, index[:, None].expand(-1, 6, -1), sample[:, :6])
        centres = torch.where(sums[:, 5:] > 0, sums[:, :5] / sums[:, 5:].clamp(min=1), centres)
        lengths = (centres ** 2).sum(1) + torch.where(exists, 0, 1e6)
        factors = torch.stack([*(-2 * centres).unbind(1), lengths, torch.ones_like(lengths)], 2)
        labels = nearest(factors, sample if left else points)
    return labels.view(batch, height, width)


def components(labels: Tensor) -> Tensor:
    """First pixel (B, N), in reading order, of each pixel's 4-connected component.

    `labels` (B, H, W). Runs along the rows start as one node each; then every node hooks itself to
    the smallest node that it touches above or below, and all paths are halved twice.
    """
    batch, height, width = labels.shape
    column = torch.arange(width, device=labels.device)
    fresh = torch.ones_like(labels, dtype=torch.bool)
    fresh[:, :, 1:] = labels[:, :, 1:] != labels[:, :, :-1]
    node = torch.where(fresh, column, 0).cummax(2).values
    node = (node + torch.arange(height, device=labels.device)[:, None] * width).flatten(1)
    same = labels[:, 1:] == labels[:, :-1]
    for _ in range((height * width).bit_length()):
        here = node.view(labels.shape)
        smallest = here.clone()
        above, below = smallest[:, :-1], smallest[:, 1:]
        torch.where(same, torch.minimum(here[:, 1:], here[:, :-1]), here[:, 1:], out=below)
        above.copy_(torch.where(same, torch.minimum(above, here[:, 1:]), above))
        before, node = node, node.scatter_reduce(1, node, smallest.flatten(1), "amin")
        node = node.gather(1, node)
        node = node.gather(1, node)
        if node.device.type == "cpu" and torch.equal(node, before):
            break
    return node


def merge(region: Tensor, root: Tensor, colour: Tensor) -> Tensor:
    """Joins components without a region to the touching region of the most similar mean colour.

    `region` (B, H, W), NONE where there is none; `root` (B, N) as from `components`, regions being
    named by roots; `colour` (B, 3, N). Components that touch no region stay without one.
    """
    batch, pixels = root.shape
    sums = colour.new_zeros(batch, 4, pixels).scatter_add_(
        2, root[:, None].expand(-1, 4, -1), torch.cat([colour, torch.ones_like(colour[:, :1])], 1))
    means = sums[:, :3] / sums[:, 3:].clamp(min=1)
    for _ in range(MERGE_ROUNDS):
        owner = torch.where(region == NONE, root.view(region.shape), region).flatten(1)
        shade = means.gather(2, owner[:, None].expand(-1, 3, -1)).view(batch, 3, *region.shape[1:])
        best = torch.full_like(region, NONE)                 # (difference, region) in one integer
        for dim in (1, 2):
            length = region.shape[dim] - 1
            difference = shade.narrow(dim + 1, 0, length) - shade.narrow(dim + 1, 1, length)
            difference = difference.square().sum(1).view(torch.int32).long() << 32
            for here, there in ((0, 1), (1, 0)):             # whatever | NONE is NONE
                target = best.narrow(dim, here, length)
                torch.minimum(target, difference | region.narrow(dim, there, length), out=target)
        best = torch.full_like(root, NONE).scatter_reduce(1, root, best.flatten(1), "amin")
        best = best.gather(1, root).view(region.shape)
        best = torch.where(best == NONE, NONE, best & 0xFFFFFFFF)
        region = torch.where(region == NONE, best, region)
    return region


def fill(region: Tensor) -> Tensor:
    """Continues regions (B, H, W) along rows, then columns, over the pixels at NONE."""
    for dim in (2, 1):
        place = torch.arange(region.shape[dim], device=region.device)
        place = place if dim == 2 else place[:, None]
        for _ in range(2):                                   # forwards, then backwards
            last = torch.where(region == NONE, 0, place).cummax(dim).values
            region = region.gather(dim, last).flip(dim)
    return region


def connect(labels: Tensor, colour: Tensor, least: Tensor) -> Tensor:
    """Superpixels (B, H, W), numbered from 0 in each image, each of them 4-connected.

    `labels` (B, H, W) clusters; `colour` (B, 3, N); `least` (B,) pixels: components at least that
    large, and the largest in any case, stay and absorb the others.
    """
    root = components(labels)
    sizes = torch.zeros_like(root).scatter_add_(1, root, torch.ones_like(root))
    kept = (sizes >= least[:, None]).scatter(1, sizes.argmax(1, keepdim=True), True)
    region = torch.where(kept.gather(1, root), root, NONE).view(labels.shape)
    region = fill(merge(region, root, colour))
    return (kept.cumsum(1) - 1).gather(1, region.flatten(1)).view(labels.shape)


@torch.no_grad()
def slic(images: Tensor, n_segments: int | Tensor, compactness: float = 10.0,
         iterations: int = 10) -> Tensor:
    """Superpixels (B, H, W) int64 of `images` (B, 3, H, W), sRGB in [0, 1], not normalised.

    `n_segments`, about how many are wanted, an int or (B,) on the CPU, and `compactness` mean what
    they mean in skimage.segmentation.slic; each image is stretched to the range [0, 1] first. The
    labels of an image are 0, 1, … without a gap, at most `most_superpixels`; each superpixel is
    4-connected. Runs in float32 on the images' device.
    """
    batch, _, height, width = images.shape
    first, step, cells = grid(n_segments, batch, height, width)
    pixels = images.float().flatten(2)
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    lab = rgb_to_lab((pixels - low) / (high - low).clamp(min=1e-12))
    with full_precision(images.device.type):                 # TF32 is too coarse for distances
        labels = kmeans(lab / compactness, first, step, cells, height, width, iterations)
    least = least_sizes(cells, height * width).to(images.device, non_blocking=True)
    return connect(labels, lab, least)


def slic_skimage(images: Tensor, n_segments: int | Tensor, compactness: float = 10.0,
                 iterations: int = 10) -> Tensor:
    """The same by scikit-image, image by image on the CPU's threads; labels from 0."""
    from skimage.segmentation import slic as one
    numbers = torch.as_tensor(n_segments).expand(len(images)).tolist()
    pixels = images.permute(0, 2, 3, 1).float().cpu().numpy()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        labels = pool.map(lambda image, n: one(image, n_segments=n, compactness=compactness,
                                               max_num_iter=iterations, start_label=0),
                          pixels, numbers)
        return torch.from_numpy(np.stack(list(labels))).to(images.device)
