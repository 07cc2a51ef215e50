"""SAMix's Mixer (Li et al. 2021, section 3.3) and AutoMix's Mix Block (Liu et al., ECCV 2022): a
small attention over two images' features decides, pixel by pixel, which of them to show."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.mixing import draw_lambda, draw_perm, per_image

MASK_LOSSES = ("l1_variance", "l1", "l2_variance", "sparsity")


def draw_partners(n: int, generator: torch.Generator, no_repeat: bool = False) -> Tensor:
    """Return partners (n,), a permutation; with `no_repeat` one cycle: none is its own partner."""
    order = draw_perm(n, generator)
    return order.roll(1)[order.argsort()] if no_repeat else order


class Draws(NamedTuple):
    """The random choices of one step: for the MixBlock's losses (mb) and for branch q (bb)."""
    lam_mb: Tensor                  # scalars: shares of the first image
    lam_bb: Tensor
    perm_bb: Tensor                 # (B,) partners
    perm_mb: Tensor
    modes: tuple = (None, None)     # of the masks' enlargement: mb's, bb's
    adjust: bool = False            # the mean of q's masks to lambda
    switched_off: bool = False      # the MixBlock learns from its mask loss alone


def draw_pairs(n: int, alpha: float, generator: torch.Generator, no_repeat: bool = False,
               device="cpu") -> Draws:
    """Return lambdas ~ Beta(alpha, alpha) and partners, on `device`, of n images."""
    lams = draw_lambda(alpha, generator, 2)
    perms = torch.stack([draw_partners(n, generator, no_repeat) for _ in range(2)])
    return Draws(*lams, *perms.to(device, non_blocking=True))


def rescale_lambda(lam: Tensor, k: float) -> Tensor:
    """Return lambda as the features carry it: itself for k < 0, else a cubic through 0, 1/2 and 1,
    flat around 1/2 for k = 0, near the identity for k = 10 (its cap)."""
    if k < 0:
        return lam
    k = min(k, 10) + 1
    return (4 / 3 * lam ** 3 - 2 * lam ** 2 + k * lam) / (k - 2 / 3)


class MixBlock(nn.Module):
    """Masks of image pairs by a layer's features. mode: of their enlargement; dropout: of values.
    'samix': lambda multiplies the features, query and key see both images, the value is non-linear.
    'automix': the query sees the first image, the key, of the same weights, the second, the value
    is linear; with lam_concat lambda is one more input channel, else masks do not depend on it."""

    def __init__(self, in_channels: int, lam_mul_k: float = -1, mode: str = "bilinear",
                 dropout: float = 0, variant: str = "samix", lam_concat: bool = True):
        super().__init__()
        half = in_channels // 2
        self.lam_mul_k, self.mode = lam_mul_k, mode
        self.variant, self.lam_concat = variant, lam_concat
        if variant == "samix":
            self.query = nn.Conv2d(2 * in_channels, half, 1)
            self.key = nn.Conv2d(2 * in_channels, half, 1)
            self.value = nn.Sequential(
                nn.Conv2d(in_channels, half, 1, bias=False), nn.BatchNorm2d(half), nn.ELU(),
                nn.Conv2d(half, 1, 1, bias=False), nn.Dropout(dropout))
        else:
            in_channels += lam_concat
            self.query = self.key = nn.Conv2d(in_channels, half, 1)
            self.value = nn.Sequential(nn.Conv2d(in_channels, 1, 1), nn.Dropout(dropout))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 4:                       # of a convolution
                nn.init.normal_(parameter, std=0.01)

    def forward(self, features: Tensor, lam: float | Tensor, perm: Tensor, scale_factor: int, *,
                partners: Tensor | None = None, mode: str | None = None) -> Tensor:
        """Return float32 masks (B, 2, scale_factor·h, scale_factor·w) of images with shares `lam`,
        a scalar or (B,), mixed with perm[i], whose features are of `partners` if given."""
        perm = perm.to(features.device, non_blocking=True)
        lam = per_image(lam, features).to(features.dtype).view(-1, 1, 1, 1)
        # channels last: 1×1 convolutions and the attention's tokens are then the same memory
        features, second = (part.contiguous(memory_format=torch.channels_last)
                            for part in (features, features if partners is None else partners))
        first, second = features, second[perm]
        if self.variant == "samix":
            share = rescale_lambda(lam, self.lam_mul_k)
            first, second = first * (1 + share), second * (2 - share)
            both = torch.cat([first, second], 1)            # queries and keys in one convolution
            weight, bias = (torch.cat([getattr(layer, name) for layer in (self.query, self.key)])
                            for name in ("weight", "bias"))
            query, key = F.conv2d(both, weight, bias).flatten(2).transpose(1, 2).chunk(2, 2)
        else:
            if self.lam_concat:
                first, second = (torch.cat([part, share.expand(-1, -1, *part.shape[2:])], 1)
                                 for part, share in ((first, lam), (second, 1 - lam)))
            query, key = (self.query(x).flatten(2).transpose(1, 2) for x in (first, second))

        attention = (query @ key.transpose(1, 2) * query.shape[2] ** -0.5).softmax(2)
        value = self.value(second).flatten(2).transpose(1, 2)
        logits = (attention.to(value.dtype) @ value).transpose(1, 2).unflatten(
            2, features.shape[2:])
        logits = F.interpolate(logits.float(), scale_factor=scale_factor, mode=mode or self.mode)
        share = logits.sigmoid()
        return torch.cat([1 - share, share], 1)


