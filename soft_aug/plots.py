"""Pictures: reliability diagram, and curves over the visible fraction of an image."""
import torch
from matplotlib.figure import Figure

from common.plots import BLUE, GRID, save_figure

RED, GREY = "#d1495b", "#8a8a8a"


def curve(path, title: str, ylabel: str, visible, values: dict, *, top: float,
          chance: float | None = None):
    """Values from 0 to `top` by name, one line each, over visible fractions in [0, 1]; `chance`:
    a level to compare with."""
    figure = Figure(figsize=(4.8, 4.0), layout="constrained")
    axes = figure.subplots()
    for (name, line), colour in zip(values.items(), (BLUE, RED, GREY, "#1a7f4b"), strict=False):
        axes.plot(visible, line, color=colour, linewidth=2, label=name, clip_on=False,
                  marker="o" if len(visible) < 20 else None, markersize=4)
    if chance is not None:
        axes.axhline(chance, color=GREY, linewidth=1, linestyle="--", label="chance")
    axes.set(title=title, xlabel="visible fraction of the image", ylabel=ylabel, xlim=(0, 1),
             ylim=(0, top))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def reliability_diagram(path, confidence, accuracy, count, error: float):
    """Accuracy per confidence bin against the diagonal, and how many predictions each bin holds.

    confidence, accuracy, count: tensors of one number a bin (equal bins over [0, 1]), as
    `common.metrics.reliability_bins` returns them; error: their calibration error, a fraction.
    """
    share = count / count.sum().clamp(min=1)
    centres = (torch.arange(len(count)) + 0.5) / len(count)
    width = 0.94 / len(count)
    figure = Figure(figsize=(4.8, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    filled = count > 0
    upper.bar(centres, accuracy, width, color=BLUE, label="accuracy")
    upper.bar(centres[filled], (confidence - accuracy)[filled], width, bottom=accuracy[filled],
              color=RED, alpha=0.3)
    upper.hlines(confidence[filled], centres[filled] - width / 2, centres[filled] + width / 2,
                 color=RED, linewidth=2.5, label="mean confidence")
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
    upper.set(title=f"Reliability, ECE {100 * error:.2f} %", ylabel="accuracy", xlim=(0, 1),
              ylim=(0, 1))
    upper.legend(frameon=False, loc="upper left")
    lower.bar(centres, 100 * share, width, color=GREY)
    lower.set(xlabel="confidence", ylabel="predictions (%)")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
