"""SoftCrop (Liu et al. 2023), its confidence curve and soft noise, for whole batches."""
import torch
from torch import Tensor

from common.mixing import box_mask

MAX_DRAWS = 100                            # of one offset; after that it is 0


def draw_offsets(n: int, size: tuple[int, int], sigma: float, generator=None) -> Tensor:
    """Return offsets (n, 2) int64, dy and dx in pixels, for images of `size` (H, W): N(0, sigma²),
    drawn again while beyond ±H (±W), truncated toward zero."""
    offsets = torch.zeros(n, len(size), dtype=torch.int64)
    for axis, limit in enumerate(size):
        waiting = torch.arange(n)
        for _ in range(MAX_DRAWS):
            if not len(waiting):
                break
            offset = torch.randn(len(waiting), generator=generator) * sigma
            accepted = offset.abs() <= limit
            offsets[waiting[accepted], axis] = offset[accepted].trunc().long()
            waiting = waiting[~accepted]
    return offsets


def soft_crop(images: Tensor, offsets: Tensor, background: Tensor, *, iou: bool = False):
    """Return each image shifted by its offset, on its background, and the visible fraction (B,),
    the share of the image inside the crop or, with `iou`, their intersection over union. images
    (B, C, H, W) and background (B, C) normalised; offsets (B, 2) integers: pixel (i, j) of a crop
    is pixel (i + dy, j + dx) of the image."""
    height, width = images.shape[2:]
    dy, dx = offsets.to(images.device, non_blocking=True).unbind(1)
    background = background.to(images, non_blocking=True)[:, :, None, None]
    rows = (torch.arange(height, device=images.device) + dy[:, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + dx[:, None]).clamp(0, width - 1)
    index = (rows[:, :, None] * width + columns[:, None]).flatten(1)[:, None]
    crops = images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1)).view(images.shape)
    inside = box_mask([(-dy, height - dy), (-dx, width - dx)], (height, width))
    crops = torch.where(inside[:, None], crops, background)
    visible = (1 - dy.abs() / height).clamp(min=0) * (1 - dx.abs() / width).clamp(min=0)
    return crops, visible / (2 - visible) if iou else visible


def confidence(visible: Tensor, num_classes: int, *, power: float, t: float = 1.0,
               max_p: float | Tensor = 1.0) -> Tensor:
    """Return the label's probability (B,) in the targets of images of visible fraction v (B,):
    m - (m - 1/C) ((t - v) / t)^power for 0 < v <= t, 1/C below, m above, where m is max_p (a number
    or (B,)) but at least 1/C. With t = m = 1: 1 - (1 - 1/C) (1 - v)^power."""
    chance = 1 / num_classes
    highest = max_p.clamp(min=chance) if torch.is_tensor(max_p) else max(max_p, chance)
    t = max(t, 1e-10)
    return highest - (highest - chance) * ((t - visible) / t).clamp(0, 1) ** power


def draw_noise(shape, noise: float, scale: float = 1.0, generator=None, device="cpu"):
    """Return sigma (B,) = |N(0, noise²)| and the field N(0, scale²) of `shape` (B, C, H, W). A GPU
    draws the field itself, seeded by `step_generator`: sending it would synchronise."""
    sigma = (torch.randn(shape[0], generator=generator) * noise).abs()
    if torch.device(device).type == "cpu":
        return sigma, torch.randn(shape, generator=generator) * scale
    return sigma, torch.randn(shape, device=device) * scale


def soft_noise(images: Tensor, sigma: Tensor, field: Tensor):
    """Return images + sigma·field (B, C, H, W), and 1 / (1 + sigma) (B,) for a visible fraction."""
    sigma, field = (draw.to(images, non_blocking=True) for draw in (sigma, field))
    return images + sigma[:, None, None, None] * field, 1 / (1 + sigma)
