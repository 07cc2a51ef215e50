"""A run: its folder, resume, the epoch's steps and their sums, log lines."""
import csv
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import checkpoint, corruptions, distributed, files, plots, runtime
from common.distributed import log
from common.errors import RunError, Stopped

NOT_SAVED = ("nothing was saved after the last good checkpoint; mostly the learning rate is too "
             "high, or the images are too small for the network")
# Flags that a run may change when it goes on, without a word
NOT_TRAINING = ("data_dir", "root_dir", "workers", "print_freq", "device", "resume", "evaluate",
                "preview", "corruptions", "cam", "target_layer", "max_steps", "tensorboard",
                "debug", "class_names", "job_id", "ngpu", "gpu_ids", "tb_path", "evaluation",
                "meas_lat", "launcher", "port", "local_rank")

MEASURED = ("_loss", "_accuracy", "_top5", "_ece")      # columns of evaluations


def parameters(net) -> int:
    """Return the number of parameters that learn."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def about(info, net, train, args) -> str:
    """Return what a run begins with: the data set, the network, and how long it will train."""
    trial = f"TRIAL of {args.max_steps} steps\n" if args.max_steps else ""
    return (f"{trial}{info}\nnetwork: {args.arch}, {parameters(net):,} parameters; {len(train)} "
            f"steps of {args.batch_size} images an epoch, {args.epochs} epochs")


class StepSums:
    """Loss and hits of an epoch's steps, without host synchronisation; saved: a former `state`."""

    def __init__(self, steps: int, device, saved=None):
        self.losses = torch.zeros(steps, device=device)
        self.hits = torch.zeros(2, dtype=torch.float64, device=device)      # right, seen
        self.more, self.steps = {}, 0                                       # sums of other values
        if saved:                       # means and totals of all ranks
            first = distributed.rank() == 0
            self.steps = len(saved["losses"])
            self.losses[:self.steps] = torch.tensor(saved["losses"])
            self.hits[:] = torch.tensor(saved["hits"]) * first
            self.more = {name: torch.tensor(value, device=device) * first
                         for name, value in saved.get("more", {}).items()}

    def add(self, step: int, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor,
            **more: torch.Tensor):
        """Add a step's loss and its hits on labels (B,); more: scalars, whose means are columns."""
        self.steps = step + 1
        self.losses[step] = loss.detach()
        self.hits[0] += (logits.detach().argmax(1) == labels).sum()
        self.hits[1] += len(labels)
        for name, value in more.items():
            self.more[name] = self.more.get(name, 0) + value.detach().double()

    def check(self, epoch: int):
        """Raise RunError naming the first step whose loss is not a finite number."""
        bad = (~torch.isfinite(self.losses[:self.steps])).nonzero()
        if len(bad):
            raise RunError(f"the loss became {self.losses[bad[0]].item()} at epoch {epoch + 1}, "
                           f"step {int(bad[0]) + 1}; {NOT_SAVED}")

    def state(self) -> dict:
        """Return what a checkpoint inside the epoch holds; every rank asks at the same step."""
        losses = distributed.total(self.losses[:self.steps]) / distributed.world()
        return {"losses": losses.tolist(), "hits": distributed.total(self.hits).tolist(), "more": {
            name: distributed.total(value).item() for name, value in self.more.items()}}

    def result(self) -> dict:
        """Return mean loss, accuracy in % and means of other values over all ranks' steps."""
        sums, steps = self.state(), self.steps * distributed.world()
        (right, seen), loss = sums["hits"], statistics.fmean(sums["losses"])
        return {"train_loss": loss, "train_accuracy": 100 * right / seen,
                **{name: value / steps for name, value in sums["more"].items()}}


