"""Cost of a network: multiply-adds and latency."""
import copy

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(net, image_size: int) -> int:
    """Return the multiply-adds of convolutions and linear layers for one image; of a CPU network.

    Biases are not counted.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).eval()(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


@torch.no_grad()
def latency(net, image_size: int, device: str, count: int, seconds: float = 2.0) -> float:
    """Return the median time in seconds of a forward pass of `count` images."""
    net = copy.deepcopy(net).to(device).eval()
    images = torch.zeros(count, 3, image_size, image_size, device=device)
    timer = Timer("net(images)", globals={"net": net, "images": images},
                  num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median
