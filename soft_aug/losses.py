"""Losses of Soft Augmentation (Liu et al. 2023): float32 scalars of logits (B, K), labels (B,) and
confidence (B,) in (0, 1], the label's probability, which all but soft_target_loss ignore."""
import torch
import torch.nn.functional as F


def soft_target_loss(logits, labels, confidence, *, reweight: str | bool | None = True,
                     other: bool = False, soften: bool = True) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of the prediction from the target: `confidence` for
    the label and the rest in equal parts for the other classes or, with `other`, for the last
    logit, a class beyond the data's. soften=False: one-hot targets. reweight: 'batch' (or True)
    multiplies the mean loss by the batch's mean confidence, as the authors' program does; 'sample'
    each image's by its own, as the paper's formula does."""
    target = confidence if soften else torch.ones_like(confidence)
    rest = 1 - target
    log_p = logits.float().log_softmax(1)
    log_label = log_p.gather(1, labels[:, None])[:, 0]
    classes = 1 if other else max(1, logits.shape[1] - 1)
    log_rest = (log_p[:, -1] if other else log_p.sum(1) - log_label) / classes
    entropy = -torch.xlogy(target, target) - torch.xlogy(rest, rest / classes)
    divergence = -target * log_label - rest * log_rest - entropy
    if reweight == "sample":
        return (divergence * confidence).mean()
    return divergence.mean() * (confidence.mean() if reweight else 1)


def cross_entropy(logits, labels, confidence=None) -> torch.Tensor:
    """Return the cross-entropy: under SoftCrop, the paper's hard crop."""
    return F.cross_entropy(logits.float(), labels)


def smooth_cross_entropy(logits, labels, confidence=None, *, smoothing: float) -> torch.Tensor:
    """Return the divergence from 1 - smoothing on the label and the rest on the other classes."""
    target = torch.full_like(labels, 1 - smoothing, dtype=torch.float32)
    return soft_target_loss(logits, labels, target, reweight=None)


def focal_loss(logits, labels, confidence=None, *, gamma: float = 2.0) -> torch.Tensor:
    """Return the mean of (1 - p)^gamma times the cross-entropy (Lin et al. 2017)."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    wrong = -torch.expm1(-losses).clamp(max=-1e-12)         # 1 - p; a power's gradient at 0: inf
    return (wrong ** gamma * losses).mean()


def mixup_loss(loss, logits, labels, p, perm, lam) -> torch.Tensor:
    """Return `loss`, one of this file, of a batch mixed by Mixup with partners perm (B,) and the
    first image's share lam: of both labels, each with its own confidence p."""
    perm = perm.to(logits.device, non_blocking=True)
    return lam * loss(logits, labels, p) + (1 - lam) * loss(logits, labels[perm], p[perm])
