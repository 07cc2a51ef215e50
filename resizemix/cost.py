"""Cost of a network: multiply-adds and latency."""
import copy

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def multiply_adds(net, image_size: int) -> int:
    """Return the multiply-adds of one image (no biases) in a network on the CPU."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).eval()(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


@torch.no_grad()
def latency(net, image_size: int, device: torch.device) -> str:
    """Return the median time of a forward pass: of 32 images on a GPU, of 1 on a CPU."""
    images = torch.zeros(32 if device.type == "cuda" else 1, 3, image_size, image_size)
    timer = Timer("net(images)", num_threads=torch.get_num_threads(),
                  globals={"net": copy.deepcopy(net).eval(), "images": images.to(device)})
    seconds = timer.blocked_autorange(min_run_time=2).median
    return f"{1000 * seconds:.2f} ms for a batch of {len(images)} ({device.type})"
