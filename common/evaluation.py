"""Every network judged alike: accuracy, calibration, occlusion, FGSM, corruptions."""
import itertools
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import corruptions, distributed, files, gradcam, plots, runtime
from common.data.recipe import mean_std, unnormalise
from common.distributed import log
from common.errors import RunError

BINS = 10                                           # of confidence
OCCLUDED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)      # shifts of test images, of the side
FGSM = (4, 8)                                       # steps in 1/255


def bin_sums(logits: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """Return (3, bins) float64 sums of logits (N, C): confidence, hits, count of each bin; bin i
    holds confidences in (i/bins, (i+1)/bins] (Guo et al. 2017, section 2)."""
    confidence, predicted = logits.float().softmax(1).double().max(1)
    edges = torch.linspace(0, 1, bins + 1, device=logits.device, dtype=torch.float64)
    index = torch.bucketize(confidence, edges[1:-1])
    values = torch.stack([confidence, (predicted == labels).double(), torch.ones_like(confidence)])
    return values.new_zeros(3, bins).index_add_(1, index, values)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the ECE in [0, 1] of logits (N, C) and labels (N,)."""
    confidence, hits, _ = bin_sums(logits, labels, bins)
    return (hits - confidence).abs().sum().item() / len(labels)


def tally(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (2 + 3 * BINS,) float64 sums of logits (B, C): loss, top-5 hits, `bin_sums`."""
    logits = logits.float()
    top5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).sum()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.cat([loss[None], top5[None], bin_sums(logits, labels).flatten()])


def averages(sums: Tensor) -> dict:
    """Return loss, top1 and top5 in %, ece in [0, 1], count and `bin_sums` of summed tallies."""
    bins, count = sums[2:].view(3, BINS), int(sums[-BINS:].sum())
    gap = (bins[1] - bins[0]).abs().sum()
    means = torch.stack([*sums[:2], bins[1].sum(), gap]) / max(count, 1)
    loss, top5, top1, ece = means.tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5, "ece": ece, "count": count,
            "bins": bins}


def batches(loader, args):
    """Return the (images, labels) of an evaluation, at most --max_steps, behind a progress bar."""
    steps = min(args.max_steps or len(loader), len(loader))
    return distributed.progress(itertools.islice(loader, steps), steps, "evaluating")


@torch.no_grad()
def measure(net, loader, args, info, names: list[str], outputs) -> dict:
    """Return {name: `averages`} over all ranks; outputs(images, labels) yields logits (B, C) for
    each of `names`, of which columns beyond the data's classes are left out."""
    device, training = next(net.parameters()).device, net.training
    sums = torch.zeros(len(names), 2 + 3 * BINS, dtype=torch.float64, device=device)
    net.eval()
    for images, labels in batches(loader, args):
        with runtime.autocast(args, device):
            for total, logits in zip(sums, outputs(images, labels), strict=True):
                total += tally(logits[:, :info.num_classes], labels)
    net.train(training)
    return dict(zip(names, map(averages, distributed.total(sums).cpu()), strict=True))


def evaluate(net, loader, args, info) -> dict:
    """Return `averages` of net (images -> logits) on all images, each counted once over ranks."""
    return measure(net, loader, args, info, [""], lambda images, _: [net(images)])[""]


def sentence(result: dict) -> str:
    """Return what `evaluate` found, in words."""
    return (f"accuracy {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss "
            f"{result['loss']:.4f}, ECE {100 * result['ece']:.2f} % on {result['count']} images")


def columns(result: dict, part: str = "test") -> dict:
    """Return what `evaluate` found, by the names of log.csv's columns."""
    return {f"{part}_loss": result["loss"], f"{part}_accuracy": result["top1"],
            f"{part}_top5": result["top5"], f"{part}_ece": result["ece"]}


