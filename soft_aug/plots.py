"""Three pictures: softening curve, reliability diagram, accuracy over the visible fraction."""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from common.runlog import save_figure
from soft_aug.softcrop import confidence

BLUE, RED, GREY = "#2f6db3", "#d1495b", "#8a8a8a"


def _axes(title, xlabel, ylabel, xlim=(0, 1), ylim=(0, 1)):
    figure, axes = plt.subplots(figsize=(4.8, 4.0), layout="constrained")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=xlim, ylim=ylim)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def softening_curve(path, num_classes: int = 100, powers=(1, 2, 3, 4), max_p: float = 1.0):
    """Confidence in the label over the visible fraction, one line per power."""
    figure, axes = _axes("Confidence in the label of a crop", "visible fraction v",
                         "confidence p", ylim=(0, 1.02))
    visible = torch.linspace(0, 1, 201)
    for power, colour in zip(powers, plt.cm.viridis(torch.linspace(0.1, 0.85, len(powers))),
                             strict=True):
        curve = confidence(visible, num_classes, power=power, max_p=max_p)
        axes.plot(visible, curve, color=colour, linewidth=2, label=f"k = {power:g}")
    axes.axhline(1 / num_classes, color=GREY, linewidth=1, linestyle="--",
                 label=f"chance, 1/{num_classes}")
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def reliability_diagram(confidence, accuracy, count, path):
    """Accuracy per confidence bin against the diagonal, and how many predictions each bin holds.

    confidence, accuracy, count: sequences of one number a bin (equal bins over [0, 1]), as
    `common.metrics.reliability_bins` returns them. The expected calibration error stands in the
    title.
    """
    confidence, accuracy, count = (torch.as_tensor(values, dtype=torch.float64).cpu()
                                   for values in (confidence, accuracy, count))
    share = count / count.sum().clamp(min=1)
    error = float(((accuracy - confidence).abs() * share).sum())
    centres = (torch.arange(len(count)) + 0.5) / len(count)
    width = 0.94 / len(count)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(4.8, 5.4), sharex=True,
                                         height_ratios=(3.2, 1), layout="constrained")
    filled = count > 0
    top.bar(centres, accuracy, width, color=BLUE, label="accuracy")
    top.bar(centres[filled], (confidence - accuracy)[filled], width, bottom=accuracy[filled],
            color=RED, alpha=0.3)
    top.hlines(confidence[filled], centres[filled] - width / 2, centres[filled] + width / 2,
               color=RED, linewidth=2.5, label="mean confidence")
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
    top.set(title=f"Reliability, ECE {100 * error:.2f} %", ylabel="accuracy", xlim=(0, 1),
            ylim=(0, 1))
    top.legend(frameon=False, loc="upper left")
    bottom.bar(centres, 100 * share, width, color=GREY)
    bottom.set(xlabel="confidence", ylabel="predictions (%)")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def occlusion_curve(visible, accuracies: dict, path):
    """Accuracy in % over the visible fraction of the test images (the paper's occlusion test).

    visible: fractions in [0, 1]; accuracies: one sequence in % per name of a curve.
    """
    figure, axes = _axes("Accuracy under occlusion", "visible fraction of the image",
                         "top-1 accuracy (%)", ylim=(0, 100))
    for name, values in accuracies.items():
        axes.plot(visible, values, marker="o", markersize=4, linewidth=2, label=name,
                  clip_on=False)
    axes.invert_xaxis()
    if len(accuracies) > 1:
        axes.legend(frameon=False)
    save_figure(figure, path)
