#!/usr/bin/env python3
"""SAMix (Li et al. 2021) and AutoMix (Liu et al., ECCV 2022): a small network, the MixBlock, learns
how to mix two images while the classifier learns from the mixtures. Beside them Mixup and CutMix.

CPU trial   python samix/main.py --dataset digits --initial_channels 16 --epochs 12 --lr 0.05 \\
                --ema_base 0.99 --ema_end 0.99
one GPU     python samix/main.py --config cifar100_r18 --data_dir data --amp bf16
eight GPUs  torchrun --nproc_per_node=8 samix/main.py --config imagenet_r50 --data_dir imagenet
two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                --rdzv_endpoint=HOST:29500 samix/main.py --config imagenet_r50 …"""
import copy
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
from torch import nn

from common import data, distributed, evaluation, flags, mixing, models, plots, runtime
from common.data import STREAMED, Recipe
from common.distributed import log
from common.flags import add_boolean, amount, count, number, positive, share
from common.mixing import draw_lambda, soft_targets
from common.models import weights
from common.models.features import build_backbone
from common.randaugment import randaugment
from common.run import Run, about
from samix import configs, mixblock
from samix.evaluation import draw_mixtures, measure, report, warn_of_collapse
from samix.mixblock import Draws, MixBlock, draw_pairs, draw_partners, mix
from samix.momentum import Branch, head_loss, momentum_update
from samix.schedule import cosine, ema_momentum, parameter_groups, step_rates

LEARNED = ("samix", "automix")          # methods with a MixBlock


