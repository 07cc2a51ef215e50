"""A GPU that is not there: tensors on "cuda" are `Pretended`, with their values on the CPU.

Inside `pretend_cuda()` torch sees one GPU. The yielded `Seen` counts what a GPU would have been
asked for: kernels (operations that are no views) and waits of the host (item, nonzero, copies that
block, …) by the line of the project that asked. What CUDA refuses (operands on two devices, a CPU
generator, numpy of a device tensor) raises Mismatch.
"""
import collections
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = str(Path(__file__).resolve().parents[1])
CUDA = torch.device("cuda", 0)
# Their results are known to the host only once the device has finished
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
           "unique_consecutive", "bincount", "is_nonzero", "_linalg_check_errors", "histc"}
NO_KERNEL = {"detach", "lift_fresh", "alias", "_unsafe_view", "empty", "empty_like",
             "empty_strided", "new_empty", "new_empty_strided", "_reshape_alias", "scalar_tensor"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
PAGEABLE = 64 * 1024                    # bytes; larger copies from pageable memory wait


class Mismatch(RuntimeError):
    """CUDA would have refused this operation."""


class Pretended(Tensor):
    """A tensor of the pretended GPU; `inner` holds its values.

    Torch's own code sees it on "meta", whose backward pass needs no GPU; Python sees "cuda".
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu, is_meta = CUDA, True, False, False

    @staticmethod
    def __new__(cls, inner):
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="meta")
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, *args):
        raise Mismatch(f"{func}: a pretended tensor outside pretend_cuda()")

    def __deepcopy__(self, memo):
        copy = memo[id(self)] = self.detach().clone()
        copy.__dict__ = self.__dict__ | copy.__dict__               # nn.Parameter's mark as well
        return copy.requires_grad_(self.requires_grad)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise Mismatch(f"numpy() of a device tensor, {line()}")

    __array__ = numpy


class Seen(TorchDispatchMode):
    """Kernels and waits since `reset`; what a cached function makes once is no wait."""

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.kernels, self.waits = 0, collections.Counter()

    def wait(self, reason: str):
        if where := line():
            self.waits[f"{reason}, {where}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        ours = {id(t.inner): t for t in tensors if isinstance(t, Pretended)}
        asked, device = kwargs.get("device"), bool(ours)
        if asked is not None:
            device, kwargs["device"] = asked.type != "cpu", torch.device("cpu")
        if name in ("copy_", "_to_copy"):
            source = args[name == "copy_"]
            target = isinstance(args[0], Pretended) if name == "copy_" else device
            if isinstance(source, Pretended) != target:
                size = source.numel() * source.element_size()
                blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
                if blocking or target and size > PAGEABLE:
                    self.wait(f"copy to the {'device' if target else 'host'} of {size} bytes")
            elif target and asked and kwargs.get("dtype", source.dtype) == source.dtype:
                return Pretended(source.inner.detach())             # it lies there already
        elif device:
            self.check(func, name, args, kwargs,
                       [t for t in tensors if not isinstance(t, Pretended)])
        args, kwargs = tree_map_only(Pretended, lambda t: t.inner, (args, kwargs))
        out = func(*args, **kwargs)
        if not device:
            return out
        self.kernels += not (func.is_view or name in NO_KERNEL or asked and name == "_to_copy")
        return tree_map_only(Tensor, lambda t: ours[id(t)] if id(t) in ours else Pretended(t), out)

    def check(self, func, name, args, kwargs, alone):
        """Note an operation's waits; Mismatch for what CUDA refuses. alone: its CPU tensors."""
        if kwargs.get("generator") is not None:
            raise Mismatch(f"{name}: a CPU generator for a device tensor, {line()}")
        if name == "binary_cross_entropy" and torch.is_autocast_enabled("cuda"):
            raise Mismatch(f"{name} under autocast, {line()}")
        if name in WAITING or name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)
        if name in INDEXING:
            value = args[2] if "put" in name else None
            number = value is not None and value.ndim == 0
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if masks and not (number and len(args[1]) == 1):        # else it is masked_fill
                self.wait("index by a mask")
            if isinstance(args[0], Pretended):                      # CPU indices are sent over
                if any(t is not value for t in alone):
                    self.wait("copy of an index to the device")
                alone = [t for t in alone if t is value and not number]
        elif (torch.Tag.pointwise in func.tags or "fill" in name) and (
                isinstance(args[0], Pretended) or not func._schema.is_mutable):
            if alone and name == "where":
                self.wait("copy of a number to the device")
            alone = [t for t in alone if t.ndim]                    # numbers go with the kernel
        if alone:
            raise Mismatch(f"{name}: CPU tensors {[tuple(t.shape) for t in alone]}, {line()}")


def line() -> str:
    """Return file:line of the project at work; '' where a cached function is."""
    found = ""
    for frame, number in traceback.walk_stack(None):
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and name != __file__ and "site-packages" not in name:
            if hasattr(frame.f_globals.get(frame.f_code.co_name), "cache_info"):
                return ""
            found = found or f"{name[len(ROOT) + 1:]}:{number}"
    return found or "?"


@contextlib.contextmanager
def pretend_cuda():
    """Yield a Seen; inside, torch sees one GPU."""
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
               "synchronize": None, "get_device_name": "pretended", "manual_seed_all": None,
               "is_bf16_supported": True, "_lazy_init": None}
    answers = {name: lambda *a, value=value, **k: value for name, value in answers.items()}
    with (mock.patch.multiple(torch.cuda, **answers),
          mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
          mock.patch.object(torch, "set_float32_matmul_precision"),
          mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion",
                            lambda: True),
          Seen() as seen):
        torch._C._set_only_lift_cpu_tensors(True)                   # torch.tensor(…, device=)
        try:
            yield seen
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
