"""Device, seeds, precision, torchrun, signals and the flags that every main.py shares."""
import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import math
import os
import re
import signal
import sys
import traceback

import torch
import torch.distributed as dist
from tqdm import tqdm

BOOLEANS = {"true": True, "yes": True, "y": True, "1": True,
            "false": False, "no": False, "n": False, "0": False}


MEMORY_FULL = "error: the memory is full: lower --batch_size, or the sizes that the flags ask for"


class RunError(Exception):
    """A fault the user can mend; `launch` prints its one line and exits with code 1."""


class DataError(RunError):
    """Data that are missing, damaged or not what the flags say; the message names the file."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived and the state has been saved; `code` is the exit status."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------------------- flags

def boolean(text: str) -> bool:
    """argparse type of the papers' booleans: true/false, yes/no, 1/0 in any case."""
    try:
        return BOOLEANS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false") from None


def add_boolean(add, name: str, default: bool, help: str):
    """`--name`, `--name True` and `--name False` all work; `add`: a parser's add_argument."""
    add(name, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def number(kind=float, low=None, high=None, above=None):
    """argparse type: an int or float within its bounds (`above` excludes the bound itself)."""
    bounds = [f"{word} {bound}" for word, bound in
              (("of at least", low), ("at most", high), ("above", above)) if bound is not None]

    def check(text: str):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if ((low is None or value >= low) and (high is None or value <= high)
                    and (above is None or value > above) and math.isfinite(value)):
                return value
        what = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"'{text}' is not {what} {' and '.join(bounds)}")
    return check


def part_of_a_name(text: str) -> str:
    """argparse type: what is put into a folder's name."""
    if "/" in text:
        raise argparse.ArgumentTypeError(f"'{text}' is part of a name and holds no '/'")
    return text


positive, count = number(int, low=1), number(int, low=0)
amount, share = number(low=0), number(low=0, high=1)


def add_flags(parser, datasets, archs, names: dict, **defaults):
    """The flags that every main.py has beside its paper's own.

    datasets, archs: the choices; names: a paper's own names for some of these flags, by ours;
    defaults: values by flag (none: None, unless a configuration sets it).
    """
    group = parser.add_argument_group("data, network and schedule (the same in every main.py)")

    def ours(name, help=None, **options):
        group.add_argument(f"--{name}", *names.get(name, ()), default=defaults.get(name), help=help,
                           **options)

    defaults = {"data_dir": "data", "root_dir": "experiments", "initial_channels": 64, "seed": 0,
                "workers": 4, "print_freq": 100, "momentum": 0.9, "job_name": ""} | defaults
    ours("dataset", "which data", choices=datasets)
    ours("data_dir", "folder (or .npz file) of the data set")
    ours("root_dir", "where the run's folder is made")
    ours("job_name", "suffix of the run's folder", type=part_of_a_name)
    ours("labels_per_class", "training images of each class, if not all", type=positive)
    ours("image_size", "side of the square images in pixels, if not the data set's",
        type=positive)
    ours("arch", ", ".join(archs), choices=archs, metavar="NET")
    ours("initial_channels", "64 is the network as published, 16 has a quarter of all its widths",
        type=number(int, low=4))
    ours("epochs", type=positive)
    ours("batch_size", "over all processes", type=positive)
    ours("lr", "learning rate", type=amount)
    ours("momentum", type=share)
    ours("weight_decay", type=amount)
    ours("seed", "of all that is random; a default of -1 draws one",
         type=number(int, low=-2**63, high=2**63 - 1))
    ours("workers", "threads that decode image files or run DALI", type=count)
    ours("print_freq", "steps between log lines", type=positive)

    group = parser.add_argument_group("run time (the same in every main.py)")
    add = group.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto: the GPU where there is one")
    add("--amp", choices=["off", "bf16", "fp16"], default="off",
        help="autocast precision; fp16 scales the loss and needs a GPU")
    add_boolean(add, "--compile", False, "torch.compile the network")
    add_boolean(add, "--channels_last", True,
                "memory format of the network; on, it measured faster everywhere")
    add("--loader", choices=["auto", "dali", "torch"], default="auto",
        help="who makes the batches; both augment alike, auto: the faster")
    add("--resume", default="", metavar="auto|PATH",
        help="auto: go on from the run's newest good checkpoint, if there is one")
    either = group.add_mutually_exclusive_group().add_argument
    either("--evaluate", nargs="?", const="auto", default="", metavar="CHECKPOINT",
           help="evaluate and exit: this file, or --resume's, or the run's best.pt")
    either("--preview", default="", metavar="FILE.png",
           help="draw a mixed batch with its label shares (by --resume's network), and exit")
    add("--max_steps", type=positive, default=None, metavar="N",
        help="a trial: N training steps, N evaluation batches, then all the closing motions")
    add_boolean(add, "--tensorboard", False, "write TensorBoard events into the run folder")


# ----------------------------------------------------------------------------------- the machine

