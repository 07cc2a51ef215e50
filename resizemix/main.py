#!/usr/bin/env python3
"""ResizeMix (Qin et al. 2020) and the methods it is compared with, in one program: Cutout,
CutMix, RandAugment, AutoAugment, ResizeMix, and ResizeMix+ (with RandAugment).

CPU trial   python resizemix/main.py --dataset digits --net_name wresnet40_2 --epochs 12
one GPU     python resizemix/main.py --config cifar100_wrs --data_dir data --amp bf16
eight GPUs  torchrun --nproc_per_node=8 resizemix/main.py --config imagenet_res --data_dir imagenet
two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                --rdzv_endpoint=HOST:29500 resizemix/main.py --config imagenet_res …"""
import copy
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import AutoAugmentPolicy

from common import data, distributed, evaluation, flags, mixing, models, plots, runtime
from common.data import STREAMED, Recipe
from common.distributed import log
from common.errors import RunError
from common.flags import add_boolean, amount, count, number, positive, share
from common.models.weights import load_pretrained
from common.run import Run, about
from resizemix import configs, randaugment
from resizemix.mixing import CropTest, cutmix, draw_corners, draw_scale, resize_mix

SWITCHES = ("cutout", "randaugment", "autoaugment", "resizemix", "batch_aug")
LAUNCHERS = {"none": [], "pytorch": ["RANK"], "slurm": ["SLURM_PROCID", "MASTER_ADDR"]}
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


def parse_args(argv=None):
    """Return the flags; usage errors exit with code 2."""
    parser, positive_share = flags.Parser(__doc__), number(above=0, high=1)
    add = parser.add_argument_group("run").add_argument
    add("--config", type=lambda name: name.removesuffix(".py"), choices=configs.CONFIGS,
        default="cifar100_wrs", help="sets data, network and schedule; other flags win")
    add("--method", choices=configs.METHODS, help="sets flags, a row of the paper's tables")
    add("--tb_path", type=flags.path, help="if given, TensorBoard events (in the run's folder)")
    add_boolean(add, "--evaluation", False, "evaluate before training, too")
    add_boolean(add, "--meas_lat", False, "measure the network's latency before training")
    add("--launcher", choices=LAUNCHERS, default="none", help="who must have started the processes")
    add("--port", type=number(int, low=1, high=65535), default=23333, help="slurm: MASTER_PORT")
    add("--local_rank", "--local-rank", type=count, help="where the launcher sets no LOCAL_RANK")

    add = parser.add_argument_group("data and schedule").add_argument
    add("--padding", type=count, default=4, help="pixels around an image before its random crop")
    add("--min_scale", type=positive_share, default=0.08, help="imagenet: least area of a crop")
    add_boolean(add, "--color_jitter", False, "imagenet: change colours at random")
    add("--min_lr", type=amount, default=1e-5, help="at the end of the cosine")
    add("--warmup_epochs", type=count, help="of linear warm-up")
    add("--warmup_start_lr", type=amount, default=1e-5, help="where it begins")
    add("--restart_epochs", type=positive, nargs="*", default=[], help="lengths of several cosines")
    add("--lr_schedule", choices=["cosine", "step"], default="cosine", help="after the warm-up")
    add("--milestones", type=count, nargs="*", default=[], help="step: epochs of the LR changes")
    add("--gamma", type=amount, default=0.1, help="step: LR factor at these epochs")
    add_boolean(add, "--nesterov", False, "Nesterov's momentum")
    add("--clip_grad", type=amount, default=0.0, help="largest norm of the gradients; 0: any")

    add = parser.add_argument_group("method").add_argument
    add("--cutout", type=count, default=0, help="side of the erased square, pixels; 0: none")
    add_boolean(add, "--randaugment", False, "RandAugment of the loaded images")
    add_boolean(add, "--autoaugment", False, "AutoAugment of the loaded images")
    add("--cutmix_prob", type=share, default=0.0, help="share of the batches mixed by CutMix")
    add("--cutmix_beta", type=number(above=0), default=1.0, help="CutMix: Beta parameter")
    add_boolean(add, "--resizemix", True, "ResizeMix of all other batches")
    add("--resizemix_low", type=positive_share, default=0.1, help="ResizeMix: least scale")
    add("--resizemix_high", type=positive_share, default=0.8, help="ResizeMix: largest scale")
    add_boolean(add, "--batch_aug", False, "train on two RandAugments of each mixed batch")
    add_boolean(add, "--crop_test", False, "evaluate the whole image and its centre together")
    flags.add_flags(parser, data.NAMES, models.ALL, {
        "data_dir": ["--data_path"], "root_dir": ["--save"], "arch": ["--net_name"],
        "lr": ["--init_lr"], "print_freq": ["--report_freq"], "resume": ["--load_path"]
    }, pretrained="")

    first = parser.peek(argv)
    config = configs.CONFIGS[first.config] | configs.METHODS.get(first.method, {})
    if first.dataset not in (None, config["dataset"]):
        del config["image_size"]                            # every data set has its own
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    del args.method                                         # its flags say it
    args.tensorboard |= bool(args.tb_path)
    if args.randaugment and args.autoaugment:
        parser.error("--randaugment and --autoaugment: choose one of them")
    if args.resizemix_low > args.resizemix_high:
        parser.error(f"--resizemix_low is above --resizemix_high {args.resizemix_high}")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs} are not below the {args.epochs} epochs")
    parser.only(args, args.lr_schedule == "step", "milestones gamma", "--lr_schedule step")
    parser.only(args, args.lr_schedule == "cosine", "restart_epochs min_lr", "--lr_schedule cosine")
    parser.only(args, args.dataset in STREAMED, "min_scale color_jitter", "sets read from disk")
    parser.only(args, args.dataset not in STREAMED, "padding", "sets in memory")
    parser.idle(
        args, (args.cutmix_prob > 0, "cutmix_beta", "--cutmix_prob"),
        (args.resizemix and args.cutmix_prob < 1, "resizemix_low resizemix_high", "--resizemix"),
        (args.warmup_epochs, "warmup_start_lr", "--warmup_epochs"),
        (args.launcher == "slurm", "port", "--launcher slurm"),
        (not (args.evaluate or args.preview), "meas_lat evaluation", "training"))
    if args.lr_schedule == "cosine" and args.lr < args.min_lr:
        parser.error(f"--lr {args.lr} is below --min_lr {args.min_lr}: give both")
    return args


