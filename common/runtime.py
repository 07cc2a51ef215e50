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

from common.distributed import log, print_once, rank, warn, world
from common.errors import RunError, Stopped

COMPILERS = {"darwin": "clang++", "win32": "cl"}            # what torch.compile calls on a CPU
traceback_folder = Path()                                   # of unforeseen faults; a run's own


def setup(args) -> torch.device:
    """Return the device, with the processes joined, seeds set and the CPU's memory tuned."""
    env = os.environ
    if env.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "RANK" not in env:   # srun, no torchrun
        env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"],
                   WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"])
    local_rank, local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
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
    if "RANK" in env and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    torch.manual_seed(args.seed)
    name = torch.cuda.get_device_name(device) if on_gpu else \
        f"CPU, {torch.get_num_threads()} threads"
    log(f"device: {name}" + f", {world()} processes" * (world() > 1)
        + f"; precision {'fp32' if args.amp == 'off' else args.amp}" + ", TF32" * has_tf32(device)
        + " (no GPU found)" * (not on_gpu and args.device != "cpu"))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() \
        and (not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if args.amp == "bf16" and not on_gpu and not bf16:
        warn("this processor lacks bf16: --amp bf16 is emulated and many times slower than off")
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
                       "there; lower --nproc_per_node (slurm: not --gpus-per-task)")
    compiler = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if args.compile and not shutil.which(compiler):
        raise RunError(f"--compile needs a C++ compiler, and {compiler!r} is not on the PATH: "
                       "install it, name another in CXX, or leave out --compile")


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def has_tf32(device: torch.device) -> bool:
    """Return whether fp32 products and convolutions there are TF32's: 10 bits of mantissa."""
    return (device.type == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
            and torch.cuda.is_tf32_supported())


def hardware(device: torch.device) -> str:
    """Return the GPU's name, or what instructions the processor has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def facts(device: torch.device) -> dict:
    """Return what a run notes of its machine and versions."""
    git = "git describe --always --dirty=+ --exclude='*'"
    commit = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True,
                            text=True).stdout.strip()       # '' without git
    return {"device": str(device), "processes": world(), "commit": commit,
            "gpu": hardware(device) if device.type == "cuda" else None,
            "tf32": has_tf32(device), "threads": torch.get_num_threads(),
            "processor": hardware(torch.device("cpu")),
            "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__}


def use_gpus(count: int):
    """Restart this program under torchrun on `count` GPUs of this machine, if count is above 1."""
    if count > 1 and not torch.cuda.is_available():
        warn(f"{count} GPUs asked for, none is there: one process on the CPU")
    elif count > 1 and "RANK" not in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  f"--nproc_per_node={count}", *sys.argv])


def tune_cpu_memory():
    """Keep freed buffers in the process: glibc's page faults cost more than the arithmetic."""
    with contextlib.suppress(OSError, AttributeError):      # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)                                      # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)                              # M_TRIM_THRESHOLD


def autocast(args, device: torch.device):
    """Return the context of the forward passes under --amp."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def prepare(model, args, device: torch.device):
    """Return (net, model) on the device, in the memory format of --channels_last, compiled or not:
    the bare module, for checkpoints, evaluation and saliency passes; and what the training step
    calls, under torchrun a DistributedDataParallel, which averages over ranks what the step's last
    backward pass leaves in the gradients (and passes through `net` before it)."""
    net = model.to(device)
    narrow = device.type == "cpu" and any(map(is_narrow, net.modules()))
    if last := args.channels_last and not narrow:
        net = net.to(memory_format=torch.channels_last)
    else:                               # else the strides of a batch would choose the kernel
        for part in net.modules():
            if isinstance(part, torch.nn.Conv2d):
                part.register_forward_pre_hook(
                    lambda _, inputs: tuple(value.contiguous() for value in inputs))
    log(f"memory format: {'channels last' if last else 'contiguous'}"
        + " (channels last is unsafe for fewer than 16 channels on a CPU)" * (
            args.channels_last and narrow) + "; compiled" * args.compile)
    if args.compile:
        net.compile()                                       # in place: names in checkpoints stay
    if world() == 1:
        return net, net
    ids = [device.index] if device.type == "cuda" else None
    return net, torch.nn.parallel.DistributedDataParallel(net, device_ids=ids)


def is_narrow(part) -> bool:
    """Return whether oneDNN's channels-last kernels of this module write beyond their buffers: seen
    in strided 1×1 and in 3×3 convolutions of up to 8 channels; stems on RGB are safe."""
    return (isinstance(part, torch.nn.Conv2d) and not part.kernel_size == part.stride == (1, 1)
            and (part.out_channels < 16 or (part.in_channels < 16 and part.in_channels != 3)))


_compile = functools.cache(torch.compile)


def compiled(function, args):
    """Return `function`, compiled under --compile (once a program)."""
    return _compile(function) if args.compile else function


class StopSignal:
    """Notes SIGTERM and Ctrl-C; the training loop asks after each step. A second one kills, as
    does the first after `release`."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def release(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def note(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def arrived(self, step: int, last: bool = False) -> bool:
        """Return whether to stop after this step; all ranks get the same answer."""
        if world() == 1:
            return self.number != 0
        if (step + 1) % 8 and not last:                     # agreeing costs a wait
            return False
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.number = int(number)
        return self.number != 0


def launch(main):
    """Run main() as a program: a fault prints one line and exits with code 1 (--debug raises)."""
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
        message, code = stop.args
        log(message)
    except KeyboardInterrupt:
        print_once("stopped by Ctrl-C; nothing more was written")
        code = 130
    except Exception as fault:
        if "--debug" in sys.argv and not isinstance(fault, RunError):
            raise
        print_once(f"error: {describe(fault)}")
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


def describe(fault: Exception) -> str:
    """Return one line about a fault; write the traceback of an unforeseen one into a file."""
    if isinstance(fault, RunError):
        return str(fault)
    if isinstance(fault, OSError):
        return (f"{fault.filename}: " if fault.filename else "") + (fault.strerror or str(fault))
    first = str(fault).strip().partition("\n")[0][:300]
    if isinstance(fault, (MemoryError, torch.OutOfMemoryError)):
        return f"the memory is full ({first}): lower --batch_size, or take --amp bf16 on a GPU"
    path = traceback_folder / (f"error-{rank()}.txt" if world() > 1 else "error.txt")
    try:
        path.write_text("".join(traceback.format_exception(fault)), errors="backslashreplace")
        where = f"details in {path}"
    except OSError:
        where = "--debug shows where"
    gone = " (was another process stopped? then go on with --resume auto)" if world() > 1 else ""
    return f"{type(fault).__name__}: {first}{gone}; {where}"
