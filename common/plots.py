"""Atomic files, colours, curves, and the grid of a preview."""
import contextlib
import os
from pathlib import Path

import torch

from common.data.recipe import to_arrays
from common.errors import RunError

# One colour a curve, in fixed order; readable for the colour-blind, on white.
BLUE, ORANGE, GREEN = "#2a78d6", "#c4570a", "#1a7f4b"
INK, GRID, MUTED = "#3d3d3a", "#e4e3de", "#75746e"


@contextlib.contextmanager
def whole(path: Path):
    """Yield a temporary path; rename it to `path` on success.

    Raises RunError naming the file that could not be written, or `path` where it is a folder, a
    device or anything else but a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise RunError(f"{path} is no regular file: it stays as it is")
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)
    except OSError as fault:
        new.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {fault.strerror}") from None


def write_atomic(path: Path, text: str):
    """Writes a text file that is whole at every moment. Raises RunError naming the file."""
    with whole(path) as new:
        new.write_text(text)


def new_figure(**options):
    """Return an empty matplotlib Figure in whose texts a $ is a $."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams["text.parse_math"] = False
    return Figure(layout="constrained", **options)


def save_figure(figure, path: Path):
    """Write a figure atomically, in the format that the suffix names; "?" for what is not UTF-8."""
    for text in figure.findobj(lambda part: hasattr(part, "set_text")):
        if (words := text.get_text()) and not words.isascii():
            text.set_text(words.encode(errors="replace").decode())
    with whole(path) as new:
        figure.savefig(new, dpi=130, format=Path(path).suffix[1:].lower())


def curves(path: Path, title: str, history: list[dict]) -> Path:
    """Draw loss and accuracy of training, validation and test over the epochs of `history`."""
    figure = new_figure(figsize=(9, 3.4))
    axes = figure.subplots(1, 2)
    for axis, what, heading in (
            (axes[0], "loss", "loss (training: the method's own)"),
            (axes[1], "accuracy", "accuracy, % (training: on mixed images)")):
        for part, colour in (("train", ORANGE), ("valid", GREEN), ("test", BLUE)):
            name = f"{part}_{what}"
            points = [(row["epoch"] + 1, row[name]) for row in history if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=part,
                          marker="o" if len(points) < 3 else None, markersize=4)
        axis.set_title(heading, loc="left", fontsize=10, color=INK)
        axis.set_xlabel("epoch", color=INK)
        axis.grid(color=GRID, linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    save_figure(figure, path)
    return path


def shares(target: torch.Tensor, classes: list[str], most: int = 3) -> str:
    """'cat 63 %\\ndog 37 %' of one soft target (num_classes,); of digits '4: 63 %'."""
    values, index = target.float().cpu().topk(min(most, len(target)))
    names = [classes[i][:16] + ":" * classes[i][-1:].isdigit() for i in index.tolist()]
    return "\n".join(f"{name} {100 * v:.0f} %" for v, name in
                     zip(values.tolist(), names, strict=True) if v >= 0.005)


def most_mixed(targets: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """Return the indices of those targets (B, num_classes) whose largest share is nearest 1/2."""
    distance = (targets.float().amax(1) - 0.5).abs()
    return distance.argsort(stable=True)[:columns].sort().values


def preview(path, title: str, rows: dict, targets: torch.Tensor, info) -> Path:
    """Writes a PNG with one row of pictures per entry of `rows` and label shares below the last.

    Of a larger batch it shows the eight images whose labels are mixed most.

    rows: name -> images (B, 3, H, W), normalised, or maps (B, H, W) drawn in grey from their own
    minimum to their maximum, or None; targets (B, num_classes) belong to the last row. info: Info
    of the data set (mean, std, class names).
    """
    chosen, pictures = most_mixed(targets), {}
    for name, batch in rows.items():
        if batch is None:
            continue
        batch = batch[chosen.to(batch.device)].float()
        pictures[name] = to_arrays(batch, info) if batch.ndim == 4 else batch.cpu().numpy()
    return grid(path, title, pictures,
                [shares(target, info.classes) for target in targets[chosen]])


def grid(path, title: str, rows: dict, captions: list[str] | dict, side: float = 1.25) -> Path:
    """Writes a PNG with one row of pictures per entry of `rows`: name -> arrays (H, W[, 3]).

    captions: below the pictures of the last row, or name -> captions of that row; side: of a
    picture, in inches.
    """
    captions = captions if isinstance(captions, dict) else {list(rows)[-1]: captions}
    columns = min(len(pictures) for pictures in rows.values())
    figure = new_figure(figsize=(side * columns + 0.3, 1.06 * side * len(rows) + 0.75))
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
