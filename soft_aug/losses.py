"""Losses of Soft Augmentation (Liu et al. 2023): a label and the confidence in it.

Every loss takes logits (B, K), labels (B,) int64 and confidence (B,) in (0, 1], the probability
of the label, and returns a float32 scalar; those that know no confidence ignore it, so that one
call serves them all. Class and confidence stay two tensors.
"""
import torch
import torch.nn.functional as F


def soft_target_loss(logits, labels, confidence, *, reweight: str | bool | None = True,
                     other: bool = False, soften: bool = True) -> torch.Tensor:
    """Kullback-Leibler divergence of the prediction from the softened target.

    The target gives `confidence` to the label and shares the rest among all other classes or,
    with `other`, gives it to one class more than the data have: the last of the K logits. The
    target's entropy is subtracted (the loss is 0 where prediction equals target); it does not
    touch the gradient. soften=False: one-hot targets. reweight: 'batch' (or True) multiplies the
    mean loss by the mean confidence, 'sample' each image's loss by its own (the paper's
    formula), None (or False) nothing. Raises ValueError for another reweight.
    """
    if reweight not in ("batch", "sample", None, True, False):
        raise ValueError(f"reweight must be 'batch', 'sample' or None, not {reweight!r}")
    target = confidence if soften else torch.ones_like(confidence)
    rest = 1 - target
    log_p = logits.float().log_softmax(1)
    log_label = log_p.gather(1, labels[:, None])[:, 0]
    shares = 1 if other else logits.shape[1] - 1
    log_rest = (log_p[:, -1] if other else log_p.sum(1) - log_label) / shares
    entropy = -torch.xlogy(target, target) - torch.xlogy(rest, rest / shares)
    divergence = -target * log_label - rest * log_rest - entropy
    if reweight == "sample":
        return (divergence * confidence).mean()
    return divergence.mean() * (confidence.mean() if reweight else 1)


def cross_entropy(logits, labels, confidence=None) -> torch.Tensor:
    """Plain cross-entropy; ignores the confidence (the paper's hard crop)."""
    return F.cross_entropy(logits.float(), labels)


def smooth_cross_entropy(logits, labels, confidence=None, *, smoothing: float) -> torch.Tensor:
    """Label smoothing: 1 - smoothing on the label, the rest on the other classes; less entropy.

    Ignores the confidence: all images get the same.
    """
    kept = torch.full_like(labels, 1 - smoothing, dtype=torch.float32)
    return soft_target_loss(logits, labels, kept, reweight=None)


def focal_loss(logits, labels, confidence=None, *, gamma: float = 2.0) -> torch.Tensor:
    """Mean of (1 - p)^gamma times the cross-entropy (Lin et al. 2017); ignores the confidence."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    wrong = -torch.expm1(-losses).clamp(max=-1e-12)         # 1 - p; 0 has no gradient of a root
    return (wrong ** gamma * losses).mean()


def mixup_loss(loss, logits, labels, confidence, perm, lam) -> torch.Tensor:
    """Any `loss` of this file for a batch mixed by Mixup: both labels, each with its confidence.

    loss(logits, labels, confidence); perm (B,) the partners; lam the share of the first image, a
    number or a 0-dim tensor in [0, 1]. With soft_target_loss the gradient is that of the
    mixed soft target.
    """
    perm = perm.to(logits.device, non_blocking=True)
    return (lam * loss(logits, labels, confidence)
            + (1 - lam) * loss(logits, labels[perm], confidence[perm]))
