"""The branches (AutoMix section 3.3, SAMix section 3.4) and the loss of their heads: q learns to
classify; k, its moving average, makes the masks' features and judges the MixBlock's mixtures."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.mixing import probabilities


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

    def forward(self, images: Tensor, head: str = "one") -> Tensor:
        """Return logits (B, num_classes) of head 'one' or 'mix'."""
        return getattr(self, head)(self.backbone(images)[1])


@torch.no_grad()
def momentum_update(k: nn.Module, q: nn.Module, momentum: float):
    """k = momentum·k + (1 - momentum)·q, parameters alone: BatchNorm statistics stay k's own."""
    torch._foreach_lerp_(list(k.parameters()), list(q.parameters()), 1 - momentum)


def head_loss(logits: Tensor, targets: Tensor, head: str = "ce", neg_weight: float = 1.0,
              smoothing: float = 0.0) -> Tensor:
    """Return the loss of `logits` (B, K) against labels (B,) or soft targets (B, K), mean over B.
    'bce': binary cross entropies, summed over the classes; `neg_weight` (eta, section 3.2) weighs
    those of classes not in the image."""
    logits = logits.float()
    if head == "ce":
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    targets = probabilities(targets, logits.shape[1])
    weight = torch.where(targets > 0, 1.0, neg_weight)
    total = F.binary_cross_entropy_with_logits(logits, targets, weight, reduction="sum")
    return total / len(logits)