class Run:
    """One run: its folder, its history, and how far it has come (epoch and step, from 0). name:
    further parts of the folder's name; identity: what a checkpoint must agree in, besides data and
    network; parts: `model` and all else that has a state_dict."""

    def __init__(self, args, device, info, name: list[str], identity: dict | None = None, **parts):
        self.args, self.device, self.info, self.parts = args, device, info, parts
        self.identity = {
            "arch": args.arch, "initial_channels": args.initial_channels, "dataset": info.name,
            "classes": info.num_classes, "data": info.fingerprint} | (identity or {})
        name = [info.name, args.arch, *name, f"seed{args.seed}", args.job_name]
        self.folder = Path(args.root_dir).expanduser() / "_".join(filter(None, name))
        self.keeps_files = not getattr(args, "log_off", False)
        self.writes = self.keeps_files and distributed.rank() == 0
        if args.tensorboard and not self.keeps_files:
            raise RunError("--tensorboard: --log_off writes no files")
        self.history, self.best, self.epoch, self.step = [], -1.0, 0, 0
        self.sums = None                # of the epoch's steps; resumed inside an epoch: their state
        self.devices = []                               # all that the run has seen
        self.events, self.steps_left, self.begun = None, args.max_steps, (0.0, 0)
        if args.corruptions:
            corruptions.find(args.corruptions, info)                # now, not after the training

    def load_weights(self, *loaders) -> Path | None:
        """Load weights of --evaluate (auto: --resume's or best.pt) or --resume; return the file.
        Its run's mean and standard deviation of pixels replace those of info and `loaders`."""
        evaluate, path = self.args.evaluate, self.args.resume
        if path == "auto":
            path, _ = checkpoint.newest_valid(self.folder)
        if evaluate:
            path = evaluate if evaluate != "auto" else path or self.folder / checkpoint.BEST
        if not path:
            return None
        state = checkpoint.load(path)
        theirs = state["identity"]
        data = theirs.get("data")
        free = {name: theirs.get(name) for name in ("data", *["dataset"] * bool(evaluate))}
        checkpoint.check_identity(state, self.identity | free)
        if evaluate and data != self.info.fingerprint:
            distributed.warn("these are not the data of the checkpoint's run")
        if evaluate and self.args.val_split and data != self.info.fingerprint:
            raise RunError("--val_split: data or parts are not those of the checkpoint's run; "
                           f"take its flags and --seed {state['args']['seed']}")
        names = state["args"].get("class_names", [])        # older ones lack them
        odd = [f"{a} (here {b})" for a, b in zip(names, self.info.classes, strict=False) if a != b]
        if odd and sorted(names) == sorted(self.info.classes):
            raise RunError(f"the checkpoint's classes are in another order: {', '.join(odd[:3])}")
        if odd:
            distributed.warn(f"the checkpoint's classes have other names: {', '.join(odd[:3])}")
        checkpoint.load_part("model", self.parts["model"], state)
        if found := state["args"].get("statistics"):
            if found != (tuple(self.info.mean), tuple(self.info.std)):
                log("images are normalised as the checkpoint's run normalised its own")
            self.info.mean, self.info.std = found
            for loader in loaders:
                loader.recipe = dataclasses.replace(loader.recipe, mean=self.info.mean,
                                                    std=self.info.std)
        # between epochs the counter is at the next one
        log(f"checkpoint: {path}, epoch {state['epoch'] + (state.get('step') != 0)}")
        return Path(path)

    def start(self, start_epoch: int | None = None, **facts):
        """Take the folder, go on as --resume or start_epoch says, write args.json with `facts`."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = files.lock(self.folder / ".lock")           # until the process ends
        wanted = self.args.resume or self.keeps_files
        state = checkpoint.resume(self.args.resume, self.folder) if wanted else None
        self.resumed = state is not None
        changed = self.restore(state) if state else {}
        position = torch.tensor([self.epoch, self.step], device=self.device)
        apart = distributed.total(position) != position * distributed.world()
        if distributed.total(apart.long()).any():
            raise RunError(f"{self.folder}: the processes find different checkpoints there; "
                           "--root_dir must be on a disk that all machines share")
        if start_epoch is not None:
            if start_epoch > self.epoch:
                distributed.warn(f"--start_epoch {start_epoch}, after {self.epoch} trained epochs")
            self.epoch, self.step, self.sums = start_epoch, 0, None
            self.history = [row for row in self.history if row["epoch"] < start_epoch]
        others = self.args.max_steps or any(hasattr(self.args, name) for name in changed)
        if state and self.epoch >= self.args.epochs and others:
            raise RunError(f"{self.folder}: this run is done; other flags or --max_steps need "
                           "another --job_name or --root_dir")
        self.begun = time.perf_counter(), self.epoch
        if not self.over:
            self.stop = runtime.StopSignal()
            self.devices += {runtime.hardware(self.device)} - {*self.devices}
        if self.keeps_files:
            runtime.traceback_folder = self.folder
        if not self.writes or self.over and (self.folder / "args.json").exists():
            return
        for name in ("evaluation.csv", "evaluation.png"):           # of an earlier checkpoint
            (self.folder / name).unlink(missing_ok=True)
        program = os.path.relpath(sys.argv[0] or "python", Path(__file__).parents[1])
        facts |= runtime.facts(self.device) | {
            "parameters": parameters(self.parts["model"]), "data": str(self.info),
            "fingerprint": self.info.fingerprint,
            "command": " ".join([Path(sys.executable).name, program, *sys.argv[1:]]),
            "args": vars(self.args), "devices": self.devices,
            "resumed_at": [self.epoch + 1, self.step] if state else None, "changed": changed}
        files.write_atomic(self.folder / "args.json", json.dumps(facts, indent=1, default=str))
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.events = SummaryWriter(self.folder / "tensorboard", purge_step=self.epoch + 1)

    def settings(self) -> dict:
        """Return the flags, and what else a run's exact numbers depend on."""
        return vars(self.args) | {
            "pixels": self.info.image_size, "width": self.info.width,
            "class_names": list(self.info.classes),
            "hardware": runtime.hardware(self.device),
            "statistics": (tuple(self.info.mean), tuple(self.info.std)),
            "processes": distributed.world(),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None}

    def restore(self, state: dict) -> dict:
        """Restore a checkpoint; return the settings that differ. RunError: it does not fit."""
        if "history" not in state:
            raise RunError(f"{self.args.resume} holds weights alone: take {checkpoint.NEWEST}")
        checkpoint.check_identity(state, self.identity)
        then, now = state["args"], self.settings()
        for name in ("seed", *["batch_size"] * (state["step"] > 0)):        # inside an epoch
            if then[name] != now[name]:
                raise RunError(f"go on with --{name} {then[name]}, as the checkpoint's run")
        for name, part in self.parts.items():
            checkpoint.load_part(name, part, state)
        for name in ("history", "best", "epoch", "step", "sums"):
            setattr(self, name, state[name])
        self.devices = state.get("devices", [])         # older ones lack them
        log(f"resumed at epoch {self.epoch + 1}, step {self.step}")
        free = NOT_TRAINING             # older ones say cpu or cuda; a finished run trains nowhere
        if self.over or then.get("hardware") == self.device.type:
            free = (*free, "hardware")
        changed = {name: f"{value} -> {now[name]}" for name, value in then.items()
                   if name not in free and value != now.get(name, value)}
        if changed:
            distributed.warn("going on with other settings than before: " + ", ".join(
                f"{'--' * hasattr(self.args, name)}{name} {change}"
                for name, change in changed.items()))
        return changed

    def steps(self, loader):
        """Yield (step, batch) of the epoch from where the run stands, behind a progress bar, to its
        end or that of --max_steps; `sums` takes what each step finds."""
        loader.set_epoch(self.epoch, self.step)
        self.epoch_steps, started, first = len(loader), time.perf_counter(), self.step
        self.sums = StepSums(len(loader), self.device, self.sums)
        with distributed.progress(loader, len(loader), f"epoch {self.epoch + 1}/{self.args.epochs}",
                                  initial=self.step, postfix=self.left(self.epoch)) as bar:
            for step, batch in enumerate(bar, self.step):
                yield step, batch
                if self.ends(step):
                    break
        self.sums.check(self.epoch)                                 # waits for the device
        seconds, images = time.perf_counter() - started, (self.step - first) * self.args.batch_size
        self.timing = {"seconds": seconds, "images_per_second": images / seconds}
        distributed.share_buffers(self.parts["model"])

    def ends(self, step: int) -> bool:
        """Return, after each step, whether --max_steps ends the epoch here. Logs and checks the
        losses every --print_freq steps; after SIGTERM or Ctrl-C saves and ends the program."""
        self.step = step + 1
        if self.step % self.args.print_freq == 0:
            self.sums.check(self.epoch)
            log(f"epoch {self.epoch + 1} step {self.step}/{self.epoch_steps} "
                f"loss {self.sums.losses[step]:.5f}")
        if self.stop.arrived(step, last=self.step == self.epoch_steps):
            self.sums.check(self.epoch)
            self.save()
            distributed.total(torch.zeros(1, device=self.device)).item()    # rank 0 has written it
            raise self.stopped(f"at epoch {self.epoch + 1}, step {self.step}")
        if self.steps_left is not None:
            self.steps_left -= 1
        return self.steps_left == 0

    def stopped(self, where: str) -> Stopped:
        """Return the end of a program that a signal has stopped."""
        number = self.stop.number
        return Stopped(f"{signal.Signals(number).name}: stopped {where}; go on with --resume auto",
                       128 + number)

    def check_finite(self, row: dict):
        """Raise RunError when a value of `row` or a weight of the network is not finite."""
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        finite = [value.isfinite().all() for value in self.parts["model"].state_dict().values()
                  if value.is_floating_point()]
        if bad or not torch.stack(finite).all():                    # waits for the device once
            raise RunError(f"{', '.join(bad) or 'a weight of the network'} is not finite at epoch "
                           f"{self.epoch + 1}, after step {self.step}; {NOT_SAVED}")

    def save(self):
        """Write checkpoint.pt: all that the rest of the run depends on."""
        self.check_finite({})
        sums = self.sums and self.sums.state()
        history = self.history
        if self.args.max_steps and self.epoch < self.args.epochs:   # measured on a part of images
            history = [{name: value for name, value in row.items() if row["epoch"] < self.begun[1]
                        or name.startswith("train_") or not name.endswith(MEASURED)}
                       for row in history]
        if self.writes:
            checkpoint.save(self.folder, {
                **{name: part.state_dict() for name, part in self.parts.items()},
                "epoch": self.epoch, "step": self.step, "sums": sums, "history": history,
                "best": self.best, "devices": self.devices, "identity": self.identity,
                "args": self.settings()})

    def end_epoch(self, row: dict, accuracy: float | None):
        """Log the epoch's row, save best.pt if `accuracy` (None: not measured) is the best yet (a
        trial's never is), go on to the next epoch unless this one was cut short, and save."""
        row = row | self.timing
        self.check_finite(row)
        self.history.append({"epoch": self.epoch} | row)
        log(self.line(row))
        if self.writes:
            self.write_log(row)
        trial = self.args.max_steps is not None
        if accuracy is not None and (self.best < 0 if trial else accuracy > self.best):
            self.best = self.best if trial else accuracy
            if self.writes:
                checkpoint.save(self.folder, {
                    "model": self.parts["model"].state_dict(), "identity": self.identity,
                    "epoch": self.epoch, "accuracy": accuracy, "args": self.settings()},
                    checkpoint.BEST)
        if self.step < self.epoch_steps or self.steps_left == 0:
            history, self.history = self.history, self.history[:-1]     # logged again when done
            self.save()
            self.history = history
        else:
            self.epoch, self.step, self.sums = self.epoch + 1, 0, None
            self.save()
        if self.over:                       # nothing is left to save: a signal ends the evaluation
            if self.stop.arrived(self.step, last=True):
                raise self.stopped("after the last step")
            self.stop.release()

    def line(self, row: dict) -> str:
        """Return an epoch's line of the log: loss, accuracies, seconds, time left."""
        if accuracies := self.column("test_accuracy"):
            row = row | {"best": max(accuracies)}
        shown = {"loss": "train_loss", "train": "train_accuracy", "k-NN": "knn_accuracy",
                 "test": "test_accuracy", "best": "best"}
        parts = [f"{label} {row[name]:6.{4 if label == 'loss' else 2}f}"
                 for label, name in shown.items() if name in row]
        epochs = self.args.epochs
        return "  ".join([f"epoch {self.epoch + 1:{len(str(epochs))}}/{epochs}", *parts,
                          f"{row['seconds']:.0f} s", self.left(self.epoch + 1)]).rstrip()

    def left(self, done: int) -> str:
        """Return the time that the rest of the run will take, '' where that is not known."""
        start, first = self.begun
        if done <= first or self.args.max_steps:
            return ""
        seconds = (time.perf_counter() - start) / (done - first) * (self.args.epochs - done)
        return f"{tqdm.format_interval(seconds)} left"

    @property
    def over(self) -> bool:
        """Whether all epochs, or all steps of a trial, are done."""
        return self.epoch >= self.args.epochs or self.steps_left == 0

    def write_log(self, row: dict):
        """Rewrite log.csv from the history and send the new row to TensorBoard."""
        columns = dict.fromkeys(name for line in self.history for name in line)
        with files.whole(self.folder / "log.csv") as new, open(new, "w") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for line in self.history:
                short = {name: f"{value:.6g}" for name, value in line.items()}
                writer.writerow(short | {"epoch": line["epoch"] + 1})
        if self.events:
            for name, value in row.items():
                self.events.add_scalar(name, value, self.epoch + 1)
            self.events.flush()

    def column(self, name: str) -> list[float]:
        """Return the values of one column, rows without it left out."""
        return [row[name] for row in self.history if name in row]

    def report(self) -> str:
        """Return the closing line: median of the last ten epochs' test accuracy, and spread."""
        values = self.column("test_accuracy")
        if not values:
            return f"{len(self.history)} epochs are done"
        last = values[-10:]
        median = statistics.median(last)
        spread = max(max(last) - median, median - min(last))
        trial = "TRIAL, on a few images: " if self.args.max_steps else ""
        return (f"{trial}test accuracy, median of the last {len(last)} epochs: {median:.2f} % "
                f"(± {spread:.2f}); best {max(values):.2f} %; last {values[-1]:.2f} %; "
                f"{statistics.mean(self.column('seconds')):.1f} s of training an epoch")

    def finish(self, title: str, draw, *what):
        """Log the result, draw curves.png, and mixed.png by draw(path, *what); end the lock."""
        log(self.report())
        if not self.writes:
            return
        plots.curves(self.folder / "curves.png", title, self.history)
        picture = draw(self.folder / "mixed.png", *what)
        if self.events and picture:
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            self.events.add_image("mixed images", pixels, dataformats="HWC")
            self.events.flush()
        self.lock.close()
        log(f"curves, pictures and checkpoints: {self.folder}")
