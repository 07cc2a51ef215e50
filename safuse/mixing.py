"""Superpixel mixing of SAFuse, LGCOAMix and OcCaMix, their label shares, and their random draws.

Superpixels are padded to one number per image: on a CPU what the batch needs; on a GPU pass the
bounds of `superpixels.most_superpixels`, since looking would be a host synchronisation. Draws are
by a CPU generator, or by torch's own (see `common.mixing`).
"""
import torch
from torch import Tensor


def draw_segments(batch: int, low: int, high: int, generator=None) -> Tensor:
    """Draw `n_segments` (batch,) of `slic`, uniform in low … high, both included."""
    return torch.randint(low, high + 1, (batch,), generator=generator)


def draw_chosen(batch: int, num_superpixels: int, p: float, generator=None) -> Tensor:
    """Draw which superpixels of the second image are pasted: (batch, num_superpixels) bool."""
    return torch.rand(batch, num_superpixels, generator=generator) < p


def bound(labels: Tensor, num: int | None) -> int:
    """Return `num`, or else one more than the largest label (a host synchronisation)."""
    return int(labels.max()) + 1 if num is None else num


def paste(images: Tensor, perm: Tensor, mask: Tensor) -> Tensor:
    """Return images[perm] where `mask` (B, H, W), images elsewhere."""
    return torch.where(mask[:, None], images[perm], images)


@torch.no_grad()
def superpixel_mix(images: Tensor, perm: Tensor, labels_a: Tensor, labels_b: Tensor,
                   chosen: Tensor, *, num_a: int | None = None, trim: bool | None = None
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Paste the chosen superpixels of images[perm] into images (LGCOAMix, SAFuse: section 3).

    `images` (B, C, H, W); `perm` (B,); `labels_a`, `labels_b` (B, H, W) integer superpixels of
    images and of images[perm], from 0; `chosen` (B, S) bool over labels_b < S. Returns mixed
    (B, C, H, W); fused (B, H, W) int64, the superpixels of the mixed image from 0 without a gap,
    first what is left of the first image's (possibly in pieces), then the pasted ones; and from_b
    (B, S') bool, which of them are pasted, False in the padding. S' is num_a + S, or with `trim`
    (default: on a CPU) what the batch needs; `num_a` bounds labels_a (default: its maximum + 1).
    """
    perm, chosen = (t.to(images.device, non_blocking=True) for t in (perm, chosen))
    num_a = bound(labels_a, num_a)
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
    return paste(images, perm, mask), fused, (index >= count_a) & (index < count)


def area_ratio(counts: Tensor, from_b: Tensor) -> Tensor:
    """Return the share (B,) of pixels from the second image; counts, from_b (B, S)."""
    return (counts * from_b).sum(1) / counts.sum(1)


def attention_ratio(weights: Tensor, counts: Tensor, from_b: Tensor) -> Tensor:
    """Return the second image's share (B,) of the attention (weight times pixels); no gradient.

    `weights` (B, S) >= 0 and pixel `counts` (B, S), 0 in the padding; `from_b` (B, S). Where all
    weights of an image are 0, `area_ratio`.
    """
    mass = weights.detach().float() * counts
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, counts)
    return area_ratio(mass, from_b).clamp(max=1)


def top_superpixels(scores: Tensor, counts: Tensor, ratio: float, *, at_least_one: bool = True
                    ) -> tuple[Tensor, Tensor]:
    """Return the int(ratio·n) superpixels with the highest scores of each image's n.

    `scores` and `counts` (B, S), 0 in the padding. Where int(ratio·n) is 0, the best one
    (LGCOAMix), or with at_least_one=False all (SAFuse). Returns index (B, T) by descending scores,
    and kept (B, T) bool: False where an image has fewer than T.
    """
    present = counts > 0
    n = present.sum(1)
    wanted = (n.double() * ratio).floor().long()             # float64, as Python's int(ratio * n)
    wanted = torch.where(wanted > 0, wanted, 1 if at_least_one else n)
    most = scores.shape[1]
    most = min(most, max(int(most * ratio), 1 if at_least_one else int(1 / ratio)))
    order = scores.masked_fill(~present, -torch.inf).argsort(1, descending=True)[:, :most]
    return order, torch.arange(most, device=scores.device) < wanted[:, None]


@torch.no_grad()
def attentive_mask(scores: Tensor, labels: Tensor, cells: int = 3, *, num_b: int | None = None
                   ) -> Tensor:
    """Return OcCaMix's mask (B, H, W): the superpixels of each image's most attentive cells.

    `scores` (B, h, w) of the cells; `labels` (B, H, W) superpixels from 0, below `num_b` (default:
    the maximum + 1). Each of the `cells` best cells takes the superpixel with the largest share of
    its own area inside it; of equals, the lowest.
    """
    batch, rows, columns = scores.shape
    height, width = labels.shape[1:]
    num_b = bound(labels, num_b)
    best = scores.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :cells, None]
    y, x = (torch.arange(side, device=scores.device) * parts // side
            for side, parts in ((height, rows), (width, columns)))
    inside = ((y[:, None] * columns + x).view(1, 1, -1) == best).float()
    spread = labels.flatten(1).long()[:, None].expand_as(inside)
    overlap = torch.zeros(*best.shape[:2], num_b, device=scores.device)
    overlap.scatter_add_(2, spread, inside)
    share = overlap / torch.zeros_like(overlap).scatter_add_(
        2, spread, torch.ones_like(inside)).clamp(min=1)
    number = torch.arange(num_b, device=scores.device)
    lowest = torch.where(share == share.amax(2, keepdim=True), number, num_b).amin(2, keepdim=True)
    return (labels[:, None] == lowest[..., None]).any(1)