def parse_args(argv=None):
    """Return the flags; usage errors end the program with exit code 2."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("run, data and network").add_argument
    add("--config", default="cifar100_r18", metavar="NAME",
        help=f"sets other flags: one of the authors' files, or {', '.join(configs.CONFIGS)}")
    add("--method", choices=configs.METHODS, default="samix", help="how batches are mixed")
    add("--crop", choices=["zero", "reflect", "resized"], default="resized",
        help="of sets in memory: from a border of zeros or reflection, or of a part, resized")
    add("--padding", type=count, default=4, help="width of that border")
    add("--crop_scale", type=number(above=0, high=1), default=0.08, help="least area")
    add_boolean(add, "--resize_first", False, "sets read from disk: shorter side first to 256/224")
    add_boolean(add, "--randaugment", False, "two random operations, magnitude 7 ± 0.5 of 10")
    add("--mean", type=number(), nargs=3, metavar="R", help="of pixels in [0, 1]")
    add("--std", type=number(above=0), nargs=3, metavar="R", help="likewise")
    add_boolean(add, "--drop_last", False, "no partial batch at an epoch's end")
    add("--layer", type=positive, default=3, help="stage or block that the MixBlock sees")
    add("--drop_path", type=share, default=0.0, help="of transformers: stochastic depth")

    add = parser.add_argument_group("mixing and loss").add_argument
    add("--alpha", type=number(above=0), default=2.0, help="lambda ~ Beta(alpha, alpha)")
    add_boolean(add, "--no_repeat", False, "no image is its own partner")
    add("--head", choices=["ce", "bce"], default="ce", help="cross-entropy, or binary ones summed")
    add("--label_smoothing", type=share, default=0.0, help="of --head ce")
    add = parser.add_argument_group("samix").add_argument
    add("--lam_mul_k", type=number(), default=-1.0, help="features are multiplied by 1 + "
        "lambda (below 0), or by 1 + a cubic of it")
    add = parser.add_argument_group("automix").add_argument
    add_boolean(add, "--lam_concat", True, "lambda is an input channel of the MixBlock")
    add = parser.add_argument_group("samix and automix").add_argument
    add("--mode", choices=["bilinear", "nearest"], nargs="+", default=["bilinear"],
        help="how masks are enlarged; of several one is drawn each step")
    add("--dropout", type=share, default=0.1, help="of the MixBlock's values")
    add("--mask_adjust", type=share, default=0.0, help="probability that masks move to lambda")
    add("--lam_margin", type=share, default=0.08, help="this near to 0 or 1, q sees plain Mixup")
    add("--switch_off", type=share, default=0.0,
        help="probability, annealed to 0 by a cosine, that a step has mix_k's loss; 0: all steps")
    add("--neg_weight", type=amount, default=1.0, help="bce, mix_k: of classes not in the image")
    add("--one_weight", type=amount, default=1.0, help="of the loss of clean images")
    add("--mix_q_weight", type=amount, default=1.0, help="of the loss of mixed images")
    add("--mix_k_weight", type=amount, default=1.0, help="of the MixBlock's loss through branch k")
    add("--mask_loss", type=amount, default=0.1, help="weight of the masks' loss")
    add("--mask_loss_kind", choices=mixblock.MASK_LOSSES, default="l1_variance",
        help="l1, l2: of the mean from lambda; variance: less twice the masks'; sparsity: m(1 - m)")
    add("--mask_margin", type=share, default=0.1, help="deviations below it cost nothing")
    add_boolean(add, "--mask_anneal", True, "the masks' loss falls to 0 along a cosine")
    add("--block_lr", type=amount, default=0.1, help="of the MixBlock (CIFAR's ResNets: as --lr)")
    add("--block_min_lr", type=amount, default=1e-3, help="at the end of its cosine")
    add("--block_momentum", type=share, default=0.9, help="of SGD")
    add("--ema_base", type=share, default=0.999, help="branch k: momentum up to --ema_start")
    add("--ema_end", type=share, default=0.99999, help="what it then grows to")
    add("--ema_start", type=share, default=0.1, help="share of the run")

    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", choices=["sgd", "adamw"], default="sgd", help="of network and MixBlock")
    add("--min_lr", type=amount, default=0.0, help="at the end of the cosine")
    add("--lr_every", choices=["epoch", "step"], default="epoch", help="when the cosine moves")
    add("--milestones", type=count, nargs="*", help="no cosine: epochs at which the rates change")
    add("--gamma", type=amount, default=0.1, help="factor at these epochs")
    add("--warmup_epochs", type=count, default=0, help="linear warm-up, not of the MixBlock")
    add("--warmup_ratio", type=share, default=1e-5, help="share of the rate that it begins with")
    add_boolean(add, "--nesterov", False, "Nesterov's momentum")
    add("--clip_grad", type=amount, default=0.0, help="largest norm of the gradients; 0: any")
    flags.add_flags(parser, data.NAMES, models.ALL, {"lr": ["--learning_rate"]}, pretrained="",
                    lr=0.1, weight_decay=1e-4, batch_size=256, epochs=100)

    first = parser.peek(argv)
    try:
        config = configs.config(first.config, first.method)
    except ValueError as fault:
        parser.error(f"--config: {fault}")
    if first.dataset not in (None, config["dataset"]):
        del config["mean"], config["std"]             # every data set has its own
        if (first.arch or config["arch"]) not in ("deit_s", "swin_t"):
            del config["image_size"]
        if first.dataset in STREAMED:
            config["crop"] = "resized"
    parser.set_defaults(**config)
    args = parser.parse_args(argv)
    parser.only(args, args.milestones is None, "min_lr block_min_lr", "runs without --milestones")
    parser.only(args, args.milestones is not None, "gamma", "--milestones")
    parser.only(args, args.crop == "resized" or args.dataset in STREAMED, "crop_scale",
                "--crop resized")
    parser.only(args, args.crop != "resized" and args.dataset not in STREAMED, "padding",
                "--crop zero and reflect")
    parser.only(args, args.dataset in STREAMED, "resize_first", "sets read from disk")
    parser.idle(args, (args.method != "vanilla", "alpha no_repeat", "a method that mixes"),
                (args.method in LEARNED, "layer", "--method samix or automix"),
                (args.head == "bce", "neg_weight", "--head bce"),
                (args.optimizer == "sgd", "momentum block_momentum", "--optimizer sgd"),
                (args.warmup_epochs, "warmup_ratio", "--warmup_epochs"))
    args.block_lr = args.lr if args.block_lr is None else args.block_lr
    args.block_min_lr = args.min_lr if args.block_min_lr is None else args.block_min_lr
    if bool(args.mean) != bool(args.std):
        parser.error("--mean and --std: give both or neither")
    if args.optimizer == "adamw" and args.nesterov:
        parser.error("--nesterov is of --optimizer sgd")
    if args.head == "bce" and args.label_smoothing:
        parser.error("--label_smoothing is of --head ce: give --label_smoothing 0")
    for own, least in (("lr", "min_lr"), ("block_lr", "block_min_lr")):
        if args.milestones is None and getattr(args, own) < getattr(args, least):
            parser.error(f"--{own} {getattr(args, own)} is below --{least} {getattr(args, least)}, "
                         "to which it should fall: give both")
    return args


def draw_mixing(n: int, args, generator, fall: float, device="cpu") -> Draws:
    """Return draws for n images, partners on `device`; `fall`: from 1 to 0 over the run."""
    draws = draw_pairs(n, args.alpha, generator, args.no_repeat, device)
    modes = [args.mode[i] for i in torch.randint(len(args.mode), (2,), generator=generator)]
    adjust, off = torch.rand(2, generator=generator).tolist()
    return draws._replace(modes=modes, adjust=adjust < args.mask_adjust,
                          switched_off=0 < args.switch_off and off >= args.switch_off * fall)


class SAMix(nn.Module):
    """Branch q, its moving average k, and the MixBlock: losses of a batch."""

    def __init__(self, q: Branch, block: MixBlock, args):
        super().__init__()
        self.q, self.k = q, copy.deepcopy(q).requires_grad_(False)
        self.block, self.args = block, args

    @torch.no_grad()
    def masks_for_q(self, features, draws: Draws, scale: int):
        """Return masks (B, 2, H, W) of the images that branch q learns from, without gradient."""
        mask = self.block(features, draws.lam_bb, draws.perm_bb, scale, mode=draws.modes[1])
        if draws.adjust:
            mask = mixblock.adjust_mask(mask, draws.lam_bb)
        return mixblock.plain_near_ends(mask, draws.lam_bb, self.args.lam_margin)

    def forward(self, images, labels, draws: Draws, mask_weight: float):
        """Return losses by name, logits of clean images, and the mixed images mb and bb."""
        args, num_classes = self.args, self.q.one.out_features
        loss = {"head": args.head, "smoothing": args.label_smoothing}
        with torch.no_grad():
            features, _ = self.k.backbone(images)
        scale = mixblock.scale_of(images, features)
        mask_mb = self.block(features, draws.lam_mb, draws.perm_mb, scale, mode=draws.modes[0])
        mask_bb = self.masks_for_q(features, draws, scale)
        self.columns = mixblock.mask_columns(mask_mb)       # of the log
        mix_mb, mix_bb = mix(images, mask_mb, draws.perm_mb), mix(images, mask_bb, draws.perm_bb)
        targets_mb = soft_targets(labels, draws.perm_mb, draws.lam_mb, num_classes)
        targets_bb = soft_targets(labels, draws.perm_bb, draws.lam_bb, num_classes)
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
    """Return images of Mixup, CutMix or nothing, soft targets and partners."""
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
    """Leave the gradients of one step in the parameters; return the loss and the logits."""
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
    """Train to the end of the run's epoch; run.sums takes loss and hits."""
    net.train()
    total = args.epochs * len(loader)
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
        run.sums.add(step, loss, logits, labels, **getattr(net, "columns", {}))