def method_name(args) -> str:
    """Return the names of what is on, as in 'randaugment-resizemix'; 'baseline' if nothing is."""
    names = [name for name in SWITCHES if getattr(args, name)]
    return "-".join(["cutmix"] * (args.cutmix_prob > 0) + names) or "baseline"


def check_launcher(args):
    """Complete the environment of a launched process; RunError if --launcher did not start it."""
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.launcher == "slurm":
        os.environ.setdefault("MASTER_PORT", str(args.port))
    for name in LAUNCHERS[args.launcher]:
        if name not in os.environ:
            raise RunError(f"--launcher {args.launcher}: {name} is not set; see resizemix/scripts")


def mix_batch(images, labels, args, info, generator) -> tuple:
    """Return mixed images (2B under --batch_aug), soft targets, and the partners or None."""
    n, size, perm = len(images), tuple(images.shape[-2:]), None
    compiled = partial(runtime.compiled, args=args)
    targets = mixing.probabilities(labels, info.num_classes)
    if args.cutout:
        centres = mixing.draw_pixels(n, size, generator)
        images = compiled(mixing.cutout)(images, centres, args.cutout)
    by_cutmix = torch.rand((), generator=generator) < args.cutmix_prob
    if by_cutmix or args.resizemix:
        perm = mixing.draw_perm(n, generator)
        if by_cutmix:
            lam = mixing.draw_lambda(args.cutmix_beta, generator)
            centre, = mixing.draw_pixels(1, size, generator)
            images, ratio = compiled(cutmix)(images, perm, centre, lam)
        else:
            scale = draw_scale(generator, args.resizemix_low, args.resizemix_high)
            corners = draw_corners(n, size, scale, generator)
            # not compiled: nearly every scale would be a new shape
            images, ratio = resize_mix(images, perm, scale, corners)
        targets = mixing.soft_targets(labels, perm, ratio, info.num_classes)
    if args.batch_aug:
        images = randaugment.batch_aug(images, generator, mean=info.mean, std=info.std)
        targets = torch.cat([targets, targets])
    return images, targets, perm


def step_rate(args, step: int, epoch_steps: int) -> float:
    """Return the learning rate of step `step` of the run, from 0; --restart_epochs: cosines from
    --lr that begin after one another (Loshchilov & Hutter 2017)."""
    warmup = args.warmup_epochs * epoch_steps
    if step < warmup:
        return args.warmup_start_lr + (args.lr - args.warmup_start_lr) * step / warmup
    if args.lr_schedule == "step":
        return args.lr * args.gamma ** sum(step // epoch_steps >= e for e in args.milestones)
    start, length, end = warmup, args.epochs * epoch_steps - warmup, 0
    for cycle in args.restart_epochs:
        if end <= step:
            start, length = end, cycle * epoch_steps
            end += length
    progress = min((step - start) / length, 1)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def training_step(model, images, labels, args, info, generator, scaler):
    """Leave the gradients of one step in the parameters; return the loss and the logits."""
    mixed, targets, _ = mix_batch(images, labels, args, info, generator)
    with runtime.autocast(args, images.device):
        logits = model(mixed)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets)
    scaler.scale(loss).backward()
    return loss, logits[:len(labels)]                       # of --batch_aug's first half


