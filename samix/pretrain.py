#!/usr/bin/env python3
"""Self-supervised SAMix (Li et al. 2021, section 3.2): MoCo v2 (Chen et al. 2020) that also learns
from mixtures of views, and a MixBlock that learns to mix them. Evaluate with linear_probe.py.

CPU trial   python samix/pretrain.py --dataset digits --initial_channels 16 --epochs 10 --queue 1000
one GPU     python samix/pretrain.py --config cifar100_r18 --data_dir data --amp bf16
eight GPUs  torchrun --nproc_per_node=8 samix/pretrain.py --config imagenet_r50 --data_dir imagenet
"""
import copy
import signal
import sys
from functools import partial
from pathlib import Path
from shlex import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
from torch import nn

from common import data, distributed, flags, models, plots, runtime
from common.data import STREAMED, Recipe
from common.data.recipe import mean_std, to_uint8
from common.data.stream import DaliStream
from common.distributed import log
from common.flags import amount, number, positive, share
from common.mixing import probabilities
from common.models.features import build_backbone
from common.run import Run, about
from samix import contrast, mixblock
from samix.contrast import Encoder, Queue, encode_keys, extend, mixed_nce, mixed_pair, similarity
from samix.evaluation import draw_mixtures, knn_accuracy, warn_of_collapse
from samix.mixblock import Draws, MixBlock, draw_pairs, mask_loss, mix
from samix.momentum import momentum_update
from samix.schedule import cosine
from samix.views import draw_view, make_view, yield_two_crops

METHODS = {"samix": "SAMix", "moco": "MoCo v2"}
CONFIGS = {                             # the blur is for large images alone
    "cifar100_r18": {"dataset": "cifar100", "arch": "resnet18", "blur": 0.0, "queue": 4096},
    "imagenet_r18": {"dataset": "imagenet", "arch": "resnet18", "blur": 0.5, "queue": 65536},
    "imagenet_r50": {"dataset": "imagenet", "arch": "resnet50", "blur": 0.5, "queue": 65536}}


