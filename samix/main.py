#!/usr/bin/env python3
"""SAMix (Li et al. 2021) and AutoMix (Liu et al., ECCV 2022): a small network, the MixBlock, learns
how to mix two images while the classifier learns from the mixtures. Beside them Mixup and CutMix.

a CPU trial       python samix/main.py --dataset digits --initial_channels 16 --epochs 12 --lr 0.05
one GPU           python samix/main.py --config cifar100_r18 --data_dir data --amp bf16
eight GPUs        torchrun --nproc_per_node=8 samix/main.py --config imagenet_r50 \\
                      --data_dir imagenet --amp bf16
two machines      torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                      --rdzv_endpoint=HOST:29500 samix/main.py --config imagenet_r50 …

--batch_size counts the images of a step over all processes.
"""
import argparse
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
from torch import Tensor, nn

from common import data, distributed, evaluation, flags, mixing, models, plots, runtime
from common.data import STREAMED, Recipe
from common.distributed import log
from common.flags import add_boolean
from common.mixing import draw_lambda, soft_targets
from common.models import weights
from common.models.features import build_backbone
from common.randaugment import randaugment
from common.run import Run, about
from common.sums import StepSums
from samix import configs, mixblock
from samix.evaluation import headline, measure, mixtures, report, warn_of_collapse
from samix.losses import head_loss
from samix.mixblock import MixBlock, draw_partners, mix
from samix.momentum import Branch, cosine, ema_momentum, momentum_copy, momentum_update
from samix.schedule import parameter_groups, step_rates

LEARNED = ("samix", "automix")          # methods with a MixBlock


