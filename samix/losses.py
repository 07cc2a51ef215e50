"""The heads' losses."""
import torch
import torch.nn.functional as F
from torch import Tensor


def head_loss(logits: Tensor, targets: Tensor, head: str = "ce", neg_weight: float = 1.0,
              smoothing: float = 0.0) -> Tensor:
    """Loss of `logits` (B, K) against labels (B,) or soft targets (B, K); mean over B, float32.

    'ce': cross entropy, labels smoothed by `smoothing`. 'bce': binary cross entropies, summed over
    the classes; those of classes that are not in the image weigh `neg_weight` (section 3.2: eta,
    which balances telling the two classes apart against telling them from all others).
    """
    logits = logits.float()
    if head == "ce":
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1]).float()
    weight = torch.where(targets > 0, 1.0, neg_weight)
    total = F.binary_cross_entropy_with_logits(logits, targets, weight, reduction="sum")
    return total / len(logits)
