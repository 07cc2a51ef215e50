#!/usr/bin/env python3
"""SAFuse (Sun and Dornaika 2024) and the superpixel methods before it, LGCOAMix and OcCaMix, in one
program, with CutMix and plain training to compare them with.

CPU trial   python safuse/main.py --dataset digits --initial_channels 16 --epochs 12 \\
                --schedule step --milestones 6 10 --batch_size 100 --LR 0.05
one GPU     python safuse/main.py --method safuse --dataset cifar100 --data_dir data
eight GPUs  torchrun --nproc_per_node=8 safuse/main.py --method lgcoamix --dataset cub200 …
two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                --rdzv_endpoint=HOST:29500 safuse/main.py --method lgcoamix …"""
import dataclasses
import os
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
from torchvision.ops import box_iou

from common import data, distributed, evaluation, flags, plots, runtime
from common.data.recipe import Recipe, unnormalise
from common.distributed import log
from common.errors import RunError
from common.flags import add_boolean, amount, chosen, count, number, positive, share
from common.mixing import cutmix, draw_centre, draw_lambda, draw_perm, probabilities, soft_targets
from common.models.weights import load_pretrained
from common.run import Run, about
from safuse import losses, mixing, network, superpixels
from safuse.recipes import CROPS, SCHEDULES, defaults, learning_rate

METHODS = {"safuse": "SAFuse", "lgcoamix": "LGCOAMix", "occamix": "OcCaMix", "cutmix": "CutMix",
           "baseline": "Plain training"}
DECODERS = {"safuse": "joint", "lgcoamix": "local"}         # none: a plain classifier


def parse_args(argv=None):
    """Return the flags; usage errors exit with code 2."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("data and schedule").add_argument
    add("--method", choices=METHODS, default="safuse", help="how batches are mixed")
    add("--NUM_CLASS", type=positive, help="if given, the data must have so many")
    add("--padding", type=count, default=4, help="pixels around an image before its random crop")
    add_boolean(add, "--normalise", False, "images in units of the data set's standard deviation")
    add("--start_epoch", "--START_EPOCH", type=count, help="first epoch, counted from 0")
    add("--RESUME", dest="resume", type=lambda text: "auto" * flags.boolean(text), nargs="?",
        const="auto", metavar="BOOL", help="the same as --resume auto")
    add("--schedule", choices=[*SCHEDULES, "step"], help="of the LR; A, B, C: the papers'")
    add("--milestones", type=count, nargs="*", default=[], help="step: epochs of the LR changes")
    add("--gamma", type=amount, default=0.1, help="step: LR factor at these epochs")
    add_boolean(add, "--nesterov", False, "Nesterov's momentum")
    add("--gpu_ids", type=lambda text: [*map(count, text.strip("[]").split(","))],
        metavar="N[,N…]", help="GPUs to use, a process on each")
    add = parser.add_argument_group("safuse, lgcoamix, occamix and cutmix").add_argument
    add("--cutmix_prob", type=share, default=0.5, help="share of the batches that are mixed")
    add = parser.add_argument_group("safuse, lgcoamix and occamix").add_argument
    add("--N_min", type=positive, help="least number of superpixels asked of an image")
    add("--N_max", type=positive, help="and the most")
    add("--compactness", type=number(above=0), help="of the superpixels, against colour")
    add("--superpixels", choices=["slic", "skimage"], default="slic", help="batched, or on the CPU")
    add = parser.add_argument_group("occamix").add_argument
    add("--cells", type=positive, default=3, help="most attentive cells of an image")
    add = parser.add_argument_group("safuse and lgcoamix").add_argument
    add("--p_binom", "--Burn_prob", type=share, default=0.5, help="share of superpixels pasted")
    add("--topN_local_ratio", type=number(low=1e-3, high=1),
        help="share of an image's superpixels, by attention, that are classified one by one")
    add("--loss_gamma_CE", type=amount, help="weight of the superpixels' cross entropy")
    add("--loss_gamma_SCL", type=amount, help="weight of their contrastive loss")
    add("--temp", type=number(above=0), default=0.7, help="temperature of the contrastive loss")
    add("--attention_score", choices=["post_norm", "pre_norm"], default="post_norm",
        help="sum over a superpixel's channels after LayerNorm (as published) or before it")
    add("--label_share", choices=["both", "attention"], help="both: mean of attention and area")
    flags.add_flags(parser, data.NAMES, network.ARCHS, {
        "data_dir": ["--data_path"], "epochs": ["--NB_EPOCH"], "lr": ["--LR"],
        "batch_size": ["--BATCH_SIZE", "-b"]
    }, dataset="cifar100", arch="resnet18", weight_decay=5e-4, workers=2, pretrained=None)

    first = parser.peek(argv)
    parser.set_defaults(**defaults(first.method, first.dataset, first.arch, first.image_size))
    args = parser.parse_args(argv)
    if args.N_min > args.N_max:
        parser.error(f"--N_min {args.N_min} is more than --N_max {args.N_max}")
    parser.only(args, args.schedule == "step", "milestones gamma", "--schedule step")
    parser.only(args, args.dataset not in data.STREAMED, "padding", "sets in memory")
    parser.idle(args, (args.device != "cpu", "gpu_ids", "a GPU"))
    return args


class Mixed(NamedTuple):
    """A batch for the network, with what the loss and the preview need."""
    images: torch.Tensor                        # (B, 3, H, W)
    perm: torch.Tensor | None = None            # (B,) partners
    ratio: torch.Tensor | None = None           # (B,) share of the first image, by area
    labels: torch.Tensor | None = None          # (B, H, W) superpixels of the images
    fused: torch.Tensor | None = None           # (B, H, W) superpixels of the mixed images,
    from_b: torch.Tensor | None = None          # (B, S) and which of these are pasted


def is_mixed(args, epoch: int, step: int) -> bool:
    """Return whether this step's batch is mixed, the same on all processes."""
    if args.method == "baseline" or args.p_binom == 0 and args.method not in ("cutmix", "occamix"):
        return False
    generator = torch.Generator().manual_seed(distributed.seed_of(args.seed, "mixed", epoch, step))
    return bool(torch.rand((), generator=generator) < args.cutmix_prob)