# ------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    """The flags; usage errors end the program with exit code 2."""
    parser = flags.Parser(__doc__)
    amount, share, count = flags.amount, flags.share, flags.count
    add = parser.add_argument_group("run").add_argument
    add("--config", default="cifar100_r18", metavar="NAME", help="sets the flags below, unless the "
        f"command line does: one of the authors' files, or {', '.join(configs.CONFIGS)}")
    add("--method", choices=configs.METHODS, default="samix")

    add = parser.add_argument_group("data and network").add_argument
    add("--crop", choices=["zero", "reflect", "resized"], help="of sets in memory: of the image "
        "with a border of zeros or of its reflection, or of a random part, resized")
    add("--padding", type=count, help="width of that border")
    add("--crop_scale", type=flags.number(above=0, high=1), help="least area of a resized crop")
    add_boolean(add, "--resize_first", None, "sets read from disk: shorter side first 256/224·size")
    add_boolean(add, "--randaugment", None, "two random operations, magnitude 7 ± 0.5 of 10")
    add("--mean", type=flags.number(), nargs=3, metavar="R", help="of pixels in [0, 1]")
    add("--std", type=flags.number(above=0), nargs=3, metavar="R")
    add_boolean(add, "--drop_last", None, "no partial batch at an epoch's end")
    add("--layer", type=flags.positive, help="stage (DeiT: block), from 1, that the MixBlock sees")
    add("--drop_path", type=share, help="of transformers: stochastic depth of the last block")

    add = parser.add_argument_group("mixing").add_argument
    add("--alpha", type=amount, help="lambda ~ Beta(alpha, alpha)")
    add("--variant", choices=["samix", "automix"], help="of the MixBlock")
    add_boolean(add, "--lam_concat", None, "automix: lambda is an input channel of the MixBlock")
    add("--lam_mul_k", type=flags.number(), help="scale of the features: -1 lambda, else a cubic")
    add("--mode", choices=["bilinear", "nearest"], nargs="+",
        help="how masks are enlarged; of several one is drawn each step")
    add("--dropout", type=share, help="of the MixBlock's values")
    add("--mask_adjust", type=share, help="probability of moving a batch's mean masks to lambda")
    add("--lam_margin", type=share, help="nearer to 0 or 1 branch q sees plain Mixup")
    add("--switch_off", type=share, help="probability, annealed to 0 by a cosine, that a step has "
        "mix_k's loss, without which the MixBlock learns from its mask loss alone; 0: all steps")
    add_boolean(add, "--no_repeat", None, "no image is its own partner")

    add = parser.add_argument_group("losses").add_argument
    add("--head", choices=["ce", "bce"], help="cross-entropy, or binary ones summed over classes")
    add("--neg_weight", type=amount, help="bce, mix_k: weight of classes not in the image")
    add("--label_smoothing", type=share, help="of cross-entropy")
    add("--one_weight", type=amount, help="of the loss of clean images")
    add("--mix_q_weight", type=amount, help="of the loss of mixed images")
    add("--mix_k_weight", type=amount, help="of the MixBlock's loss through branch k")
    add("--mask_loss", type=amount, help="weight of the masks' loss")
    add("--mask_loss_kind", choices=mixblock.MASK_LOSSES)
    add("--mask_margin", type=share, help="deviation of the mean mask from lambda that is free")
    add_boolean(add, "--mask_anneal", None, "that weight falls to 0 along a cosine")

    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", choices=["sgd", "adamw"])
    add("--min_lr", type=amount, help="at the end of the cosine")
    add("--lr_every", choices=["epoch", "step"], help="how often the cosine moves")
    add("--milestones", type=count, nargs="*", help="no cosine: epochs at which the rates change")
    add("--gamma", type=amount, default=0.1, help="factor at these epochs")
    add("--warmup_epochs", type=count, help="linear warm-up, not of the MixBlock")
    add("--warmup_ratio", type=share, help="share of the rate that it begins with")
    add_boolean(add, "--nesterov", False, "Nesterov's momentum")
    add("--clip_grad", type=amount, help="largest norm of the gradients; 0: not clipped")
    add("--block_lr", type=amount, help="of the MixBlock, like the next two")
    add("--block_min_lr", type=amount)
    add("--block_momentum", type=share)
    add("--ema_base", type=share, help="branch k: momentum up to a share ema_start of the run")
    add("--ema_end", type=share, help="what it then grows to")
    add("--ema_start", type=share)
    flags.add_flags(parser, data.NAMES, models.ALL, {"lr": ["--learning_rate"]}, momentum=None,
                    pretrained=None)

    first = parser.peek(argv)
    try:
        config = configs.config(first.config, first.method)
    except ValueError as fault:
        parser.error(f"--config: {fault}")
    if first.dataset not in (None, config["dataset"]):
        del config["image_size"], config["mean"], config["std"]     # every data set has its own
        if first.dataset in STREAMED:
            config["crop"] = "resized"
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    if all(config[f"block_{name}"] == config[name] for name in ("lr", "min_lr")):
        for name in ("lr", "min_lr"):           # CIFAR's are the backbone's own
            if getattr(first, f"block_{name}") is None:
                setattr(args, f"block_{name}", getattr(args, name))
    for own, least in (("lr", "min_lr"), ("block_lr", "block_min_lr")):
        if args.milestones is None and getattr(args, own) < getattr(args, least):
            parser.error(f"--{own} {getattr(args, own)} is below --{least} {getattr(args, least)}, "
                         "to which it should fall: give both")
    if bool(args.mean) != bool(args.std):
        parser.error("--mean and --std: give both or neither")
    if args.drop_path and args.arch not in models.NAMES["transformer"]:
        parser.error(f"--drop_path is for {', '.join(models.NAMES['transformer'])}")
    if args.nesterov and (args.optimizer != "sgd" or args.momentum == 0):
        parser.error("--nesterov needs --optimizer sgd and a --momentum")
    if args.optimizer == "adamw" and first.momentum is not None:
        parser.error("--momentum is of --optimizer sgd")
    if args.head == "bce" and args.label_smoothing:
        parser.error("--label_smoothing is of --head ce: give --label_smoothing 0")
    if args.method in LEARNED and args.alpha == 0:
        parser.error("--alpha 0: the MixBlock learns from mixtures alone")
    return args


