"""Losses on superpixels: cross entropy of their own label, and contrast between their classes."""
import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed


def local_cross_entropy(logits, labels, selected, weights=None) -> Tensor:
    """Return the cross-entropy of the selected superpixels, a scalar: mean over the images of sums
    (LGCOAMix), or of averages with `weights` (B, T) >= 0, which get no gradient (SAFuse). `logits`
    (B, T, K); `labels`, `selected` (B, T)."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    share = selected.float()
    if weights is not None:
        share = F.normalize(weights.detach().float() * selected, p=1, dim=1)
    return (losses.view(selected.shape) * share).sum() / len(selected)


def superpixel_contrastive(logits, labels, selected, weights=None, *, temperature: float = 0.7,
                           base_temperature: float = 0.07) -> Tensor:
    """Return the supervised contrastive loss of the selected superpixels of all processes: the mean
    of l_i (LGCOAMix), weighed by `weights` (B, T) >= 0 without gradient (SAFuse).
    `logits` (B, T, K), compared by s, their cosine / temperature; `labels`, `selected` (B, T). For
    i and every j of its class, i too, log p_ij = s_ij - log(exp s_ij + sum of exp s_ik over the k
    of other classes); l_i = -(temperature / base_temperature) · mean of log p_ij over j. The
    gradient is scaled so that DistributedDataParallel's mean is the whole batch's."""
    with torch.autocast(logits.device.type, enabled=False):
        features = F.normalize(logits.float(), dim=-1).flatten(0, 1)
        share = (selected if weights is None else weights.detach() * selected).float().flatten()
        rows = features, share, labels.flatten(), selected.flatten()
        if distributed.world() > 1:
            rows = [distributed.gather_rows(t) for t in rows]
        elif features.device.type == "cpu":             # a matrix without padding; a GPU would wait
            rows = [t[selected.flatten()] for t in rows]
        features, share, labels, selected = rows
        # a row's largest entry is its own, 1 / temperature
        similar = (features @ features.T - 1) / temperature
        same = labels[:, None] == labels
        others = (similar.exp() * (~same & selected)).sum(1, keepdim=True)
        positive = (same & selected).float()
        log_p = similar - (similar.exp() + others).log()
        losses = (log_p * positive).sum(1) / positive.sum(1).clamp(min=1)
        loss = -temperature / base_temperature * (losses * share).sum() / share.sum().clamp(1e-12)
        return loss + (distributed.world() - 1) * (loss - loss.detach())
