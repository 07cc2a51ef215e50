"""The run folder: args.json, log.csv, curves.png, TensorBoard events, and the progress bar."""
import contextlib
import csv
import fcntl
import io
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from tqdm import tqdm

from common import runtime
from common.runtime import RunError

# One colour a curve, in fixed order; readable for the colour-blind, on white.
BLUE, ORANGE, GREEN, INK, GRID = "#2a78d6", "#c4570a", "#1a7f4b", "#3d3d3a", "#e4e3de"


def write_atomic(path: Path, text: str):
    """Writes a text file that is whole at every moment. Raises RunError naming the file."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text)
        os.replace(new, path)
    except OSError as fault:
        raise RunError(f"{path} could not be written: {fault.strerror}") from None


def commit() -> str:
    """The project's git commit, with '+' when files differ from it; '' outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout

    with contextlib.suppress(OSError):
        head = git("rev-parse", "--short", "HEAD").strip()
        return head + ("+" if head and git("status", "--porcelain", "-uno") else "")
    return ""


class RunLog:
    """Rows of one run, a dict an epoch, kept in its folder.

    folder: None for a run that writes nothing (--log_off, ranks other than 0). Raises RunError
    when the folder is not writable or another running process holds it.
    """

    def __init__(self, folder: Path | None, args, device, history=()):
        self.folder, self.history, self.events = folder, list(history), None
        if not folder:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "w")         # held until the process ends
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another run is writing there; choose another --root_dir "
                           "or wait for its end") from None
        except OSError as fault:
            raise RunError(f"{folder} cannot be written: {fault.strerror}") from None
        self.facts = {
            "command": " ".join([Path(sys.executable).name, *sys.argv]), "args": vars(args),
            "device": str(device), "processes": runtime.world(), "commit": commit(),
            "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "threads": torch.get_num_threads()}

    def start(self, **facts):
        """Writes args.json: flags, versions, commit, device, and what else is known by now."""
        if not self.folder:
            return
        write_atomic(self.folder / "args.json",
                     json.dumps(self.facts | facts, indent=1, default=str) + "\n")
        if self.facts["args"].get("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self.events = SummaryWriter(self.folder / "tensorboard",
                                        purge_step=len(self.history) or None)

    def add(self, **row):
        """Adds the row of one epoch and rewrites log.csv; numbers are kept as they are."""
        self.history.append(row)
        if not self.folder:
            return
        columns = list(dict.fromkeys(name for row in self.history for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.history:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        write_atomic(self.folder / "log.csv", text.getvalue())
        if self.events:
            for name, value in self.history[-1].items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self.events.add_scalar(name, value, self.history[-1].get("epoch", 0))
            self.events.flush()

    def column(self, name: str) -> list[float]:
        """All values of one column, epoch by epoch (rows without it left out)."""
        return [row[name] for row in self.history if row.get(name) is not None]

    def draw_curves(self, title: str) -> Path | None:
        """curves.png: loss and accuracy of training and test over the epochs."""
        if not self.folder or not self.history:
            return None
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for axis, what, title in (
                (axes[0], "loss", "loss (training: the method's own)"),
                (axes[1], "accuracy", "accuracy, % (training: on mixed images)")):
            for part, colour in (("train", ORANGE), ("valid", GREEN), ("test", BLUE)):
                name = f"{part}_{what}"
                points = [(row["epoch"], row[name]) for row in self.history
                          if row.get(name) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=part,
                              marker="o" if len(points) < 3 else None, markersize=4)
            axis.set_title(title, loc="left", fontsize=10, color=INK)
            axis.set_xlabel("epoch", color=INK)
            axis.grid(color=GRID, linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(frameon=False, fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
        path = self.folder / "curves.png"
        save_figure(figure, path)
        return path


def save_figure(figure, path: Path):
    """Writes a matplotlib figure as a PNG that is whole at every moment, and closes it."""
    import matplotlib.pyplot as plt
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(new, dpi=130, format="png")
        os.replace(new, path)
    except OSError as fault:
        raise RunError(f"{path} could not be written: {fault.strerror}") from None
    finally:
        plt.close(figure)


def progress(steps, total: int, initial: int, text: str):
    """tqdm over the steps of an epoch, on the first process of a terminal or a log alike."""
    return tqdm(steps, total=total, initial=initial, desc=text, leave=False,
                disable=runtime.rank() != 0, mininterval=0.5 if sys.stderr.isatty() else 30)


def report(accuracies: list[float], seconds: list[float]) -> str:
    """The papers' closing line: median of the last ten epochs' test accuracy, and the spread."""
    last = accuracies[-10:]
    median = statistics.median(last)
    spread = max(max(last) - median, median - min(last))
    return (f"test accuracy, median of the last {len(last)} epochs: {median:.2f} % "
            f"(± {spread:.2f}); best {max(accuracies):.2f} %; last {accuracies[-1]:.2f} %; "
            f"{statistics.mean(seconds):.1f} s of training an epoch")
