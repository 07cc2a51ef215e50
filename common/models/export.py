#!/usr/bin/env python3
"""Writes a checkpoint's network for other programs.

    python common/models/export.py CHECKPOINT OUT.pth     # a state_dict, in torchvision's names if
                                                          # the network is torchvision's
    python common/models/export.py CHECKPOINT OUT.onnx    # needs onnx and onnxscript"""
import importlib.util
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision

from common import checkpoint, files, flags, models, runtime
from common.errors import RunError
from common.models.weights import CLASSIFIERS, TORCHVISION

# A backbone inside SAMix's or SAFuse's network; SAMix's classifier
INSIDE = r"^(?:q\.)?backbone\.before\.|^encoder\.(?=conv|bn1|layer\d|class_token|encoder\.)"
ONE = r"^(?:q\.)?one\."


def with_torchvisions_names(state: dict, arch: str, classes: int) -> tuple[dict, str] | None:
    """Return the state_dict for torchvision's model `arch`, without a classifier that does not fit,
    and a description; None if the rest does not fit either."""
    name = TORCHVISION.get(arch, arch)
    if name not in torchvision.models.list_models(module=torchvision.models):
        return None
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, num_classes=classes).state_dict()
    head = next(key for key in theirs if key.startswith(CLASSIFIERS)).rsplit(".", 1)[0]
    ours = {re.sub(ONE, f"{head}.", re.sub(INSIDE, "", key)): value for key, value in state.items()}
    ours = {key: ours[key] for key, value in theirs.items()
            if key in ours and ours[key].shape == value.shape}
    if last := "encoder.conv1.weight" in state:             # SAFuse's, for 128 pixels and more
        ours = {key: value for key, value in ours.items() if not key.startswith(CLASSIFIERS)}
    missing = theirs.keys() - ours.keys()
    if not all(key.startswith(CLASSIFIERS) for key in missing):
        return None
    return ours, (f"{name} in torchvision's names" + ", without the classifier" * bool(missing)
                  + "; its layer4 has stride 1" * last)


def write_onnx(state: dict, identity: dict, args: dict, classes: int, path: Path):
    """Write a network of common/models as ONNX, for batches of any size."""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise RunError(f"{path}: pip install onnx onnxscript")
    size = args.get("pixels") or args.get("image_size") or {        # older ones lack the first
        "tiny-imagenet-200": 64, "imagenet": 224}.get(identity["dataset"], 32)
    try:
        network = models.build(identity["arch"], classes, size, dropout=args.get("dropout") or 0.0,
                               initial_channels=identity["initial_channels"])
        network.load_state_dict(state)
    except (ValueError, RuntimeError):
        raise RunError(f"{path}: ONNX is for the networks of sage, resizemix and soft_aug; write "
                       "a .pth") from None
    images = torch.zeros(2, 3, size, args.get("width", size))
    torch.onnx.export(network.eval(), (images,), path, dynamo=True, external_data=False,
                      input_names=["images"], output_names=["logits"],
                      dynamic_shapes=({0: torch.export.Dim("batch")},))


def main(argv=None):
    """Write what the command line asks for, and print what it is."""
    parser = flags.Parser(__doc__)
    parser.usage = "%(prog)s CHECKPOINT OUT"
    parser.add_argument("checkpoint", help="checkpoint.pt or best.pt of a run")
    parser.add_argument("out", type=Path, help="OUT.pth or OUT.onnx")
    words = parser.parse_args(argv)
    if words.out.resolve() == Path(words.checkpoint).resolve():
        parser.error("OUT is the checkpoint itself")
    saved = checkpoint.load(words.checkpoint)
    state, identity, args = saved["model"], saved["identity"], saved.get("args", {})
    classes = identity["classes"] + bool(args.get("other"))     # Soft Augmentation's
    what = f"{identity['arch']} in this project's names (common.models.build)"
    if words.out.suffix == ".onnx":
        write_onnx(state, identity, args, classes, words.out)
        what = f"{identity['arch']} as ONNX"
    else:
        state, what = with_torchvisions_names(state, identity["arch"], classes) or (state, what)
        with files.whole(words.out) as new:
            torch.save(state, new)
    print(f"{words.out}: {what}, {len(state)} tensors")
    if "statistics" in args:
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in args["statistics"])
        print(f"images: RGB in [0, 1], minus ({mean}), divided by ({std})")


if __name__ == "__main__":
    runtime.launch(main)