def parse_args(argv=None):
    """Return the flags; usage errors end the program with exit code 2."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("run, data and network").add_argument
    add("--config", choices=CONFIGS, default="cifar100_r18", help="for dataset, arch, blur, queue")
    add("--method", choices=METHODS, default="samix", help="with mixtures, or without")
    add("--crop_scale", type=number(above=0, high=1), default=0.2, help="a view's least area")
    add("--blur", type=share, help="probability of a view's blur")
    add("--layer", type=positive, default=3, help="stage whose features the MixBlock sees")

    add = parser.add_argument_group("method").add_argument
    add("--queue", type=positive, help="past keys that serve as negatives")
    add("--dim", type=positive, default=128, help="of the embeddings")
    add("--neck", type=positive, default=2048, help="hidden width of the projection")
    add("--temperature", type=number(above=0), default=0.2, help="divides the similarities")
    add("--ema", type=share, default=0.999, help="momentum of the keys' encoder")
    add = parser.add_argument_group("samix").add_argument
    add("--alpha", type=number(above=0), default=2.0, help="lambda ~ Beta(alpha, alpha)")
    add("--lam_mul_k", type=number(), default=-1.0, help="how lambda scales the features")
    add("--mask_margin", type=share, default=0.1, help="masks further from lambda are moved to it")
    add("--block_loss", choices=["infonce", "bce"], default="infonce", help="bce: no queue")
    add("--mask_loss", type=amount, default=0.1, help="weight, falls to 0 along a cosine")
    add("--extend_weight", type=amount, default=0.0, help="likewise, of the loss of extended keys")
    flags.add_flags(parser, data.NAMES, models.ALL, {}, epochs=200, batch_size=256, lr=0.03,
                    weight_decay=1e-4)

    parser.set_defaults(**CONFIGS[parser.peek(argv).config])
    parser.refuse("cam evaluate corruptions target_layer", "of samix/linear_probe.py")
    args = parser.parse_args(argv)
    if args.queue < args.batch_size:
        parser.error(f"--queue {args.queue} is less than a batch of {args.batch_size}")
    return args


class Contrast(nn.Module):
    """The encoder q, its moving average k, and the MixBlock (None: MoCo): losses of two views."""

    def __init__(self, q: Encoder, block: MixBlock | None, args):
        super().__init__()
        self.q, self.k = q, copy.deepcopy(q).requires_grad_(False)
        self.block, self.args = block, args

    def forward(self, view_q, view_k, draws: Draws, negatives, order, extension):
        """Return losses by name, new keys and queries of normalised views (B, 3, H, W); order: of
        all ranks' images in the keys' batches; extension (B, dim): see `extend`."""
        nce = partial(mixed_nce, negatives=negatives, temperature=self.args.temperature)
        _, query = self.q(view_q)
        if self.block is None:
            _, key_k = encode_keys(self.k, view_k, order)
            return {"moco": nce(query, key_k, key_k, 1.0)}, key_k, query

        perm_bb, perm_mb = draws.perm_bb, draws.perm_mb
        features, keys = encode_keys(self.k, torch.cat([view_q, view_k]), order)
        (features_q, features_k), (key_q, key_k) = features.chunk(2), keys.chunk(2)
        scale = mixblock.scale_of(view_q, features_q)
        with torch.no_grad():
            mask_bb = self.block(features_q, draws.lam_bb, perm_bb, scale, partners=features_k)
            mask_bb = mixblock.adjust_mask(mask_bb, draws.lam_bb, margin=self.args.mask_margin)
        mask_mb = self.block(features_q, draws.lam_mb, perm_mb, scale, partners=features_k)
        self.columns = mixblock.mask_columns(mask_mb)       # of the log
        # image i's pixels are of view q, its partner's of view k; each meets the other view's key
        _, mixed_q = self.q(mix(view_q, mask_bb, perm_bb, view_k))
        _, mixed_k = self.k(mix(view_q, mask_mb, perm_mb, view_k))
        pair = partial(mixed_pair, mixed_k, lam=draws.lam_mb, temperature=self.args.temperature)
        block = pair if self.args.block_loss == "bce" else partial(nce, mixed_k, lam=draws.lam_mb)
        losses = {
            "moco": nce(query, key_k, key_k, 1.0),
            "mix": nce(mixed_q, key_k, key_q[perm_bb], draws.lam_bb),       # of these two q learns
            "block": block(key_k, key_q[perm_mb]),
            "mask": mask_loss(mask_mb, draws.lam_mb)}
        if self.args.extend_weight:
            losses["extend"] = pair(extend(key_k, key_q, extension),
                                    extend(key_q, key_k, extension)[perm_mb])
        return losses, key_k, query


def two_views(images, args, info, generator):
    """Return two normalised views (B, 3, S, S) of a batch, or of DALI's two crops (B, 6, S, S)."""
    mean, std = mean_std(info, images.device)
    cropped = images.shape[1] == 6
    parts = images.chunk(2, 1) if cropped else [to_uint8(images, info)] * 2
    scale, views = (1.0 if cropped else args.crop_scale, 1.0), []
    for part in parts:
        view = draw_view(len(part), part.shape[-2:], generator, blur=args.blur, scale=scale)
        views.append((make_view(part, view, info.image_size) - mean) / std)
    return views


def training_step(model, images, queue, args, info, generator, shared, scaler, fall):
    """Leave the gradients of one step in the parameters; return the loss, each query's similarity
    to its own key and to the nearest negative (B, 2), and the new keys."""
    view_q, view_k = two_views(images, args, info, generator)
    draws = draw_pairs(len(images), args.alpha, generator, device=images.device)
    rows = len(images) * distributed.world() * (2 if args.method == "samix" else 1)
    order = torch.randperm(rows, generator=shared)          # the same on every rank
    extension = contrast.draw_extension((len(images), args.dim), generator)
    weights = {"extend": args.extend_weight * fall, "mask": args.mask_loss * fall}
    with runtime.autocast(args, images.device):
        losses, keys, query = model(view_q, view_k, draws, queue.keys, order, extension)
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items())
    scaler.scale(loss).backward()
    own = similarity(query, keys, args.temperature).detach()
    nearest = (query.detach() @ queue.keys.T).amax(1).float() / args.temperature
    return loss, torch.stack([own, nearest], 1), keys