# --------------------------------------------------------------------------------------- one step

class Draws(NamedTuple):
    """The random choices of one step: for the MixBlock's losses (mb) and for branch q (bb)."""
    lam_mb: Tensor                  # scalars: shares of the first image
    lam_bb: Tensor
    perm_bb: Tensor                 # (B,) partners
    perm_mb: Tensor
    modes: tuple = (None, None)     # of the masks' enlargement: mb's, bb's
    adjust: bool = False            # the mean of q's masks to lambda
    switched_off: bool = False      # the MixBlock learns from its mask loss alone


def draw_mixing(n: int, args, generator, fall: float, device="cpu") -> Draws:
    """Draws for n images; `fall`: from 1 to 0 over the run; partners are sent to `device`."""
    lam_mb, lam_bb = draw_lambda(args.alpha, generator, 2)
    perm_bb, perm_mb = torch.stack([draw_partners(n, generator, args.no_repeat) for _ in range(2)]
                                   ).to(device, non_blocking=True)
    modes = [args.mode[i] for i in torch.randint(len(args.mode), (2,), generator=generator)]
    adjust, off = torch.rand(2, generator=generator).tolist()
    return Draws(lam_mb, lam_bb, perm_bb, perm_mb, modes, adjust < args.mask_adjust,
                 0 < args.switch_off and off >= args.switch_off * fall)


class SAMix(nn.Module):
    """Branch q, its moving average k, and the MixBlock: losses of a batch."""

    without_graph = torch.no_grad       # of the masks that branch q learns from

    def __init__(self, q: Branch, block: MixBlock, args):
        super().__init__()
        self.q, self.k, self.block, self.args = q, momentum_copy(q), block, args

    def masks_for_q(self, features, draws: Draws, scale: int):
        """Masks (B, 2, H, W) of the images that branch q learns from; they get no gradient."""
        with self.without_graph():
            mask = self.block(features, draws.lam_bb, draws.perm_bb, scale, mode=draws.modes[1])
            if draws.adjust:
                mask = mixblock.adjust_mask(mask, draws.lam_bb)
            return mixblock.plain_near_ends(mask, draws.lam_bb, self.args.lam_margin)

    def forward(self, images, labels, draws: Draws, mask_weight: float):
        """(losses by name, logits of clean images, the two mixed batches mb and bb)."""
        args, num_classes = self.args, self.q.one.out_features
        loss = {"head": args.head, "smoothing": args.label_smoothing}
        with torch.no_grad():
            features = self.k.features(images)
        scale = images.shape[-1] // features.shape[-1]
        mask_mb = self.block(features, draws.lam_mb, draws.perm_mb, scale, mode=draws.modes[0])
        mask_bb = self.masks_for_q(features, draws, scale)
        self.columns = mixblock.mask_columns(mask_mb)       # of the log
        mix_mb, mix_bb = mix(images, mask_mb, draws.perm_mb), mix(images, mask_bb, draws.perm_bb)
        targets_mb, targets_bb = (
            soft_targets(labels, perm, lam, num_classes)
            for perm, lam in ((draws.perm_mb, draws.lam_mb), (draws.perm_bb, draws.lam_bb)))
        clean = self.q(images, "one")
        losses = {
            # through k, which does not learn, to the MixBlock alone
            "mask": mask_weight * mixblock.mask_loss(mask_mb, draws.lam_mb, args.mask_margin,
                                                     args.mask_loss_kind),
            # to branch q alone
            "one_q": args.one_weight * head_loss(clean, labels, **loss),
            "mix_q": args.mix_q_weight * head_loss(self.q(mix_bb, "mix"), targets_bb, **loss),
        }
        if not draws.switched_off:
            losses["mix_k"] = args.mix_k_weight * head_loss(
                self.k(mix_mb, "mix"), targets_mb, neg_weight=args.neg_weight, **loss)
        return losses, clean, (mix_mb, mix_bb)


