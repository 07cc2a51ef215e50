"""Matrix products at full float32 precision, whatever the program's settings are."""
import contextlib

import torch


@contextlib.contextmanager
def full_precision(device_type: str):
    """Inside, float32 matrix products are exact: no autocast, and no TF32 on a GPU. Inductor's
    kernels follow the setting at the time of the call: use it around a compiled function too."""
    if torch.compiler.is_compiling():                       # dynamo can trace this getter alone
        before = "high" if torch.backends.cuda.matmul.allow_tf32 else "highest"
    else:
        before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
