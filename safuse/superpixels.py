"""SLIC superpixels (Achanta et al. 2012) of a batch on its device, without host synchronisation:
k-means over (colour, position) with scikit-image's grid, Lab colours and compactness."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import full_precision

MERGE_ROUNDS = 2               # more change the explained colour by less than a hundredth
CHUNK = 2 ** 19                # distances computed at once on a CPU: what its cache holds
PIXEL = 2.0 ** 20              # weight of a pixel in a cluster's mean against its old centre's 1
FAR = -1e8                     # lightness of clusters that an image does not have

# sRGB to XYZ divided by the white point D65; and (116·y, 500·(x - y), 200·(y - z)), its Lab
XYZ = ((0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
       (0.212671, 0.715160, 0.072169),
       (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883))
LAB = ((0, 116, 0), (500, -500, 0), (0, 200, -200))


def grid(n_segments: int | Tensor, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Return scikit-image's grid of about `n_segments` centres: the first and the spacing in pixels
    (y, x), rows and columns, all (batch, 2) int64 on the CPU."""
    n = torch.as_tensor(n_segments).cpu().double().expand(batch)[:, None]
    sides = torch.tensor([height, width])
    size, short = (sides.prod() / n).sqrt(), sides.amin().double()     # a number / n rounds twice
    # where a square cell is higher than the image the short side is one cell
    size = torch.where(size <= short, size.expand(-1, 2),
                       torch.where(sides == short, short, sides / n))
    step, first = size.round().long().clamp(min=1), (size // 2).long()
    return first, step, (sides - first + step - 1) // step


def least_sizes(cells: Tensor, pixels: int) -> Tensor:
    """Return the pixels (B,), half of the mean cell, below which a component is no superpixel."""
    return (pixels / 2 / cells.prod(1)).long().clamp(min=1)


def most_superpixels(n_segments: int | Tensor, height: int, width: int) -> int:
    """Return an upper bound of what `slic` returns for n_segments, whatever the images are."""
    cells = grid(n_segments, torch.as_tensor(n_segments).numel(), height, width)[2]
    return int((height * width // least_sizes(cells, height * width)).max())


def rgb_to_lab(pixels: Tensor) -> Tensor:
    """Return CIE Lab (D65) of sRGB colours (B, 3, N) in [0, 1]."""
    to_xyz, to_lab = torch.tensor([XYZ, LAB]).to(pixels.device, non_blocking=True)
    t = to_xyz @ torch.where(pixels > 0.04045, ((pixels + 0.055) / 1.055).pow(2.4), pixels / 12.92)
    lab = to_lab @ torch.where(t > 0.008856, t.pow(1 / 3), 7.787 * t + 16 / 116)
    lab[:, 0].sub_(16)
    return lab


def nearest(centres: Tensor, points: Tensor, number: Tensor, bits: Tensor) -> Tensor:
    """Return which of centres (B, K, 7) is nearest to points (B, 7, N): (B, N). Their product is
    the squared distance; `number` (K, 1): 0 … K-1; `bits`: a power of two, at least K. The index
    replaces the lowest bits of the distance, ordered as an integer like the float: one minimum
    finds both, ten times faster on a CPU than min with indices."""
    pieces, labels = 1, []
    if points.device.type == "cpu" and not torch.compiler.is_compiling():
        pieces = max(1, len(centres) * len(number) * points.shape[2] // CHUNK)
    for piece in points.tensor_split(pieces, 2):
        distances = torch.bmm(centres, piece).view(torch.int32)
        labels.append(distances.bitwise_and_(-bits).bitwise_or_(number).amin(1))
    labels = torch.cat(labels, 1) if pieces > 1 else labels[0]
    return labels.bitwise_and_(bits - 1).long()


def kmeans(colour: Tensor, first: Tensor, step: Tensor, cells: Tensor, height: int, width: int,
           iterations: int) -> Tensor:
    """Return pixels' clusters (B, H, W) by |difference of colour|² + |distance in steps|²; `colour`
    (B, 3, N), divided by the compactness. The first iteration is by position alone, as in
    scikit-image. From 128 pixels on centres are means over every second pixel both ways."""
    batch, device = len(colour), colour.device
    cells_of = cells.prod(1, keepdim=True)
    count = int(cells_of.max())
    bits = (2 ** cells_of.max().double().log2().ceil()).to(torch.int32)
    number = torch.arange(count, dtype=torch.int32, device=device)[:, None]
    small = torch.cat([first - step // 2, step, cells - 1, step.amax(1, keepdim=True), cells_of], 1)
    start, step, last, scale, cells_of = small.to(device, non_blocking=True)[..., None].split(
        [2, 2, 2, 1, 1], 1)
    pixel = torch.arange(max(height, width), device=device)
    cell = ((pixel - start) // step).clamp(min=0).minimum(last)              # (B, 2, longer side)
    labels = (cell[:, 0, :height, None] * (last[:, 1:] + 1) + cell[:, 1, None, :width])

    # Sums hold the old centres, so that an empty cluster keeps its own: of a pixel (p, PIXEL), of a
    # centre (c / PIXEL, 1). Distances are the product of (-2p·PIXEL, |p|², PIXEL²) and (c / PIXEL,
    # 1, |c / PIXEL|²), a little more so that rounding leaves it positive
    position, plane = pixel / scale, (batch, 1, height, width)
    weight, square = (colour.new_full((), PIXEL ** n).expand(plane) for n in (1, 2))
    members = torch.cat([colour.view(batch, 3, height, width),
                         position[:, :, :height, None].expand(plane),
                         position[:, :, None, :width].expand(plane), weight], 1)
    p = members[:, :5]
    points = torch.cat([-2 * PIXEL * p, p.square().sum(1, keepdim=True) + 1e-3, square], 1)
    stride = 2 if min(height, width) >= 128 else 1
    members, sample = (t[:, :, ::stride, ::stride].flatten(2) for t in (members, points))
    index = labels[:, ::stride, ::stride].flatten(1)
    centres = colour.new_zeros(batch, 6, count)
    centres[:, 5] = 1
    centres[:, 0].masked_fill_(number[:, 0] >= cells_of[:, 0], FAR / PIXEL)
    for left in reversed(range(iterations - 1)):
        centres.scatter_add_(2, index[:, None].expand(-1, 6, -1), members)
        centres = centres / centres[:, 5:]
        factors = torch.cat([centres, centres[:, :5].square().sum(1, keepdim=True)], 1)
        labels = index = nearest(factors.mT, sample if left else points.flatten(2), number, bits)
    return labels.view(batch, height, width)


def components(labels: Tensor) -> Tensor:
    """Return the first pixel (B, N) of each pixel's 4-connected component of labels (B, H, W)."""
    _, height, width = labels.shape
    rows = torch.arange(0, height * width, width, device=labels.device)[:, None]
    fresh = labels[:, :, 1:] != labels[:, :, :-1]
    runs = F.pad(fresh * torch.arange(1, width, device=labels.device), (1, 0)).cummax(2).values
    node = (runs + rows).flatten(1)                         # of each run along a row
    same = (labels[:, 1:] == labels[:, :-1]).flatten(1)
    for _ in range((height * width).bit_length()):
        above, below = node[:, :-width], node[:, width:]
        low = torch.minimum(above, below)
        high = torch.where(same, torch.maximum(above, below), low)
        before, node = node, node.scatter_reduce(1, high, low, "amin")      # hooks the larger
        node = node.gather(1, node)                                         # halves all paths
        node = node.gather(1, node)
        if node.device.type == "cpu" and not torch.compiler.is_compiling() \
                and torch.equal(node, before):
            break
    return node


def neighbours(image: Tensor, border: float) -> Tensor:
    """Return the pixels above, left, right and below (B, C, 2, 2, H, W) of (B, C, H, W), a view."""
    batch, channels, height, width = image.shape
    wide = F.pad(image, (1, 1, 1, 1), value=border)
    # at 1, p, p + 2 and 2p + 1 of rows of p pixels
    return wide.as_strided((batch, channels, 2, 2, height, width),
                           (*wide.stride()[:2], width + 1, width + 3, width + 2, 1), 1)


def fill(region: Tensor, none: int) -> Tensor:
    """Return regions (B, H, W) continued along rows, then columns, over the pixels at `none`."""
    for _ in range(2):
        known = region != none
        last = (known * torch.arange(region.shape[2], device=region.device)).cummax(2).values
        # before the first that is known: that one
        region = region.gather(2, last.maximum(known.byte().argmax(2, keepdim=True))).mT
    return region


def connect(labels: Tensor, colour: Tensor, least: Tensor) -> Tensor:
    """Return 4-connected superpixels (B, H, W), numbered from 0 in each image, of clusters `labels`
    (B, H, W): components of at least `least` (B,) pixels, and the largest, stay; the others join
    the touching one of the most similar `colour` (B, 3, N)."""
    shape, none = labels.shape, labels[0].numel()
    root = components(labels)
    sums = torch.cat([colour, torch.ones_like(colour[:, :1])], 1)
    sums = torch.zeros_like(sums).scatter_add_(2, root[:, None].expand(-1, 4, -1), sums)
    sizes = sums[:, 3]
    large = (sizes >= least[:, None]).scatter(1, sizes.argmax(1, keepdim=True), True)
    region = torch.where(large, torch.arange(none, device=root.device), none)       # of each root
    means = F.pad(sums[:, :3] / sums[:, 3:].clamp(min=1), (0, 1), value=torch.inf)  # of none: inf
    own = means.gather(2, root[:, None].expand(-1, 3, -1)).view(shape[0], 3, 1, 1, *shape[1:])
    unseen = torch.full_like(root, (0x7F800000 << 32) + none)       # the bits of inf, no region
    for _ in range(MERGE_ROUNDS):
        there = region.gather(1, root)
        shade = means.gather(2, there[:, None].expand(-1, 3, -1)).view(shape[0], 3, *shape[1:])
        difference = (neighbours(shade, torch.inf) - own).square_().sum(1)
        # difference and region in one integer, which is smallest where the difference is
        best = difference.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(
            neighbours(there.view(shape)[:, None], none)[:, 0])
        best = torch.minimum(*torch.minimum(*best.unbind(1)).unbind(1)).flatten(1)
        best = unseen.scatter_reduce(1, root, best, "amin")
        region = torch.where(region == none, best & 0xFFFFFFFF, region)
    region = fill(region.gather(1, root).view(shape), none)
    return (large.cumsum(1) - 1).gather(1, region.flatten(1)).view(shape)


def borders(pixels: Tensor, labels: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1], enlarged, with superpixels' borders in yellow."""
    factor = max(1, 224 // pixels.shape[-1])
    pixels, labels = (t.repeat_interleave(factor, -2).repeat_interleave(factor, -1).cpu()
                      for t in (pixels, labels))
    edge = torch.zeros_like(labels, dtype=torch.bool)
    edge[:, 1:] = labels[:, 1:] != labels[:, :-1]
    edge[:, :, 1:] |= labels[:, :, 1:] != labels[:, :, :-1]
    return torch.where(edge[:, None], torch.tensor([1.0, 1.0, 0.0])[:, None, None], pixels)


@torch.no_grad()
def slic(images: Tensor, n_segments, compactness: float = 10.0, iterations: int = 10) -> Tensor:
    """Return superpixels 0, 1, … (B, H, W) of `images` (B, 3, H, W), sRGB in [0, 1] or bytes, each
    stretched to [0, 1] first. `n_segments` (an int, or (B,) on the CPU) and `compactness` as in
    skimage.segmentation.slic. Raises ValueError for normalised images, on a CPU."""
    batch, _, height, width = images.shape
    first, step, cells = grid(n_segments, batch, height, width)
    pixels = images.float().flatten(2)
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    if images.is_floating_point() and images.device.type == "cpu" and \
            not torch.compiler.is_compiling() and (low.min() < -0.1 or high.max() > 1.1):
        raise ValueError("slic needs images in [0, 1], not normalised ones (a mixer: their mean "
                         f"and std): these go from {low.min():.2f} to {high.max():.2f}")
    with full_precision(images.device.type):                 # TF32 is too coarse for distances
        lab = rgb_to_lab((pixels - low) / (high - low).clamp(min=1e-12))
        labels = kmeans(lab / compactness, first, step, cells, height, width, iterations)
    least = least_sizes(cells, height * width).to(images.device, non_blocking=True)
    return connect(labels, lab, least)


def slic_skimage(images: Tensor, n_segments: int | Tensor, compactness: float = 10.0) -> Tensor:
    """Return scikit-image's superpixels, image by image on the CPU's threads; labels from 0."""
    from skimage.segmentation import slic as one
    numbers = torch.as_tensor(n_segments).expand(len(images)).tolist()
    pixels = images.permute(0, 2, 3, 1).float().cpu().numpy()
    with ThreadPoolExecutor() as pool:
        labels = pool.map(lambda x, n: one(x, n, compactness, start_label=0), pixels, numbers)
    return torch.from_numpy(np.stack(list(labels))).to(images.device)