def draw_preview(path, net, train, args, info, trained: bool = True):
    """Draw images of the first training batch, mixed near a half; return the path."""
    train.set_epoch(0)
    images, labels = (part[:32] for part in next(iter(train)))
    title = f"{configs.METHODS[args.method]} on {info.name}"
    if args.method in LEARNED:
        return draw_mixtures(path, title, {"image": images}, net, labels, args, info, trained)
    args = copy.copy(args)
    args.alpha = 32.0                                       # a lambda near a half
    generator = distributed.step_generator(args.seed, 0, 0)
    for _ in range(30):                             # until CutMix's box, too, shows a good part
        mixed, targets, perm = mix_baseline(images, labels, args, info, generator)
        if targets.amax(1).median() < 0.7:
            break
    rows = {"image": images, "partner": images[perm], "mixed": mixed}
    return plots.preview(path, title, rows, targets, info)


def build(args, info) -> nn.Module:
    """Return the network to train: SAMix, or a Branch with one head for the baselines."""
    drop_path = {"drop_path": args.drop_path} if args.drop_path else {}
    backbone = build_backbone(args.arch, info.image_size, args.layer,
                              initial_channels=args.initial_channels, **drop_path)
    branch = Branch(backbone, backbone.width, info.num_classes)
    if args.method in LEARNED:
        block = MixBlock(backbone.channels, args.lam_mul_k, dropout=args.dropout,
                         variant=args.method, lam_concat=args.lam_concat)
        return SAMix(branch, block, args)
    branch.mix = None
    return branch


