"""What the families of networks share."""
from torch import Tensor, nn

from common.errors import RunError
from common.mixing import mixup


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *,
         bias: bool = False, groups: int = 1) -> nn.Conv2d:
    """Return a convolution padded to keep the size at stride 1 (odd kernels)."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2,
                     bias=bias, groups=groups)


def stem(channels: int, image_size: int, bias: bool = False) -> nn.Conv2d:
    """Return the first 3×3 convolution, of stride 2 from 64 pixels on: stages see equal sizes."""
    return conv(3, channels, 3, 1 if image_size < 64 else 2, bias=bias)


def norm_relu(channels: int, momentum: float = 0.1) -> list[nn.Module]:
    """Return BatchNorm and ReLU."""
    return [nn.BatchNorm2d(channels, momentum=momentum), nn.ReLU(inplace=True)]


def make_stages(block, in_channels: int, widths, depths, strides=(1, 2, 2, 2)) -> list[nn.Module]:
    """Return stages of `depths` blocks, block(channels in, out, stride); strides: of the first."""
    stages = []
    for width, depth, stride in zip(widths, depths, strides, strict=False):
        blocks = [block(in_channels, width, stride)]
        stages.append(nn.Sequential(*blocks, *(block(width, width, 1) for _ in range(depth - 1))))
        in_channels = width
    return stages


class Network(nn.Module):
    """Stem, stages, tail, global average pooling, dropout, linear classifier: (B, num_classes).
    With a permutation `perm` (B,) it mixes activations (Manifold Mixup, Verma et al. 2019):
    h·lam + h[perm]·(1 - lam) after stage `layer`, 0: the input; `lam` a scalar or (B,)."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], tail: nn.Module,
                 features: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.stem, self.stages, self.tail = stem, nn.ModuleList(stages), tail
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, num_classes)

    def forward(self, images: Tensor, perm: Tensor | None = None, lam: float | Tensor = 1.0,
                layer: int = 0) -> Tensor:
        x = self.stem(images if perm is None or layer else mixup(images, perm, lam)[0])
        for number, stage in enumerate(self.stages, 1):
            x = stage(x)
            if perm is not None and layer == number:
                x = mixup(x, perm, lam)[0]
        return self.fc(self.dropout(self.tail(x).mean((2, 3))))


class PreActBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016): two 3×3 convolutions, or a bottleneck; where
    the shape changes, the shortcut is a 1×1 convolution of the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bottleneck: bool = False):
        super().__init__()
        self.activation = nn.Sequential(*norm_relu(in_channels))
        if bottleneck:
            width = out_channels // 4
            layers = [conv(in_channels, width, 1), *norm_relu(width),
                      conv(width, width, 3, stride), *norm_relu(width),
                      conv(width, out_channels, 1)]
        else:
            layers = [conv(in_channels, out_channels, 3, stride), *norm_relu(out_channels),
                      conv(out_channels, out_channels, 3)]
        self.convs = nn.Sequential(*layers)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return self.convs(activated) + shortcut


def post_act_block(kind, in_channels: int, out_channels: int, stride: int, **options) -> nn.Module:
    """Return torchvision's BasicBlock or Bottleneck (`kind`), projected where the shape changes."""
    project, planes = None, out_channels // kind.expansion
    if planes * options.get("base_width", 64) < 64:
        raise RunError("a ResNeXt needs --initial_channels 16 or more")
    if stride != 1 or in_channels != out_channels:
        project = nn.Sequential(conv(in_channels, out_channels, 1, stride),
                                nn.BatchNorm2d(out_channels))
    return kind(in_channels, planes, stride, project, **options)


def he_init(network: Network, zero_bias: bool = True) -> Network:
    """Set convolutions to N(0, 2 / (k²·out_channels)), by default the classifier's bias to 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_bias:
        nn.init.zeros_(network.fc.bias)
    return network
