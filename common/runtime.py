"""Device, memory format, precision, compilation, signals, and the start and end of a program."""
import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision

from common import distributed
from common.distributed import log, print_once, rank, warn, world
from common.errors import RunError, Stopped

COMPILERS = {"darwin": "clang++", "win32": "cl"}            # what torch.compile calls on a CPU
traceback_folder = Path()                                   # of unforeseen faults; a run's own


# ----------------------------------------------------------------------------------- the machine

def setup(args) -> torch.device:
    """Return the device, with the processes joined, seeds set and the CPU's memory tuned.

    Raises RunError when what the flags or the launcher ask for is missing here.
    """
    local_rank, local_world = distributed.read_launcher()
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    check_machine(args, on_gpu, max(local_rank + 1, local_world))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")          # TF32, as cuDNN's convolutions
        torch.backends.cudnn.benchmark = True
    else:
        tune_cpu_memory()
        if local_world > 1:                                 # torchrun would leave one thread each
            torch.set_num_threads(max(1, cores() // local_world))
    distributed.join(device)
    torch.manual_seed(args.seed)
    name = torch.cuda.get_device_name(device) if on_gpu else \
        f"CPU, {torch.get_num_threads()} threads"
    log(f"device: {name}" + (f", {world()} processes" if world() > 1 else "")
        + f"; precision {'fp32' if args.amp == 'off' else args.amp}"
        + ("" if on_gpu or args.device == "cpu" else " (no GPU found)"))
    if args.amp == "bf16" and not on_gpu and not has_bf16():
        warn("this processor has no bf16 instructions: --amp bf16 is emulated and many times "
             "slower than --amp off")
    return device


def check_machine(args, on_gpu: bool, processes: int):
    """Raise RunError naming a flag that this machine cannot follow; `processes` run on it."""
    if args.loader == "dali" and not (importlib.util.find_spec("nvidia")
                                      and importlib.util.find_spec("nvidia.dali")):
        raise RunError("--loader dali: DALI is not installed (pip install nvidia-dali-cuda120, on "
                       "Linux); --loader torch does without it")
    if args.device == "cuda" and not on_gpu:
        raise RunError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if args.amp == "fp16" and not on_gpu:
        raise RunError("--amp fp16 needs a GPU; use --amp off (or bf16) on a CPU")
    if on_gpu and processes > torch.cuda.device_count():
        raise RunError(f"{processes} processes need a GPU each and {torch.cuda.device_count()} are "
                       "there; lower --nproc_per_node")
    compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if args.compile and not shutil.which(compiler):
        raise RunError(f"--compile needs a C++ compiler, and '{compiler}' is not on the PATH: "
                       "install it, name another in CXX, or leave out --compile")


def has_bf16() -> bool:
    """Return whether the processor computes in bf16, by what torch knows of it."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and (not x86 or torch.cpu._is_avx512_bf16_supported()
                 or torch.cpu._is_amx_tile_supported()))


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """The project's git commit, with '+' when files differ from it; '' outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout

    with contextlib.suppress(OSError):
        head = git("rev-parse", "--short", "HEAD").strip()
        return head + ("+" if head and git("status", "--porcelain", "-uno") else "")
    return ""


def facts(device: torch.device) -> dict:
    """Return what a run notes of its machine and versions."""
    return {"device": str(device), "processes": world(), "commit": commit(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "torchvision": torchvision.__version__}


def use_gpus(count: int):
    """Restart this program under torchrun on `count` GPUs of this machine, if count is above 1.

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
    """Keep freed buffers in the process: glibc's page faults cost more than the arithmetic.

    With mmap off and trimming off, plain training of the trial network runs about 1.2 times
    and saliency methods up to 2 times faster. Does nothing where there is no glibc.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ----------------------------------------------------------------------------------- the network

def autocast(args, device: torch.device):
    """Return the context of the forward passes under --amp."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def prepare(model, args, device: torch.device):
    """Return (net, model) on the device, in the memory format of --channels_last, compiled or not.

    `net` is the bare module, for checkpoints, evaluation and saliency passes; `model` is the same
    network as the training step calls it: under torchrun wrapped in DistributedDataParallel, which
    averages over ranks what the step's last backward pass leaves in the gradients (also what
    passes through `net` left there before). Where the network is not channels last, its
    convolutions make their inputs contiguous: else the strides of a batch choose the kernel.
    """
    net = model.to(device)
    narrow = device.type == "cpu" and any(map(is_narrow, net.modules()))
    if args.channels_last and not narrow:
        net = net.to(memory_format=torch.channels_last)
    else:
        for part in net.modules():
            if isinstance(part, torch.nn.Conv2d):
                part.register_forward_pre_hook(make_contiguous)
    log(("memory format: channels last" if args.channels_last and not narrow else
         "memory format: contiguous")
        + (" (channels last is unsafe for fewer than 16 channels on a CPU)"
           if args.channels_last and narrow else "") + ("; compiled" if args.compile else ""))
    if args.compile:
        net.compile()                                       # in place: names in checkpoints stay
    if world() == 1:
        return net, net
    ids = [device.index] if device.type == "cuda" else None
    return net, torch.nn.parallel.DistributedDataParallel(net, device_ids=ids)


def is_narrow(part) -> bool:
    """Return whether oneDNN's channels-last kernels of this module write beyond their buffers.

    Seen with AVX2 in strided 1×1 convolutions of fewer than 8 channels, with AVX-512 in 3×3 ones of
    up to 8; plain 1×1 products and stems on RGB are safe.
    """
    if not isinstance(part, torch.nn.Conv2d) or part.kernel_size == part.stride == (1, 1):
        return False
    return part.out_channels < 16 or (part.in_channels < 16 and part.in_channels != 3)


def make_contiguous(_, inputs):
    """Return a convolution's inputs (a forward pre-hook) in contiguous memory format."""
    return tuple(value.contiguous() for value in inputs)


@functools.cache
def _compile(function):
    return torch.compile(function)


def compiled(function, args):
    """Return `function`, compiled under --compile (once a program)."""
    return _compile(function) if args.compile else function


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
        """Return whether to stop after this step; all ranks get the same answer."""
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
        """End the program with one line and the signal's exit code."""
        raise Stopped(f"{signal.Signals(self.number).name}: {message}", 128 + self.number)


def launch(main):
    """Run main() as a program: faults print one line and exit with code 1.

    What nothing foresaw leaves its traceback in a file (the run's folder, or the working folder);
    with --debug it is raised.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)    # which imports had switched off
    os.environ["MPLBACKEND"] = "agg"                            # pictures go into files
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                          # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    code = 1
    try:
        main()
        code = 0
    except Stopped as stop:
        log(str(stop))
        code = stop.code
    except KeyboardInterrupt:
        print_once("stopped by Ctrl-C; nothing more was written")
        code = 130
    except RunError as fault:
        print_once(f"error: {fault}")
    except torch.OutOfMemoryError as fault:
        print_once(f"error: the GPU's memory is full ({first_line(fault)}): lower --batch_size or "
                   "use --amp bf16")
    except MemoryError as fault:
        print_once(f"error: the memory is full ({first_line(fault)}): lower --batch_size, or the "
                   "sizes that the flags set")
    except OSError as fault:
        name = f"{fault.filename}: " if fault.filename else ""
        print_once(f"error: {name}{fault.strerror or fault}")
    except Exception as fault:
        if "--debug" in sys.argv:
            raise
        print_once(describe(fault))
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:                                         # Python would flush again and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code and world() > 1:
        os._exit(code)                                          # never wait for ranks that hang
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def first_line(fault: Exception) -> str:
    """Return the beginning of what a fault says."""
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0][:300]


def describe(fault: Exception) -> str:
    """Return one line about an unforeseen fault; write its traceback into a file."""
    path = traceback_folder / (f"error-{rank()}.txt" if world() > 1 else "error.txt")
    try:
        path.write_text("".join(traceback.format_exception(fault)), errors="backslashreplace")
        where = f"details in {path}"
    except OSError:
        where = "--debug shows where"
    gone = " (was another process stopped? then go on with --resume auto)" if world() > 1 else ""
    return f"error: {type(fault).__name__}: {first_line(fault)}{gone}; {where}"