def train_one_epoch(net, model, loader, optimizer, scaler, args, info, run):
    """Train to the end of the run's epoch; run.sums takes loss and hits."""
    net.train()
    for step, (images, labels) in run.steps(loader):
        generator = distributed.step_generator(args.seed, run.epoch, step)
        for group in optimizer.param_groups:
            group["lr"] = step_rate(args, run.epoch * len(loader) + step, len(loader))
        optimizer.zero_grad(set_to_none=True)
        loss, logits = training_step(model, images, labels, args, info, generator, scaler)
        if args.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        run.sums.add(step, loss, logits, labels)


@torch.no_grad()
def multiply_adds(net, height: int, width: int) -> int:
    """Return the multiply-adds of one image (no biases) in a network on the CPU."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).eval()(torch.zeros(1, 3, height, width))
    return counter.get_total_flops() // 2


@torch.no_grad()
def latency(net, height: int, width: int, device: torch.device) -> str:
    """Return the median time of a forward pass: of 32 images on a GPU, of 1 on a CPU."""
    images = torch.zeros(32 if device.type == "cuda" else 1, 3, height, width)
    timer = Timer("net(images)", num_threads=torch.get_num_threads(),
                  globals={"net": copy.deepcopy(net).eval(), "images": images.to(device)})
    seconds = timer.blocked_autorange(min_run_time=2).median
    return f"{1000 * seconds:.2f} ms for a batch of {len(images)} ({device.type})"


def draw_preview(path, train, args, info):
    """Draw the first training batch, mixed; return the path."""
    train.set_epoch(0)
    images, labels = next(iter(train))
    args = copy.copy(args)
    if not args.resizemix:
        args.cutmix_prob = math.ceil(args.cutmix_prob)
    args.cutmix_beta, args.resizemix_low, args.resizemix_high = 32.0, 0.55, 0.8     # well mixed
    n, generator = len(images), distributed.step_generator(args.seed, 0, 0)
    mixed, targets, perm = mix_batch(images, labels, args, info, generator)
    rows = {"image": images, "partner": None if perm is None else images[perm], "mixed": mixed[:n]}
    title = " and ".join(configs.TITLES[name] for name in method_name(args).split("-"))
    return plots.preview(path, f"{title} on {info.name}", rows, targets[:n], info)


def main(argv=None):
    """Train, evaluate or draw as the flags say; return the network."""
    args = parse_args(argv)
    check_launcher(args)
    device = runtime.setup(args)
    streamed = args.dataset in STREAMED
    transform = randaugment.transform if args.randaugment else None
    if args.autoaugment:
        kind = AutoAugmentPolicy.IMAGENET if streamed else AutoAugmentPolicy.CIFAR10
        transform = partial(randaugment.autoaugment, kind=kind)
    recipe = Recipe(
        padding=args.padding, scale=(args.min_scale, 1.0), interpolation="lanczos",
        color_jitter=0.4 * args.color_jitter, transform=transform,
        transform_first=transform is not None and not streamed,
        **CIFAR if args.dataset in ("cifar10", "cifar100") else {})
    train, test, info = data.load(
        args.dataset, args.data_dir, recipe, device=device, **flags.chosen(args, flags.LOADING),
        drop_last=args.dataset != "imagenet")

    torch.manual_seed(args.seed)
    net = models.build(args.arch, info.num_classes, info.image_size,
                       initial_channels=args.initial_channels)
    cost = multiply_adds(net, info.image_size, info.width)
    net, model = runtime.prepare(net, args, device)
    judged = CropTest(net) if args.crop_test and not args.cam else net
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay,
                                nesterov=args.nesterov and args.momentum > 0)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; {cost / 1e6:,.1f} M multiply-adds an image; "
        f"method {method_name(args)}")
    run = Run(args, device, info, [method_name(args)], model=net, optimizer=optimizer,
              scaler=scaler)
    if args.evaluate or args.preview:
        checkpoint = run.load_weights(train, test) or load_pretrained(net, args)
        if args.evaluate:
            evaluation.report(judged, test, args, info, run, checkpoint)
        elif distributed.rank() == 0:
            log(f"mixed images: {draw_preview(args.preview, train, args, info)}")
        return net
    run.start(multiply_adds=cost)
    if not run.resumed:
        load_pretrained(net, args)
    if args.meas_lat and distributed.rank() == 0:
        log(f"latency: {latency(net, info.image_size, info.width, device)}")
    if args.evaluation:
        log(f"test: {evaluation.sentence(evaluation.evaluate(judged, test, args, info))}")
    while not run.over:
        train_one_epoch(net, model, train, optimizer, scaler, args, info, run)
        row = {"lr": optimizer.param_groups[0]["lr"]} | run.sums.result()
        row |= evaluation.columns(evaluation.evaluate(judged, test, args, info))
        run.end_epoch(row, row["test_accuracy"])
    evaluation.report(judged, test, args, info, run)
    run.finish(f"{method_name(args)}, {args.arch} on {info.name}", draw_preview, train, args, info)
    return net


if __name__ == "__main__":
    runtime.launch(main)
