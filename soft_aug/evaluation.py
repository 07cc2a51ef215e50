"""What Soft Augmentation's runs leave besides: the softening curve, TensorBoard's tags."""
from pathlib import Path

import torch

from common import plots
from soft_aug.softcrop import confidence


def draw_softening(path: Path, args, num_classes: int) -> Path:
    """Write a PNG of the confidence in the label of a SoftCrop over its visible fraction."""
    visible = torch.linspace(0, 1, 101)
    softened = confidence(visible, num_classes, power=args.pcrop, max_p=args.max_p)
    figure = plots.new_figure(4.8, 4.0)
    axes = figure.subplots()
    axes.plot(visible, softened, color=plots.BLUE, linewidth=2, label=f"k = {args.pcrop:g}")
    axes.axhline(1 / num_classes, color=plots.MUTED, linewidth=1, linestyle="--", label="chance")
    plots.frame(axes, title="Confidence in the label of a crop", ylabel="confidence",
                xlabel="visible fraction of the image", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    plots.save_figure(figure, path)
    return path


def write_events(run):
    """Write the newest row under the tags of the paper's program, for TensorBoard."""
    row = run.history[-1]
    tags = {"learning/lr": row["lr"], "Train/loss": row["train_loss"]}
    if "test_loss" in row:
        tags |= {"Test/Average loss": row["test_loss"], "Test/Accuracy": row["test_accuracy"],
                 "Test/ECE": row["test_ece"]}
        for part in ("Test", "Train"):
            tags[f"{part}/Best Average loss"] = min(run.column(f"{part.lower()}_loss"))
            tags[f"{part}/Best Accuracy"] = max(run.column(f"{part.lower()}_accuracy"))
    for tag, value in tags.items():
        run.events.add_scalar(tag, value, row["epoch"] + 1)
