"""What a network costs: multiply-adds and latency."""
import copy
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(net, image_size: int) -> int:
    """Of the convolutions and linear layers for one image, biases not counted; for a CPU net."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).eval()(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


@torch.no_grad()
def latency(net, image_size: int, device: str, count: int, seconds: float = 2.0) -> float:
    """Median time in seconds of a forward pass of `count` images, measured for `seconds`."""
    net = copy.deepcopy(net).to(device).eval()
    images = torch.zeros(count, 3, image_size, image_size, device=device)
    for _ in range(3):                                      # cuDNN chooses its kernels
        net(images)
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        if device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        net(images)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return statistics.median(times)