def mix_baseline(images, labels, args, info, generator):
    """Mixup, CutMix or nothing: images, soft targets and partners."""
    perm, ratio = draw_partners(len(images), generator, args.no_repeat), torch.ones(())
    if args.method != "vanilla":
        lam = draw_lambda(args.alpha, generator)
    if args.method == "mixup":
        images, ratio = runtime.compiled(mixing.mixup, args)(images, perm, lam)
    elif args.method == "cutmix":
        centre = mixing.draw_centre(*images.shape[-2:], generator)
        images, ratio = runtime.compiled(mixing.cutmix, args)(images, perm, centre, lam)
    return images, soft_targets(labels, perm, ratio, info.num_classes), perm


def training_step(model, images, labels, args, info, generator, scaler, fall):
    """Leaves the gradients of one step in the parameters; returns the loss and the logits."""
    with runtime.autocast(args, images.device):
        if args.method in LEARNED:
            draws = draw_mixing(len(images), args, generator, fall, images.device)
            weight = args.mask_loss * (fall if args.mask_anneal else 1)
            losses, logits, _ = model(images, labels, draws, weight)
            loss = sum(losses.values())
        else:
            images, targets, _ = mix_baseline(images, labels, args, info, generator)
            logits = model(images)
            loss = head_loss(logits, targets, args.head, smoothing=args.label_smoothing)
    scaler.scale(loss).backward()
    return loss, logits


def train_one_epoch(net, model, loader, optimizer, scaler, args, info, run):
    """The rest of the epoch that `run` stands in; returns its sums of loss and hits."""
    net.train()
    sums, total = StepSums(len(loader), run.device, run.sums), args.epochs * len(loader)
    for step, (images, labels) in run.steps(loader):
        generator = distributed.step_generator(args.seed, run.epoch, step)
        done = run.epoch * len(loader) + step
        rates = step_rates(args, done, len(loader))
        for group in optimizer.param_groups:
            group["lr"] = rates[group["part"]]
        optimizer.zero_grad(set_to_none=True)
        loss, logits = training_step(model, images, labels, args, info, generator, scaler,
                                     cosine(done, total))
        if args.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if args.method in LEARNED:
            momentum_update(net.k, net.q, ema_momentum(done, total, args.ema_base, args.ema_end,
                                                       args.ema_start))
        sums.add(step, loss, logits, labels, **getattr(net, "columns", {}))
        if run.ends(step, sums, args.print_freq):
            break
    sums.check(run.epoch)
    return sums


def draw_preview(path, net, train, args, info, trained: bool = True):
    """Draw images of the first training batch, mixed near a half; return the path."""
    train.set_epoch(0)
    images, labels = (part[:32] for part in next(iter(train)))
    generator = distributed.step_generator(args.seed, 0, 0)
    title = f"{configs.METHODS[args.method]} on {info.name}"
    if args.method in LEARNED:
        perm = draw_partners(len(images), generator, True)
        rows = mixtures(net, images, images, perm, args, info)
        targets = soft_targets(labels, perm, torch.tensor(0.7), info.num_classes)   # the last row's
        title += "" if trained else ": the MixBlock before training"
    else:
        args = argparse.Namespace(**vars(args) | {"alpha": 32.0})       # a lambda near a half
        for _ in range(30):                         # until CutMix's box, too, shows a good part
            mixed, targets, perm = mix_baseline(images, labels, args, info, generator)
            if targets.amax(1).median() < 0.7:
                break
        rows = {"mixed": mixed}
    rows = {"image": images, "partner": images[perm]} | rows
    return plots.preview(path, title, rows, targets, info)


