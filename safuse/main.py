#!/usr/bin/env python3
"""SAFuse (Sun and Dornaika 2024) and the superpixel methods before it, LGCOAMix and OcCaMix, in one
program, with CutMix and plain training to compare them with.

a CPU trial       python safuse/main.py --dataset digits --initial_channels 16 --epochs 12 \\
                      --schedule step --milestones 6 10 --batch_size 100 --LR 0.05
one GPU           python safuse/main.py --method safuse --dataset cifar100 --data_dir data
eight GPUs        torchrun --nproc_per_node=8 safuse/main.py --method lgcoamix --dataset cub200 \\
                      --data_dir data --arch resnet50 --batch_size 64
two machines      torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                      --rdzv_endpoint=HOST:29500 safuse/main.py …

--batch_size counts the images of a step over all processes.
"""
import argparse
import copy
import os
import re
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

from common import data, distributed, evaluation, flags, plots, runtime
from common.data import Recipe
from common.data.recipe import unnormalise
from common.distributed import log
from common.errors import RunError
from common.flags import add_boolean, amount, count, number, positive, share
from common.mixing import (
    cutmix,
    draw_centre,
    draw_lambda,
    draw_perm,
    soft_cross_entropy,
    soft_targets,
)
from common.models.weights import load_pretrained
from common.run import Run, about
from common.sums import StepSums
from safuse import losses, mixing, network, picture, superpixels
from safuse.localisation import localise
from safuse.recipes import CROPS, SCHEDULES, defaults, learning_rate

METHODS = {"safuse": "SAFuse", "lgcoamix": "LGCOAMix", "occamix": "OcCaMix", "cutmix": "CutMix",
           "baseline": "Plain training"}
DECODERS = {"safuse": "joint", "lgcoamix": "local"}         # none: a plain classifier


# ------------------------------------------------------------------------------------------ flags

def gpu_list(text: str) -> list[int]:
    """argparse type: '0', '0,1' or '[0, 1]'."""
    if not re.fullmatch(r"\[?\s*\d+(\s*,\s*\d+)*\s*\]?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of GPUs such as 0,1")
    return [int(n) for n in re.findall(r"\d+", text)]