def train_one_epoch(net, model, queue, loader, optimizer, scaler, args, info, run):
    """Train to the end of the run's epoch; run.sums takes loss and hits."""
    net.train()
    for step, (images, _) in run.steps(loader):
        shared = torch.Generator().manual_seed(
            distributed.seed_of(args.seed, "order", run.epoch, step))
        generator = distributed.step_generator(args.seed, run.epoch, step)
        fall = cosine(run.epoch * len(loader) + step, args.epochs * len(loader))
        optimizer.param_groups[0]["lr"] = args.lr * fall
        optimizer.zero_grad(set_to_none=True)
        loss, logits, keys = training_step(model, images, queue, args, info, generator, shared,
                                           scaler, fall)
        scaler.step(optimizer)
        scaler.update()
        momentum_update(net.k, net.q, args.ema)
        queue.enqueue(keys)
        own = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        run.sums.add(step, loss, logits, own, **getattr(net, "columns", {}))


def draw_preview(path, net, train, args, info, trained: bool = True):
    """Draw both views of images of the first training batch and, of SAMix, their mixtures."""
    train.set_epoch(0)
    images, labels = (part[:32] for part in next(iter(train)))
    generator = distributed.step_generator(args.seed, 0, 0)
    view_q, view_k = two_views(images, args, info, generator)
    title = f"{METHODS[args.method]}, two views of {info.name}"
    views = {"view q": view_q, "view k": view_k}
    if args.method == "samix":
        return draw_mixtures(path, title, views, net, labels, args, info, trained)
    return plots.preview(path, title, views, probabilities(labels, info.num_classes), info)


def build(args, info) -> Contrast:
    """Return the network to train, for the sizes of the data."""
    backbone = build_backbone(args.arch, info.image_size, args.layer,
                              initial_channels=args.initial_channels)
    block = MixBlock(backbone.channels, args.lam_mul_k) if args.method == "samix" else None
    return Contrast(Encoder(backbone, backbone.width, args.dim, args.neck), block, args)


def main(argv=None):
    """Train, or draw a picture, as the flags say; return the network."""
    args = parse_args(argv)
    device = runtime.setup(args)
    recipe = Recipe(crop="random" if args.dataset in STREAMED else "padded", padding=0, flip=False,
                    interpolation="bicubic")                # squares, of which to make views
    train, test, info = data.load(
        args.dataset, args.data_dir, recipe, device=device, **flags.chosen(args, flags.LOADING),
        drop_last=True)
    if isinstance(train, DaliStream):
        yield_two_crops(train, (args.crop_scale, 1.0))
    torch.manual_seed(args.seed)
    net, model = runtime.prepare(build(args, info), args, device)
    queue = Queue(args.queue, args.dim).to(device)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], args.lr,
                                args.momentum, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; method {args.method}, {args.queue} keys")
    identity = {"layer": args.layer, "image_size": info.image_size, "method": args.method,
                "queue": args.queue}
    run = Run(args, device, info, [args.method, "pretrained"], identity,
              model=net, queue=queue, optimizer=optimizer, scaler=scaler)
    if args.preview:
        trained = run.load_weights(train) is not None
        if distributed.rank() == 0:
            log(f"mixed images: {draw_preview(args.preview, net, train, args, info, trained)}")
        return net
    run.start()
    while not run.over:
        train_one_epoch(net, model, queue, train, optimizer, scaler, args, info, run)
        row = {"lr": optimizer.param_groups[0]["lr"]} | run.sums.result()
        warn_of_collapse(row, run)
        row["knn_accuracy"] = knn_accuracy(net.q.backbone, test, info.num_classes, args)
        run.end_epoch(row, None)
    run.finish(f"{METHODS[args.method]}, {args.arch} on {info.name} (accuracy: queries nearest to "
               "their own key)", draw_preview, net, train, args, info)
    log("now: python samix/linear_probe.py --weights "
        f"{quote(str(run.folder / 'checkpoint.pt'))} --data_dir {quote(args.data_dir)}")
    return net


if __name__ == "__main__":
    runtime.launch(main)
