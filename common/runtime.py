"""Device, memory format, precision, compilation, signals, and the start and end of a program."""
import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import sys
import traceback

import torch
import torch.distributed as dist

from common.distributed import log, warn, world
from common.errors import RunError, Stopped

MEMORY_FULL = "error: the memory is full: lower --batch_size, or the sizes that the flags ask for"


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
    log(f"device: {name}" + (f", {world()} processes" if world() > 1 else "")
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
        log(str(stop))
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
