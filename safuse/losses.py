"""Losses on superpixels: cross entropy of their own label, and contrast between their classes."""
import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed


def superpixel_labels(labels: Tensor, perm: Tensor, from_b: Tensor) -> Tensor:
    """Return the class (B, S) of each superpixel: labels[perm] where pasted, else labels (B,)."""
    perm = perm.to(labels.device, non_blocking=True)
    return torch.where(from_b, labels[perm][:, None], labels[:, None])


def local_cross_entropy(logits: Tensor, labels: Tensor, kept: Tensor,
                        weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of the selected superpixels, mean over the images; a scalar.

    `logits` (B, T, K); `labels` (B, T); `kept` (B, T) bool. An image's terms are summed (LGCOAMix),
    or averaged with `weights` (B, T) >= 0, which get no gradient (SAFuse).
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    share = kept.float()
    if weights is not None:
        share = weights.detach().float() * kept
        share = share / share.sum(1, keepdim=True).clamp(min=1e-12)
    return (losses.view(kept.shape) * share).sum() / len(kept)


def superpixel_contrastive(logits: Tensor, labels: Tensor, kept: Tensor,
                           weights: Tensor | None = None, *, temperature: float = 0.7,
                           base_temperature: float = 0.07, gather: bool = False) -> Tensor:
    """Return the supervised contrastive loss of the batch's selected superpixels; a scalar.

    `logits` (B, T, K) are compared by s, their cosine / temperature; `labels` (B, T); `kept` (B, T)
    bool. For i and every j of its class, i itself included,
    log p_ij = s_ij - log(exp s_ij + sum of exp s_ik over the k of other classes), and
    l_i = -(temperature / base_temperature) · mean of log p_ij over j. Returned is the mean of l_i
    (LGCOAMix), weighed by `weights` (B, T) >= 0, which get no gradient, if given (SAFuse).
    `gather`: over all processes, of equal (B, T); the gradient is scaled so that
    DistributedDataParallel's mean is the whole batch's.
    """
    with torch.autocast(logits.device.type, enabled=False):
        features = F.normalize(logits.float(), dim=-1).flatten(0, 1)
        share = (kept if weights is None else weights.detach() * kept).float().flatten()
        labels, kept = labels.flatten(), kept.flatten()
        processes = distributed.world() if gather else 1
        if processes > 1:
            features, share, labels, kept = (distributed.gather_rows(t)
                                             for t in (features, share, labels, kept))
        elif features.device.type == "cpu":             # a matrix without padding; a GPU would wait
            features, share, labels, kept = (t[kept] for t in (features, share, labels, kept))
        # a row's largest entry is its own, 1 / temperature
        similar = (features @ features.T - 1) / temperature
        same = labels[:, None] == labels
        exponential = similar.exp()
        others = (exponential * (~same & kept)).sum(1, keepdim=True)
        positive = (same & kept).float()
        log_p = similar - (exponential + others).log()
        losses = (log_p * positive).sum(1) / positive.sum(1).clamp(min=1)
        share = share / share.sum().clamp(min=1e-12)
        loss = -temperature / base_temperature * (losses * share).sum()
        return loss + (processes - 1) * (loss - loss.detach())
