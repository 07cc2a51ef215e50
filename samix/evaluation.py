"""The four heads measured and reported, and a batch's masks and mixtures to look at."""
import copy
import statistics

import torch
import torch.nn.functional as F

from common import distributed, evaluation, plots, runtime
from common.data.recipe import mean_std
from common.mixing import soft_targets
from samix.mixblock import draw_partners, mix

HEADS = {"one_k": ("k", "one"), "mix_k": ("k", "mix"), "one_q": ("q", "one"), "mix_q": ("q", "mix")}


def measure(net, batches, args, info) -> dict:
    """Return `evaluation.measure` of each head, the headline's first (one_q of a baseline)."""
    if not hasattr(net, "k"):
        return {"one_q": evaluation.evaluate(net, batches, args, info)}

    def heads(images, labels):
        pooled = {branch: getattr(net, branch).pooled(images) for branch in "kq"}
        for branch, head in HEADS.values():
            yield getattr(getattr(net, branch), head)(pooled[branch])
    return evaluation.measure(net, batches, args, info, list(HEADS), heads)


@torch.no_grad()
def pooled_features(backbone, loader, args) -> tuple:
    """Return pooled features (N, width), float32, and labels of this rank's images."""
    backbone.eval()
    found = []
    for images, labels in evaluation.batches(loader, args):
        with runtime.autocast(args, images.device):
            found.append((backbone(images)[1].float(), labels))
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def knn_accuracy(backbone, loader, num_classes: int, args, k: int = 20, temperature: float = 0.07
                 ) -> float:
    """Return the share in % of images whose k nearest others, on this rank, vote for their label:
    by cosine of pooled features, weighed by exp(cosine / temperature) (Wu et al. 2018)."""
    training = backbone.training
    features, known = pooled_features(backbone, loader, args)
    backbone.train(training)
    features, right = F.normalize(features), 0
    for index in torch.arange(len(known), device=known.device).split(1024):
        cosines = features[index] @ features.T
        cosines[torch.arange(len(index)), index] = -torch.inf                   # itself
        cosines, nearest = cosines.topk(min(k, len(known)), 1)
        votes = torch.zeros(len(index), num_classes, device=known.device)
        votes.scatter_add_(1, known[nearest], (cosines / temperature).exp())
        right += (votes.argmax(1) == known[index]).sum()
    right, count = distributed.total(torch.stack([right, torch.full_like(right, len(known))]))
    return float(100 * right / count)


def warn_of_collapse(row: dict, run):
    """Warn when more than half of an epoch's pairs begin to show one image alone."""
    before = run.column("mask_alone")[-1:] or [0]
    if before[0] <= 0.5 < row["mask_alone"]:
        distributed.warn(f"the masks collapse: {100 * row['mask_alone']:.0f} % of the pairs show "
                         "one image alone (log.csv, mask_alone); try a lower --block_lr")


def report(run) -> str:
    """Return the headline, one head fixed in advance at the last epoch, and the originals' way."""
    last = {name: run.column(f"{name}_accuracy")[-10:] for name in HEADS}
    medians = {name: statistics.median(values) for name, values in last.items() if values}
    best = max(medians, key=medians.get)
    return (f"headline, one_k at the last epoch: {last['one_k'][-1]:.2f} %; the best of 4 heads by "
            f"the median of the last {len(last['one_k'])} epochs: {medians[best]:.2f} % ({best})")


@torch.no_grad()
def draw_mixtures(path, title, rows, net, images, second, labels, args, info, trained):
    """Draw `rows`, then masks (white: the first image) and mixtures at three lambdas, of images
    with partners of `second`, another view of them or themselves; return the path."""
    perm = draw_partners(len(images), distributed.step_generator(args.seed, 0, 0), True)
    rows = rows | {"partner": second[perm]}
    net = copy.deepcopy(net).train()                # as in a step, but without dropout
    net.block.value[-1].eval()
    mean, std = mean_std(info, images.device)
    with runtime.autocast(args, images.device):
        first, partners = (net.k.backbone(views)[0] for views in (images, second))
        for lam in torch.tensor([0.3, 0.5, 0.7]):
            mask = net.block(first, lam, perm, images.shape[-1] // first.shape[-1],
                             partners=partners, mode=getattr(args, "mode", [None])[0])
            rows[f"mask, λ {lam:.1f}"] = (mask[:, :1] - mean) / std
            rows[f"mixed, λ {lam:.1f}"] = mix(images, mask, perm, second)
    return plots.preview(path, title + (": the MixBlock before training" if not trained else ""),
                         rows, soft_targets(labels, perm, lam, info.num_classes), info)
