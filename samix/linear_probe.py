#!/usr/bin/env python3
"""Linear probe of a pretrained encoder: its backbone is frozen, a linear layer is trained on it.

    python samix/linear_probe.py --weights experiments/…/checkpoint.pt --data_dir data
    python samix/linear_probe.py --weights random --arch resnet18 --dataset cifar100 --data_dir data
    torchrun --nproc_per_node=8 samix/linear_probe.py --weights … --data_dir imagenet --amp bf16

Network and data set are those of the checkpoint; `random` probes an untrained network. Features are
standardised before the layer, so that one learning rate serves all.
"""
import hashlib
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint, data, distributed, evaluation, flags, models, runtime
from common.data import Recipe
from common.distributed import log
from common.errors import RunError
from common.models.features import Backbone, build_backbone
from common.run import Run, about
from common.sums import StepSums
from samix.momentum import cosine


def parse_args(argv=None):
    """The flags; usage errors end the program with exit code 2."""
    parser = flags.Parser(__doc__)
    parser.add_argument("--weights", required=True, type=flags.path, metavar="CHECKPOINT|random",
                        help="of pretrain.py, or of main.py's SAMix")
    flags.add_flags(parser, data.NAMES, models.ALL, {}, initial_channels=None, epochs=100,
                    batch_size=256, lr=0.1, weight_decay=0.0)
    args = parser.parse_args(argv)
    if args.preview:
        parser.error("--preview: nothing is mixed here")
    if args.weights == "random" and not (args.dataset and args.arch):
        parser.error("--weights random needs --dataset and --arch")
    return args


class Probe(nn.Module):
    """A frozen backbone, standardised features and a linear layer: images -> logits."""

    def __init__(self, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.norm = nn.BatchNorm1d(backbone.width, affine=False)
        self.fc = nn.Linear(backbone.width, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images):
        with torch.set_grad_enabled(images.requires_grad):      # an attack's alone
            _, pooled = self.backbone(images)
        self.norm.train(self.training and len(images) > 1)      # one image has no deviation
        return self.fc(self.norm(pooled.float()))


def train_one_epoch(net, model, loader, optimizer, scaler, args, run):
    """The rest of the epoch that `run` stands in; returns its sums of loss and hits."""
    net.train()
    sums = StepSums(len(loader), run.device, run.sums)
    for step, (images, labels) in run.steps(loader):
        distributed.step_generator(args.seed, run.epoch, step)
        optimizer.param_groups[0]["lr"] = args.lr * cosine(run.epoch * len(loader) + step,
                                                           args.epochs * len(loader))
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast(args, images.device):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        sums.add(step, loss, logits, labels)
        if run.ends(step, sums, args.print_freq):
            break
    sums.check(run.epoch)
    return sums


def main(argv=None):
    """Trains the probe (or evaluates it); returns it."""
    args = parse_args(argv)
    device = runtime.setup(args)
    state, known = {}, {"initial_channels": 64, "layer": 3}
    if args.weights != "random":
        stored = checkpoint.load(args.weights)
        known |= stored.get("args", {}) | stored["identity"]
        state = {name.removeprefix("q.backbone."): value for name, value in stored["model"].items()
                 if name.startswith("q.backbone.")}
        if not state:
            raise RunError(f"{args.weights} holds no encoder of pretrain.py or of main.py's SAMix")
    for name in ("arch", "dataset", "initial_channels", "image_size"):
        setattr(args, name, getattr(args, name) or known.get(name))
    recipe = Recipe(interpolation="bicubic", mean=known.get("mean"), std=known.get("std"))
    train, test, info = data.load(
        args.dataset, args.data_dir, recipe, batch_size=args.batch_size, device=device,
        seed=args.seed, loader=args.loader, image_size=args.image_size,
        labels_per_class=args.labels_per_class, workers=args.workers)
    torch.manual_seed(args.seed)
    try:
        backbone = build_backbone(args.arch, info.image_size, known["layer"],
                                  initial_channels=args.initial_channels)
        backbone.load_state_dict(state or backbone.state_dict())
    except (ValueError, RuntimeError) as fault:
        reason = str(fault).splitlines()[0]
        raise RunError(f"{args.weights} does not fit {args.arch}: {reason}") from None
    digest = hashlib.blake2b(b"".join(value.numpy().tobytes() for value in
                                      backbone.state_dict().values()), digest_size=8)
    net, model = runtime.prepare(Probe(backbone, info.num_classes), args, device)
    optimizer = torch.optim.SGD(net.fc.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    what = "random" if not state else known.get("method", "weights")
    log(f"{about(info, net, train, args)}; probe of {what}")
    run = Run(args, device, info, ["probe", what], {"weights": digest.hexdigest()},
              model=net, optimizer=optimizer, scaler=scaler)
    if args.evaluate:
        evaluation.report(net, test, args, info, run, run.load_weights())
        return net
    run.start(weights=args.weights)
    while not run.over:
        sums = train_one_epoch(net, model, train, optimizer, scaler, args, run)
        row, timing = {"lr": optimizer.param_groups[0]["lr"]} | sums.result(), run.clock()
        distributed.share_buffers(net)
        row |= evaluation.columns(evaluation.evaluate(net, test, args, info))
        run.end_epoch(row | timing, row["test_accuracy"], sums)

    evaluation.report(net, test, args, info, run)
    run.finish(f"linear probe of {what} features, {args.arch} on {info.name}")
    return net


if __name__ == "__main__":
    runtime.launch(main)
