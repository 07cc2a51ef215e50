"""The processes of a run: rank, log lines of rank 0, reductions, gathers, seeds of a step."""
import hashlib
import os
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm


def rank() -> int:
    """Return the number of this process among all (0 without torchrun)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes (1 without torchrun)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log(message: str):
    """Print on rank 0, above a progress bar if there is one."""
    if rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


def warn(message: str):
    """Print a warning on stderr, on rank 0, also before the processes join."""
    if rank() == 0 and os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def progress(batches, total: int, title: str, **options) -> tqdm:
    """Return `batches` behind a progress bar, on rank 0 and in a terminal alone."""
    return tqdm(batches, total=total, desc=title, leave=False,
                disable=None if rank() == 0 else True, **options)


def print_once(line: str):
    """Print one line on stderr, unless another process of the run has printed the same."""
    try:
        if dist.is_initialized():
            told = dist.distributed_c10d._get_default_store().add(line, 1) > 1
        else:                                               # not joined yet: one a machine
            told = os.environ.get("LOCAL_RANK", "0").strip("0").isdecimal()
            time.sleep(5 * told)                            # torchrun ends all when one has ended
    except RuntimeError:                                    # the store's process is gone
        told = False
    if not told:
        print(line, file=sys.stderr, flush=True)


def total(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes (the tensor itself when there is one)."""
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return all processes' rows (B, ...), equal shapes, as one; only our own carry a gradient."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


def share_buffers(net):
    """Copy rank 0's BatchNorm statistics to all, so that they evaluate the same network."""
    if world() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def seed_of(*numbers) -> int:
    """Return a 63-bit seed made of all numbers (seed, epoch, step, rank, …)."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """Return the generator of a training step's draws on this rank; seed torch (dropout) alike."""
    number = seed_of(seed, epoch, step, rank())
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():     # torch.manual_seed asks absent devices too: 0.2 ms a step
        torch.cuda.manual_seed(number)
    return torch.Generator().manual_seed(number)
