"""The processes of a run: rank, log lines of rank 0, reductions, gathers, seeds of a step."""
import hashlib
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.errors import RunError


def rank() -> int:
    """Number of this process among all (0 without torchrun)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes (1 without torchrun)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log(message: str):
    """Prints on the first process only, above a progress bar if there is one."""
    if rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


def warn(message: str):
    """One line on stderr, from the first process only."""
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes (the tensor itself when there is one)."""
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather(value) -> list:
    """What each process has for `value` (anything that pickles), in the order of ranks."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The processes' tensors (B, ...), all of one shape, in one; only our own carry a gradient."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


def share_buffers(net):
    """Every rank takes rank 0's BatchNorm statistics, so that all evaluate the same network."""
    if world() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def per_rank(batch_size: int) -> int:
    """Images of this process in one step of `batch_size` images over all processes."""
    if batch_size % world():
        raise RunError(f"--batch_size {batch_size} cannot be shared by {world()} processes: "
                       f"take a multiple of {world()}")
    return batch_size // world()


def seed_of(*numbers) -> int:
    """A 63-bit seed that depends on all numbers (seed, epoch, step, rank, …) and nothing else."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The source of one training step's draws on this rank; dropout is seeded alike.

    Because a step's randomness is a function of its number alone, a resumed run continues
    exactly where a run that was never stopped would be.
    """
    number = seed_of(seed, epoch, step, rank())
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)
