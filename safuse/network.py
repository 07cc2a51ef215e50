"""Encoder (ResNet or ViT), decoder and superpixel attention of SAFuse and LGCOAMix."""
from functools import partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from common.errors import RunError
from common.models.parts import PreActBlock, conv, make_stages, norm_relu, post_act_block
from common.models.resnet import POSTACT

RESNETS = {"resnet18": "resnet18", "resnet50": "resnet50", "resnext50": "resnext50_32x4d"}
ARCHS = (*RESNETS, "deit_b16")


class ResNet(nn.Module):
    """ResNet stages x0 … x4 in three forms; parameters have torchvision's names. 32: 3×3 stem; 64:
    the same, but ResNets have pre-activation blocks and a bare stem; 224: 7×7 stem with stride 2
    (x0), pooling, and a last stage with stride 1."""

    def __init__(self, arch: str, form: int, channels: int):
        super().__init__()
        kind, depths, groups, width = POSTACT[RESNETS[arch]]
        preact = form == 64 and arch != "resnext50"
        self.conv1 = conv(3, channels, 7, 2) if form == 224 else conv(3, channels, 3)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(channels)
        self.relu = nn.Identity() if preact else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if form == 224 else nn.Identity()
        self.widths = [channels, *(channels * 2 ** i * kind.expansion for i in range(4))]
        block = partial(PreActBlock, bottleneck=kind.expansion > 1) if preact else \
            partial(post_act_block, kind, groups=groups, base_width=width)
        self.layer1, self.layer2, self.layer3, self.layer4 = make_stages(
            block, channels, self.widths[1:], depths, (1, 2, 2, 1 if form == 224 else 2))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return stages [x0, …, x4] and the mean (B, features) of the last."""
        stages = [self.relu(self.bn1(self.conv1(images)))]
        x = self.maxpool(stages[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            stages.append(x)
        return stages, x.mean((2, 3))


class ViT(models.VisionTransformer):
    """torchvision's ViT-B/16 (DeiT-B has the same architecture) with 12·channels features."""

    def __init__(self, image_size: int, channels: int):
        width = 12 * channels
        super().__init__(image_size, 16, 12, width // 64, width, 4 * width)
        self.heads = nn.Identity()
        self.widths = [width]

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return [the patches' tokens as a map (B, features, h, w)], and the class token."""
        first, side = self.class_token.expand(len(images), -1, -1), self.image_size // 16
        tokens = self.encoder(torch.cat([first, self._process_input(images)], 1))
        return [tokens[:, 1:].mT.unflatten(2, (side, side))], tokens[:, 0]


class Decoder(nn.Module):
    """The paper's transposed convolutions from the last stage back to the images' size; `widths`:
    of the encoder's stages; `kind` as in `Network`. Returns `channels` features, without ReLU."""

    def __init__(self, arch: str, form: int, widths: list[int], kind: str, c: int):
        super().__init__()
        self.steps, self.skips = nn.ModuleList(), []        # channels of stages x3 … x0 that join
        if arch == "deit_b16":
            steps = [(4 * c, 2), (2 * c, 2), (c, 2), (c, 2)]                # channels, stride
        elif kind == "local" and arch == "resnext50" and form == 64:
            steps = [(16 * c, 2), (8 * c, 2), (4 * c, 2), (c, 1), (c, 1)]
        elif kind == "local" and arch == "resnext50" and form == 224:
            steps = [(16 * c, 1), (8 * c, 2), (4 * c, 2), (c, 1), (c // 2, 2), (c // 2, 2)]
        else:
            x1, (first, last) = widths[1], (1, 2) if form == 224 else (2, 1)
            steps = [(2 * x1, first), (x1, 2), (x1 // 2, 2), (c, last), (c, last)]
            self.skips = widths[-2::-1]
        channels = widths[-1]
        for (out, stride), skip in zip_longest(steps, [0, *self.skips], fillvalue=0):
            inputs, kernel, border = channels + skip, 2 * stride - 1, stride - 1
            step = nn.ConvTranspose2d(inputs, out, kernel, stride, border, border, bias=False)
            self.steps.append(nn.Sequential(step, *norm_relu(out)))
            self.channels = channels = out
        self.steps[-1].pop(2)

    def forward(self, stages: list[Tensor]) -> Tensor:
        x, *before = reversed(stages)
        for number, step in enumerate(self.steps):
            if number and self.skips:
                x = torch.cat([x, before[number - 1]], 1)
            x = step(x)
        return x


def superpixel_pool(features: Tensor, fused: Tensor, num_superpixels: int) -> tuple:
    """Return each superpixel's mean features (B, S, C) and pixels (B, S), 0 where there is none, of
    `features` (B, C, H, W) and `fused` (B, H, W), integer labels below S. Sums are in float32."""
    batch, channels = features.shape[:2]
    index = fused.flatten(1).long()
    counts = torch.zeros(batch, num_superpixels, device=features.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))
    sums = torch.zeros(batch, channels, num_superpixels, device=features.device).scatter_add(
        2, index[:, None].expand(-1, channels, -1), features.float().flatten(2))
    return (sums / counts.clamp(min=1)[:, None]).mT, counts


class SuperpixelAttention(nn.Module):
    """One-head self-attention of the superpixels of each image, with residual and LayerNorm. A
    superpixel's score is the sum over its channels: `post_norm` after LayerNorm, as the original
    (0 while gain is 1 and bias is 0, as at first), or `pre_norm` before it."""

    def __init__(self, dim: int, score: str = "post_norm"):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.score = score

    def forward(self, pooled: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return attended features (B, S, C) and scores (B, S) of pooled (B, S, C), in float32; of
        padding (count 0) 0 and -inf. sigmoid(score) is the weight."""
        with torch.autocast(pooled.device.type, enabled=False):
            pooled, present = pooled.float(), counts > 0
            joined = pooled + F.scaled_dot_product_attention(
                self.query(pooled), self.key(pooled), self.value(pooled), present[:, None])
            attended = self.norm(joined)
            score = (attended if self.score == "post_norm" else joined).sum(2)
            return attended * present[..., None], score.masked_fill(~present, -torch.inf)


class Network(nn.Module):
    """ResNet or ViT with the papers' decoder: images (B, 3, H, W) -> logits (B, num_classes).
    `arch`: one of ARCHS, for images of `image_size` (× `width`) pixels. `decoder`: joint (SAFuse:
    the classifier sees the mean of its features, too), local (LGCOAMix: for superpixels alone) or
    none (a plain classifier). Raises RunError for sizes that it cannot take."""

    def __init__(self, arch: str, num_classes: int, image_size: int = 32, *,
                 width: int | None = None, decoder: str = "joint", initial_channels: int = 64,
                 score: str = "post_norm"):
        super().__init__()
        vit = arch == "deit_b16"
        form = 224 if vit or image_size >= 128 else 64 if image_size >= 64 else 32
        multiple, width = 16 if form == 224 else 8, width or image_size
        if vit and initial_channels % 16:
            raise RunError(f"{arch}: --initial_channels {initial_channels} is no multiple of 16")
        if image_size % multiple or width % multiple:
            raise RunError(f"{arch} takes images whose sides are multiples of {multiple} pixels, "
                           f"not {image_size}×{width}; give --image_size")
        self.encoder = ViT(image_size, initial_channels) if vit else \
            ResNet(arch, form, initial_channels)
        self.decoder = None if decoder == "none" else \
            Decoder(arch, form, self.encoder.widths, decoder, initial_channels)
        self.joint, self.features = decoder == "joint", self.encoder.widths[-1]
        extra = self.decoder.channels if self.joint else 0
        self.fc = nn.Linear(self.features + extra, num_classes)
        if self.decoder:
            self.attention = SuperpixelAttention(self.decoder.channels, score)
            self.fc_local = nn.Linear(self.decoder.channels, num_classes)
        ours = self.decoder if vit else self                # the rest of a ViT is torchvision's
        if ours:
            ours.apply(partial(init, xavier=form == 224 or form == 64 and arch != "resnext50"))

    def forward(self, images: Tensor, fused: Tensor | None = None, num_superpixels: int = 0):
        """Return logits (B, num_classes); with superpixels `fused` (B, H, W) also the logits
        (B, S, num_classes), attention scores (B, S) and pixels (B, S) of each superpixel."""
        stages, mean = self.encoder(images)
        decoded = self.decoder(stages) if self.joint or fused is not None else None
        logits = self.fc(torch.cat([mean, decoded.mean((2, 3))], 1) if self.joint else mean)
        if fused is None:
            return logits
        pooled, counts = superpixel_pool(decoded, fused, num_superpixels)
        attended, scores = self.attention(pooled, counts)
        return logits, self.fc_local(attended), scores, counts

    def activation_maps(self, images: Tensor) -> Tensor:
        """Return class activation maps (B, num_classes, h, w) of the encoder's features."""
        return activation_maps(self.encoder(images)[0][-1], self.fc.weight[:, :self.features])

    def local_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only a forward pass with superpixels uses."""
        parts = ["attention", "fc_local"] + ["decoder"] * (not self.joint)
        return [p for name, p in self.named_parameters() if name.split(".")[0] in parts]


def activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """Return max(0, weight (K, C) · features (B, C, h, w)) (Zhou et al. 2016): (B, K, h, w)."""
    return torch.einsum("kc,bchw->bkhw", weight, features).relu()


def boxes_of(maps: Tensor, height: int, width: int) -> Tensor:
    """Return boxes (B, 4) of x1, y1, x2, y2 in height × width images, on the CPU: of the largest
    4-connected component, in enlarged maps (B, h, w), of at least a fifth of the maximum."""
    from skimage.measure import label, regionprops
    maps = F.interpolate(maps.detach().float()[:, None], (height, width), mode="bilinear")[:, 0]
    boxes = []
    for mask in (maps >= 0.2 * maps.amax((1, 2), keepdim=True)).cpu().numpy():
        regions = regionprops(label(mask, connectivity=1))
        top, left, bottom, right = max(regions, key=lambda region: region.area).bbox
        boxes.append((left, top, right, bottom))
    return torch.tensor(boxes, dtype=torch.float32)


def init(layer: nn.Module, xavier: bool):
    """Set a layer's weights: Kaiming, fan out; or xavier, and N(0, 0.01) for Linear layers."""
    if isinstance(layer, nn.Conv2d) and xavier:
        nn.init.xavier_uniform_(layer.weight)
    elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Linear) and xavier:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
