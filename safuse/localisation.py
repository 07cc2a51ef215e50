"""Weakly supervised localisation: boxes from class activation maps. For evaluation only."""
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from common import distributed, evaluation, runtime

THRESHOLD = 0.2                # of the map's maximum
LEAST_IOU = 0.5                # with the true box


def boxes_of(maps: Tensor, height: int, width: int) -> Tensor:
    """Return boxes (B, 4) of x1, y1, x2, y2 in height × width images, on the CPU: of the largest
    4-connected component, in enlarged maps (B, h, w), of at least THRESHOLD of the maximum."""
    from skimage.measure import label, regionprops
    maps = F.interpolate(maps.detach().float()[:, None], (height, width), mode="bilinear")[:, 0]
    boxes = []
    for mask in (maps >= THRESHOLD * maps.amax((1, 2), keepdim=True)).cpu().numpy():
        regions = regionprops(label(mask, connectivity=1))
        top, left, bottom, right = max(regions, key=lambda region: region.area).bbox
        boxes.append((left, top, right, bottom))
    return torch.tensor(boxes, dtype=torch.float32)


@torch.no_grad()
def localise(net, batches, args) -> tuple[float, float]:
    """Return the % of test images with an IoU of at least LEAST_IOU: right class, class given."""
    boxes, hits, start = batches.boxes(), torch.zeros(3, device=batches.device), 0
    net.eval()
    for images, labels in evaluation.batches(batches, args):
        with runtime.autocast(args, images.device):
            logits, maps = net(images), net.activation_maps(images)
        found = boxes_of(maps[torch.arange(len(labels)), labels], *images.shape[2:])
        true = boxes[start:start + len(labels)].cpu().float()
        given = box_iou(found, true).diagonal() >= LEAST_IOU
        right = given & (logits.argmax(1) == labels).cpu()
        hits += torch.tensor([right.sum(), given.sum(), len(labels)], device=hits.device)
        start += len(labels)
    right, given, count = distributed.total(hits).tolist()
    return 100 * right / count, 100 * given / count