def occlude(images: Tensor, offset: int, info) -> Tensor:
    """Return images (B, 3, H, W) moved by `offset` > 0 pixels along both axes, into mean colour
    (mid-grey if not normalised); an image's directions depend on its pixels alone."""
    number = (unnormalise(images, info) * 255).round().sum((1, 2, 3), dtype=torch.float64).long()
    padded = F.pad(images, (offset,) * 4, value=0.0 if any(info.mean) else 0.5)
    windows = padded.unfold(2, images.shape[2], 2 * offset).unfold(
        3, images.shape[3], 2 * offset).permute(0, 2, 3, 1, 4, 5)
    return windows[torch.arange(len(images), device=images.device), number % 2, number // 2 % 2]


def conditions(net, info) -> tuple[list[str], object]:
    """Return names of clean, occluded and attacked images, and `measure`'s outputs for them."""
    offsets = sorted({round(part * info.image_size) for part in OCCLUDED
                      if part * info.image_size < info.width} - {0})
    visible = [math.prod(max(0, 1 - offset / side) for side in (info.image_size, info.width))
               for offset in offsets]

    def outputs(images, labels):
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():           # clean logits and the attack's gradient in one pass
            logits = net(leaf)
            known = logits[:, :info.num_classes].detach().float()
            grad = known.softmax(1) - F.one_hot(labels, info.num_classes)
            # of the cross-entropy; its sign survives any scale, so none underflows in fp16
            grad /= grad.abs().amax(1, keepdim=True).clamp(min=1e-30)
            grad = F.pad(grad, (0, logits.shape[1] - info.num_classes)).to(logits.dtype)
            grad, = torch.autograd.grad(logits, leaf, grad)
        yield known
        for offset in offsets:
            yield net(occlude(images, offset, info))
        mean, std = mean_std(info, images.device)
        for step in FGSM:                   # in pixels of [0, 1], and clipped there
            yield net(torch.clamp(images + step / 255 / std * grad.sign(), -mean / std,
                                  (1 - mean) / std))

    return ["clean", *(f"visible {100 * part:.0f} %" for part in visible),
            *(f"fgsm {step}/255" for step in FGSM)], outputs


def report(net, test, args, info, run, checkpoint: Path | None = None):
    """Log what net (images -> logits) does on clean, occluded, attacked and --corruptions images;
    write evaluation.csv and .png into the run's folder, or beside --evaluate's `checkpoint`."""
    if args.cam:
        return gradcam.draw(args.cam, net, test, args, info)
    results = measure(net, test, args, info, *conditions(net, info))
    if args.corruptions:
        device = next(net.parameters()).device
        for name, loader in corruptions.read(args.corruptions, info, args.batch_size, device):
            results[name] = evaluate(net, loader, args, info)
    bad = [name for name, result in results.items() if not math.isfinite(result["loss"])]
    if bad:
        raise RunError(f"the network's outputs are not finite ({', '.join(bad[:3])}); another "
                       "checkpoint may be sound")
    lines = ["condition,accuracy,top5,loss,ece,count"]
    for name, result in results.items():
        log(f"{name}: {sentence(result)}")
        lines.append("{},{top1:.6g},{top5:.6g},{loss:.6g},{ece:.6g},{count}".format(name, **result))
    errors = [100 - result["top1"] for name, result in results.items() if corruptions.kind(name)]
    if errors:
        log(f"mean corruption error: {statistics.mean(errors):.2f} % over {len(errors) // 5} "
            "corruptions of 5 severities")
    if run.writes:
        path = checkpoint.with_name(f"{checkpoint.stem}_evaluation.csv") if checkpoint else \
            run.folder / "evaluation.csv"
        files.write_atomic(path, "\n".join(lines) + "\n")
        draw(path.with_suffix(".png"), path.parent.name, results)
        log(f"evaluation: {path}, {path.with_suffix('.png').name}")


def draw(path: Path, title: str, results: dict):
    """Draw reliability, accuracy over visible fraction, and accuracy under other conditions."""
    bars, seen = {}, {100: results["clean"]["top1"]}
    for name, result in results.items():
        if name.startswith("visible"):
            seen[float(name.split()[1])] = result["top1"]
        else:                                       # of a corruption: the mean over severities
            bars.setdefault(corruptions.kind(name) or name, []).append(result["top1"])
    figure = plots.new_figure(13, 4 + 0.18 * max(0, len(bars) - 8), title)
    left, middle, right = figure.subplots(1, 3)

    _, hits, count = results["clean"]["bins"]
    centres = (torch.arange(BINS) + 0.5) / BINS
    left.bar(centres, count / count.sum(), 0.94 / BINS, color=plots.GRID, label="share of images")
    left.bar(centres, hits / count.clamp(min=1), 0.6 / BINS, color=plots.BLUE, label="accuracy")
    left.plot([0, 1], [0, 1], color=plots.MUTED, linestyle="--", linewidth=1)
    left.legend(framealpha=0.9, edgecolor="none", loc="upper left", fontsize=9)
    plots.frame(left, title=f"Reliability, ECE {100 * results['clean']['ece']:.2f} %",
                xlabel="confidence", xlim=(0, 1), ylim=(0, 1))

    middle.plot(list(seen), list(seen.values()), "o-", color=plots.BLUE, clip_on=False)
    plots.frame(middle, title="Occlusion", xlabel="visible fraction of the image, %",
                ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100))

    drawn = right.barh(list(bars), list(map(statistics.mean, bars.values())), height=0.7,
                       color=[plots.MUTED, *[plots.BLUE] * (len(bars) - 1)])
    right.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8, color=plots.INK)
    right.invert_yaxis()
    title = "Attacks" + " and corruptions" * any(map(corruptions.kind, results))
    plots.frame(right, title=title, xlabel="accuracy, %", xlim=(0, 108))
    plots.save_figure(figure, path)
