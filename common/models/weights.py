"""Weights from elsewhere: torchvision's for ImageNet, or a file's. No code in a file can run."""
import argparse
import hashlib
import re
from pathlib import Path

import torch
import torchvision

from common.distributed import log
from common.errors import DataError

TORCHVISION = {"convnext_t": "convnext_tiny", "resnext50": "resnext50_32x4d",
               "deit_b16": "vit_b_16"}                      # where our names differ
CLASSIFIERS = ("fc.", "heads.", "head.", "classifier.2.")


def load_pretrained(network, args):
    """Load the weights that --pretrained names, if any: torchvision's for ImageNet or a file's; a
    classifier that does not fit keeps its initial values. Raises DataError."""
    source, arch = args.pretrained, args.arch
    if not source:
        return
    state = read(download(arch) if source == "torchvision" else Path(source).expanduser())
    own = network.state_dict()
    loaded = {name: state[name] for name, value in own.items()
              if getattr(state.get(name), "shape", None) == value.shape}
    new = [name for name in own if name not in loaded and not name.endswith("batches_tracked")]
    odd = [name for name in new if not name.startswith(CLASSIFIERS)]
    if odd:
        theirs = tuple(state[odd[0]].shape) if odd[0] in state else "missing"
        raise DataError(f"{source} does not fit {arch} at this image size: {odd[0]}: {theirs}, "
                        f"{tuple(own[odd[0]].shape)} needed")
    left = [name for name in state if name not in own and not name.startswith(CLASSIFIERS)
            and not name.endswith("batches_tracked")]
    parts = {name.split(".")[0] for name in own}
    if deeper := [name for name in left if name.split(".")[0] in parts]:
        raise DataError(f"{source} is of a larger network than {arch}: it holds {deeper[0]}, too")
    network.load_state_dict(loaded, strict=False)
    log(f"weights: {source}'s" + f"; new: {', '.join(sorted(new))}" * bool(new)
        + f"; left out: {', '.join(left)}" * bool(left))


def read(path: Path) -> dict[str, torch.Tensor]:
    """Return the state_dict in a file, read with weights_only; it may be under "state_dict" or
    "model", with DDP's or torch.compile's prefixes. Raises DataError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):    # of many trainers
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of weights") from None
    except Exception as fault:                              # torch raises nearly anything
        code = re.search(r"GLOBAL (\S+)", str(fault))
        raise DataError(f"{path} holds more than tensors ({code[1]}), which would run code when "
                        "read: save its state_dict alone" if code else
                        f"{path}: not a readable file of weights") from None
    for key in ("state_dict", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    pairs = state.items() if isinstance(state, dict) else ()
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value
             for name, value in pairs if isinstance(value, torch.Tensor)}
    if not state:
        raise DataError(f"{path}: not a readable file of weights (it holds no state_dict)")
    return state


def download(arch: str) -> Path:
    """Return the file of torchvision's ImageNet weights in torch.hub's cache, downloaded where it
    is missing, its SHA-256 checked at every use. Raises DataError."""
    try:
        url = torchvision.models.get_model_weights(TORCHVISION.get(arch, arch)).IMAGENET1K_V1.url
    except (ValueError, AttributeError):
        raise DataError(f"torchvision has no ImageNet weights of {arch}") from None
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    expected = path.stem.rsplit("-", 1)[1]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, expected, progress=False)
    except (OSError, RuntimeError) as fault:
        raise DataError(f"{url} could not be downloaded ({fault}); fetch it elsewhere and give the "
                        "file: --pretrained FILE") from None
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(expected):
        raise DataError(f"{path}: its SHA-256 begins otherwise; delete it to download it again")
    return path
