"""The four heads measured and reported, and a batch's masks and mixtures to look at."""
import copy
import statistics

import torch
import torch.nn.functional as F

from common import distributed, evaluation, runtime
from common.data.recipe import mean_std
from samix.mixblock import mix

HEADS = {"one_k": ("k", "one"), "mix_k": ("k", "mix"), "one_q": ("q", "one"), "mix_q": ("q", "mix")}


def headline(net):
    """The network whose accuracy is the headline: branch k, or what a baseline trained."""
    return getattr(net, "k", net)


def measure(net, batches, args, info) -> dict:
    """`evaluation.measure` of each head, the headline's first (one_q alone of a baseline)."""
    if not hasattr(net, "k"):
        return {"one_q": evaluation.evaluate(net, batches, args, info)}

    def heads(images, labels):
        pooled = {branch: getattr(net, branch).pooled(images) for branch in "kq"}
        for branch, head in HEADS.values():
            yield getattr(getattr(net, branch), head)(pooled[branch])
    return evaluation.measure(net, batches, args, info, list(HEADS), heads)


@torch.no_grad()
def knn_accuracy(backbone, batches, num_classes: int, args, k: int = 20,
                 temperature: float = 0.07) -> float:
    """Share in % of images whose k nearest others, on this rank, vote for their label: neighbours
    by cosine of pooled features, weighed by exp(cosine / temperature) (Wu et al. 2018)."""
    training, found = backbone.training, []
    backbone.eval()
    for step, (images, labels) in enumerate(batches):
        if args.max_steps and step >= args.max_steps:
            break
        with runtime.autocast(args, images.device):
            found.append((F.normalize(backbone(images)[1].float()), labels))
    backbone.train(training)
    features, known = (torch.cat(part) for part in zip(*found, strict=True))
    index = torch.arange(len(known), device=known.device)
    right = torch.zeros((), dtype=torch.float64, device=known.device)
    for part in index.split(1024):
        cosines = (features[part] @ features.T).masked_fill(index == part[:, None], -torch.inf)
        cosines, nearest = cosines.topk(min(k, len(known)), 1)
        votes = torch.zeros(len(part), num_classes, device=known.device)
        votes.scatter_add_(1, known[nearest], (cosines / temperature).exp())
        right += (votes.argmax(1) == known[part]).sum()
    right, count = distributed.total(torch.stack([right, torch.full_like(right, len(known))]))
    return float(100 * right / count)


def warn_of_collapse(row: dict, run):
    """Warn when more than half of an epoch's pairs begin to show one image alone."""
    before = run.column("mask_alone")[-1:] or [0]
    if before[0] <= 0.5 < row["mask_alone"]:
        distributed.warn(f"the masks collapse: {100 * row['mask_alone']:.0f} % of the pairs show "
                         "one image alone (log.csv, mask_alone); try a lower --block_lr")


def report(run) -> str:
    """The headline, one head fixed in advance at the last epoch; then as the originals report."""
    heads = [name for name in HEADS if run.column(f"{name}_accuracy")]
    if not heads:
        return "no epoch was left to train"
    medians = {name: statistics.median(run.column(f"{name}_accuracy")[-10:]) for name in heads}
    best, values = max(heads, key=medians.get), run.column("test_accuracy")
    return (f"headline, {heads[0]} at the last epoch: {values[-1]:.2f} %; the best of {len(heads)} "
            f"heads by the median of the last {len(values[-10:])} epochs: {medians[best]:.2f} % "
            f"({best})")


@torch.no_grad()
def mixtures(net, images, second, perm, args, info) -> dict:
    """Rows of masks (white: the first image) and of mixtures, to draw: of images with second[perm],
    another view of them or themselves. Leaves the network alone."""
    # in training mode, but without dropout, nor SyncBatchNorm, which would wait for other ranks
    net, rows = copy.deepcopy(net).train(not getattr(args, "sync_bn", False)), {}
    net.block.value[-1].eval()
    mean, std = mean_std(info, images.device)
    with runtime.autocast(args, images.device):
        first, partners = (net.k.backbone(views)[0] for views in (images, second))
        for lam in torch.tensor([0.3, 0.5, 0.7]):
            mask = net.block(first, lam, perm, images.shape[-1] // first.shape[-1],
                             partners=partners, mode=getattr(args, "mode", [None])[0])
            rows[f"mask, λ {lam:.1f}"] = (mask[:, :1] - mean) / std
            rows[f"mixed, λ {lam:.1f}"] = mix(images, mask, perm, second)
    return rows
