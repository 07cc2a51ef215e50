#!/usr/bin/env python3
"""Linear probe of a pretrained encoder: its backbone is frozen, a linear layer is trained on it.

    python samix/linear_probe.py --weights experiments/…/checkpoint.pt --data_dir data
    python samix/linear_probe.py --weights random --arch resnet18 --dataset cifar100 --data_dir data
    torchrun --nproc_per_node=8 samix/linear_probe.py --weights … --data_dir imagenet --amp bf16

Network and data set are those of the checkpoint. `random` probes an untrained network, the least
that a pretrained one has to beat. Features are standardised before the layer, so that one learning
rate serves all.
"""
import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint, data, metrics, models, runlog, runtime
from common.models.features import Backbone, build_backbone
from common.runtime import RunError
from samix.momentum import cosine

NETS = [name for names in models.NAMES.values() for name in names]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("run").add_argument
    add("--weights", required=True, metavar="CHECKPOINT|random",
        help="of pretrain.py (or of another run of the probe's network)")
    add("--data_dir", default="data", help="folder (or .npz file) of the data set")
    add("--root_dir", default="experiments", help="where the run's folder is made")
    add("--job_name", default="", help="suffix of the run's folder")
    add("--seed", type=int, default=0)
    add("--print_freq", type=runtime.positive, default=100, help="steps between log lines")
    add("--workers", type=runtime.count, default=4, help="threads that decode image files")
    add = parser.add_argument_group("data and network (default: the checkpoint's)").add_argument
    add("--dataset", choices=data.NAMES)
    add("--labels_per_class", type=runtime.positive, default=None,
        help="training images of each class (default: all)")
    add("--arch", choices=NETS, metavar="NET")
    add("--initial_channels", type=runtime.positive)
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=runtime.positive, default=100)
    add("--batch_size", type=runtime.positive, default=256, help="over all processes")
    add("--lr", type=runtime.amount, default=0.1, help="falls to 0 along a cosine")
    add("--momentum", type=runtime.share, default=0.9)
    add("--weight_decay", type=runtime.amount, default=0.0)
    runtime.add_flags(parser)
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
        with torch.no_grad():
            _, last = self.backbone(images)
        pooled = last.mean((2, 3)) if last.ndim == 4 else last
        self.norm.train(self.training and len(images) > 1)      # one image has no deviation
        return self.fc(self.norm(pooled.float()))


def train_one_epoch(net, model, loader, optimizer, scaler, args, run):
    """The rest of the epoch that `run` stands in; returns its sums of loss and hits."""
    net.train()
    sums = metrics.StepSums(len(loader), run.device, run.sums)
    for step, (images, labels) in run.steps(loader):
        runtime.step_generator(args.seed, run.epoch, step)
        fall = cosine(run.epoch * len(loader) + step, args.epochs * len(loader))
        optimizer.param_groups[0]["lr"] = args.lr * fall
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
        known |= stored["identity"]
        state = {name.removeprefix("q.backbone."): value for name, value in stored["model"].items()
                 if name.startswith("q.backbone.")}
        if not state:
            raise RunError(f"{args.weights} holds no encoder of pretrain.py or of main.py's SAMix")
    arch, dataset = args.arch or known["arch"], args.dataset or known["dataset"]
    channels = args.initial_channels or known["initial_channels"]

    # Data, network, optimizer
    train, test, info = data.load(
        dataset, args.data_dir, batch_size=args.batch_size, device=device, seed=args.seed,
        loader=args.loader, image_size=args.image_size or known.get("image_size"),
        labels_per_class=args.labels_per_class, workers=args.workers,
        streaming={"filter": "bicubic"})
    torch.manual_seed(args.seed)
    try:
        backbone = build_backbone(arch, info.image_size, known["layer"], initial_channels=channels)
        backbone.load_state_dict(state or backbone.state_dict())
    except (ValueError, RuntimeError) as fault:
        raise RunError(f"{args.weights} does not fit {arch}: {str(fault).splitlines()[0]}"
                       ) from None
    digest = hashlib.blake2b(digest_size=8)
    for value in backbone.state_dict().values():
        digest.update(value.numpy().tobytes())
    net, model = runtime.prepare(Probe(backbone, info.num_classes), args, device)
    optimizer = torch.optim.SGD(net.fc.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    what = "random" if not state else known.get("method", "weights")
    runtime.say(f"{info}\nprobe: {sum(p.numel() for p in net.fc.parameters()):,} parameters on the "
                f"{backbone.width} features of {arch}, {what}")

    # The run
    identity = {"arch": arch, "initial_channels": channels, "weights": digest.hexdigest(),
                "dataset": info.name, "classes": info.num_classes, "data": info.fingerprint}
    run = runlog.Run(args, device, [info.name, arch, "probe", what, f"seed{args.seed}",
                                    args.job_name], identity,
                     model=net, optimizer=optimizer, scaler=scaler)
    measure = {"max_steps": args.max_steps, "autocast": lambda: runtime.autocast(args, device)}
    if args.evaluate:
        run.load_weights()
        result = metrics.evaluate(net, test, **measure)
        runtime.say(f"test: accuracy {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss "
                    f"{result['loss']:.4f} on {result['count']} images")
        return net
    run.start(weights=args.weights, data=str(info))
    while not run.over:
        sums = train_one_epoch(net, model, train, optimizer, scaler, args, run)
        row, timing = {"lr": optimizer.param_groups[0]["lr"]} | sums.result(), run.clock()
        runtime.share_buffers(net)
        result = metrics.evaluate(net, test, **measure)
        row |= {"test_loss": result["loss"], "test_accuracy": result["top1"],
                "test_top5": result["top5"]}
        run.end_epoch(row | timing, row["test_accuracy"], sums)
    runtime.say(run.report())
    if run.writes:
        curves = run.draw_curves(f"linear probe of {what} features, {arch} on {info.name}")
        runtime.say(f"curves: {curves}\ncheckpoints: {run.folder}")
    return net


if __name__ == "__main__":
    runtime.launch(main)
