"""What Soft Augmentation's runs find out: accuracy, calibration, occlusion; TensorBoard's tags."""
import math
from pathlib import Path

import torch

from common import distributed, metrics
from common.distributed import log
from common.plots import write_atomic
from soft_aug import plots
from soft_aug.softcrop import confidence, soft_crop

OCCLUDED = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)      # offsets of the test crops, of the side


class KnownClasses(torch.nn.Module):
    """The logits of the data's own classes: without --other's."""

    def __init__(self, net, num_classes: int):
        super().__init__()
        self.net, self.num_classes = net, num_classes
        self.training = net.training

    def forward(self, images):
        return self.net(images)[:, :self.num_classes]


def measure(net, batches, args, info, attack=None) -> dict:
    """Loss, top1, top5 (%), count; ece, a fraction, and its bins: confidence, accuracy, count."""
    result = metrics.evaluate(KnownClasses(net, info.num_classes), batches, args,
                              attack=attack, keep_logits=True)
    *means, count = metrics.reliability_bins(result.pop("logits"), result.pop("labels"))
    sums = distributed.total(torch.stack([*(mean * count for mean in means), count])).cpu()
    sure, right, count = *(sums[:2] / sums[2].clamp(min=1)), sums[2]
    error = float(((right - sure).abs() * count).sum() / count.sum())
    return result | {"ece": error, "bins": (sure, right, count)}


def occlude(offset: int):
    """Slides test images by `offset` pixels along both axes, each way; outside: the mean colour."""
    generator = torch.Generator().manual_seed(distributed.seed_of("occlusion", distributed.rank()))

    def attack(images, labels):
        signs = 2 * torch.randint(2, (len(images), 2), generator=generator) - 1
        return soft_crop(images, offset * signs, torch.zeros(len(images), 3))[0]
    return attack


def write_csv(path: Path, columns: dict):
    """Equally long columns of numbers by name."""
    lines = [",".join(f"{float(value):.6g}" for value in row)
             for row in zip(*columns.values(), strict=True)]
    write_atomic(path, "\n".join([",".join(columns), *lines]) + "\n")


def evaluate(net, test, args, info, folder: Path | None, prefix: str = ""):
    """Accuracy, loss and calibration on the test images, whole and occluded; says and draws them.

    Writes <prefix>reliability, occlusion and, of SoftCrop, softening (.png and .csv) into `folder`.
    """
    rows = []
    for hidden in OCCLUDED:
        offset = round(hidden * info.image_size)
        visible = math.prod(max(0, 1 - offset / side) for side in (info.image_size, info.width))
        result = measure(net, test, args, info, occlude(offset))
        rows.append({"offset": offset, "visible": visible, "accuracy": result["top1"],
                     "loss": result["loss"], "ece": result["ece"]})
        if not rows[1:]:
            bins = result["bins"]
            log(f"test: accuracy {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
                        f"loss {result['loss']:.4f}, ECE {result['ece']:.4f} "
                        f"({100 * result['ece']:.2f} %) on {result['count']} images")
        else:
            log(f"{100 * visible:.0f} % visible (offset {offset} pixels): accuracy "
                        f"{result['top1']:.2f} %, loss {result['loss']:.4f}, "
                        f"ECE {100 * result['ece']:.2f} %")
    if not folder:
        return
    edges = torch.linspace(0, 1, len(bins[0]) + 1)
    write_csv(folder / f"{prefix}reliability.csv", dict(zip(
        ("above", "up_to", "confidence", "accuracy", "count"), (edges[:-1], edges[1:], *bins),
        strict=True)))
    plots.reliability_diagram(folder / f"{prefix}reliability.png", *bins, rows[0]["ece"])
    occlusion = {name: [row[name] for row in rows] for name in rows[0]}
    write_csv(folder / f"{prefix}occlusion.csv", occlusion)
    plots.curve(folder / f"{prefix}occlusion.png", "Accuracy under occlusion", "top-1 accuracy, %",
                occlusion["visible"], {"test": occlusion["accuracy"]}, top=100)
    if args.da == 2:
        visible = torch.linspace(0, 1, 101)
        sure = confidence(visible, info.num_classes, power=args.pcrop, max_p=args.max_p)
        write_csv(folder / f"{prefix}softening.csv", {"visible": visible, "confidence": sure})
        plots.curve(folder / f"{prefix}softening.png", "Confidence in the label of a crop",
                    "confidence", visible, {f"k = {args.pcrop:g}": sure}, top=1,
                    chance=1 / info.num_classes)
    log(f"calibration and occlusion: {folder}/{prefix}*.png, *.csv")


def write_events(run):
    """The newest row under the tags of the paper's program, for TensorBoard."""
    if not run.events:
        return
    row = run.history[-1]
    tags = {"learning/lr": row["lr"], "Train/loss": row["train_loss"]}
    if "test_loss" in row:
        tags |= {"Test/Average loss": row["test_loss"], "Test/Accuracy": row["test_accuracy"],
                 "Test/ECE": row["test_ece"]}
        for part in ("Test", "Train"):
            tags[f"{part}/Best Average loss"] = min(run.column(f"{part.lower()}_loss"))
            tags[f"{part}/Best Accuracy"] = max(run.column(f"{part.lower()}_accuracy"))
    for tag, value in tags.items():
        run.events.add_scalar(tag, value, row["epoch"])
    run.events.flush()