def parse_args(argv=None):
    """Return the flags; usage errors end the program with exit code 2."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("data and schedule").add_argument
    add("--method", choices=METHODS, default="safuse")
    add("--NUM_CLASS", type=positive, default=None, help="if given, the data must have so many")
    add("--padding", type=count, default=4, help="pixels around an image before its random crop "
        "(of sets in memory)")
    add_boolean(add, "--normalise", False,
                "images in units of the data set's deviation instead of in [0, 1]")
    add("--start_epoch", "--START_EPOCH", type=count, default=None,
        help="first epoch, counted from 0")
    add("--RESUME", type=flags.boolean, nargs="?", const=True, default=False, metavar="BOOL",
        help="the same as --resume auto")
    add("--schedule", choices=[*SCHEDULES, "step"], help="of the learning rate; A, B and C are the "
        "papers' and count epochs to 600 (C: 300)")
    add("--milestones", type=count, nargs="*", default=[], help="step: epochs of the LR changes")
    add("--gamma", type=amount, default=0.1, help="step: LR factor at these epochs")
    add_boolean(add, "--nesterov", False, "Nesterov's momentum")
    add("--gpu_ids", type=gpu_list, default=None, metavar="N[,N…]",
        help="GPUs to use; with several the program restarts itself under torchrun")

    add = parser.add_argument_group("mixing").add_argument
    add("--cutmix_prob", type=share, default=0.5, help="share of the batches that are mixed")
    add("--p_binom", "--Burn_prob", type=share, default=0.5,
        help="probability of pasting a superpixel; 0: nothing is mixed")
    add("--N_min", type=number(float, low=1, high=1e6), help="superpixels wanted of an image, "
        "at least")
    add("--N_max", type=number(float, low=1, high=1e6), help="and at most")
    add("--compactness", type=number(above=0), help="of the superpixels, against colour")
    add("--superpixels", choices=["slic", "skimage"], default="slic",
        help="slic: ours, batched on the device; skimage: scikit-image's, on the CPU")
    add("--cells", type=positive, default=3, help="occamix: most attentive cells of an image")
    add("--beta", type=amount, default=1.0, help="cutmix: Beta parameter")

    add = parser.add_argument_group("safuse and lgcoamix").add_argument
    add("--topN_local_ratio", type=number(low=1e-3, high=1),
        help="share of an image's superpixels, by attention, that is classified one by one")
    add("--loss_gamma_CE", type=amount, help="weight of the superpixels' cross entropy")
    add("--loss_gamma_SCL", type=amount, help="weight of their contrastive loss")
    add("--temp", type=number(above=0), default=0.7, help="temperature of the contrastive loss")
    add("--base_temp", type=number(above=0), default=0.07, help="its base temperature")
    add_boolean(add, "--gather", True, "contrast the superpixels of all processes, not of each")
    add("--attention_score", choices=network.SCORES, default="post_norm",
        help="sum over a superpixel's channels after LayerNorm (as published) or before it")
    add("--label_share", choices=["both", "attention"],
        help="the label's share of image b is its share of attention, or the mean of this and of "
             "the area; with attention alone at least one superpixel is classified")
    flags.add_flags(
        parser, data.NAMES, network.ARCHS,
        {"data_dir": ["--data_path"], "epochs": ["--NB_EPOCH"], "lr": ["--LR"],
         "batch_size": ["--BATCH_SIZE", "-b"]},
        dataset="cifar100", arch="resnet18", weight_decay=5e-4, workers=2, pretrained=None)

    first = parser.peek(argv)
    parser.set_defaults(**defaults(first.method, first.dataset, first.arch, first.image_size))
    args = parser.parse_args(argv)
    args.resume = args.resume or ("auto" if args.RESUME else "")
    del args.RESUME                             # said by --resume, now and in the checkpoint
    for name in ("N_min", "N_max"):
        if getattr(args, name) % 1:
            parser.error(f"--{name} {getattr(args, name)} is not a whole number")
        setattr(args, name, int(getattr(args, name)))
    if args.N_min > args.N_max:
        parser.error(f"--N_min {args.N_min} is more than --N_max {args.N_max}")
    if args.milestones and args.schedule != "step":
        parser.error("--milestones are for --schedule step")
    if args.nesterov and not args.momentum:
        parser.error("--nesterov needs --momentum")
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        parser.error(f"--start_epoch {args.start_epoch}: the last epoch is {args.epochs - 1}")
    return args


# ----------------------------------------------------------------------------------------- mixing

class Mixed(NamedTuple):
    """A batch for the network, with what the loss and the preview need."""
    images: torch.Tensor                        # (B, 3, H, W)
    perm: torch.Tensor | None = None            # (B,) partners
    ratio: torch.Tensor | None = None           # (B,) share of the first image's label
    labels: torch.Tensor | None = None          # (B, H, W) superpixels of the images
    mask: torch.Tensor | None = None            # (B, H, W) occamix: what is pasted
    fused: torch.Tensor | None = None           # (B, H, W) superpixels of the mixed images,
    from_b: torch.Tensor | None = None          # (B, S) and which of these are pasted


def is_mixed(args, epoch: int, step: int) -> bool:
    """Return whether this step's batch is mixed, the same on all processes."""
    if args.method == "baseline" or args.p_binom == 0:
        return False
    generator = torch.Generator().manual_seed(distributed.seed_of(args.seed, "mixed", epoch, step))
    return bool(torch.rand((), generator=generator) < args.cutmix_prob)


def mix_batch(net, images, args, info, generator) -> Mixed:
    """Mix a batch by --method; every random number comes from `generator`."""
    n, (height, width) = len(images), images.shape[-2:]
    compiled = partial(runtime.compiled, args=args)
    perm = draw_perm(n, generator).to(images.device, non_blocking=True)
    if args.method == "cutmix":
        lam = draw_lambda(args.beta, generator)
        mixed, ratio = compiled(cutmix)(images, perm, draw_centre(height, width, generator), lam)
        return Mixed(mixed, perm, ratio)

    # One segmentation of an image serves in both its roles
    segments = mixing.draw_segments(n, args.N_min, args.N_max, generator)
    slic = compiled(superpixels.slic) if args.superpixels == "slic" else superpixels.slic_skimage
    labels = slic(unnormalise(images, info), segments, args.compactness)
    most = superpixels.most_superpixels(torch.arange(args.N_min, args.N_max + 1), height, width)
    if args.method == "occamix":
        with runtime.autocast(args, images.device):
            scores = network.attention_scores(net, images).float()
        mask = compiled(mixing.attentive_mask)(scores[perm], labels[perm], args.cells, num_b=most)
        return Mixed(mixing.paste(images, perm, mask), perm, 1 - mask.float().mean((1, 2)),
                     labels, mask)

    chosen = mixing.draw_chosen(n, most, args.p_binom, generator)
    trim = False if args.gather and distributed.world() > 1 else None   # ranks: equal shapes
    mixed, fused, from_b = compiled(mixing.superpixel_mix)(
        images, perm, labels, labels[perm], chosen, num_a=most, trim=trim)
    return Mixed(mixed, perm, labels=labels, fused=fused, from_b=from_b)


