"""Two random views of each image (MoCo v2's augmentation): crop, flip, colours, grey, blur. Colours
change by one affine map of the channels, as by DALI's color_twist; hue: a turn of their plane."""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.data.memory import draw_boxes, resize_boxes
from common.data.stream import DaliStream

SCALE_RATIO = (3 / 4, 4 / 3)
JITTER, HUE = 0.4, 0.1                  # brightness, contrast, saturation: 1 ± 0.4; hue, in turns
JITTERED, GREY = 0.8, 0.2               # probabilities
SIGMA = (0.1, 2.0)                      # of the blur, pixels
LUMA = (0.299, 0.587, 0.114)
YIQ = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)], dtype=torch.float64)


class View(NamedTuple):
    """The draws of one view of n images, on the CPU."""
    boxes: Tensor                       # (4, n) crops
    flip: Tensor                        # (n,) bool
    colours: Tensor                     # (n, 3, 3) maps of the channels
    shift: Tensor                       # (n,) added to them
    sigma: Tensor                       # (n,) of the blur, 0: none


def draw_view(n: int, size, generator, *, scale=(0.2, 1.0), blur: float = 0.5) -> View:
    """Return draws for n images of `size` (H, W): crops of a share `scale`; blur: probability."""
    boxes = draw_boxes(n, size, scale, SCALE_RATIO, generator)
    flip, jittered, grey, blurred, width = torch.rand(5, n, generator=generator)
    change = (2 * torch.rand(4, n, generator=generator) - 1) * (jittered < JITTERED)
    brightness, contrast, saturation = 1 + JITTER * change[:3]
    turn, saturation = 2 * math.pi * HUE * change[3], saturation * (grey >= GREY)
    plane = torch.zeros(n, 3, 3, dtype=torch.float64)       # luminance stays, the colours turn
    plane[:, 0, 0] = 1
    plane[:, 1, 1] = plane[:, 2, 2] = saturation * turn.cos()
    plane[:, 1, 2], plane[:, 2, 1] = -saturation * turn.sin(), saturation * turn.sin()
    colours = (YIQ.inverse() @ plane @ YIQ).float() * (brightness * contrast)[:, None, None]
    sigma = (SIGMA[0] + (SIGMA[1] - SIGMA[0]) * width) * (blurred < blur)
    return View(boxes, flip < 0.5, colours, brightness * 0.5 * (1 - contrast), sigma)


def make_view(images: Tensor, view: View, size: int) -> Tensor:
    """Return the view (B, 3, size, size), float in [0, 1], of uint8 images (B, 3, H, W)."""
    boxes, flip, colours, shift, sigma = (draw.to(images.device, non_blocking=True)
                                          for draw in view)
    pixels = resize_boxes(images, boxes, (size, size), "bicubic").float() / 255
    pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
    pixels = (colours @ pixels.flatten(2) + shift[:, None, None]).clamp(0, 1)
    pixels = pixels.unflatten(2, (size, size))
    if not view.sigma.any():                                # known on the CPU
        return pixels
    index = torch.arange(size, device=images.device)
    away = (index - index[:, None]) / sigma.clamp(min=0.01)[:, None, None]
    taps = (-away ** 2 / 2).softmax(2)[:, None]             # of the blur, (B, 1, size, size)
    return taps @ pixels @ taps.mT


def yield_two_crops(stream: DaliStream, scale: tuple[float, float]):
    """Make a stream of training images yield two crops of each, uint8 (B, 6, S, S)."""
    def graph(encoded, **decoder):
        from nvidia.dali import fn
        images = fn.decoders.image(encoded, **decoder)
        crops = [fn.random_resized_crop(
            images, size=(stream.size, stream.size), random_area=scale,
            random_aspect_ratio=SCALE_RATIO, **stream.filters()) for _ in range(2)]
        return fn.transpose(fn.cat(*crops, axis=2), perm=[2, 0, 1])

    stream.graph, stream.finish = graph, lambda images, step: images
