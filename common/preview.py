"""The picture of a mixed batch: first images, partners, mixed images, shares of their labels."""
from pathlib import Path

import torch

from common.data.batches import to_arrays
from common.runlog import INK, save_figure

MUTED = "#75746e"


def shares(target: torch.Tensor, classes: list[str], most: int = 3) -> str:
    """'63 % cat\\n37 % dog' of one soft target (num_classes,)."""
    values, index = target.float().cpu().topk(min(most, len(target)))
    return "\n".join(f"{100 * v:.0f} % {classes[i][:16]}" for v, i in
                     zip(values.tolist(), index.tolist(), strict=True) if v >= 0.005)


def draw(path, title: str, rows: dict, targets: torch.Tensor, info, columns: int = 8) -> Path:
    """Writes a PNG with one row of pictures per entry of `rows` and label shares below the last.

    rows: name -> images (B, 3, H, W), normalised, or maps (B, H, W) drawn in grey from their own
    minimum to their maximum; targets (B, num_classes) belong to the last row. info: Info of the
    data set (mean, std, class names).
    """
    columns = min(columns, len(targets))
    pictures = {}
    for name, batch in rows.items():
        batch = batch[:columns].float()
        pictures[name] = to_arrays(batch, info) if batch.ndim == 4 else batch.cpu().numpy()
    return grid(path, title, pictures,
                [shares(target, info.classes) for target in targets[:columns]])


def grid(path, title: str, rows: dict, captions: list[str] | dict, side: float = 1.25) -> Path:
    """Writes a PNG with one row of pictures per entry of `rows`: name -> arrays (H, W[, 3]).

    captions: below the pictures of the last row, or name -> captions of that row; side: of a
    picture, in inches.
    """
    from matplotlib.figure import Figure
    captions = captions if isinstance(captions, dict) else {list(rows)[-1]: captions}
    columns = min(len(pictures) for pictures in rows.values())
    figure = Figure(figsize=(side * columns + 0.3, 1.06 * side * len(rows) + 0.75),
                    layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture, number in zip(line, pictures, range(columns), strict=False):
            axis.imshow(picture, cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if name in captions:
                axis.set_xlabel(captions[name][number], fontsize=7, color=MUTED)
        line[0].set_ylabel(name, fontsize=9, color=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    save_figure(figure, path)
    return Path(path)
