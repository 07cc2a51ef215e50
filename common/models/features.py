"""Feature maps of a network: behind a middle layer, and those that its classifier sees."""
from pickle import UnpicklingError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import ConvNeXt
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from common import models
from common.errors import DataError, RunError
from common.models.parts import Network


class Backbone(nn.Module):
    """A network of `build` without its classifier: images (B, 3, H, W) -> (middle, pooled).

    `middle` (B, channels, h, w): behind stage `layer` (of Swin with the merging of patches that
    follows it; of a ViT behind block `layer`, without the class token), counted from 1. `pooled`
    (B, width): what the classifier sees, the mean of the last features over their positions, of a
    ViT the class token. Raises RunError for a layer that is not there or is the last.
    """

    def __init__(self, network: nn.Module, layer: int, image_size: int):
        super().__init__()
        vit = isinstance(network, VisionTransformer)
        stages = len(network.stages) if isinstance(network, Network) else \
            len(network.encoder.layers) if vit else 4
        if not 1 <= layer < stages:
            raise RunError(f"--layer {layer}: no layer {layer} before the last: there are {stages}")
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
            middle, pooled = self.eval()(torch.zeros(1, 3, image_size, image_size))
        self.train()
        self.channels, self.width = middle.shape[1], pooled.shape[1]
        self.side = middle.shape[2]             # of the middle features of such images

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.after is not None:
            middle = self.before(images)
            return middle, self.after(middle).mean((2, 3))
        middle, last = self.before(images).values()
        if self.patches:
            middle = middle[:, 1:].transpose(1, 2).unflatten(2, (self.patches, self.patches))
            return middle, last[:, 0]
        if self.tokens_last:
            middle = middle.permute(0, 3, 1, 2)
        return middle, last.mean((2, 3))


def build_backbone(name: str, image_size: int, layer: int, **options) -> Backbone:
    """The network `name` without its classifier, for images of exactly `image_size` pixels.

    Up to 64 pixels the convolutional ones have a stem of stride 1. `options` of `models.build`.
    Raises RunError for what does not exist or fit.
    """
    form = image_size if image_size > 64 or name in ("deit_s", "swin_t") else 32
    try:
        return Backbone(models.build(name, 1000, form, **options), layer, image_size)
    except (ValueError, RuntimeError) as fault:
        raise RunError(f"{name} cannot have {options} on {image_size} pixels: "
                       f"{str(fault).splitlines()[0]}") from None


def load_weights(network: nn.Module, source: str, model: str):
    """Loads ImageNet weights: torchvision's of its `model` (source "torchvision": downloaded), or
    those of a local file.

    A file holds a state_dict in torchvision's names, perhaps under the key state_dict or model and
    with the prefix module. What the network lacks, as its classifier, is left out. Raises DataError
    naming the source that is missing or does not fit.
    """
    if source == "torchvision":
        try:
            weights = torchvision.models.get_model_weights(model).IMAGENET1K_V1
        except (ValueError, AttributeError):
            raise DataError(f"torchvision has no ImageNet weights of {model}") from None
        try:
            state = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as fault:
            raise DataError(f"{weights.url} could not be downloaded ({fault}); fetch it elsewhere "
                            "and give the file: --pretrained FILE") from fault
    else:
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise DataError(f"{source}: no such file of weights") from None
        except (RuntimeError, EOFError, UnpicklingError, OSError, ValueError) as fault:
            raise DataError(f"{source}: not a readable file of weights "
                            f"({(str(fault).splitlines() or ['empty'])[0][:100]})") from fault
        for key in ("state_dict", "model"):
            state = state.get(key, state) if isinstance(state, dict) else {}
        state = {name.removeprefix("module."): value for name, value in state.items()}
    own = network.state_dict()
    wrong = [name for name, value in own.items() if not name.endswith("num_batches_tracked")
             and getattr(state.get(name), "shape", None) != value.shape]
    if wrong:
        name, theirs = wrong[0], getattr(state.get(wrong[0]), "shape", None)
        raise DataError(f"{source} does not fit {model} at this image size: {len(wrong)} of "
                        f"{len(own)} tensors, first {name}: "
                        f"{'missing' if theirs is None else tuple(theirs)}, "
                        f"{tuple(own[name].shape)} needed")
    network.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
