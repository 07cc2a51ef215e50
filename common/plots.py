"""Figures, colours, curves, and the grid of a preview."""
from pathlib import Path

import torch

from common.data.recipe import to_uint8
from common.files import whole

# One colour a curve, in fixed order; readable for the colour-blind, on white.
BLUE, ORANGE, GREEN = "#2a78d6", "#c4570a", "#1a7f4b"
INK, GRID, MUTED = "#3d3d3a", "#e4e3de", "#75746e"


def new_figure(width: float, height: float, title: str = ""):
    """Return an empty matplotlib Figure in whose texts a $ is a $."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    return figure


def frame(axis, **labels):
    """Label an axis, and draw its grid behind the curves."""
    axis.set(**labels)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure, path: Path):
    """Write a figure atomically, in the format that the suffix names."""
    with whole(path) as new:
        figure.savefig(new, dpi=130, format=Path(path).suffix[1:].lower())


def curves(path: Path, title: str, history: list[dict]):
    """Draw loss and accuracy of training, validation and test over the epochs of `history`."""
    figure = new_figure(9, 3.4, title)
    for axis, what, heading in zip(figure.subplots(1, 2), ("loss", "accuracy"), (
            "loss (training: the method's own)", "accuracy, % (training: on mixed images)"),
            strict=True):
        for part, colour in (("train", ORANGE), ("valid", GREEN), ("test", BLUE)):
            name = f"{part}_{what}"
            points = {row["epoch"] + 1: row[name] for row in history if name in row}
            if points:
                axis.plot(list(points), list(points.values()), color=colour, linewidth=1.8,
                          label=part, marker="o" if len(points) < 3 else None, markersize=4)
        frame(axis, xlabel="epoch", title=heading)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def shares(target: torch.Tensor, classes: list[str]) -> str:
    """Return 'cat 63 %\\ndog 37 %' of one soft target (num_classes,); of digits '4: 63 %'."""
    most = target.float().cpu().topk(min(3, len(target)))
    names = [classes[i] if len(classes[i]) < 15 else f"{classes[i][:13].rstrip()}…"
             for i in most.indices]
    return "\n".join(f"{name}{':' * name[-1:].isdigit()} {100 * value:.0f} %" for name, value in
                     zip(names, most.values, strict=True) if value >= 0.005)


def preview(path, title: str, rows: dict, targets: torch.Tensor, info) -> Path:
    """Write a picture of a batch's eight images that are mixed most, with label shares below.
    rows: name -> images (B, 3, H, W), normalised, or maps (B, H, W) drawn in grey from their own
    minimum to their maximum, or None; targets (B, num_classes) belong to the last row."""
    distance, pictures = (targets.float().amax(1) - 0.5).abs(), {}
    chosen = distance.argsort(stable=True)[:8].sort().values
    for name, batch in rows.items():
        if batch is not None:
            batch = batch[chosen.to(batch.device)].float()
            batch = to_uint8(batch, info).permute(0, 2, 3, 1) if batch.ndim == 4 else batch
            pictures[name] = batch.cpu().numpy()
    return grid(path, title, pictures, [shares(target, info.classes) for target in targets[chosen]])


def grid(path, title: str, rows: dict, captions: list[str], side: float = 1.25) -> Path:
    """Write `rows`, name -> arrays (H, W[, 3]) of `side` inches, with captions below the last."""
    columns = min(map(len, rows.values()))
    figure = new_figure(side * columns + 0.3, 1.06 * side * len(rows) + 0.75, title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture, cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=9, color=INK)
    for axis, caption in zip(axes[-1], captions, strict=False):
        axis.set_xlabel(caption, fontsize=7, color=MUTED)
    save_figure(figure, path)
    return Path(path)
