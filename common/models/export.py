#!/usr/bin/env python3
"""Writes a checkpoint's network for other programs.

    python common/models/export.py CHECKPOINT OUT.pth     # a state_dict
    python common/models/export.py CHECKPOINT OUT.onnx    # needs onnx and onnxscript

The state_dict has torchvision's names where the network is torchvision's, our own names else.
"""
import argparse
import importlib.util
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision

from common import checkpoint, models, runtime
from common.errors import RunError
from common.models.weights import CLASSIFIERS, TORCHVISION

# A backbone inside SAMix's or SAFuse's network; SAMix's classifier
INSIDE = r"^(?:q\.)?backbone\.before\.|^encoder\.(?=conv|bn1|layer\d|class_token|encoder\.)"
ONE = r"^(?:q\.)?one\."


def with_torchvisions_names(state: dict, arch: str, classes: int) -> tuple[dict, str] | None:
    """Return the state_dict that torchvision's model `arch` loads and what it is; None if none.

    Without the classifier where that is wider, as SAFuse's.
    """
    name = TORCHVISION.get(arch, arch)
    if name not in torchvision.models.list_models(module=torchvision.models):
        return None
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, num_classes=classes).state_dict()
    head = next(key for key in theirs if key.startswith(CLASSIFIERS)).rsplit(".", 1)[0]
    ours = {re.sub(ONE, f"{head}.", re.sub(INSIDE, "", key)): value for key, value in state.items()}
    ours = {key: ours[key] for key, value in theirs.items()
            if key in ours and ours[key].shape == value.shape}
    missing = [key for key in theirs if key not in ours]
    if not all(key.startswith(CLASSIFIERS) for key in missing):
        return None
    return ours, f"{name} in torchvision's names" + ", without the classifier" * bool(missing)


def outputs(identity: dict, args: dict) -> int:
    """Return the number of logits: classes, and Soft Augmentation's --other."""
    return identity["classes"] + bool(args.get("other"))


def write_onnx(state: dict, identity: dict, args: dict, path: Path):
    """Write a network of common/models as ONNX, for batches of any size."""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise RunError(f"{path}: pip install onnx onnxscript")
    size = args.get("image_size") or {"digits": 32, "tiny-imagenet-200": 64, "imagenet": 224}.get(
        identity["dataset"], 32)
    try:
        network = models.build(identity["arch"], outputs(identity, args), size,
                               initial_channels=identity["initial_channels"],
                               dropout=args.get("dropout") or 0.0)
        network.load_state_dict(state)
    except (ValueError, RuntimeError):
        raise RunError(f"{path}: ONNX is for the networks of sage, resizemix and soft_aug; write "
                       "a .pth") from None
    torch.onnx.export(network.eval(), (torch.zeros(2, 3, size, size),), path, dynamo=True,
                      input_names=["images"], output_names=["logits"],
                      dynamic_shapes=({0: torch.export.Dim("batch")},))


def parse_args(argv=None):
    """Return the flags; usage errors end the program with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint.pt or best.pt of a run")
    parser.add_argument("out", type=Path, help="OUT.pth or OUT.onnx")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".pth", ".onnx"):
        parser.error(f"{args.out}: the name ends in .pth or .onnx")
    return args


def main(argv=None):
    """Write what the command line asks for; say what it is."""
    args = parse_args(argv)
    saved = checkpoint.load(args.checkpoint)
    state, identity = saved["model"], saved["identity"]
    if args.out.suffix == ".onnx":
        write_onnx(state, identity, saved.get("args", {}), args.out)
        return print(f"{args.out}: {identity['arch']} as ONNX")
    state, what = with_torchvisions_names(state, identity["arch"],
                                          outputs(identity, saved.get("args", {}))) or (
        state, f"{identity['arch']} in this project's names (common.models.build)")
    torch.save(state, args.out)
    print(f"{args.out}: {what}, {len(state)} tensors")


if __name__ == "__main__":
    runtime.launch(main)
