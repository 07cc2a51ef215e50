"""Checkpoints: written atomically, the previous one stays, loaded without running code."""
import contextlib
import hashlib
import io
import os
from pathlib import Path

import torch

from common.distributed import rank, warn
from common.errors import RunError
from common.files import whole

NEWEST, PREVIOUS, BEST = "checkpoint.pt", "checkpoint.prev.pt", "best.pt"
DIGEST = 32                             # bytes at a file's end, of all before: torch checks no CRC


def save(folder: Path, state: dict, name: str = NEWEST):
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to folder/name; the newest
    checkpoint before it becomes checkpoint.prev.pt. On a full disk all stays."""
    path, buffer = folder / name, io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.blake2b(buffer.getbuffer(), digest_size=DIGEST).digest())
    with whole(path) as new, open(new, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
        if name == NEWEST and path.exists():
            os.replace(path, folder / PREVIOUS)


def load(path) -> dict:
    """Return a checkpoint, on the CPU; no code in it can run. Raises RunError if it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint")
    try:
        content = memoryview(path.read_bytes())
    except OSError as fault:                                # of the disk: another one may be sound
        raise RunError(f"{path}: {fault.strerror}") from None
    if hashlib.blake2b(content[:-DIGEST], digest_size=DIGEST).digest() != content[-DIGEST:]:
        raise RunError(f"{path} is damaged or no checkpoint of this project")
    return torch.load(path, map_location="cpu", weights_only=True)


def newest_valid(folder: Path) -> tuple[Path | None, dict | None]:
    """Return a run's newest checkpoint that is not damaged, and its state; None, None without."""
    for path in (folder / NEWEST, folder / PREVIOUS):
        with contextlib.suppress(RunError):
            return path, load(path)
    return None, None


def resume(source: str, folder: Path) -> dict | None:
    """Return the state to go on from. source '': None, a fresh start; 'auto': the newest valid
    checkpoint, if any; a path: that file. RunError: another run would be overwritten."""
    newest, previous, log = folder / NEWEST, folder / PREVIOUS, folder / "log.csv"
    empty = not newest.exists() and not previous.exists()
    # its checkpoints deleted; killed before its first one, a run has logged one epoch at most
    bare = empty and log.exists() and (not source or log.read_text().count("\n") > 2)
    if source and source != "auto":
        if (bare or not empty) and Path(source).resolve().parent != folder.resolve():
            raise RunError(f"--resume {source}: {folder} already holds another run, which would be "
                           "overwritten; choose another --root_dir")
        return load(source)
    if bare:
        raise RunError(f"{folder} holds a run without its checkpoints: --job_name NAME or another "
                       "--root_dir begins a new one")
    if empty:
        return None
    if not source:
        raise RunError(f"{folder} already holds a run: --resume auto continues it, --job_name NAME "
                       "or another --root_dir begins a new one")
    path, state = newest_valid(folder)
    if path is None:
        load(newest)                                        # raises: neither is valid
    if path == previous:
        warn(f"{newest} is missing or damaged; going on from {previous}")
        if rank() == 0 and newest.exists():                 # else it would become the previous one
            os.replace(newest, folder / "checkpoint.damaged.pt")
    return state


def check_identity(state: dict, identity: dict):
    """Raise RunError naming what differs between a checkpoint's network or data and this run's."""
    theirs = state["identity"]
    wrong = [f"{key} {theirs.get(key)} (here {value})" for key, value in identity.items()
             if theirs.get(key) != value]
    if wrong:
        raise RunError("the checkpoint is of another run: " + ", ".join(wrong))


def load_part(name: str, part, state: dict):
    """Load one part's state; an optimizer keeps the settings of this run's flags, but for the
    learning rate, which the loop sets. Raises RunError when it is of another shape."""
    settings = [{key: value for key, value in group.items() if key not in ("params", "lr")}
                for group in getattr(part, "param_groups", [])]
    try:
        if state[name]:                                     # a scaler that is off has no state
            part.load_state_dict(state[name])
    except (KeyError, ValueError, RuntimeError) as fault:
        reason = str(fault).strip().rpartition("\n")[2].strip()[:120]
        raise RunError(f"the checkpoint's {name} does not fit this run's ({reason})") from None
    for group, own in zip(getattr(part, "param_groups", []), settings, strict=True):
        group.update(own)
