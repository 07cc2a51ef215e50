"""torchvision's DeiT-S (Touvron et al. 2021; a ViT, without the distillation token), Swin-T (Liu et
al. 2021) and ConvNeXt-T (Liu et al. 2022; below 64 pixels with a 3×3 stem of stride 1)."""
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import StochasticDepth

from common.errors import RunError
from common.models.parts import conv

SPECS = {                      # blocks, width of the (first) stage at 64 initial channels
    "deit_s": (12, 384),
    "swin_t": ([2, 2, 6, 2], 96),
    "convnext_t": ([3, 3, 9, 3], 96),
}


def transformer(name, num_classes, image_size, channels, dropout, drop_path=0.0) -> nn.Module:
    """Return one of SPECS; drop_path: the last block's probability, growing linearly from 0."""
    depths, width = SPECS[name]
    width = width * channels // 64
    if name == "deit_s":
        if image_size % 16:
            raise RunError(f"deit_s takes images of a multiple of 16 pixels, not {image_size}")
        network = VisionTransformer(image_size, 16, depths, 6, width, 4 * width,
                                    num_classes=num_classes)
        for number, block in enumerate(network.encoder.layers):      # on both residual branches
            p = drop_path * number / (depths - 1)
            block.dropout = StochasticDepth(p, "row")
            block.mlp.append(StochasticDepth(p, "row"))
        nn.init.trunc_normal_(network.heads.head.weight, std=0.02)   # torchvision's is 0
    elif name == "swin_t":
        network = SwinTransformer([4, 4], width, depths, [3, 6, 12, 24], [7, 7],
                                  stochastic_depth_prob=drop_path, num_classes=num_classes)
    else:
        outputs = [2 * width, 4 * width, 8 * width, None]
        blocks = map(CNBlockConfig, [width, *outputs], outputs, depths)
        network = ConvNeXt(list(blocks), drop_path, num_classes=num_classes)
        if image_size < 64:
            network.features[0][0] = conv(3, width, 3, bias=True)
            nn.init.trunc_normal_(network.features[0][0].weight, std=0.02)
            nn.init.zeros_(network.features[0][0].bias)
    if dropout:
        linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
        head = network.get_submodule(linear[-1])
        network.set_submodule(linear[-1], nn.Sequential(nn.Dropout(dropout), head))
    return network
