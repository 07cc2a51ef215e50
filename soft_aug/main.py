#!/usr/bin/env python3
"""Soft Augmentation (Liu et al., CVPR 2023): the more an augmentation hides of an image, the less
confidence its target puts in the label. Beside it the crops and losses it is compared with.

CPU trial   python soft_aug/main.py --dataset digits --initial_channels 16 --da 2 --loss st \\
                --crop 6 --epochs 12 --ft 2
one GPU     python soft_aug/main.py --task cifar100 --da 2 --loss st --amp bf16
eight GPUs  torchrun --nproc_per_node=8 soft_aug/main.py --task cifar100 --da 2 --loss st
two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                --rdzv_endpoint=HOST:29500 soft_aug/main.py --task cifar100 …"""
import copy
import dataclasses
import glob
import math
import random
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
import torch.nn.functional as F

from common import checkpoint, data, distributed, evaluation, flags, models, plots, runtime
from common.data import Recipe
from common.distributed import log
from common.flags import add_boolean, amount, chosen, count, number, positive
from common.mixing import cutout, draw_lambda, draw_perm, draw_pixels, mixup
from common.models.weights import load_pretrained
from common.randaugment import randaugment
from common.run import Run, about
from soft_aug import losses, softcrop

METHODS = {"standard": {"da": 0, "loss": "ce"}, "cutout": {"da": 1, "loss": "ce", "l": 16.0},
           "hard": {"da": 2, "loss": "ce"}, "soft": {"da": 2, "loss": "st"},
           "weighted": {"da": 2, "loss": "st", "no_soften": True}}
METHODS |= {f"{name}+ra": values | {"ra": True} for name, values in METHODS.items()}
TAGS = {"lr": "learning/lr", "train_loss": "Train/loss", "test_loss": "Test/Average loss",
        "test_accuracy": "Test/Accuracy", "test_ece": "Test/ECE"}       # of the paper's program
