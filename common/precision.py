"""Matrix products at full float32 precision, whatever the program's settings are."""
import contextlib

import torch


@contextlib.contextmanager
def full_precision(device_type: str):
    """Inside, float32 matrix products are exact: no autocast, and no TF32 on a GPU. Inductor's
    kernels follow the setting at the time of the call: use it around a compiled function too."""
    before, newer = None, (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if torch.compiler.is_compiling():                       # dynamo can trace this getter alone
        before = "high" if torch.backends.cuda.matmul.allow_tf32 else "highest"
    else:
        with contextlib.suppress(RuntimeError):             # fp32_precision was set: the newer way
            before = torch.get_float32_matmul_precision()
    if before is None:
        precisions = [backend.fp32_precision for backend in newer]
        for backend in newer:
            backend.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before is None:
            for backend, precision in zip(newer, precisions, strict=True):
                backend.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(before)
