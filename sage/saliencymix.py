"""SaliencyMix (Uddin et al., ICLR 2021): a box around the most salient point is pasted.

Saliency is the static fine-grained kind (Montabone & Soto 2010): how much a pixel's brightness
differs from the means of windows around it, at six sizes.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from common.mixing import draw_lambda

GREY = {"R": 9798, "G": 19235, "B": 3735}           # weights of the 8-bit grey image, in 1/32768
SCALES = (12, 24, 28, 48, 56, 112)                  # half sides of the windows, in pixels


def grey_levels(images: Tensor, channel_order: str = "RGB") -> Tensor:
    """(B, 3 or 1, H, W) uint8 to grey levels (B, H, W) int32 in 0..255."""
    if images.shape[1] == 1:
        return images[:, 0].int()
    grey = sum(images[:, c].int() * GREY[name] for c, name in enumerate(channel_order))
    return (grey + 16384) >> 15


def blur(grey: Tensor) -> Tensor:
    """Binomial 3×3 blur of integers (B, H, W), mirrored at the border, rounded."""
    for _ in range(2):                              # rows, then columns: sums stay exact
        padded = F.pad(grey[:, None].float(), (0, 0, 1, 1), mode="reflect")[:, 0].int()
        grey = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]).mT
    return (grey + 8) >> 4


@torch.no_grad()
def fine_grained_saliency(images: Tensor, channel_order: str = "RGB") -> Tensor:
    """Saliency (B, H, W) in [0, 1], multiples of 1/255, of images (B, 3 or 1, H, W) uint8.

    Sides of at least 2 pixels. channel_order: the meaning of the three channels, 'RGB' or 'BGR'.
    Both the excess over the window's mean ("on") and the lack ("off") are summed over the scales
    and stretched to 255; an image of one colour has no saliency. All arithmetic is that of 8-bit
    programs, rounded toward zero where they truncate.
    """
    grey = blur(blur(grey_levels(images, channel_order)))
    height, width = grey.shape[1:]
    integral = F.pad(grey.cumsum(1).cumsum(2), (1, 0, 1, 0))
    centre = grey.float()
    on, off = (torch.zeros_like(grey) for _ in range(2))
    rows, columns = (torch.arange(side, device=grey.device) for side in (height, width))
    for n in SCALES:
        top, bottom = (rows - n + 1).clamp(min=0), (rows + n + 1).clamp(max=height)
        left, right = (columns - n + 1).clamp(min=0), (columns + n + 1).clamp(max=width)
        below, above = integral[:, bottom], integral[:, top]
        window = below[..., right] - below[..., left] - above[..., right] + above[..., left]
        area = (bottom - top)[:, None] * (right - left)
        mean = (window.float() - centre) / (area - 1)
        on += (centre - mean).clamp(min=0).int()
        off += (mean - centre).clamp(min=0).int()

    def stretch(values, of):
        most = of.amax((1, 2), keepdim=True).clamp(min=1)
        return (255 * (values.float() / most.float())).int()

    on, off = stretch(on, on), stretch(off, off)
    return (stretch(on + off, torch.maximum(on, off)) & 255).float() / 255


@torch.no_grad()
def saliency_mix(images: Tensor, perm: Tensor, lam: Tensor | float, saliency: Tensor
                 ) -> tuple[Tensor, Tensor]:
    """Pastes the same box, sqrt(1 - lam) of each side, of every image's partner into it.

    `images` (B, C, H, W); `perm` (B,); `lam` in [0, 1]; `saliency` (H, W), by the published
    program of image perm[0] for the whole batch: the box is centred on its first maximum and
    clipped to the image. Returns mixed images and ratio (B,), the share of pixels that stay.
    """
    height, width = images.shape[-2:]
    peak = (saliency * 255).int().flatten().argmax()
    edge = torch.as_tensor(1.0 - lam, dtype=torch.float64).sqrt()
    inside = []
    for centre, side in ((peak // width, height), (peak % width, width)):
        half = (side * edge).int() // 2
        grid = torch.arange(side, device=images.device)
        inside.append((grid >= centre - half) & (grid < centre + half))
    box = inside[0][:, None] & inside[1]
    partners = images[perm.to(images.device, non_blocking=True)]
    return torch.where(box, partners, images), (1 - box.float().mean()).expand(len(images))


def draw_box_lambda(generator: torch.Generator, probability: float = 0.5) -> Tensor:
    """Beta(1, 1) with the given probability, else 1: no box, a batch left as it is."""
    mixes = torch.rand((), generator=generator) < probability
    return torch.where(mixes, draw_lambda(1.0, generator), 1.0)