def build(args, info) -> nn.Module:
    """The network to train: SAMix, or a Branch with one head for the baselines."""
    backbone = build_backbone(args.arch, info.image_size, args.layer,
                              initial_channels=args.initial_channels,
                              **({"drop_path": args.drop_path} if args.drop_path else {}))
    branch = Branch(backbone, backbone.width, info.num_classes)
    if args.method in LEARNED:
        mixblock.check_masks(backbone, args.arch, info.image_size, info.width)
        block = MixBlock(backbone.channels, args.lam_mul_k, dropout=args.dropout,
                         variant=args.variant, lam_concat=args.lam_concat)
        return SAMix(branch, block, args)
    branch.mix = None
    return branch


def load_pretrained(net, args):
    """Begins both branches with the weights that --pretrained names, if any."""
    weights.load_pretrained(getattr(net, "q", net).backbone.before, args)
    if args.pretrained and args.method in LEARNED:
        net.k.load_state_dict(net.q.state_dict())


def load_data(args, device):
    """Training and test batches and Info, cropped as the flags say."""
    recipe = Recipe(
        crop="resized" if args.crop == "resized" else "padded", padding=args.padding,
        padding_mode="reflect" if args.crop == "reflect" else "constant",
        scale=(args.crop_scale, 1.0), interpolation="bicubic",
        resize="shorter" if args.resize_first and args.dataset in STREAMED else None,
        transform=partial(randaugment, level=21, std=1.5) if args.randaugment else None,
        mean=args.mean, std=args.std)
    return data.load(
        args.dataset, args.data_dir, recipe, batch_size=args.batch_size, device=device,
        seed=args.seed, loader=args.loader, image_size=args.image_size, val_split=args.val_split,
        labels_per_class=args.labels_per_class, workers=args.workers, drop_last=args.drop_last)


def main(argv=None):
    """Trains (or evaluates, or draws a picture) as the flags say; returns the network."""
    args = parse_args(argv)
    device = runtime.setup(args)
    train, test, info = load_data(args, device)
    torch.manual_seed(args.seed)
    net, model = runtime.prepare(build(args, info), args, device)
    groups = parameter_groups(net, args)
    optimizer = torch.optim.AdamW(groups, args.lr) if args.optimizer == "adamw" else \
        torch.optim.SGD(groups, args.lr, args.momentum, nesterov=args.nesterov)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; method {args.method}")
    run = Run(args, device, info, [args.method], {"method": args.method},
              model=net, optimizer=optimizer, scaler=scaler)
    if args.evaluate or args.preview:
        checkpoint = run.load_weights()
        if not checkpoint:
            load_pretrained(net, args)
        if args.evaluate:
            for name, result in measure(net, test, args, info).items():
                log(f"{name}: {evaluation.sentence(result)}")
            evaluation.report(headline(net), test, args, info, run, checkpoint)
        elif distributed.rank() == 0:
            path = draw_preview(args.preview, net, train, args, info, bool(checkpoint))
            log(f"mixed images: {path}")
        return net
    run.start()
    if not run.resumed:
        load_pretrained(net, args)
    if run.writes and run.epoch == run.step == 0:
        draw_preview(run.folder / "mixed_start.png", net, train, args, info, False)
    while not run.over:
        sums = train_one_epoch(net, model, train, optimizer, scaler, args, info, run)
        row, timing = {"lr": optimizer.param_groups[0]["lr"]} | sums.result(), run.clock()
        if args.method in LEARNED:
            warn_of_collapse(row, run)
        distributed.share_buffers(net)
        heads = measure(net, test, args, info)
        row |= evaluation.columns(next(iter(heads.values())))
        row |= {f"{name}_accuracy": head["top1"] for name, head in heads.items()}
        run.end_epoch(row | timing, row["test_accuracy"], sums)

    evaluation.report(headline(net), test, args, info, run)
    if args.method in LEARNED:
        log(report(run))
    run.finish(f"{args.method}, {args.arch} on {info.name}", draw_preview, net, train, args, info)
    return net


if __name__ == "__main__":
    runtime.launch(main)
