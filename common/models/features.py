"""Feature maps of a network: after a middle stage, and those that its classifier sees."""
import torch
from torch import Tensor, nn
from torchvision.models.convnext import ConvNeXt
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from common import models
from common.errors import RunError
from common.models.parts import Network


class Backbone(nn.Module):
    """A network of `build` without its classifier: images (B, 3, H, W) -> (middle, pooled).
    middle (B, channels, h, w): feature map after stage `layer`, counted from 1 (Swin: after patch
    merging; ViT: after block `layer`, patch tokens only). pooled: (B, width)."""

    def __init__(self, network: nn.Module, layer: int, image_size: int):
        super().__init__()
        vit = isinstance(network, VisionTransformer)
        stages = len(network.stages) if isinstance(network, Network) else \
            len(network.encoder.layers) if vit else 4
        if not 1 <= layer < stages:
            raise RunError(f"--layer {layer}: no layer {layer} before the last: there are {stages}")
        self.patches = image_size // 16 if vit else 0       # a side
        self.channels_last = isinstance(network, SwinTransformer)   # (B, h, w, C)
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
        with torch.no_grad():
            weight = next(network.parameters())
            middle, pooled = self.eval()(weight.new_zeros(1, 3, image_size, image_size))
        self.train()
        self.channels, self.width = middle.shape[1], pooled.shape[1]

    @property
    def stages(self) -> list[nn.Module]:
        """The stages of our own networks, where Grad-CAM looks for 'layerN.M'."""
        return [] if self.after is None else [*self.before[1:], *self.after[:-1]]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.after is not None:
            middle = self.before(images)
            return middle, self.after(middle).mean((2, 3))
        middle, last = self.before(images).values()
        if self.patches:
            middle = middle[:, 1:].transpose(1, 2).unflatten(2, (self.patches, self.patches))
            return middle, last[:, 0]
        return middle.permute(0, 3, 1, 2) if self.channels_last else middle, last.mean((2, 3))


def build_backbone(name: str, image_size: int, layer: int, **options) -> Backbone:
    """Return the network `name` without its classifier, for images of `image_size` pixels; up to 64
    the convolutional ones have a stem of stride 1. Raises RunError for sizes it cannot have."""
    form = image_size if image_size > 64 or name in ("deit_s", "swin_t") else 32
    try:
        return Backbone(models.build(name, 1000, form, **options), layer, image_size)
    except TypeError as fault:                              # "… keyword argument 'drop_path'"
        raise RunError(f"{name} has no option {str(fault).split()[-1]}") from None
    except (ValueError, RuntimeError) as fault:
        raise RunError(f"{name} cannot have {options} on {image_size} pixels: "
                       f"{str(fault).splitlines()[0]}") from None
