"""The momentum branch (AutoMix section 3.3, SAMix section 3.4): networks, update and schedules.

Branch q learns to classify; branch k, its moving average, makes the masks' features and judges the
mixed images that the MixBlock learns by.
"""
import copy
import math

import torch
from torch import Tensor, nn


class Branch(nn.Module):
    """A backbone (images -> middle feature map (B, C, h, w), pooled features (B, width)) with two
    linear heads: `one` for clean images, `mix` for mixed ones."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.mix, self.one = nn.Linear(width, num_classes), nn.Linear(width, num_classes)
        for head in (self.mix, self.one):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def features(self, images: Tensor) -> Tensor:
        """The middle feature map, for the MixBlock."""
        return self.backbone(images)[0]

    def pooled(self, images: Tensor) -> Tensor:
        """What the heads see, (B, width)."""
        return self.backbone(images)[1]

    def forward(self, images: Tensor, head: str = "one") -> Tensor:
        """Logits (B, num_classes) of head 'one' or 'mix'."""
        return getattr(self, head)(self.pooled(images))


def momentum_copy(branch: nn.Module) -> nn.Module:
    """A copy of everything, statistics included, that no gradient reaches."""
    return copy.deepcopy(branch).requires_grad_(False)


@torch.no_grad()
def momentum_update(k: nn.Module, q: nn.Module, momentum: float):
    """k = momentum·k + (1 - momentum)·q for the parameters, after each optimizer step. Buffers are
    left alone: k's BatchNorm statistics are of what k itself has seen."""
    torch._foreach_lerp_(list(k.parameters()), list(q.parameters()), 1 - momentum)


def cosine(step: int, total: int) -> float:
    """From 1 at step 0 to 0 at step `total`."""
    return (1 + math.cos(math.pi * step / total)) / 2


def ema_momentum(step: int, total: int, base: float = 0.999, end: float = 0.99999,
                 start: float = 0.1) -> float:
    """Momentum of the update after `step` of `total`: `base` up to a share `start` of the run, then
    a cosine towards `end` that began at step 0, as in the recorded runs: it jumps a little there.
    """
    return base if step < start * total else end - (end - base) * cosine(step, total)