STATISTICS = {"cifar100": ((0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
                           (0.2673342858792401, 0.2564384629170883, 0.27615047132568404))}


def parse_args(argv=None):
    """Return the flags; usage errors exit with code 2."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("schedule and run").add_argument
    add("--sch", type=number(above=0, high=1e4), default=2.5, help="epochs / 200, unless --epochs")
    add("--optimizer", choices=["sgd"], default="sgd", help="the only one")
    add_boolean(add, "--no-nag", False, "momentum that is not Nesterov's")
    add("--decay", type=lambda text: {"cosine": "c", "linear": "l", "step": "s"}.get(text, text),
        choices=["c", "l", "s"], default="c", help="learning rate: cosine, linear, step")
    add("--gamma", type=amount, default=0.2, help="LR factor of a step (--decay s)")
    add("--milestones", type=count, nargs="*", help="(default: 1/2, 3/4, 9/10 of the epochs)")
    add("--warm", type=count, default=0, help="epochs of linear warm-up")
    add("--ft", type=count, default=20, help="last epochs, weakly augmented (never the first 5 %%)")
    add("--r", type=number(above=0), default=1000.0, help="divides its strength in these")
    add("--eval_every", type=positive, default=5, help="epochs from test to test")
    add_boolean(add, "--nogpu", False, "the same as --device cpu")
    add = parser.add_argument_group("augmentation").add_argument
    add("--method", choices=METHODS, help="sets --da, --loss, --ra; these and other flags win")
    add("--da", type=int, choices=[-1, 0, 1, 2], default=0,
        help="-1: none; 0: flip, crop of 4 pixels (of sets read from disk: a random resized crop); "
        "1: these and Cutout of --l; 2: flip, SoftCrop")
    add_boolean(add, "--ra", False, "RandAugment")
    add("--crop", type=amount, default=12.0, help="SoftCrop: standard deviation, pixels")
    add("--pcrop", type=amount, default=2.0, help="SoftCrop: power k of the confidence curve")
    add("--bgcrop", type=amount, default=0.01, help="SoftCrop: standard deviation of the colour")
    add("--l", type=amount, default=0.0, help="Cutout: side of the hole, pixels (often 16)")
    add("--noise", type=amount, default=0.0, help="soft noise: spread of its standard deviation")
    add("--pnoise", type=amount, default=1.0, help="soft noise: power k of the confidence curve")
    add("--bgnoise", type=amount, default=1.0, help="soft noise: multiplies the noise")
    add_boolean(add, "--mixup", False, "Mixup of the augmented images")
    add("--a", type=amount, default=1.0, help="Mixup: Beta parameter")
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["ce", "st", "sce", "fl"], default="ce",
        help="cross-entropy, soft targets, label smoothing (1 - max_p), focal")
    add("--max_p", type=number(above=0, high=1), default=1.0, help="highest confidence")
    add("--g", type=amount, default=2.0, help="fl: gamma")
    add("--rw", nargs="?", choices=["batch", "sample", "off"], const="batch", default="batch",
        help="st: loss times the batch's mean confidence, each image's own, or neither")
    add_boolean(add, "--no-soften", False, "st: hard targets, only reweighted")
    add_boolean(add, "--other", False, "st: the rest goes to a class of its own")
    flags.add_flags(parser, data.NAMES, models.ALL, {
        "dataset": ["--task"], "arch": ["--net"], "batch_size": ["--b"], "workers": ["--n"],
        "lr": ["--learning_rate"], "weight_decay": ["--wd"], "job_name": ["--prefix"]
    }, dataset="cifar10", arch="resnet18", batch_size=128, lr=0.1, weight_decay=5e-4, seed=-1,
       workers=16, pretrained="")

    first = parser.peek(argv)
    parser.set_defaults(**METHODS.get(first.method, {}))
    args = parser.parse_args(argv)
    del args.method                                         # its flags say it
    parser.only(args, args.decay == "s", "milestones gamma", "--decay s")
    parser.only(args, args.loss == "st", "other", "--loss st")
    soft = args.loss == "st" and (args.da == 2 or args.noise)
    parser.idle(
        args, (soft or args.other or args.loss != "st", "loss", "--da 2 or --noise"),
        (args.da == 2, "crop bgcrop", "--da 2"), (args.noise, "bgnoise", "--noise"),
        (args.da == 2 and args.loss == "st", "pcrop", "--da 2 --loss st"),
        (args.noise and args.loss == "st", "pnoise", "--noise --loss st"),
        (args.mixup, "a", "--mixup"), (args.loss == "st", "rw no_soften", "--loss st"),
        (args.loss == "fl", "g", "--loss fl"), (args.ft, "r", "--ft"),
        (args.da > 0 or args.noise or args.mixup, "ft", "--da 1, --da 2, --noise or --mixup"))
    args.epochs = args.epochs or max(1, int(200 * args.sch))
    if args.milestones is None:
        args.milestones = [int(part * args.epochs) for part in (1 / 2, 3 / 4, 9 / 10)]
    if args.max_p < 1 and not (soft or args.loss == "sce"):
        parser.error("--max_p is for --loss sce, or for --loss st with --da 2 or --noise")
    if (args.da == 1) != (args.l > 0):
        parser.error("--da 1 (Cutout) and --l (the side of its hole) go together")
    if args.nogpu:
        parser.only(args, args.device == "cpu", "device", "runs without --nogpu")
        args.device = "cpu"
    args.arch = args.arch.replace("pyramid272", "pyramidnet272")
    return args


def run_name(args) -> list[str]:
    """Return the parts of the run folder's name."""
    return [f"da{args.da}", args.loss, "ra" * args.ra, "mixup" * args.mixup]


def title(args) -> str:
    """Return the augmentation and loss in words, for pictures."""
    hard = {-1: "No augmentation", 0: "Flip and crop", 1: "Cutout", 2: "Hard crop"}[args.da]
    words = ["Soft Augmentation" if args.loss == "st" else hard, "RandAugment" * args.ra,
             "Mixup" * args.mixup, {"sce": "smoothed labels", "fl": "focal loss"}.get(args.loss)]
    return " and ".join(filter(None, words))


def choose_seed(args, device) -> int:
    """Return --seed or, for -1, that of the run to resume or evaluate, else one for all ranks."""
    if args.seed != -1:
        return args.seed
    seed, asked = random.randrange(1001), args.resume or args.evaluate
    if asked == "auto":             # the newest run that these flags name
        before = "_".join(filter(None, [args.dataset, args.arch, *run_name(args), "seed"]))
        after = f"_{args.job_name}" * bool(args.job_name)
        runs = Path(args.root_dir).glob(f"{glob.escape(before)}*{glob.escape(after)}/args.json")
        for path in sorted(runs, key=lambda path: path.stat().st_mtime):
            number = path.parent.name.removeprefix(before).removesuffix(after)
            seed = int(number) if number.isdecimal() else seed
    elif asked:
        seed = checkpoint.load(asked).get("args", {}).get("seed", seed)
    seed = int(distributed.total(torch.tensor(seed * (distributed.rank() == 0), device=device)))
    log(f"seed: {seed}")
    return seed


class Mixed(NamedTuple):
    """A batch for the network."""
    images: torch.Tensor                # (B, 3, H, W)
    confidence: torch.Tensor            # (B,), in the label of each image
    perm: torch.Tensor | None = None    # Mixup: partners, and the share of the first image
    lam: torch.Tensor | None = None


def first_weak_epoch(args) -> float:
    """Return where the last --ft epochs of weak augmentation begin: never in the first 5 %."""
    return max(0.05 * args.epochs, args.epochs - args.ft)


def mix_batch(images, args, info, epoch, generator) -> Mixed:
    """Return the normalised batch after --da, --noise and --mixup, with draws from `generator`."""
    n, size = len(images), images.shape[-2:]
    compiled = partial(runtime.compiled, args=args)
    weak = epoch >= first_weak_epoch(args)
    shrink = args.r if weak else 1.0
    p = torch.ones(n, device=images.device)                 # confidence in the label

    if args.da == 1:
        images = compiled(cutout)(images, draw_pixels(n, size, generator), args.l / shrink)
    elif args.da == 2:
        background = torch.randn(n, 3, generator=generator) * args.bgcrop
        offsets = softcrop.draw_offsets(n, size, args.crop / shrink, generator)
        images, visible = compiled(softcrop.soft_crop)(images, offsets, background)
        p = softcrop.confidence(visible, info.num_classes, power=args.pcrop, max_p=args.max_p)

    if args.noise:
        images, visible = compiled(softcrop.soft_noise)(images, *softcrop.draw_noise(
            images.shape, args.noise / shrink, args.bgnoise, generator, images.device))
        ceiling = 1.0 if args.da == 2 else args.max_p       # once, whatever augments
        p *= softcrop.confidence(visible, info.num_classes, power=args.pnoise, max_p=ceiling)
        p = p.clamp(min=1 / info.num_classes)

    if not args.mixup:
        return Mixed(images, p)
    perm = draw_perm(n, generator)
    lam = draw_lambda(0.0 if weak else args.a, generator)
    return Mixed(compiled(mixup)(images, perm, lam)[0], p, perm, lam)


def mixed_loss(logits, labels, mixed, args):
    """Return the --loss of a mixed batch, a float32 scalar."""
    loss = {"ce": losses.cross_entropy,
            "st": partial(losses.soft_target_loss, reweight=None if args.rw == "off" else args.rw,
                          other=args.other, soften=not args.no_soften),
            "sce": partial(losses.smooth_cross_entropy, smoothing=1 - args.max_p),
            "fl": partial(losses.focal_loss, gamma=args.g)}[args.loss]
    if mixed.perm is None:
        return loss(logits, labels, mixed.confidence)
    return losses.mixup_loss(loss, logits, labels, mixed.confidence, mixed.perm, mixed.lam)


def implied_targets(labels, mixed, args, outputs):
    """Return the soft targets (B, outputs) implied by --loss, for the preview."""
    p, label = torch.ones_like(mixed.confidence), F.one_hot(labels, outputs).float()
    if args.loss == "sce":
        p *= args.max_p
    elif args.loss == "st" and not args.no_soften:
        p = mixed.confidence
    rest = (1 - label) / max(1, outputs - 1)
    if args.other:
        rest = F.one_hot(torch.full_like(labels, outputs - 1), outputs).float()
    targets = torch.lerp(rest, label, p[:, None])
    return targets if mixed.perm is None else mixup(targets, mixed.perm, mixed.lam)[0]


def step_rate(args, step: int, epoch_steps: int) -> float:
    """Return the learning rate of `step`, counted from 0 over all epochs, by --decay and --warm."""
    done, epoch = (step + 1) / (args.epochs * epoch_steps + 1), step // epoch_steps
    rate = args.lr * {"c": (1 + math.cos(math.pi * done)) / 2, "l": 1 - done,
                      "s": args.gamma ** sum(epoch >= e for e in args.milestones)}[args.decay]
    return rate * min(1, (step + 1) / (args.warm * epoch_steps)) if args.warm else rate


def training_step(model, images, labels, args, info, epoch, generator, scaler):
    """Leave the gradients of one step in the parameters; return the loss and the logits."""
    mixed = mix_batch(images, args, info, epoch, generator)
    with runtime.autocast(args, images.device):
        logits = model(mixed.images)
    loss = mixed_loss(logits, labels, mixed, args)
    scaler.scale(loss).backward()
    return loss, logits


def train_one_epoch(net, model, loader, optimizer, scaler, args, info, run):
    """Train to the end of the run's epoch; run.sums takes loss and hits."""
    net.train()
    for step, (images, labels) in run.steps(loader):
        generator = distributed.step_generator(args.seed, run.epoch, step)
        for group in optimizer.param_groups:
            group["lr"] = step_rate(args, run.epoch * len(loader) + step, len(loader))
        optimizer.zero_grad(set_to_none=True)
        loss, logits = training_step(model, images, labels, args, info, run.epoch, generator,
                                     scaler)
        scaler.step(optimizer)
        scaler.update()
        run.sums.add(step, loss, logits, labels)


def draw_preview(path, train, args, info):
    """Draw the first training batch, augmented; return the path."""
    train.set_epoch(0)
    images, labels = next(iter(train))
    args = copy.copy(args)
    args.a = 32.0                                           # Mixup's lambda near a half
    mixed = mix_batch(images, args, info, 0, distributed.step_generator(args.seed, 0, 0))
    rows = {"image": images, "partner": None if mixed.perm is None else images[mixed.perm],
            "mixed": mixed.images}
    info = dataclasses.replace(info, classes=[*info.classes, *["other"] * args.other])
    return plots.preview(path, f"{title(args)}, {info.name}", rows,
                         implied_targets(labels, mixed, args, len(info.classes)), info)


def draw_softening(path: Path, args, num_classes: int):
    """Draw the confidence in the label of a SoftCrop over its visible fraction."""
    visible = torch.linspace(0, 1, 101)
    softened = softcrop.confidence(visible, num_classes, power=args.pcrop, max_p=args.max_p)
    figure = plots.new_figure(4.8, 4.0)
    axes = figure.subplots()
    axes.plot(visible, softened, color=plots.BLUE, linewidth=2, label=f"k = {args.pcrop:g}")
    axes.axhline(1 / num_classes, color=plots.MUTED, linewidth=1, linestyle="--", label="chance")
    plots.frame(axes, title="Confidence in the label of a crop", ylabel="confidence",
                xlabel="visible fraction of the image", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    plots.save_figure(figure, path)


def write_events(run):
    """Write the newest row under the tags of the paper's program, for TensorBoard."""
    row = run.history[-1]
    tags = {tag: row[name] for name, tag in TAGS.items() if name in row}
    if "test_loss" in row:
        for part in ("Test", "Train"):
            tags[f"{part}/Best Average loss"] = min(run.column(f"{part.lower()}_loss"))
            tags[f"{part}/Best Accuracy"] = max(run.column(f"{part.lower()}_accuracy"))
    for tag, value in tags.items():
        run.events.add_scalar(tag, value, row["epoch"] + 1)


def main(argv=None):
    """Train, evaluate or draw as the flags say; return the network."""
    args = parse_args(argv)
    device = runtime.setup(args)
    args.seed = choose_seed(args, device)

    mean, std = STATISTICS.get(args.dataset, (None, None))
    whole = args.da in (-1, 2)                              # SoftCrop sees the whole image
    recipe = Recipe(crop="centre" if whole and args.dataset in data.STREAMED else None,
                    padding=0 if whole else 4, flip=False if args.da == -1 else None,
                    transform=randaugment if args.ra else None, mean=mean, std=std)
    train, test, info = data.load(args.dataset, args.data_dir, recipe, device=device,
                                  **chosen(args, flags.LOADING))
    torch.manual_seed(args.seed)
    net = models.build(args.arch, info.num_classes + args.other, info.image_size,
                       initial_channels=args.initial_channels)
    net, model = runtime.prepare(net, args, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay,
                                nesterov=args.momentum > 0 and not args.no_nag)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; {title(args)}")
    strong = math.ceil(first_weak_epoch(args))
    if 2 * strong < args.epochs and (args.da > 0 or args.noise or args.mixup):
        distributed.warn(f"only {strong} of {args.epochs} epochs augment in full; --ft 0: in all")

    run = Run(args, device, info, run_name(args), {"other": args.other}, model=net,
              optimizer=optimizer, scaler=scaler)
    if args.evaluate or args.preview:
        weights = run.load_weights(train, test) or load_pretrained(net, args)
        if args.evaluate:
            evaluation.report(net, test, args, info, run, weights)
        elif distributed.rank() == 0:
            log(f"mixed images: {draw_preview(args.preview, train, args, info)}")
        return net
    run.start()
    if not run.resumed:
        load_pretrained(net, args)

    while not run.over:
        train_one_epoch(net, model, train, optimizer, scaler, args, info, run)
        row = {"lr": optimizer.param_groups[0]["lr"]} | run.sums.result()
        last = run.epoch + 1 == args.epochs or run.steps_left == 0
        if last or run.epoch % args.eval_every == 0:
            row |= evaluation.columns(evaluation.evaluate(net, test, args, info))
        run.end_epoch(row, row.get("test_accuracy"))
        if run.events:
            write_events(run)

    evaluation.report(net, test, args, info, run)
    if args.da == 2 and run.writes:
        draw_softening(run.folder / "softening.png", args, info.num_classes)
    run.finish(f"{title(args)}; {args.arch} on {info.name}", draw_preview, train, args, info)
    return net


if __name__ == "__main__":
    runtime.launch(main)
