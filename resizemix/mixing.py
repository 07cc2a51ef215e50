"""ResizeMix (Qin et al. 2020), this paper's CutMix, and the central crop of its evaluation."""
import torch
from torch import Tensor, nn

from common.mixing import box_mask, draw_pixels, per_image


def box_size(image_size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return height and width, at least 1, of an image of `image_size` (H, W) at `scale`."""
    return tuple(max(1, int(side * float(scale))) for side in image_size)


def clip_corners(centres: Tensor, size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Return upper left corners (B, 2) of boxes of `size` around `centres` (B, 2), moved inside."""
    size, image_size = torch.tensor(size), torch.tensor(image_size)
    return (centres - size // 2).clamp(min=0).minimum(image_size - size)


def draw_scale(generator: torch.Generator | None = None, low: float = 0.1, high: float = 0.8
               ) -> float:
    """Return a batch's scale, uniform in [low, high) (section 3.2 of the paper)."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def draw_corners(n: int, image_size: tuple[int, int], scale: float,
                 generator: torch.Generator | None = None) -> Tensor:
    """Return upper left corners (n, 2) y, x of small images whose centres are uniform."""
    centres = draw_pixels(n, image_size, generator)
    return clip_corners(centres, box_size(image_size, scale), image_size)


def nearest_index(size: int, length: int, scale: float, device) -> Tensor:
    """Return the source pixels (size,) of a nearest resize by `scale` of a side of `length`:
    floor(i / scale) in float32, as the original; not floor(i·length / size)."""
    step = torch.arange(size, device=device, dtype=torch.float32) * (1 / float(scale))
    return step.long().clamp_(max=length - 1)


def resize_mix(images: Tensor, perm: Tensor, scale: float | Tensor, corners: Tensor
               ) -> tuple[Tensor, Tensor]:
    """Paste image perm[i], resized by `scale`, into image i at corners[i] (the paper's eq. 2-4).
    `scale` in (0, 1], a float or CPU scalar, since it sets a size; `corners` (B, 2) integers y, x.
    Returns the mixed images and ratio (B,), the share of pixels that stay."""
    (n, channels, height, width), device = images.shape, images.device
    perm, corners = (t.to(device, non_blocking=True).long() for t in (perm, corners))
    h, w = box_size((height, width), scale)
    y, x = (nearest_index(side, length, scale, device)
            for side, length in ((h, height), (w, width)))
    source = (y[:, None] * width + x).flatten()
    # Gathering by an expanded index measures 2 to 5 times faster than interpolate(mode="nearest").
    small = images.flatten(2).gather(2, source.expand(n, channels, -1))
    small = small.index_select(0, perm)
    offsets = torch.arange(h, device=device)[:, None] * width + torch.arange(w, device=device)
    target = (corners[:, :1] * width + corners[:, 1:] + offsets.flatten())[:, None]
    mixed = images.flatten(2).clone().scatter_(2, target.expand_as(small), small)
    return mixed.unflatten(2, (height, width)), per_image(1 - h * w / (height * width), images)


def cutmix(images: Tensor, perm: Tensor, centre: Tensor, lam: float | Tensor
           ) -> tuple[Tensor, Tensor]:
    """CutMix as this paper's baseline has it, in whole pixels, with one box for the batch around
    `centre` (2,) y, x. Returns the mixed images and ratio (B,), the share of pixels that stay."""
    size, cut = images.shape[-2:], (1 - torch.as_tensor(lam).double()).sqrt()
    halves = torch.stack([(length * cut).long() // 2 for length in size])
    low, end = (centre - halves).clamp(min=0), (centre + halves).minimum(torch.tensor(size))
    edges = torch.stack([low, end], 1)[..., None].to(images.device, non_blocking=True)
    partners = images[perm.to(images.device, non_blocking=True)]
    mixed = torch.where(box_mask(edges, size)[:, None], partners, images)
    return mixed, per_image(1 - (end - low).prod().double() / (size[0] * size[1]), images)


def keep_centre(images: Tensor, size: int = 24) -> tuple[Tensor, float]:
    """Return images (B, C, H, W) with 0 outside the central square, and the square's share."""
    box = tuple(slice(max(length // 2 - size // 2, 0), length // 2 + size // 2)
                for length in images.shape[-2:])
    cropped = torch.zeros_like(images)
    cropped[(..., *box)] = images[(..., *box)]
    return cropped, images[0, 0][box].numel() / images[0, 0].numel()


class CropTest(nn.Module):
    """`--crop_test`: (1 - a)·net(images) + a·net(central square), a: the square's share."""

    def __init__(self, net):
        super().__init__()
        self.net, self.training = net, net.training

    def forward(self, images):
        cropped, share = keep_centre(images)
        return (1 - share) * self.net(images) + share * self.net(cropped)