def setup(args) -> torch.device:
    """Chooses the device, joins torchrun's or srun's processes, seeds, and tunes the CPU.

    Raises RunError when the device asked for is not there. Prints what it chose, once.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in os.environ:
        os.environ.update(RANK=os.environ["SLURM_PROCID"], LOCAL_RANK=os.environ["SLURM_LOCALID"],
                          WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"])     # srun, no torchrun
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
               if "RANK" in os.environ and name not in os.environ]
    if missing:
        raise RunError(f"a run of several processes needs {' and '.join(missing)} in its "
                       "environment: start it with torchrun, or set them as "
                       "resizemix/scripts/train_slurm.sh does")
    if args.loader == "dali" and not (importlib.util.find_spec("nvidia")
                                      and importlib.util.find_spec("nvidia.dali")):
        raise RunError("--loader dali: DALI is not installed (pip install nvidia-dali-cuda120, on "
                       "Linux); --loader torch does without it")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    use_cuda = torch.cuda.is_available() and args.device != "cpu"
    if args.amp == "fp16" and not use_cuda:
        raise RunError("--amp fp16 needs a GPU; use --amp bf16 or off on a CPU")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise RunError(f"process {local_rank} of this machine has no GPU of its own: "
                       f"{torch.cuda.device_count()} are there; lower --nproc_per_node")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")          # TF32, as cuDNN's convolutions
        torch.backends.cudnn.benchmark = True
    else:
        tune_cpu_memory()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > 1:                                       # torchrun would leave one thread each
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo",
                                device_id=device if use_cuda else None)
    torch.manual_seed(args.seed)
    name = torch.cuda.get_device_name(device) if use_cuda else \
        f"CPU, {torch.get_num_threads()} threads"
    say(f"device: {name}" + (f", {world()} processes" if world() > 1 else "")
        + f"; precision {'fp32' if args.amp == 'off' else args.amp}"
        + ("; channels last" if args.channels_last else "") + ("; compiled" if args.compile else "")
        + ("" if use_cuda or args.device == "cpu" else " (no GPU found)"))
    return device


def use_gpus(count: int):
    """Restarts this program under torchrun on `count` GPUs of this machine, if count is above 1.

    Does nothing under torchrun, or (with a warning) without a GPU. Raises RunError if there are
    fewer GPUs.
    """
    if count <= 1 or "RANK" in os.environ:
        return
    if not torch.cuda.is_available():
        return warn(f"{count} GPUs asked for, none is there: one process on the CPU")
    if count > torch.cuda.device_count():
        raise RunError(f"{count} GPUs asked for, {torch.cuda.device_count()} are there")
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              f"--nproc_per_node={count}", *sys.argv])


def tune_cpu_memory():
    """Keeps freed buffers in the process: glibc's page faults cost more than the arithmetic.

    With mmap off and trimming off, plain training of the trial network runs about 1.2 times
    and saliency methods up to 2 times faster. Does nothing where there is no glibc.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(args, device: torch.device):
    """Context of the forward passes under --amp."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def prepare(model, args, device: torch.device):
    """Moves the network to the device, in the wished memory format, compiled if wished.

    Returns (net, model): `net` is the bare module, for checkpoints, evaluation and saliency
    passes; `model` is the same network as the training step calls it: under torchrun wrapped
    in DistributedDataParallel, which averages over ranks what the step's last backward pass
    leaves in the gradients (also what passes through `net` left there before).
    """
    net = model.to(device)
    # torch's channels-last convolutions on the CPU crash with fewer than 16 channels
    narrow = device.type == "cpu" and any(
        isinstance(part, torch.nn.Conv2d) and part.kernel_size != (1, 1) and part.out_channels < 16
        for part in net.modules())
    if args.channels_last and not narrow:
        net = net.to(memory_format=torch.channels_last)
    if args.compile:
        net.compile()                                       # in place: names in checkpoints stay
    if world() == 1:
        return net, net
    ids = [device.index] if device.type == "cuda" else None
    return net, torch.nn.parallel.DistributedDataParallel(net, device_ids=ids)


# ------------------------------------------------------------------------------------- processes

def rank() -> int:
    """Number of this process among all (0 without torchrun)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes (1 without torchrun)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(message: str):
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


# ------------------------------------------------------------------------------------ randomness

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


# ---------------------------------------------------------------------------------- start and end

class StopSignal:
    """Notes SIGTERM and Ctrl-C; the training loop asks after each step. A second one kills."""

    CHECK_EVERY = 8                                         # steps between agreements of ranks

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def arrived(self, step: int, last: bool = False) -> bool:
        """Whether to stop after this step; all ranks get the same answer at the same step."""
        if world() == 1:
            return self.number != 0
        if (step + 1) % self.CHECK_EVERY and not last:
            return False
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.number = int(number)
        return self.number != 0

    def leave(self, message: str):
        """Ends the program with a clear line and the signal's exit code."""
        raise Stopped(f"{signal.Signals(self.number).name}: {message}", 128 + self.number)


def launch(main):
    """Runs a main() as a program: known faults become one line on stderr and exit code 1."""
    code = 1
    try:
        main()
        code = 0
    except Stopped as stop:
        say(str(stop))
        code = stop.code
    except KeyboardInterrupt:
        print("stopped before training began; nothing was written", file=sys.stderr)
        code = 130
    except RunError as fault:
        print(f"error: {fault}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: lower --batch_size or use --amp bf16",
              file=sys.stderr)
    except MemoryError:
        print(MEMORY_FULL, file=sys.stderr)
    except OSError as fault:
        place = f"{fault.filename}: " if fault.filename else ""
        print(f"error: {place}{fault.strerror or fault}", file=sys.stderr)
    except Exception as fault:
        if world() > 1 and re.search("gloo|nccl|connection|peer", str(fault), re.IGNORECASE):
            print("error: another process of this run is gone; start again with --resume auto "
                  f"({str(fault).splitlines()[0][:120]})", file=sys.stderr)
        elif "can't allocate memory" in str(fault):         # torch's word on a CPU
            print(MEMORY_FULL, file=sys.stderr)
        elif "more than 1 value per channel" in str(fault):
            print("error: BatchNorm cannot learn from a batch of one image: choose another "
                  "--batch_size", file=sys.stderr)
        else:                                               # a defect of ours: show where
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if code and world() > 1:
        os._exit(code)                                      # never wait for ranks that hang
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