def label_shares(scores, counts, from_b):
    """Return the second image's share (B,) of the label by area and by attention."""
    return mixing.area_ratio(counts, from_b), mixing.attention_ratio(scores.sigmoid(), counts,
                                                                     from_b)


# --------------------------------------------------------------------------------------- training

def superpixel_loss(outputs, labels, mixed, args):
    """Return the loss of a mixed batch of SAFuse or LGCOAMix."""
    logits, local, scores, counts = outputs
    area, attention = label_shares(scores, counts, mixed.from_b)
    lam = attention if args.label_share == "attention" else (area + attention) / 2
    loss = soft_cross_entropy(logits, soft_targets(labels, mixed.perm, 1 - lam, logits.shape[1]))

    # The most attentive superpixels are classified and contrasted, each with its own label
    index, kept = mixing.top_superpixels(scores, counts, args.topN_local_ratio,
                                         at_least_one=args.label_share == "attention")
    local = local.gather(1, index[..., None].expand(-1, -1, local.shape[2]))
    own = losses.superpixel_labels(labels, mixed.perm, mixed.from_b).gather(1, index)
    weights = scores.sigmoid().gather(1, index) if args.method == "safuse" else None
    return loss + args.loss_gamma_CE * losses.local_cross_entropy(local, own, kept, weights) \
        + args.loss_gamma_SCL * losses.superpixel_contrastive(
            local, own, kept, weights, temperature=args.temp, base_temperature=args.base_temp,
            gather=args.gather)


def training_step(net, model, images, labels, args, info, mixed_step, generator, scaler):
    """Compute the gradients of one step; return the loss and the logits."""
    mixed = mix_batch(net, images, args, info, generator) if mixed_step else Mixed(images)
    idle = []                                   # parameters that this step does not use
    with runtime.autocast(args, images.device):
        if mixed.fused is not None:
            outputs = model(mixed.images, mixed.fused, mixed.from_b.shape[1])
        else:
            outputs = model(mixed.images),
            idle = net.local_parameters()
    if mixed.fused is not None:
        loss = superpixel_loss(outputs, labels, mixed, args)
    elif mixed.perm is not None:
        loss = soft_cross_entropy(outputs[0], soft_targets(labels, mixed.perm, mixed.ratio,
                                                           info.num_classes))
    else:
        loss = F.cross_entropy(outputs[0].float(), labels)
    total = loss
    if distributed.world() > 1:                     # ranks wait for the gradient of every parameter
        total = loss + sum(0 * p.sum() for p in idle)
    scaler.scale(total).backward()
    for parameter in idle:                      # no gradient: weight decay leaves it alone, too
        parameter.grad = None
    return loss, outputs[0]


def train_one_epoch(net, model, loader, optimizer, scaler, args, info, run):
    """Train from the run's step to the end of its epoch; return the sums of loss and hits."""
    net.train()
    sums = StepSums(len(loader), run.device, run.sums)
    for step, (images, labels) in run.steps(loader):
        generator = distributed.step_generator(args.seed, run.epoch, step)
        optimizer.zero_grad(set_to_none=True)
        loss, logits = training_step(net, model, images, labels, args, info,
                                     is_mixed(args, run.epoch, step), generator, scaler)
        scaler.step(optimizer)
        scaler.update()
        sums.add(step, loss, logits, labels)
        if run.ends(step, sums, args.print_freq):
            break
    sums.check(run.epoch)
    return sums


def report(net, test, args, info, run, checkpoint=None):
    """Report the evaluation, and weakly supervised localisation where cub200 has its boxes."""
    evaluation.report(net, test, args, info, run, checkpoint)
    if not args.cam and args.dataset == "cub200" and test.data.boxes:
        log("localisation (IoU at least 0.5): {:.2f} % with the right class, {:.2f} % "
                    "with the class given".format(*localise(net, test, args)))


