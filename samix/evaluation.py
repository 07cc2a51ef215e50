"""The four heads measured and reported, and a batch's masks and mixtures to look at."""
import copy
import statistics

import torch
import torch.nn.functional as F

from common import distributed, evaluation, plots, runtime
from common.data.recipe import mean_std
from common.mixing import soft_targets
from samix.mixblock import draw_partners, mix, scale_of

HEADS = {"one_k": ("k", "one"), "mix_k": ("k", "mix"), "one_q": ("q", "one"), "mix_q": ("q", "mix")}


def measure(net, batches, args, info) -> dict:
    """Return `evaluation.measure` of each head, the headline's first (one_q of a baseline)."""
    if not hasattr(net, "k"):
        return {"one_q": evaluation.evaluate(net, batches, args, info)}

    def heads(images, labels):
        pooled = {"k": net.k.backbone(images)[1], "q": net.q.backbone(images)[1]}
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


def knn_accuracy(backbone, loader, num_classes: int, args) -> float:
    """Return the share in % of images whose 20 nearest others, on this rank, vote for their label:
    by cosine of pooled features, weighed by exp(cosine / 0.07) (Wu et al. 2018)."""
    features, known = pooled_features(backbone, loader, args)
    features, right = F.normalize(features), 0
    for index in torch.arange(len(known), device=known.device).split(1024):
        cosines = features[index] @ features.T
        cosines[torch.arange(len(index)), index] = -torch.inf                   # itself
        cosines, nearest = cosines.topk(min(20, len(known)), 1)
        votes = torch.zeros(len(index), num_classes, device=known.device)
        votes.scatter_add_(1, known[nearest], (cosines / 0.07).exp())
        right += (votes.argmax(1) == known[index]).sum()
    right, count = distributed.total(torch.stack([right, torch.full_like(right, len(known))]))
    return float(100 * right / count)


def warn_of_collapse(row: dict, run):
    """Warn when more than half of an epoch's pairs begin to show one image alone."""
    before = run.column("mask_alone")[-1:] or [0]
    if before[0] <= 0.5 < row.get("mask_alone", 0):
        distributed.warn(f"the masks collapse: {100 * row['mask_alone']:.0f} % of the pairs show "
                         "one image alone (log.csv, mask_alone); try a lower --block_lr")


def report(run) -> str:
    """Return the headline, one head fixed in advance at the last epoch, and the originals' way."""
    last = {name: run.column(f"{name}_accuracy")[-10:] for name in HEADS}
    medians = {name: statistics.median(values) for name, values in last.items() if values}
    if not medians:
        return "no epoch was evaluated on all test images"
    best = max(medians, key=medians.get)
    return (f"headline, one_k at the last epoch: {last['one_k'][-1]:.2f} %; the best of 4 heads by "
            f"the median of the last {len(last['one_k'])} epochs: {medians[best]:.2f} % ({best})")


@torch.no_grad()
def draw_mixtures(path, title, views: dict, net, labels, args, info, trained):
    """Draw `views` of a batch (one, or two by whose second the partners are), masks (white: the
    first image) and mixtures at three lambdas; return the path."""
    images, second = list(views.values())[0], list(views.values())[-1]
    perm = draw_partners(len(images), distributed.step_generator(args.seed, 0, 0), True)
    rows = views | {"partner": second[perm]}
    net = copy.deepcopy(net).train()                # as in a step, but without dropout
    net.block.value[-1].eval()
    mean, std = mean_std(info, images.device)
    with runtime.autocast(args, images.device):
        first, partners = (net.k.backbone(view)[0] for view in (images, second))
        for lam in torch.tensor([0.3, 0.5, 0.7]):
            mask = net.block(first, lam, perm, scale_of(images, first), partners=partners,
                             mode=getattr(args, "mode", [None])[0])
            shown = mask[:, :1, :images.shape[2], :images.shape[3]]
            rows[f"mask, λ {lam:.1f}"] = (shown - mean) / std
            rows[f"mixed, λ {lam:.1f}"] = mix(images, mask, perm, second)
    return plots.preview(path, title + (": the MixBlock before training" if not trained else ""),
                         rows, soft_targets(labels, perm, lam, info.num_classes), info)
