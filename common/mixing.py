"""Mixup, CutMix, Cutout, soft targets and their losses; the random draws they share.

Draws come from a CPU `torch.Generator` and are arguments of the mixing functions, which are pure:
the same draws give the same result on every device. Nothing here waits for the device.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def draw_perm(n: int, generator: torch.Generator) -> Tensor:
    """Partners: a random permutation (n,); image i is mixed with image perm[i]."""
    return torch.randperm(n, generator=generator)


def draw_lambda(alpha: float, generator: torch.Generator, n: int | None = None) -> Tensor:
    """Share of the first image, Beta(alpha, alpha): a float32 scalar, or (n,) with `n` given.

    `alpha` <= 0 means no mixing: 1.
    """
    shape = () if n is None else (n,)
    if alpha <= 0:
        return torch.ones(shape)
    # Gamma(alpha) = Gamma(alpha + 1)·U^(1/alpha), by logarithms: small ones underflow
    shape = (2, *shape)
    gamma = torch._standard_gamma(torch.full(shape, alpha + 1, dtype=torch.float64), generator)
    first, second = gamma.log() + torch.rand(
        shape, generator=generator, dtype=torch.float64).log() / alpha
    return (first - second).sigmoid().float()


def draw_centre(height: int, width: int, generator: torch.Generator, n: int | None = None
                ) -> Tensor:
    """Centres (y, x) of CutMix boxes in pixels, uniform over the image: (2,), or (n, 2)."""
    shape = (2,) if n is None else (n, 2)
    return torch.rand(shape, generator=generator) * torch.tensor([height, width])


def draw_pixels(n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(n, 2) int64 pixels, y and x, uniform over images of `size` (H, W)."""
    return torch.stack([torch.randint(length, (n,), generator=generator) for length in size], 1)


def per_image(values: float | Tensor, images: Tensor) -> Tensor:
    """A number, scalar tensor or (B,) tensor as float32 (B,) on the images' device."""
    values = torch.as_tensor(values)
    if values.ndim:                # a CPU scalar multiplies device tensors without a copy
        values = values.to(images.device, non_blocking=True)
    return torch.ones(len(images), device=images.device) * values.float()


def box_mask(edges, size: tuple[int, int]) -> Tensor:
    """Bool (B, H, W), true inside the boxes; `size` is (H, W).

    `edges`: first and end (exclusive) of each box's rows, the same of its columns; tensors (B,).
    """
    inside = []
    for (low, end), length in zip(edges, size, strict=True):
        place = torch.arange(length, device=low.device)
        inside.append((low[:, None] <= place) & (place < end[:, None]))
    return inside[0][:, :, None] & inside[1][:, None]


def mixup(images: Tensor, perm: Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): lam·x + (1 - lam)·x[perm].

    `images` (B, ...) in any range, also hidden activations; `perm` (B,); `lam` in [0, 1], a scalar
    or (B,). Returns the mixed images and ratio (B,), the weight of the first image's label.
    """
    perm = perm.to(images.device, non_blocking=True)
    ratio = per_image(lam, images)
    weight = ratio.to(images.dtype).view(-1, *[1] * (images.ndim - 1))
    return images * weight + images[perm] * (1 - weight), ratio


def cutmix(images: Tensor, perm: Tensor, centre: Tensor, lam: float | Tensor
           ) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019): a box of x[perm], sqrt(1 - lam) of each side, is pasted into x.

    `images` (B, C, H, W) in any range; `perm` (B,); `centre` (y, x) of the box in pixels, (2,) or
    (B, 2); `lam` in [0, 1], a scalar or (B,). The box is clipped to the image and its edges are
    truncated to whole pixels. Returns the mixed images and ratio (B,), the exact share of pixels
    that stay.
    """
    centre = centre.to(images.device, non_blocking=True)
    cut = (1 - per_image(lam, images)).sqrt()                # share of each side
    halves = [cut * length / 2 for length in images.shape[-2:]]
    box = box_mask([((middle - half).clamp(min=0).floor(), (middle + half).floor())
                    for middle, half in zip(centre.unbind(-1), halves, strict=True)],
                   images.shape[-2:])
    mixed = torch.where(box[:, None], images[perm.to(images.device, non_blocking=True)], images)
    return mixed, 1 - box.float().mean((1, 2))


def cutout(images: Tensor, centres: Tensor, side: float) -> Tensor:
    """Cutout (DeVries & Taylor 2017): a square of every image becomes 0, the mean colour.

    `images` (B, C, H, W), normalised; `centres` (B, 2) pixels y, x. The square reaches from
    side // 2 pixels before the centre to just before side // 2 pixels after it, cut off at the
    borders.
    """
    centres = centres.to(images.device, non_blocking=True)
    edges = zip((centres - side // 2).unbind(1), (centres + side // 2).unbind(1), strict=True)
    return images.masked_fill(box_mask(edges, images.shape[-2:])[:, None], 0)


def probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """Targets (B, num_classes) of class indices (B,); probabilities of that shape stay."""
    return labels if labels.is_floating_point() else F.one_hot(labels, num_classes).float()


def soft_targets(labels: Tensor, perm: Tensor, ratio: Tensor, num_classes: int) -> Tensor:
    """Targets (B, num_classes): `ratio` (B,) on `labels`, the rest on `labels[perm]`.

    labels: class indices (B,), or probabilities (B, num_classes), of label smoothing for instance.
    """
    return mixup(probabilities(labels, num_classes), perm, ratio)[0]


def softmax_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of the softmax probabilities, mean over all B·C entries; a scalar.

    `logits` and `targets` (B, C), targets in [0, 1]. Logarithms are clamped at -100; computed in
    float32, also under autocast. SAGE, Puzzle Mix and Co-Mixup train with it.
    """
    with torch.autocast(logits.device.type, enabled=False):
        share = logits.float().softmax(1)
        # a NaN would end the process here (on a GPU for good): pass it on to the caller instead
        return F.binary_cross_entropy(share.nan_to_num(), targets.float()) + 0 * share.mean()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of `logits` (B, C) against probabilities `targets` (B, C); mean over B."""
    return F.cross_entropy(logits.float(), targets.float())
