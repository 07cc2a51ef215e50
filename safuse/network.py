"""Encoder (ResNet or ViT), decoder and superpixel attention of SAFuse and LGCOAMix.

The decoder brings features back to the size of the images, where they are averaged over
superpixels, which attend to each other and are classified one by one.
"""
from functools import partial

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from common.errors import RunError
from common.models.parts import PreActBlock, conv, make_stages, post_act_block

# block, depths, options of the block
RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
    "resnext50": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "base_width": 4})}
ARCHS = (*RESNETS, "deit_b16")
DECODERS = ("joint", "local", "none")
SCORES = ("post_norm", "pre_norm")


def form_of(image_size: int) -> int:
    """Return the form of the ResNets for images of this size: 32, 64 or 224."""
    return 32 if image_size < 64 else 64 if image_size < 128 else 224


# ------------------------------------------------------------------------------------- encoders

class ResNet(nn.Module):
    """ResNet stages x0 … x4 in three forms; parameters have torchvision's names.

    32: 3×3 stem; 64: the same, but ResNets have pre-activation blocks and a bare stem; 224: 7×7
    stem with stride 2 (x0), pooling, and a last stage with stride 1.
    """

    def __init__(self, arch: str, form: int, channels: int):
        super().__init__()
        kind, depths, options = RESNETS[arch]
        preact = form == 64 and arch != "resnext50"
        self.conv1 = conv(3, channels, 7, 2) if form == 224 else conv(3, channels, 3)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(channels)
        self.relu = nn.Identity() if preact else nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if form == 224 else nn.Identity()
        self.widths = [channels, *(channels * 2 ** i * kind.expansion for i in range(4))]
        block = partial(PreActBlock, bottleneck=kind is Bottleneck) if preact else \
            partial(post_act_block, kind, **options)
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
        patches = self.conv_proj(images)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1),
                            patches.flatten(2).mT], 1)
        tokens = self.encoder(tokens)
        return [tokens[:, 1:].mT.reshape(patches.shape)], tokens[:, 0]


# ------------------------------------------------------------------- decoder, pooling, attention

class Decoder(nn.Module):
    """Transposed convolutions, BatchNorm and ReLU (none at the end) back to the images' size.

    `steps`: (channels, stride) of each; stride 1 is 1×1, stride 2 is 3×3. `skips`: channels of
    the encoder's stages, the last first, that join the input of the second and later steps.
    """

    def __init__(self, channels: int, steps: list[tuple[int, int]], skips: tuple[int, ...] = ()):
        super().__init__()
        skips = [0, *skips] if skips else [0] * len(steps)
        self.steps = nn.ModuleList()
        for (out, stride), skip in zip(steps, skips, strict=True):
            size = {"kernel_size": 3, "padding": 1, "output_padding": 1} if stride == 2 else \
                {"kernel_size": 1}
            self.steps.append(nn.Sequential(
                nn.ConvTranspose2d(channels + skip, out, stride=stride, bias=False, **size),
                nn.BatchNorm2d(out), nn.ReLU(inplace=True)))
            channels = out
        self.steps[-1].pop(2)
        self.channels, self.skips = channels, any(skips)

    def forward(self, stages: list[Tensor]) -> Tensor:
        x, *before = reversed(stages)
        for number, step in enumerate(self.steps):
            if number and self.skips:
                x = torch.cat([x, before[number - 1]], 1)
            x = step(x)
        return x


