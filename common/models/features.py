"""Feature maps of a network: behind a middle layer, and those that its classifier sees."""
import torch
from torch import Tensor, nn
from torchvision.models.convnext import ConvNeXt
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from common.models.parts import Network


class Backbone(nn.Module):
    """A network of `build` without its classifier: images (B, 3, H, W) -> (middle, last).

    `middle` (B, channels, h, w): behind stage `layer` (of Swin with the merging of patches that
    follows it; of a ViT behind block `layer`, without the class token), counted from 1. `last`:
    (B, width, h', w'), of a ViT the class token (B, width). Raises ValueError for a layer that is
    not there or is the last.
    """

    def __init__(self, network: nn.Module, layer: int, image_size: int):
        super().__init__()
        vit = isinstance(network, VisionTransformer)
        stages = len(network.stages) if isinstance(network, Network) else \
            len(network.encoder.layers) if vit else 4
        if not 1 <= layer < stages:
            raise ValueError(f"no layer {layer} before the last: there are {stages}")
        self.patches = image_size // 16 if vit else 0       # a side
        self.tokens_last = isinstance(network, SwinTransformer)     # (B, h, w, C)
        if isinstance(network, Network):
            self.before = nn.Sequential(network.stem, *network.stages[:layer])
            self.after = nn.Sequential(*network.stages[layer:], network.tail)
        else:
            middle, last = {
                VisionTransformer: (f"encoder.layers.encoder_layer_{layer - 1}", "encoder.ln"),
                SwinTransformer: (f"features.{2 * layer}", "permute"),
                ConvNeXt: (f"features.{2 * layer - 1}", "classifier.0"),
            }.get(type(network), (f"layer{layer}", "layer4"))
            self.before = create_feature_extractor(network, {middle: "middle", last: "last"})
            self.after = None
        with torch.no_grad():       # sizes
            middle, last = self.eval()(torch.zeros(1, 3, image_size, image_size))
        self.train()
        self.channels, self.width = middle.shape[1], last.shape[1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.after is not None:
            middle = self.before(images)
            return middle, self.after(middle)
        middle, last = self.before(images).values()
        if self.patches:
            middle = middle[:, 1:].transpose(1, 2).unflatten(2, (self.patches, self.patches))
            last = last[:, 0]
        elif self.tokens_last:
            middle = middle.permute(0, 3, 1, 2)
        return middle, last