@torch.no_grad()
def draw_preview(path, net, train, args, info):
    """Draw the first training batch, mixed by the method; return the path."""
    train.set_epoch(0)
    images, labels = next(iter(train))
    first = {label: i for i, label in reversed(list(enumerate(labels.tolist())))}
    chosen = sorted(first.values())[:8]                     # of eight classes
    images, labels, args = images[chosen], labels[chosen], copy.copy(args)
    args.beta, title = 32.0, f"{METHODS[args.method]} on {info.name}"       # lambda near a half
    generators = (distributed.step_generator(args.seed, 0, step) for step in range(99))
    own = torch.arange(len(chosen))
    step = next((step for step, generator in enumerate(generators)
                 if (draw_perm(len(chosen), generator) != own).all()), 0)   # no image with itself
    generator = distributed.step_generator(args.seed, 0, step)
    if args.method == "baseline":
        return plots.preview(path, title, {"image": images},
                            F.one_hot(labels, info.num_classes).float(), info)
    net.eval()
    mixed = mix_batch(net, images, args, info, generator)
    perm, shares, mask = mixed.perm, {"area": mixed.ratio}, mixed.mask
    if mixed.labels is None:
        rows = {"image": images, "partner": images[perm], "mixed": mixed.images}
        return plots.preview(path, title, rows, soft_targets(labels, perm, mixed.ratio,
                                                            info.num_classes), info)
    if mixed.fused is not None:
        _, _, scores, counts = net(mixed.images, mixed.fused, mixed.from_b.shape[1])
        area, attention = label_shares(scores, counts, mixed.from_b)
        shares = {"area": 1 - area, "attention": 1 - attention}
        mask = mixed.from_b.gather(1, mixed.fused.flatten(1)).view(mixed.fused.shape)
    seen, shown = unnormalise(images, info), unnormalise(mixed.images, info)
    names = [info.classes[label][:12] for label in labels.tolist()]
    return picture.draw_mixed(path, title, seen, shown, perm, mixed.labels, mask, names, shares)


def choose_gpus(numbers: list[int]):
    """Show torch these GPUs (of those that a scheduler gave); one process for each."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
        seen[n] if len(seen) > n and seen[n] else str(n) for n in numbers)
    if not torch.cuda.is_available():
        raise RunError(f"--gpu_ids {numbers}: torch sees no such GPU; without the flag the program "
                       "finds what there is")
    runtime.use_gpus(len(numbers))


def main(argv=None):
    """Train, evaluate or draw a preview, as the flags say; return the network."""
    args = parse_args(argv)
    if args.gpu_ids and args.device != "cpu":
        choose_gpus(args.gpu_ids)
    device = runtime.setup(args)

    # Data, network, optimizer
    pixels = {} if args.normalise else {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    recipe = Recipe(padding=args.padding, **CROPS.get(args.dataset, {}), **pixels)
    train, test, info = data.load(
        args.dataset, args.data_dir, recipe, batch_size=args.batch_size, device=device,
        seed=args.seed, loader=args.loader, image_size=args.image_size, val_split=args.val_split,
        labels_per_class=args.labels_per_class, workers=args.workers)
    if args.NUM_CLASS not in (None, info.num_classes):
        raise RunError(f"--NUM_CLASS {args.NUM_CLASS}: {info.name} has {info.num_classes} classes")
    torch.manual_seed(args.seed)
    decoder = DECODERS.get(args.method, "none")
    net, model = runtime.prepare(
        network.build(args.arch, info.num_classes, info.image_size, decoder=decoder,
                      initial_channels=args.initial_channels, score=args.attention_score,
                      width=info.width),
        args, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, nesterov=args.nesterov)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; method {args.method}")

    # The run: its folder, what it holds already, and the place to go on from
    run = Run(args, device, info, [args.method], {"method": args.method},
                     model=net, optimizer=optimizer, scaler=scaler)
    if args.evaluate or args.preview:
        checkpoint = run.load_weights()
        if not checkpoint:
            load_pretrained(net.encoder, args)
        if args.evaluate:
            report(net, test, args, info, run, checkpoint)
        elif distributed.rank() == 0:
            log(f"mixed images: {draw_preview(args.preview, net, train, args, info)}")
        return net
    run.start(args.start_epoch)
    if not run.resumed:
        load_pretrained(net.encoder, args)

    # The epochs
    while not run.over:
        rate = learning_rate(run.epoch, args.lr, args.schedule, args.milestones, args.gamma)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums = train_one_epoch(net, model, train, optimizer, scaler, args, info, run)
        row, timing = {"lr": rate} | sums.result(), run.clock()
        distributed.share_buffers(net)
        row |= evaluation.columns(evaluation.evaluate(net, test, args, info))
        run.end_epoch(row | timing, row["test_accuracy"], sums)

    # The report
    report(net, test, args, info, run)
    run.finish(f"{args.method}, {args.arch} on {info.name}", draw_preview, net, train, args, info)
    return net


if __name__ == "__main__":
    runtime.launch(main)