def mix_batch(net, images, args, info, generator) -> Mixed:
    """Mix a batch by --method; every random number comes from `generator`."""
    n, (height, width) = len(images), images.shape[-2:]
    compiled = partial(runtime.compiled, args=args)
    if args.method == "baseline":
        return Mixed(images)
    perm = draw_perm(n, generator).to(images.device, non_blocking=True)
    if args.method == "cutmix":
        lam = draw_lambda(1.0, generator)
        mixed, ratio = compiled(cutmix)(images, perm, draw_centre(height, width, generator), lam)
        return Mixed(mixed, perm, ratio)

    # One segmentation of an image serves in both its roles
    segments = torch.randint(args.N_min, args.N_max + 1, (n,), generator=generator)
    slic = compiled(superpixels.slic) if args.superpixels == "slic" else superpixels.slic_skimage
    labels = slic(unnormalise(images, info), segments, args.compactness)
    most = superpixels.most_superpixels(torch.arange(args.N_min, args.N_max + 1), height, width)
    if args.method == "occamix":
        training = net.training
        net.eval()
        with torch.no_grad(), runtime.autocast(args, images.device):
            scores = net.activation_maps(images).amax(1).float()     # of the classes
        net.train(training)
        pasted = compiled(mixing.attentive_superpixels)(scores[perm], labels[perm], args.cells,
                                                        num_b=most)
    else:
        pasted = torch.rand(n, most, generator=generator) < args.p_binom
    trim = False if distributed.world() > 1 else None       # the loss gathers equal shapes
    mixed, fused, from_b = compiled(mixing.superpixel_mix)(
        images, perm, labels, labels[perm], pasted, num_a=most, trim=trim)
    ratio = 1 - from_b.gather(1, fused.flatten(1)).float().mean(1)
    return Mixed(mixed, perm, ratio, labels, fused, from_b)


def targets_of(labels, mixed, args, num_classes, scores=None, counts=None):
    """Return soft targets (B, num_classes), with attention if superpixels' scores are given."""
    if mixed.perm is None:
        return probabilities(labels, num_classes)
    ratio = mixed.ratio
    if scores is not None:
        attention = 1 - mixing.attention_ratio(scores.sigmoid(), counts, mixed.from_b)
        ratio = attention if args.label_share == "attention" else (ratio + attention) / 2
    return soft_targets(labels, mixed.perm, ratio, num_classes)


