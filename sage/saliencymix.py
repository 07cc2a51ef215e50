"""SaliencyMix (Uddin et al., ICLR 2021): a box around the most salient point is pasted."""
import torch
import torch.nn.functional as F
from torch import Tensor

from common.mixing import Draws, box_mask, draw_lambda

GREY = {"R": 9798, "G": 19235, "B": 3735}           # weights of the 8-bit grey image, in 1/32768
SCALES = (12, 24, 28, 48, 56, 112)                  # half sides of the windows, in pixels


def blur(grey: Tensor) -> Tensor:
    """Return the binomial 3×3 blur of grey levels (B, H, W), mirrored at the border, rounded."""
    grey = F.pad(grey.float(), (1, 1, 1, 1), mode="reflect")
    for _ in range(2):                              # exact: sums of integers, in sixteenths
        grey = F.avg_pool2d(grey, 2, stride=1)
    return grey.add_(0.5).floor_()


@torch.no_grad()
def fine_grained_saliency(images: Tensor, channel_order: str = "RGB") -> Tensor:
    """Return how much the brightness of uint8 images (B, 3, H, W) differs from the means of windows
    of six sizes (Montabone & Soto 2010): (B, H, W) in [0, 1], multiples of 1/255.
    Both the excess over the window's mean ("on") and the lack ("off") are summed over the scales
    and stretched to 255. All arithmetic is that of 8-bit programs, rounded toward zero."""
    if images.dtype != torch.uint8:
        raise TypeError(f"fine_grained_saliency takes uint8 images, not {images.dtype}")
    weights = torch.tensor([GREY[name] for name in channel_order])[:, None, None]
    grey = (images.int() * weights.to(images.device, non_blocking=True)).sum(1)
    centre = blur(blur((grey + 16384) >> 15))
    height, width = centre.shape[1:]
    integral = F.pad(centre.cumsum(1).cumsum(2), (1, 0, 1, 0))
    half = torch.tensor(SCALES).to(images.device, non_blocking=True)[:, None]
    rows, columns = (torch.arange(side + 1, device=images.device) for side in (height, width))
    top, left = ((i[:-1] - half + 1).clamp_(min=0) for i in (rows, columns))         # (S, H or W)
    bottom, right = ((i[1:] + half).clamp_(max=i.numel() - 1) for i in (rows, columns))
    band = integral[:, bottom] - integral[:, top]            # (B, S, H, W + 1)
    window = (band.gather(3, right[:, None].expand(len(band), -1, height, -1))
              - band.gather(3, left[:, None].expand(len(band), -1, height, -1)))
    area = (bottom - top)[:, :, None] * (right - left)[:, None]
    contrast = centre[:, None] - (window - centre[:, None]) / (area - 1)
    both = torch.stack([contrast, -contrast]).clamp_(min=0).floor_().sum(2)          # on and off

    def stretch(values, of):
        return (values / of.amax((-2, -1), keepdim=True).clamp_(min=1)).mul_(255).floor_()
    both = stretch(both, both)
    return (stretch(both.sum(0), both.amax(0)) % 256) / 255


@torch.no_grad()
def saliency_mix(images: Tensor, perm: Tensor, lam: Tensor | float, saliency: Tensor) -> tuple:
    """Return images (B, C, H, W) with one box, sqrt(1 - lam) of each side, pasted from images[perm]
    and ratio (B,), the share of pixels that stay. The box is centred on the first maximum of
    `saliency` (H, W), in the published program that of image perm[0], and clipped to the image."""
    height, width = images.shape[-2:]
    peak = (saliency * 255).int().flatten().argmax()
    edge = torch.as_tensor(1.0 - lam, dtype=torch.float64).sqrt()
    halves = (height * edge).int() // 2, (width * edge).int() // 2
    box = box_mask([((centre - half)[None], (centre + half)[None]) for centre, half in
                    zip((peak // width, peak % width), halves, strict=True)], (height, width))
    partners = images[perm.to(images.device, non_blocking=True)]
    return torch.where(box, partners, images), (1 - box.float().mean()).expand(len(images))


def draw_box_lambda(generator: Draws = None) -> Tensor:
    """Return Beta(1, 1) for half of the batches, else 1: no box."""
    mixes = torch.rand((), generator=generator) < 0.5
    return torch.where(mixes, draw_lambda(1.0, generator), 1.0)