def mask_loss(mask: Tensor, lam: float | Tensor, margin: float = 0.1,
              kind: str = "l1_variance") -> Tensor:
    """Return how far masks (B, 2, H, W), or partners' shares (B, H, W), are in mean from lambda
    beyond `margin` (section 3.3). 'l1' is AutoMix's; the 'variance' kinds reward contrast by
    twice the variance over all pixels, so they can be negative; 'sparsity' ignores lambda."""
    share = mask[:, -1] if mask.ndim == 4 else mask
    if kind == "sparsity":
        return ((share * (1 - share)).mean() - margin).clamp(min=0)
    power = 2 if kind == "l2_variance" else 1
    loss = ((1 - share.mean() - lam).abs() ** power - margin ** power).clamp(min=0)
    return loss if kind == "l1" else loss - 2 * share.var(unbiased=False)


def mask_columns(mask: Tensor) -> dict:
    """Return the log's columns of masks (B, 2, H, W): the first image's share, its deviation inside
    an image, and the share of pairs that show one image alone (mean below 0.05 or above 0.95)."""
    std, mean = torch.std_mean(mask[:, 0].detach(), (1, 2), unbiased=False)
    return {"mask_mean": mean.mean(), "mask_std": std.mean(),
            "mask_alone": ((mean - 0.5).abs() > 0.45).float().mean()}


def adjust_mask(mask: Tensor, lam: float | Tensor, margin: float = 0.0) -> Tensor:
    """Return masks (B, 2, H, W) of mean `lam`, rescaled where further than `margin` from it."""
    first = mask[:, 0].clamp(1e-8, 1 - 1e-8)
    mean, lam = first.mean((1, 2), keepdim=True), per_image(lam, mask).view(-1, 1, 1)
    lower, higher = first * (lam / mean), 1 - (1 - first) * ((1 - lam) / (1 - mean))
    adjusted = torch.where(mean > lam, lower, higher)
    adjusted = torch.where((mean - lam).abs() > margin, adjusted, first)
    return torch.stack([adjusted, 1 - adjusted], 1)


def plain_near_ends(mask: Tensor, lam: Tensor, lam_margin: float = 0.08) -> Tensor:
    """Return masks (B, 2, H, W), Mixup's where `lam` is within `lam_margin` of 0 or 1."""
    lam = per_image(lam, mask).view(-1, 1, 1, 1)
    near = torch.minimum(lam, 1 - lam) <= lam_margin
    return torch.where(near, torch.cat([lam, 1 - lam], 1), mask)


def scale_of(images: Tensor, features: Tensor) -> int:
    """Return the factor by which masks of the features' size cover the images."""
    return max(-(-images.shape[side] // features.shape[side]) for side in (2, 3))


def mix(images: Tensor, mask: Tensor, perm: Tensor, partners: Tensor | None = None) -> Tensor:
    """Return images mixed with images[perm], or with partners[perm], by masks (B, 2, H, W), which
    may be larger than the images (B, C, h, w)."""
    perm = perm.to(images.device, non_blocking=True)
    others = (images if partners is None else partners)[perm]
    mask = mask[:, :1, :images.shape[2], :images.shape[3]]
    return torch.lerp(others, images, mask.to(images.dtype))