def superpixel_loss(outputs, labels, mixed, args):
    """Return the loss of a mixed batch of SAFuse or LGCOAMix."""
    logits, local, scores, counts = outputs
    targets = targets_of(labels, mixed, args, logits.shape[1], scores, counts)
    # The most attentive superpixels are classified and contrasted, each with its own label
    index, selected = mixing.top_superpixels(scores, counts, args.topN_local_ratio,
                                             at_least_one=args.label_share == "attention")
    local = local.gather(1, index[..., None].expand(-1, -1, local.shape[2]))
    own = torch.where(mixed.from_b, labels[mixed.perm][:, None], labels[:, None]).gather(1, index)
    weights = scores.sigmoid().gather(1, index) if args.method == "safuse" else None
    contrast = losses.superpixel_contrastive(local, own, selected, weights, temperature=args.temp)
    return F.cross_entropy(logits.float(), targets) + args.loss_gamma_SCL * contrast \
        + args.loss_gamma_CE * losses.local_cross_entropy(local, own, selected, weights)


def training_step(net, model, images, labels, args, info, mixed_step, generator, scaler):
    """Leave the gradients of one step in the parameters; return the loss and the logits."""
    if mixed_step and args.method == "occamix":
        distributed.share_buffers(net)              # each rank has its own; attention is of these
    mixed = mix_batch(net, images, args, info, generator) if mixed_step else Mixed(images)
    idle = []                                       # parameters that this step does not use
    with runtime.autocast(args, images.device):
        if mixed_step and args.method in DECODERS:
            logits, *_ = outputs = model(mixed.images, mixed.fused, mixed.from_b.shape[1])
            loss = superpixel_loss(outputs, labels, mixed, args)
        else:
            logits, idle = model(mixed.images), net.local_parameters()
            targets = targets_of(labels, mixed, args, info.num_classes)
            loss = F.cross_entropy(logits.float(), targets)
    # ranks wait for the gradient of every parameter
    total = loss + sum(0 * p.sum() for p in idle) if distributed.world() > 1 else loss
    scaler.scale(total).backward()
    for parameter in idle:                          # neither weight decay nor momentum moves it
        parameter.grad = None
    return loss, logits


def train_one_epoch(net, model, loader, optimizer, scaler, args, info, run):
    """Train to the end of the run's epoch; run.sums takes loss and hits."""
    net.train()
    for step, (images, labels) in run.steps(loader):
        generator = distributed.step_generator(args.seed, run.epoch, step)
        optimizer.zero_grad(set_to_none=True)
        loss, logits = training_step(net, model, images, labels, args, info,
                                     is_mixed(args, run.epoch, step), generator, scaler)
        scaler.step(optimizer)
        scaler.update()
        run.sums.add(step, loss, logits, labels)


def report(net, test, args, info, run, checkpoint=None):
    """Report the evaluation, and weakly supervised localisation where cub200 has its boxes."""
    evaluation.report(net, test, args, info, run, checkpoint)
    if not args.cam and args.dataset == "cub200" and test.data.boxes:
        log("localisation (IoU at least 0.5): {:.2f} % with the right class, {:.2f} % "
            "with the class given".format(*localise(net, test, args)))


@torch.no_grad()
def localise(net, test, args) -> tuple[float, float]:
    """Return the % of test images whose box has an IoU of 0.5: right class, class given."""
    boxes, hits, start = test.boxes(), torch.zeros(3, device=test.device), 0
    net.eval()
    for images, labels in evaluation.batches(test, args):
        with runtime.autocast(args, images.device):
            logits, maps = net(images), net.activation_maps(images)
        found = network.boxes_of(maps[torch.arange(len(labels)), labels], *images.shape[2:])
        given = box_iou(found, boxes[start:start + len(labels)].cpu().float()).diagonal() >= 0.5
        right = given & (logits.argmax(1) == labels).cpu()
        hits += torch.tensor([right.sum(), given.sum(), len(labels)], device=hits.device)
        start += len(labels)
    right, given, count = distributed.total(hits).tolist()
    return 100 * right / count, 100 * given / count


