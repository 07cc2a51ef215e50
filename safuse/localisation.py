"""Weakly supervised localisation: boxes from class activation maps. For evaluation only."""
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou

from common import distributed, evaluation, runtime

THRESHOLD = 0.2                # of the map's maximum
LEAST_IOU = 0.5                # with the true box


def boxes_of(maps: Tensor, height: int, width: int) -> Tensor:
    """Return boxes (B, 4) of (x1, y1, x2, y2) in pixels of height × width images, on the CPU.

    Each surrounds the largest 4-connected component above THRESHOLD of the maximum of an enlarged
    class activation map (B, h, w); where the map is 0, the whole image.
    """
    maps = F.interpolate(maps.detach().float()[:, None], (height, width), mode="bilinear",
                         align_corners=False)[:, 0]
    above = (maps > THRESHOLD * maps.amax((1, 2), keepdim=True)).cpu().numpy()
    boxes = []
    for mask in above:
        labels, count = ndimage.label(mask)
        if not count:
            boxes.append((0, 0, width, height))
            continue
        largest = np.bincount(labels.ravel())[1:].argmax()
        rows, columns = ndimage.find_objects(labels)[largest]
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
    return torch.tensor(boxes, dtype=torch.float32)


def localised(logits: Tensor, maps: Tensor, labels: Tensor, boxes: Tensor, height: int, width: int
              ) -> tuple[Tensor, Tensor]:
    """Return whether each image is localised (B,): with the right class, and with it given.

    `logits` (B, K) and `maps` (B, K, h, w) of `Network.activation_maps`; `labels` (B,); `boxes`
    (B, 4), the true ones. Localised: IoU of at least LEAST_IOU. Both are on the CPU.
    """
    found = boxes_of(maps[torch.arange(len(labels)), labels], height, width)
    given = box_iou(found, boxes.cpu().float()).diagonal() >= LEAST_IOU
    return given & (logits.argmax(1) == labels).cpu(), given


@torch.no_grad()
def localise(net, batches, args) -> tuple[float, float]:
    """Return the % of images localised, over all processes: with the right class, and given it.

    `batches` of images and labels in the order of `batches.boxes()`.
    """
    boxes, hits, start = batches.boxes(), torch.zeros(3, device=batches.device), 0
    net.eval()
    for images, labels in evaluation.batches(batches, args):
        with runtime.autocast(args, images.device):
            logits, maps = net.activation_maps(images)
        found = localised(logits, maps, labels, boxes[start:start + len(labels)],
                          *images.shape[2:])
        hits += torch.tensor([*(part.sum() for part in found), len(labels)], device=hits.device)
        start += len(labels)
    right, given, count = distributed.total(hits).tolist()
    return 100 * right / count, 100 * given / count