def make_decoder(arch: str, form: int, encoder: nn.Module, channels: int, kind: str) -> Decoder:
    """Return the paper's decoder for an encoder; `kind` as in `build`."""
    c = channels
    chain = {("deit_b16", 224): [(4 * c, 2), (2 * c, 2), (c, 2), (c, 2)]}
    if kind == "local":                                      # LGCOAMix's ResNeXt has no skips
        wide = [(8 * c, 2), (4 * c, 2)]
        chain["resnext50", 64] = [(16 * c, 2), *wide, (c, 1), (c, 1)]
        chain["resnext50", 224] = [(16 * c, 1), *wide, (c, 1), (c // 2, 2), (c // 2, 2)]
    if (arch, form) in chain:
        return Decoder(encoder.widths[-1], chain[arch, form])
    strides = (1, 2, 2, 2, 2) if form == 224 else (2, 2, 2, 1, 1)
    e = encoder.widths[1] // c                               # expansion
    widths = (2 * c * e, c * e, c // 2 * e, c, c)
    return Decoder(encoder.widths[-1], list(zip(widths, strides, strict=True)),
                   tuple(encoder.widths[-2::-1]))


def superpixel_pool(features: Tensor, fused: Tensor, num_superpixels: int
                    ) -> tuple[Tensor, Tensor]:
    """Return each superpixel's mean features (B, S, C) and pixels (B, S), 0 where there is none.

    `features` (B, C, H, W); `fused` (B, H, W) integer labels below S. Sums are in float32.
    """
    batch, channels = features.shape[:2]
    index = fused.flatten(1).long()
    counts = torch.zeros(batch, num_superpixels, device=features.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))
    sums = torch.zeros(batch, channels, num_superpixels, device=features.device)
    sums = sums.scatter_add(2, index[:, None].expand(-1, channels, -1),
                            features.float().flatten(2))
    return (sums / counts.clamp(min=1)[:, None]).mT, counts


class SuperpixelAttention(nn.Module):
    """One-head self-attention of the superpixels of each image, with residual and LayerNorm.

    A superpixel's score is the sum over its channels: `post_norm` after LayerNorm, as the original
    (0 while gain is 1 and bias is 0, as at first), or `pre_norm` before it.
    """

    def __init__(self, dim: int, score: str = "post_norm"):
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, not {score}")
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.score = score

    def forward(self, pooled: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return attended features (B, S, C) and scores (B, S) of pooled (B, S, C), in float32.

        Of padding (count 0) the score is -inf, the features are 0. sigmoid(score) is the weight.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            pooled, present = pooled.float(), counts > 0
            similar = self.query(pooled) @ self.key(pooled).mT / pooled.shape[2] ** 0.5
            attention = similar.masked_fill(~present[:, None], -torch.inf).softmax(2)
            joined = attention @ self.value(pooled) + pooled
            attended = self.norm(joined)
            score = (attended if self.score == "post_norm" else joined).sum(2)
            return attended * present[..., None], score.masked_fill(~present, -torch.inf)


# --------------------------------------------------------------------------------- whole network

class Network(nn.Module):
    """Encoder and classifier, with decoder and local classifier unless decoder is None.

    `joint`: the classifier sees the mean of the decoder's features as well, always (SAFuse).
    """

    def __init__(self, encoder: nn.Module, decoder: Decoder | None, num_classes: int, *,
                 joint: bool = True, score: str = "post_norm"):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.joint = joint and decoder is not None
        self.features = encoder.widths[-1]
        extra = decoder.channels if self.joint else 0
        self.fc = nn.Linear(self.features + extra, num_classes)
        if decoder is not None:
            self.attention = SuperpixelAttention(decoder.channels, score)
            self.fc_local = nn.Linear(decoder.channels, num_classes)

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

    def local_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only a forward pass with superpixels uses."""
        if self.decoder is None:
            return []
        parts = [self.attention, self.fc_local] + [self.decoder] * (not self.joint)
        return [p for part in parts for p in part.parameters()]

    def activation_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and class activation maps (B, K, h, w), max(0, w_k · x4) with the
        classifier's weights for the encoder's features (Zhou 2016)."""
        stages, mean = self.encoder(images)
        if self.joint:
            mean = torch.cat([mean, self.decoder(stages).mean((2, 3))], 1)
        return self.fc(mean), activation_maps(stages[-1], self.fc.weight[:, :self.features])


def activation_maps(features: Tensor, weight: Tensor) -> Tensor:
    """Return max(0, weight (K, C) · features (B, C, h, w)), (B, K, h, w)."""
    return torch.einsum("kc,bchw->bkhw", weight, features).relu()


@torch.no_grad()
def attention_scores(net: Network, images: Tensor) -> Tensor:
    """Return OcCaMix's attention (B, h, w): the largest class activation, in evaluation mode."""
    training = net.training
    net.eval()
    maps = net.activation_maps(images)[1]
    net.train(training)
    return maps.amax(1)


# ---------------------------------------------------------------------------------------- build

def build(arch: str, num_classes: int, image_size: int = 32, *, decoder: str = "joint",
          initial_channels: int = 64, score: str = "post_norm", width: int | None = None
          ) -> Network:
    """Return the network `arch` (one of ARCHS) for images of `image_size` (× `width`) pixels.

    `decoder`: joint (SAFuse: also feeds the classifier), local (LGCOAMix: only for superpixels) or
    none (a plain classifier). Raises RunError for sizes the network cannot take.
    """
    form = 224 if arch == "deit_b16" else form_of(image_size)
    multiple = 16 if form == 224 else 8
    width = width or image_size
    if image_size % multiple or width % multiple or arch == "deit_b16" and width != image_size:
        raise RunError(f"{arch} takes images whose sides are multiples of {multiple} pixels"
                       f"{' and equal' * (arch == 'deit_b16')}, not {image_size}×{width}; "
                       "give --image_size")
    if initial_channels < 16 or initial_channels % 16:
        raise RunError(f"--initial_channels {initial_channels} is no multiple of 16")
    encoder = ViT(image_size, initial_channels) if arch == "deit_b16" else \
        ResNet(arch, form, initial_channels)
    net = Network(encoder, None if decoder == "none" else
                  make_decoder(arch, form, encoder, initial_channels, decoder),
                  num_classes, joint=decoder == "joint", score=score)
    return init(net, arch, form)


def init(net: Network, arch: str, form: int) -> Network:
    """Set the papers' initial weights, at random for transposed convolutions too.

    Kaiming, fan out; but xavier for the convolutions and N(0, 0.01) for the Linear layers of
    pre-activation networks and of the form 224. Of deit_b16 torchvision's stay, but the decoder's.
    """
    xavier = form == 224 or form == 64 and arch != "resnext50"
    for module in net.modules() if arch != "deit_b16" else net.decoder.modules() \
            if net.decoder else ():
        if isinstance(module, nn.Conv2d) and xavier:
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and xavier:
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return net