@torch.no_grad()
def draw_preview(path, net, train, args, info):
    """Draw training images mixed by the method, with their superpixels; return the path."""
    train.set_epoch(0)
    images, labels = (part[:64] for part in next(iter(train)))
    net.eval()
    mixed = mix_batch(net, images, args, info, distributed.step_generator(args.seed, 0, 0))
    attention = net(mixed.images, mixed.fused, mixed.from_b.shape[1])[2:] \
        if args.method in DECODERS else ()
    targets = targets_of(labels, mixed, args, info.num_classes, *attention)
    rows = {"image": images, "partner": None if mixed.perm is None else images[mixed.perm],
            "mask": None, "mixed": mixed.images}
    if mixed.labels is not None:
        of = {"image": mixed.labels, "partner": mixed.labels[mixed.perm], "mixed": mixed.fused}
        rows |= {name: superpixels.borders(unnormalise(rows[name], info), of[name]) for name in of}
        rows["mask"] = mixed.from_b.gather(1, mixed.fused.flatten(1)).view(mixed.fused.shape)
        info = dataclasses.replace(info, mean=(0.0,) * 3, std=(1.0,) * 3)
    return plots.preview(path, f"{METHODS[args.method]} on {info.name}", rows, targets, info)


def choose_gpus(numbers: list[int]):
    """Show torch these GPUs of those that a scheduler gave; torchrun's processes choose alike."""
    given = os.environ.setdefault("GIVEN_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    names = given.split(",") if given else [str(n) for n in range(max(numbers) + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[n] for n in numbers if n < len(names))
    if not torch.cuda.is_available():
        raise RunError(f"--gpu_ids {numbers}: torch sees no such GPU")
    runtime.use_gpus(len(numbers))


def main(argv=None):
    """Train, evaluate or draw as the flags say; return the network."""
    args = parse_args(argv)
    if args.gpu_ids and args.device != "cpu":
        choose_gpus(args.gpu_ids)
    device = runtime.setup(args)

    pixels = {} if args.normalise else {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    recipe = Recipe(padding=args.padding, **CROPS.get(args.dataset, {}), **pixels)
    train, test, info = data.load(args.dataset, args.data_dir, recipe, device=device,
                                  **chosen(args, flags.LOADING))
    if args.NUM_CLASS not in (None, info.num_classes):
        raise RunError(f"--NUM_CLASS {args.NUM_CLASS}: {info.name} has {info.num_classes} classes")
    torch.manual_seed(args.seed)
    net, model = runtime.prepare(network.Network(
        args.arch, info.num_classes, info.image_size, width=info.width,
        decoder=DECODERS.get(args.method, "none"), initial_channels=args.initial_channels,
        score=args.attention_score), args, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay,
                                nesterov=args.nesterov and args.momentum > 0)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; method {args.method}")

    run = Run(args, device, info, [args.method], {"method": args.method}, model=net,
              optimizer=optimizer, scaler=scaler)
    if args.evaluate or args.preview:
        checkpoint = run.load_weights(train, test) or load_pretrained(net.encoder, args)
        if args.evaluate:
            report(net, test, args, info, run, checkpoint)
        elif distributed.rank() == 0:
            log(f"mixed images: {draw_preview(args.preview, net, train, args, info)}")
        return net
    run.start(args.start_epoch)
    if not run.resumed:
        load_pretrained(net.encoder, args)

    while not run.over:
        rate = learning_rate(run.epoch, args.lr, args.schedule, args.milestones, args.gamma)
        for group in optimizer.param_groups:
            group["lr"] = rate
        train_one_epoch(net, model, train, optimizer, scaler, args, info, run)
        row = {"lr": rate} | run.sums.result()
        row |= evaluation.columns(evaluation.evaluate(net, test, args, info))
        run.end_epoch(row, row["test_accuracy"])

    report(net, test, args, info, run)
    run.finish(f"{args.method}, {args.arch} on {info.name}", draw_preview, net, train, args, info)
    return net


if __name__ == "__main__":
    runtime.launch(main)
