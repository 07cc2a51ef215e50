#!/usr/bin/env python3
"""Linear probe of a pretrained encoder: logistic regression on the features of its frozen backbone.

    python samix/linear_probe.py --weights experiments/…/checkpoint.pt --data_dir data
    python samix/linear_probe.py --weights random --arch resnet18 --dataset cifar100 --data_dir data
    torchrun --nproc_per_node=8 samix/linear_probe.py --weights … --data_dir imagenet --amp bf16

Network, data set and seed are those of the checkpoint. The standardised features of all training
images stay on the device: of ImageNet some 45 GB."""
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoint, data, distributed, evaluation, flags, models, runtime
from common.data import STREAMED, Recipe
from common.distributed import log
from common.errors import RunError
from common.models.features import build_backbone
from common.run import Run
from samix.evaluation import pooled_features
from samix.momentum import Branch


def parse_args(argv=None):
    """Return the flags; usage errors end the program with exit code 2."""
    parser = flags.Parser(__doc__)
    parser.add_argument("--weights", required=True, type=flags.path, metavar="CHECKPOINT|random",
                        help="pretrain.py's, main.py's of SAMix, or an untrained network's")
    flags.add_flags(parser, data.NAMES, models.ALL, {}, initial_channels=None, momentum=None,
                    print_freq=None, seed=None, batch_size=256, weight_decay=1e-4)
    parser.refuse("epochs lr momentum resume preview print_freq tensorboard evaluate",
                  "the regression takes none")
    args = parser.parse_args(argv)
    if args.weights == "random" and not (args.dataset and args.arch):
        parser.error("--weights random needs --dataset and --arch")
    return args


def fit(layer: nn.Linear, features: Tensor, labels: Tensor, weight_decay: float):
    """Train a layer by L-BFGS on the features (N, width) of all ranks, N the same on each."""
    moments = torch.stack([features.mean(0), features.square().mean(0)])
    mean, square = distributed.total(moments) / distributed.world()
    std = (square - mean.square()).clamp(min=1e-12).sqrt()
    features = (features - mean) / std
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(features), labels) + \
            weight_decay / 2 * layer.weight.square().sum()
        loss.backward()
        for parameter in layer.parameters():
            parameter.grad = distributed.total(parameter.grad) / distributed.world()
        return distributed.total(loss.detach()) / distributed.world()

    optimizer.step(closure)
    with torch.no_grad():                                   # for features as they come
        layer.weight /= std
        layer.bias -= layer.weight @ mean


def main(argv=None):
    """Fit the probe, evaluate it, and return it."""
    args = parse_args(argv)
    state, known = {}, {"initial_channels": 64, "layer": 1, "method": "random", "seed": 0}
    if args.weights != "random":
        stored = checkpoint.load(args.weights)
        known |= stored["args"] | stored["identity"]
        state = {name.removeprefix("q.backbone."): value for name, value in stored["model"].items()
                 if name.startswith("q.backbone.")}
        if not state:
            raise RunError(f"{args.weights} holds no encoder of pretrain.py or of main.py's SAMix")
    same = args.dataset in (None, known.get("dataset")) and args.data_dir == known.get("data_dir")
    for name in ("arch", "dataset", "initial_channels", "image_size", "seed",
                 *["val_split"] * same):
        if getattr(args, name) is None:
            setattr(args, name, known.get(name))
    device = runtime.setup(args)
    crop, resize = ("centre", "shorter") if args.dataset in STREAMED else \
        ("resized" if known.get("crop") == "resized" else "padded", None)
    mean, std = known.get("statistics") or (known.get("mean"), known.get("std"))
    recipe = Recipe(crop=crop, resize=resize, padding=0, flip=False, interpolation="bicubic",
                    scale=(1.0, 1.0), ratio=(0.01, 100.0), mean=mean, std=std)  # as in tests
    train, test, info = data.load(
        args.dataset, args.data_dir, recipe, device=device, **flags.chosen(args, flags.LOADING))
    torch.manual_seed(args.seed)
    backbone = build_backbone(args.arch, info.image_size, known["layer"],
                              initial_channels=args.initial_channels)
    checkpoint.load_part("encoder", backbone, {"encoder": state})
    net, _ = runtime.prepare(Branch(backbone, backbone.width, info.num_classes), args, device)
    net.mix = None
    log(f"{info}\nprobe of {known['method']} features, {args.arch}")
    weights = Path(args.weights).resolve()
    encoder = [weights.parent.name, weights.stem] if state else ["random"]
    run = Run(args, device, info, ["probe", *encoder], model=net)
    fit(net.one, *pooled_features(net.backbone, train, args), args.weight_decay)
    evaluation.report(net, test, args, info, run)
    return net


if __name__ == "__main__":
    runtime.launch(main)
