"""SoftCrop (Liu et al. 2023), its confidence curve and soft noise, for whole batches.

A crop that shows less of an image deserves less confidence in its label: `soft_crop` moves each
image by a random offset and tells the fraction that stays visible, `confidence` turns fractions
into the probability of the label. `draw_*` make the random numbers on the CPU, from a
torch.Generator; everything else is a pure function on the device of the images, which takes the
draws from wherever they are.
"""
import torch

MAX_DRAWS = 100                            # of one offset; then it is 0


# ------------------------------------------------------------------------------------- SoftCrop

def draw_offsets(n: int, size: tuple[int, int], sigma: float, generator=None) -> torch.Tensor:
    """(n, 2) int64 offsets (dy, dx) in pixels for images of `size` (H, W).

    Each is normal with standard deviation `sigma`, drawn again while its size exceeds H (or W),
    0 after 100 draws, and truncated toward zero.
    """
    return torch.stack([_truncated_normal(n, limit, sigma, generator) for limit in size], 1)


def _truncated_normal(n, limit, sigma, generator):
    offsets = torch.zeros(n, dtype=torch.int64)
    waiting = torch.arange(n)
    for _ in range(MAX_DRAWS):
        offset = torch.randn(len(waiting), generator=generator) * sigma
        accepted = offset.abs() <= limit
        offsets[waiting[accepted]] = offset[accepted].trunc().long()
        waiting = waiting[~accepted]
        if not len(waiting):
            break
    return offsets


def draw_background(n: int, channels: int, std: float, generator=None) -> torch.Tensor:
    """(n, channels) background colours in normalised units, normal with standard deviation std."""
    return torch.randn(n, channels, generator=generator) * std


def soft_crop(images: torch.Tensor, offsets: torch.Tensor, background: torch.Tensor, *,
              iou: bool = False):
    """Slides the window of each image by its offset; what lies outside takes the background.

    images (B, C, H, W) normalised; offsets (B, 2) integer (dy, dx): pixel (i, j) of the crop is
    pixel (i + dy, j + dx) of the image; background (B, C) in the units of the images.
    Returns crops (B, C, H, W) and the visible fraction (B,) float32 in [0, 1]: the share of the
    image inside the window or, with `iou`, the intersection over union of image and window.
    """
    height, width = images.shape[2:]
    offsets = offsets.to(images.device, non_blocking=True)
    background = background.to(images, non_blocking=True)
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    columns = torch.arange(width, device=images.device) + offsets[:, 1:]
    inside = (((rows >= 0) & (rows < height))[:, :, None]
              & ((columns >= 0) & (columns < width))[:, None])
    index = (rows.clamp(0, height - 1) * width)[:, :, None] + columns.clamp(0, width - 1)[:, None]
    index = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    crops = images.flatten(2).gather(2, index).view(images.shape)
    crops = torch.where(inside[:, None], crops, background[:, :, None, None])
    visible = ((1 - offsets[:, 0].abs() / height).clamp(min=0)
               * (1 - offsets[:, 1].abs() / width).clamp(min=0))
    return crops, visible / (2 - visible) if iou else visible


def confidence(visible: torch.Tensor, num_classes: int, *, power: float, t: float = 1.0,
               max_p: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Probability (B,) of the label of images of which the fraction `visible` (B,) is seen.

    p = m - (m - 1/C) ((t - v) / t)^power for 0 < v <= t, the chance level 1/C at v <= 0 and m
    at v > t, where m is max_p (a number or (B,)), but never below chance. With t = m = 1 this is
    1 - (1 - 1/C) (1 - v)^power.
    """
    chance = 1 / num_classes
    highest = max_p.clamp(min=chance) if torch.is_tensor(max_p) else max(max_p, chance)
    t = max(t, 1e-10)
    return highest - (highest - chance) * ((t - visible) / t).clamp(0, 1) ** power


# -------------------------------------------------------------------------------------- soft noise

def draw_noise(shape: tuple[int, ...], noise: float, scale: float = 1.0, generator=None,
               device="cpu"):
    """Draws of `soft_noise` for a batch of `shape` (B, C, H, W).

    Returns sigma (B,) = |N(0, noise)| and the field (B, C, H, W), normal with standard deviation
    `scale`. For a GPU the field is drawn there, by the GPU's own generator (which
    `step_generator` seeds): to send a batch of numbers makes the host wait.
    """
    sigma = (torch.randn(shape[0], generator=generator) * noise).abs()
    if torch.device(device).type == "cpu":
        return sigma, torch.randn(shape, generator=generator) * scale
    return sigma, torch.randn(shape, device=device) * scale


def soft_noise(images: torch.Tensor, sigma: torch.Tensor, field: torch.Tensor):
    """Adds sigma (B,) times the field (B, C, H, W) to the images (B, C, H, W).

    Returns the noisy images and 1 / (1 + sigma) (B,), which takes the place of the visible
    fraction in `confidence`.
    """
    sigma, field = (draw.to(images, non_blocking=True) for draw in (sigma, field))
    return images + sigma[:, None, None, None] * field, 1 / (1 + sigma)
