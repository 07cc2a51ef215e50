"""Checkpoints: written atomically, the previous one kept, loaded without running code."""
import errno
import hashlib
import os
from pathlib import Path

import torch

from common.distributed import rank, warn
from common.errors import RunError

NEWEST, PREVIOUS, BEST = "checkpoint.pt", "checkpoint.prev.pt", "best.pt"
DAMAGED = "checkpoint.damaged.pt"
DIGEST = 32                             # bytes at the end of a file, of all before them


def save(folder: Path, state: dict, name: str = NEWEST):
    """Writes `state` (tensors, numbers, strings, lists and dicts of them) to folder/name.

    The file is complete at every moment: written beside, synced to disk, then renamed over the
    old one. The newest checkpoint before it stays as checkpoint.prev.pt. Raises RunError when
    the disk is full or not writable; the old file is then still whole.
    """
    path, new = folder / name, folder / f".{name}.new"
    try:
        with open(new, "w+b") as file:
            torch.save(state, file)
            size = file.tell()
            file.seek(0)
            file.write(digest(file, size))
            file.flush()
            os.fsync(file.fileno())
        if name == NEWEST and path.exists():
            os.replace(path, folder / PREVIOUS)
        os.replace(new, path)
    except (OSError, RuntimeError) as fault:                # torch reports a full disk as either
        new.unlink(missing_ok=True)
        full = getattr(fault, "errno", None) == errno.ENOSPC or "write" in str(fault)
        reason = "the disk is full" if full else str(fault).splitlines()[0]
        raise RunError(f"{path} could not be written ({reason}); "
                       "the checkpoint before it is untouched") from None


def digest(file, size: int) -> bytes:
    """BLAKE2b of the next `size` bytes of an open file."""
    found = hashlib.blake2b(digest_size=DIGEST)
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        found.update(block)
        size -= len(block)
    return found.digest()


def load(path) -> dict:
    """Reads one checkpoint to the CPU; no code in it can run (weights_only).

    Raises RunError when it is missing, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint")
    try:
        with open(path, "rb") as file:                      # torch itself checks no CRC
            if digest(file, path.stat().st_size - DIGEST) != file.read():
                raise ValueError("its digest is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:                              # torch raises nearly anything
        raise RunError(f"{path} is damaged or no checkpoint "
                       f"({(str(fault).splitlines() or ['empty'])[0][:80]})") from None
    check_state(state, path)
    return state


def check_state(state, path):
    """Raise RunError naming the first entry of a checkpoint that is missing or ill-typed.

    Weights alone (best.pt) have no history; what goes on training has all entries.
    """
    def number(value):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not isinstance(state, dict) or not {"model", "identity"} <= set(state):
        raise RunError(f"{path} is not a checkpoint of this project")
    right = {"model": lambda model: isinstance(model, dict) and all(
                 isinstance(name, str) and torch.is_tensor(value) for name, value in model.items()),
             "identity": lambda value: isinstance(value, dict), "epoch": number,
             "args": lambda value: isinstance(value, dict)}
    if "history" in state:
        right |= {"step": number, "best": lambda value: isinstance(value, int | float),
                  "sums": lambda value: value is None or isinstance(value, dict),
                  "history": lambda rows: isinstance(rows, list) and all(
                      isinstance(row, dict) and number(row.get("epoch")) for row in rows),
                  "args": lambda value: isinstance(value, dict) and number(value.get("batch_size"))}
    wrong = [name for name, check in right.items() if name not in state or not check(state[name])]
    if wrong:
        raise RunError(f"{path}: the checkpoint's {wrong[0]} is missing or not what it should be")


def resume(source: str, folder: Path) -> dict | None:
    """Return the state to go on from, None for a fresh start.

    source '': start fresh (RunError if the folder holds a run). 'auto': newest valid checkpoint of
    the folder, if any; a damaged newer one is named and put aside. A path: that file (RunError if
    the folder holds another run).
    """
    newest, previous = folder / NEWEST, folder / PREVIOUS
    if newest.exists() or previous.exists():
        if not source:
            raise RunError(f"{folder} already holds a run: go on with --resume auto, "
                           "or choose another --root_dir")
        if source != "auto" and Path(source).resolve().parent != folder.resolve():
            raise RunError(f"--resume {source}: {folder} already holds another run, which would be "
                           "overwritten; choose another --root_dir")
    if not source:
        return None
    if source == "auto":
        if not newest.exists() and not previous.exists():
            return None
        try:
            return load(newest)
        except RunError as fault:
            if not previous.exists():
                raise
            state = load(previous)
            if rank() == 0 and newest.exists():             # else it would become the previous one
                os.replace(newest, folder / DAMAGED)
            warn(f"{fault}; going on from {previous}")
            return state
    try:
        return load(source)
    except RunError as fault:
        before = Path(source).with_name(PREVIOUS)
        if before.is_file() and before != Path(source):
            raise RunError(f"{fault}; the good one before it: --resume {before}") from None
        raise


def check_identity(state: dict, identity: dict):
    """Raises RunError naming what differs between a checkpoint's network or data and this run's.

    `identity` holds what must agree; to evaluate, less than to go on training.
    """
    theirs = state["identity"]
    wrong = [f"{key} {theirs.get(key)} (here {value})" for key, value in identity.items()
             if theirs.get(key) != value]
    if wrong:
        raise RunError("the checkpoint is of another run: " + ", ".join(wrong))


def load_part(name: str, part, state: dict):
    """Load one part's state; an optimizer keeps the settings of this run's flags (but for the
    learning rate, which the loop sets). Raises RunError when it is of another shape.
    """
    settings = [{key: value for key, value in group.items() if key not in ("params", "lr")}
                for group in getattr(part, "param_groups", [])]
    try:
        if state[name]:                                     # a scaler that is off has no state
            part.load_state_dict(state[name])
        for group, own in zip(getattr(part, "param_groups", []), settings, strict=True):
            group.update(own)
    except (KeyError, ValueError, RuntimeError) as fault:
        reason = (str(fault).strip().splitlines() or [""])[-1].strip()
        raise RunError(f"the checkpoint's {name} does not fit this run's ({reason[:120]})"
                       ) from None
