"""Superpixel mixing of SAFuse, LGCOAMix and OcCaMix, and label shares. On a GPU give `num_a` and
`num_b` (`superpixels.most_superpixels`): looking for them is a host synchronisation."""
import torch
from torch import Tensor


@torch.no_grad()
def superpixel_mix(images: Tensor, perm: Tensor, labels_a: Tensor, labels_b: Tensor,
                   chosen: Tensor, *, num_a: int | None = None, trim: bool | None = None) -> tuple:
    """Return images (B, C, H, W) with the `chosen` (B, S) superpixels of images[perm] pasted; fused
    (B, H, W), their superpixels from 0 without a gap, the first image's before; from_b (B, S')
    bool, which are pasted, False in the padding. `labels_a`, `labels_b` (B, H, W): superpixels of
    images, below `num_a`, and of images[perm]. S' is num_a + S, or with `trim` (default: on a CPU)
    what the batch needs."""
    perm, chosen = (t.to(images.device, non_blocking=True) for t in (perm, chosen))
    num_a = int(labels_a.max()) + 1 if num_a is None else num_a
    mask = chosen.gather(1, labels_b.flatten(1).long()).view(labels_b.shape)
    joint = torch.where(mask, labels_b.long() + num_a, labels_a.long()).flatten(1)
    present = torch.zeros(len(images), num_a + chosen.shape[1], dtype=torch.bool,
                          device=images.device).scatter_(1, joint, True)
    number = present.cumsum(1)
    count_a, count = number[:, num_a - 1:num_a], number[:, -1:]
    if images.device.type == "cpu" if trim is None else trim:
        present = present[:, :int(count.max())]
    index = torch.arange(present.shape[1], device=images.device)
    fused = (number - 1).gather(1, joint).view(labels_a.shape)
    mixed = torch.where(mask[:, None], images[perm], images)
    return mixed, fused, (index >= count_a) & (index < count)


def area_ratio(counts: Tensor, from_b: Tensor) -> Tensor:
    """Return the share (B,) of pixels from the second image; counts, from_b (B, S)."""
    return (counts * from_b).sum(1) / counts.sum(1)


def attention_ratio(weights: Tensor, counts: Tensor, from_b: Tensor) -> Tensor:
    """Return the second image's share (B,) of the attention, weights (B, S) >= 0 times pixels, or
    `area_ratio` where all weights are 0; without gradient."""
    mass = weights.detach().float() * counts
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, counts)
    return area_ratio(mass, from_b).clamp(max=1)


def top_superpixels(scores: Tensor, counts: Tensor, ratio: float, *, at_least_one: bool) -> tuple:
    """Return the int(ratio·n) best of each image's n superpixels: index (B, T) by descending
    `scores` (B, S), and selected (B, T) bool, False where an image has fewer than T. Where
    int(ratio·n) is 0, the best one (LGCOAMix), or with at_least_one=False all (SAFuse)."""
    present = counts > 0
    n = present.sum(1)
    wanted = (n.double() * ratio).floor().long()             # float64, as Python's int(ratio * n)
    wanted = torch.where(wanted > 0, wanted, 1 if at_least_one else n)
    most = max(int(scores.shape[1] * ratio), 1 if at_least_one else int(1 / ratio))
    order = scores.masked_fill(~present, -torch.inf).argsort(1, descending=True)[:, :most]
    return order, torch.arange(order.shape[1], device=scores.device) < wanted[:, None]


@torch.no_grad()
def attentive_superpixels(scores: Tensor, labels: Tensor, cells: int = 3, *, num_b=None) -> Tensor:
    """Return the superpixels (B, num_b) bool of each image's most attentive cells (OcCaMix): each
    takes the superpixel with the largest share of its area inside; of equals, the lowest. `scores`
    (B, h, w) of the cells; `labels` (B, H, W) superpixels below `num_b`."""
    (batch, rows, columns), (height, width) = scores.shape, labels.shape[1:]
    num_b = int(labels.max()) + 1 if num_b is None else num_b
    best = scores.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :cells, None]
    y = torch.arange(height, device=scores.device) * rows // height
    x = torch.arange(width, device=scores.device) * columns // width
    inside = ((y[:, None] * columns + x).flatten() == best).float()
    spread = labels.flatten(1).long()[:, None].expand_as(inside)
    empty = torch.zeros(*best.shape[:2], num_b, device=scores.device)
    area = empty.scatter_add(2, spread, torch.ones_like(inside)).clamp(min=1)
    found = (empty.scatter_add(2, spread, inside) / area).argmax(2)        # the first of equals
    return scores.new_zeros(batch, num_b, dtype=torch.bool).scatter_(1, found, True)
