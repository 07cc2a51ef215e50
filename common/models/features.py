"""Feature maps of a network: behind a middle layer, and those that its classifier sees."""
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import ConvNeXt
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from common import models
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
        self.side = middle.shape[2]             # of the middle features of such images

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


def build_backbone(name: str, image_size: int, layer: int, *, pretrained: str | bool = False,
                   **options) -> Backbone:
    """The network `name` without its classifier, for images of exactly `image_size` pixels.

    Up to 64 pixels the convolutional ones have a stem of stride 1. `options` of `models.build`;
    pretrained: begin with ImageNet weights, torchvision's (True: downloaded) or of a file with
    their state_dict. Raises ValueError for what does not exist or fit, OSError when the weights
    cannot be had.
    """
    form = image_size if image_size > 64 or name in ("deit_s", "swin_t") else 32
    network = models.build(name, 1000, form, **options)
    if pretrained is True:
        theirs = {"convnext_t": "convnext_tiny"}.get(name, name)
        weights = torchvision.models.get_model_weights(theirs).IMAGENET1K_V1
        state = weights.get_state_dict(progress=False, check_hash=True)
    elif pretrained:
        state = torch.load(pretrained, map_location="cpu", weights_only=True)
    if pretrained:
        classifier = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        own = network.state_dict(keep_vars=True)
        for key, value in own.items():
            if value is classifier.weight or value is classifier.bias:
                state[key] = value
            elif key not in state or state[key].shape != value.shape:
                raise ValueError(f"the weights do not fit {name} for {image_size} pixels ({key})")
        network.load_state_dict({key: state[key] for key in own})
    return Backbone(network, layer, image_size)