def load_pretrained(net, args):
    """Begin both branches with the weights that --pretrained names, if any."""
    weights.load_pretrained(getattr(net, "q", net).backbone.before, args)
    if args.pretrained and args.method in LEARNED:
        net.k.load_state_dict(net.q.state_dict())


def load_data(args, device):
    """Return training and test batches and Info, cropped as the flags say."""
    recipe = Recipe(
        crop="resized" if args.crop == "resized" else "padded", padding=args.padding,
        padding_mode="reflect" if args.crop == "reflect" else "constant",
        scale=(args.crop_scale, 1.0), interpolation="bicubic",
        resize="shorter" if args.resize_first and args.dataset in STREAMED else None,
        transform=partial(randaugment, level=21, std=1.5) if args.randaugment else None,
        mean=args.mean, std=args.std)
    return data.load(
        args.dataset, args.data_dir, recipe, device=device, **flags.chosen(args, flags.LOADING),
        drop_last=args.drop_last)


def main(argv=None):
    """Train, evaluate or draw a picture, as the flags say; return the network."""
    args = parse_args(argv)
    device = runtime.setup(args)
    train, test, info = load_data(args, device)
    torch.manual_seed(args.seed)
    net, model = runtime.prepare(build(args, info), args, device)
    headline, groups = getattr(net, "k", net), parameter_groups(net, args)
    optimizer = torch.optim.AdamW(groups, args.lr) if args.optimizer == "adamw" else \
        torch.optim.SGD(groups, args.lr, args.momentum,
                        nesterov=args.nesterov and args.momentum > 0)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; method {args.method}")
    run = Run(args, device, info, [args.method], {"method": args.method},
              model=net, optimizer=optimizer, scaler=scaler)
    if args.evaluate or args.preview:
        checkpoint = run.load_weights(train, test) or load_pretrained(net, args)
        if args.evaluate:
            for name, result in {} if args.cam else measure(net, test, args, info).items():
                log(f"{name}: {evaluation.sentence(result)}")
            evaluation.report(headline, test, args, info, run, checkpoint)
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
        train_one_epoch(net, model, train, optimizer, scaler, args, info, run)
        row = {"lr": optimizer.param_groups[0]["lr"]} | run.sums.result()
        warn_of_collapse(row, run)
        heads = measure(net, test, args, info)
        row |= evaluation.columns(next(iter(heads.values())))
        row |= {f"{name}_accuracy": head["top1"] for name, head in heads.items()}
        run.end_epoch(row, row["test_accuracy"])
    evaluation.report(headline, test, args, info, run)
    if args.method in LEARNED:
        log(report(run))
    run.finish(f"{configs.METHODS[args.method]}, {args.arch} on {info.name}", draw_preview, net,
               train, args, info)
    return net


if __name__ == "__main__":
    runtime.launch(main)
