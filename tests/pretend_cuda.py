"""A GPU that is not there: tensors on "cuda" stay in memory, marked by their storage.

Inside `pretend_cuda()` torch sees one GPU. `.device` of a marked tensor says cuda, values are
really computed, and the yielded `Seen` counts what a GPU would have been asked for: kernels
(operations that are no views), waits of the host (item, nonzero, copies that block, …) and copies.
What CUDA refuses (operands on two devices, a CPU generator, numpy of a device tensor) raises
Mismatch. Both waits and mismatches name the line of the project that asked.
"""
import collections
import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = str(Path(__file__).resolve().parents[1])
CUDA = torch.device("cuda", 0)
# Their results are known to the host only once the device has finished
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
           "unique_consecutive", "bincount", "is_nonzero", "_linalg_check_errors", "histc"}
NO_KERNEL = {"detach", "detach_", "lift_fresh", "alias", "_unsafe_view", "empty", "empty_like",
             "empty_strided", "new_empty", "new_empty_strided", "_reshape_alias", "set_", "resize_"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
PAGEABLE = 64 * 1024                    # bytes; larger copies from pageable memory wait


class Mismatch(RuntimeError):
    """CUDA would have refused this operation."""


class Seen:
    """What happened since `reset`: kernels, and Counters of ops, waits and copies by place.

    What a cached function makes is made once, and not counted as a wait.
    """

    marks = {}                          # of all: the project keeps tables from test to test

    def __init__(self):
        self.inner, self.silent = "cpu", False
        self.reset()

    def reset(self):
        self.kernels, self.ops = 0, collections.Counter()
        self.waits, self.copies = collections.Counter(), collections.Counter()

    def mark(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                with torch._C.DisableTorchFunction():
                    ref = StorageWeakRef(tensor.untyped_storage())  # keeps its address unique
                self.marks[ref.cdata] = ref
        if len(self.marks) > 20000:
            for key in [key for key, ref in self.marks.items() if ref.expired()]:
                del self.marks[key]
        return tensors

    def marked(self, tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self.marks

    def wait(self, reason: str):
        if not self.silent and (where := place()):
            self.waits[f"{reason}, {where}"] += 1

    def copy(self, tensor: Tensor, kind: str, blocking: bool):
        size = tensor.numel() * tensor.element_size()
        if not self.silent:
            self.copies[f"{kind}, {place()}"] += size
        if blocking or kind == "to the device" and size > PAGEABLE:
            self.wait(f"copy {kind} of {size} bytes")

    @contextlib.contextmanager
    def during(self, **settings):
        before = {name: getattr(self, name) for name in settings}
        self.__dict__.update(settings)
        try:
            yield
        finally:
            self.__dict__.update(before)


def place() -> str:
    """file:line of the project at work and the library's file that it called; '' in a cache."""
    frame, library, found = sys._getframe(1), "", ""
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and name != __file__ and "site-packages" not in name:
            if hasattr(frame.f_globals.get(frame.f_code.co_name), "cache_info"):
                return ""
            found = found or f"{name[len(ROOT) + 1:]}:{frame.f_lineno}{library}"
        if "torchvision" in name or "grad_scaler" in name:
            library = library or f" ({Path(name).name})"
        frame = frame.f_back
    return found or "?"


class Operations(TorchDispatchMode):
    """Checks the devices of every ATen operation, counts it, and marks what comes out."""

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen, kwargs, name = self.seen, kwargs or {}, func._overloadpacket.__name__
        with torch._C.DisableTorchFunction():
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            on = [seen.marked(t) for t in tensors]
            if name == "copy_" and on[0] != on[1]:
                blocking = not (kwargs.get("non_blocking") or len(args) > 2 and args[2])
                seen.copy(tensors[1], "to the device" if on[0] else "to the host", blocking)
                return func(*args, **kwargs)
            if any(on):
                self.check(func, name, args, [t for t, m in zip(tensors, on, strict=True) if not m])
            out = func(*args, **kwargs)
            if any(on) or not tensors and seen.inner == "cuda":
                seen.mark(out)
                if not (func.is_view or name in NO_KERNEL or seen.silent):
                    seen.kernels += 1
                    seen.ops[name] += 1
            return out

    def check(self, func, name, args, alone):
        """Notes the waits of an operation on the device; Mismatch for CPU tensors it refuses."""
        seen = self.seen
        if name in WAITING:
            seen.wait(name)
        if name in INDEXING:
            value = args[2] if "put" in name else None
            number = value is not None and value.numel() == 1 and not seen.marked(value)
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype == torch.bool]
            if masks and not (number and len(args[1]) == 1):        # else it is masked_fill
                seen.wait("index by a mask")
            if seen.marked(args[0]):                                # CPU indices are sent over
                for index in args[1]:
                    if isinstance(index, Tensor) and not seen.marked(index):
                        seen.copy(index, "to the device", True)
                alone = [value] if value is not None and not (number or seen.marked(value)) else []
        elif alone and all(t.ndim == 0 for t in alone):
            if name == "where":
                return seen.copy(alone[0], "to the device", True)
            written = func._schema.is_mutable and not seen.marked(args[0])
            if not written and (torch.Tag.pointwise in func.tags or "fill" in name):
                return                                              # numbers travel with the kernel
        if alone:
            raise Mismatch(f"{name}: CPU tensors {[tuple(t.shape) for t in alone]}, {place()}")


class Functions(TorchFunctionMode):
    """Lies about devices, and turns what is asked of "cuda" into marked tensors."""

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        seen, kwargs, name = self.seen, dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            return self.attribute(func, args[0])
        special = getattr(self, f"do_{name.strip('_')}", None)
        if special:
            return special(func, args, kwargs)
        here = "cuda" if any(map(seen.marked, tree_leaves((args, kwargs)))) else "cpu"
        wish = kind(kwargs.get("device"))
        if wish:
            kwargs["device"] = "cpu"
        generator = kwargs.get("generator")
        if (wish or here) == "cuda":
            if generator is not None and generator.device.type == "cpu":
                raise Mismatch(f"{name}: a CPU generator for a device tensor, {place()}")
            if name == "binary_cross_entropy" and Autocast.on:
                raise Mismatch(f"{name} under autocast, {place()}")
        with seen.during(inner=wish or here):
            out = func(*args, **kwargs)
        return seen.mark(out) if wish == "cuda" else out

    def attribute(self, func, tensor):
        asked = {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}
        return asked[func.__self__] if func.__self__ in asked and self.seen.marked(tensor) \
            else func(tensor)

    # ---- between host and device

    def send(self, tensor, device, dtype=None, non_blocking=False, copy=False, **memory):
        seen, here = self.seen, "cuda" if self.seen.marked(tensor) else "cpu"
        if device in (None, here):
            with seen.during(inner=here):
                return tensor.to(dtype or tensor.dtype, copy=copy, **memory)
        seen.copy(tensor, "to the device" if device == "cuda" else "to the host", not non_blocking)
        with seen.during(silent=True):
            out = tensor.to(dtype or tensor.dtype, copy=True, **memory)
        if device == "cuda":
            return seen.mark(out)
        with torch._C.DisableTorchFunction():
            del seen.marks[out.untyped_storage()._cdata]
        return out

    def do_to(self, func, args, kwargs):
        tensor, *rest = args
        copy = kwargs.pop("copy", False)
        if rest and isinstance(rest[0], Tensor):
            wish = "cuda" if self.seen.marked(rest[0]) else "cpu"
            return self.send(tensor, wish, rest[0].dtype, copy=copy, **kwargs)
        device, dtype, non_blocking, memory = torch._C._nn._parse_to(*rest, **kwargs)
        memory = {"memory_format": memory} if memory is not None else {}
        return self.send(tensor, kind(device), dtype, non_blocking, copy, **memory)

    def do_cuda(self, func, args, kwargs):
        return self.send(args[0], "cuda", **kwargs)

    def do_cpu(self, func, args, kwargs):
        return self.send(args[0], "cpu")

    def do_pin_memory(self, func, args, kwargs):
        return args[0]

    def do_tensor(self, func, args, kwargs):
        wish = kind(kwargs.pop("device", None)) or ("cuda" if self.seen.marked(args[0]) else "cpu")
        if any(map(self.seen.marked, tree_leaves(args[0] if func is torch.tensor else args[1:]))):
            self.seen.wait("torch.tensor of device tensors")
        with self.seen.during(silent=True):
            out = func(*args, **kwargs)
        if wish == "cuda":
            self.seen.copy(self.seen.mark(out), "to the device", True)
        return out

    do_new_tensor = do_tensor

    def do_as_tensor(self, func, args, kwargs):
        wish = kind(kwargs.pop("device", None))
        if isinstance(args[0], Tensor):
            return self.send(args[0], wish, kwargs.get("dtype"))
        return self.send(func(*args, **kwargs), wish)

    # ---- the host looks at values, or does what the device does otherwise

    def do_tolist(self, func, args, kwargs):
        if self.seen.marked(args[0]):
            self.seen.wait("tolist")
        with self.seen.during(silent=True):
            return func(*args, **kwargs)

    def do_numpy(self, func, args, kwargs):
        if self.seen.marked(args[0]):
            raise Mismatch(f"numpy() of a device tensor, {place()}")
        return func(*args, **kwargs)

    do_array = do_numpy                                     # __array__

    def do_one_hot(self, func, args, kwargs):
        classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
        if not self.seen.marked(args[0]) or classes == -1:
            with self.seen.during(inner="cuda" if self.seen.marked(args[0]) else "cpu"):
                return func(*args, **kwargs)                # where classes are counted, it waits
        return args[0].new_zeros(*args[0].shape, classes).scatter_(-1, args[0].unsqueeze(-1), 1)

    def do_repeat_interleave(self, func, args, kwargs):
        device = self.seen.marked(args[0])
        if device and any(map(self.seen.marked, args[1:])) and kwargs.get("output_size") is None:
            self.seen.wait("repeat_interleave without output_size")
        with self.seen.during(inner="cuda" if device else "cpu"):
            return func(*args, **kwargs)

    def do_deepcopy(self, func, args, kwargs):
        with self.seen.during(silent=True):
            out = func(*args, **kwargs)
        return self.seen.mark(out) if self.seen.marked(args[0]) else out


def kind(device) -> str | None:
    """'cuda' or 'cpu' of what a `device` argument may be."""
    if device is None:
        return None
    return "cuda" if isinstance(device, int) else torch.device(device).type


class Autocast(contextlib.ContextDecorator):
    """Stands in for torch.autocast; values stay float32, for half precision is slow on a CPU."""

    on = False

    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        self.enabled = enabled

    def __enter__(self):
        self.before, Autocast.on = Autocast.on, self.enabled

    def __exit__(self, *fault):
        Autocast.on = self.before


@contextlib.contextmanager
def pretend_cuda():
    """Yield a Seen; inside, torch sees one GPU."""
    seen = Seen()
    functions, backward = Functions(seen), torch.autograd._engine_run_backward
    group = torch._C._group_tensors_by_device_and_dtype

    def run_backward(*args, **kwargs):                      # Python functions' backward as well
        with seen.during(inner="cuda"), functions:
            return backward(*args, **kwargs)

    def grouped(lists, *more):                              # of the foreach optimizers
        return {(CUDA if any(map(seen.marked, part[0][0])) else device, dtype): part
                for (device, dtype), part in group(lists, *more).items()}

    answers = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
               "synchronize": None, "get_device_name": "pretended", "manual_seed_all": None,
               "is_bf16_supported": True}
    with contextlib.ExitStack() as stack:
        for owner, changes in (
                (torch.cuda, {name: lambda *a, value=value, **k: value
                              for name, value in answers.items()}),
                (torch, {"autocast": Autocast}),
                (torch._C, {"_group_tensors_by_device_and_dtype": grouped}),
                (torch.autograd, {"_engine_run_backward": run_backward})):
            stack.enter_context(mock.patch.multiple(owner, **changes))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        stack.enter_context(functions)
        stack.enter_context(Operations(seen))
        yield seen
