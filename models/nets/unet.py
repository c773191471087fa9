"""U-Net: Ronneberger et al., Convolutional Networks for Biomedical Image Segmentation, arXiv 1505.04597.

A contracting path halves the image again and again, an expanding path doubles it again, and at each size what the first
one saw is laid beside what the second one knows, so that the answer is both understood and sharp.

`unet` is the network of the paper's figure 1, but for what follows. Its convolutions are padded, so that the answer has
the size of the image, where the paper's lose two pixels each and answer only for the middle. Sides that do not divide
by 16 are halved upwards, and the surplus row or column is cut off again on the way back. A BatchNorm follows each
convolution: the paper has none, and trained for ten hours; with it some hundred steps are enough, and the paper's
dropout is left out. `UNet(…, norm=False)` is without.

`unet_resnet34` and `unet_mobilenet_v2` contract by torchvision's ResNet-34 and MobileNetV2, which can start from their
ImageNet weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, cat, nn
from torch.nn.functional import interpolate

from models.card import Card
from models.nets import backbone, class_maps
from models.nets.backbone import Backbone
from models.nets.parts import Parts

IGNORED_PREFIXES = ()

LEVELS = 4  # times that the image is halved
WIDTH = 64  # channels at the full size; doubled whenever the image is halved

_RESNET_CHANNELS = (64, 64, 128, 256, 512)  # of ResNet-34 at 1/2, 1/4, 1/8, 1/16 and 1/32
_LAST_CHANNELS = 32  # of the expanding path behind it, at the full size
_MOBILENET_CHANNELS = (16, 24, 32, 96, 320)  # of MobileNetV2, at the same sizes
_MOBILENET_EXPANDED = (128, 64, 48, 32)  # of the expanding path behind it, from 1/16 to 1/2
_MOBILENET_LAST_CHANNELS = 16


class DoubleConvolution(nn.Sequential):
    """Two 3×3 convolutions with ReLU: [batch, inputs, height, width] → [batch, outputs, height, width]."""

    def __init__(self, inputs: int, outputs: int, norm: bool = True):
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(outputs)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class Expansion(nn.Module):
    """Doubles the sides, joins what the contracting path saw at that size, and makes one map of both."""

    def __init__(self, inputs: int, joined: int, outputs: int, norm: bool = True, learned: bool = True):
        """learned: double by a 2×2 convolution as in the paper, which halves the channels; else by repetition."""
        super().__init__()
        self.enlarge: nn.Module
        if learned:
            self.enlarge = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
            inputs //= 2
        else:
            self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.convolve = DoubleConvolution(inputs + joined, outputs, norm)

    def forward(self, deep: Tensor, seen: Tensor) -> Tensor:
        """[batch, inputs, ⌈height/2⌉, ⌈width/2⌉], [batch, joined, height, width] → [batch, outputs, height, width]"""
        doubled = self.enlarge(deep)[:, :, : seen.shape[2], : seen.shape[3]]
        return self.convolve(cat([seen, doubled], dim=1))


class UNet(nn.Module):
    """images [batch, 3, height, width] → logits [batch, outputs, height, width], of any size."""

    def __init__(self, outputs: int, width: int = WIDTH, levels: int = LEVELS, norm: bool = True):
        super().__init__()
        channels = [width * 2**level for level in range(levels + 1)]
        self.contract = nn.ModuleList(
            DoubleConvolution(before, after, norm) for before, after in zip((3, *channels), channels, strict=False)
        )
        self.halve = nn.MaxPool2d(2, ceil_mode=True)
        self.expand = nn.ModuleList(
            Expansion(deep, seen, seen, norm) for seen, deep in zip(channels[-2::-1], channels[:0:-1], strict=True)
        )
        self.classify = nn.Conv2d(width, outputs, 1)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        seen: list[Tensor] = []
        features = images
        for level, convolve in enumerate(self.contract):
            features = convolve(self.halve(features) if level else features)
            seen.append(features)
        for expand in self.expand:
            seen.pop()
            features = expand(features, seen[-1])
        return self.classify(features)


class _EncoderUNet(nn.Module):
    """The same around a classifier, whose first map has half the image's sides: the last expansion joins nothing.

    images [batch, 3, height, width] → logits [batch, outputs, height, width], of any size.
    """

    def __init__(self, encoder: nn.Module, channels: Sequence[int], expanded: Sequence[int], last: int, outputs: int):
        """channels: of what `maps` gives; expanded: of the expansions at 1/16 to 1/2; last: at the full size."""
        super().__init__()
        self.encoder: Any = encoder
        *joined, deepest = channels
        self.expand = nn.ModuleList(
            Expansion(deep, seen, after, learned=False)
            for seen, deep, after in zip(joined[::-1], (deepest, *expanded[:-1]), expanded, strict=True)
        )
        self.sharpen = DoubleConvolution(expanded[-1], last)
        self.classify = nn.Conv2d(last, outputs, 1)
        for module in (self.expand, self.sharpen, self.classify):
            _initialise(module)

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the classifier sees at 1/2, 1/4, 1/8, 1/16 and 1/32 of the sides, rounded upwards."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        seen = self.maps(images)
        features = seen.pop()
        for expand in self.expand:
            features = expand(features, seen.pop())
        features = interpolate(features, scale_factor=2, mode="nearest")[:, :, : images.shape[2], : images.shape[3]]
        return self.classify(self.sharpen(features))


class ResNetUNet(_EncoderUNet):
    """Around a ResNet-34."""

    def __init__(self, outputs: int):
        from torchvision.models import resnet34

        encoder = resnet34(weights=None)
        del encoder.avgpool, encoder.fc
        super().__init__(encoder, _RESNET_CHANNELS, _RESNET_CHANNELS[-2::-1], _LAST_CHANNELS, outputs)

    def maps(self, images: Tensor) -> list[Tensor]:
        """See _EncoderUNet."""
        encoder = self.encoder
        seen = [encoder.relu(encoder.bn1(encoder.conv1(images)))]  # [batch, 64, ⌈height/2⌉, ⌈width/2⌉]
        features = encoder.maxpool(seen[0])
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            features = stage(features)
            seen.append(features)
        return seen


class MobileNetUNet(_EncoderUNet):
    """Around a MobileNetV2 without its last convolution, which serves the classes of ImageNet alone."""

    def __init__(self, outputs: int):
        encoder = Backbone("mobilenet_v2")
        super().__init__(encoder, _MOBILENET_CHANNELS, _MOBILENET_EXPANDED, _MOBILENET_LAST_CHANNELS, outputs)

    def maps(self, images: Tensor) -> list[Tensor]:
        """See _EncoderUNet."""
        return self.encoder.maps(images)


def _initialise(network: nn.Module) -> None:
    """By He et al., arXiv 1502.01852, as the paper's section 3 wants it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "unet": lambda outputs: UNet(outputs, WIDTH),
    "unet_resnet34": ResNetUNet,
    "unet_mobilenet_v2": MobileNetUNet,
}


def build(builder: str, num_classes: int) -> nn.Module:
    """An untrained network that gives logits [batch, 1 + num_classes, height, width]."""
    return _BUILDERS[builder](1 + num_classes).eval()


build_for_training = build  # nothing of it serves training alone


def parts(network: nn.Module, builder: str) -> Parts:
    """The last layer is the head, the expanding path the neck."""
    if isinstance(network, UNet):
        stages: tuple[tuple[str, ...], ...] = tuple((f"contract.{level}",) for level in range(len(network.contract)))
        return Parts(("classify",), stages, ("expand",))
    if isinstance(network, ResNetUNet):
        stages = (("encoder.conv1", "encoder.bn1"), *((f"encoder.layer{number}",) for number in range(1, 5)))
    else:
        stages = backbone.stages("mobilenet_v2", "encoder")
    return Parts(("classify",), stages, ("expand", "sharpen"))


def backbone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of an ImageNet classifier under the names that they have in its U-Net, without its last layer."""
    if any(name.startswith("features.") for name in state):
        return backbone.backbone_state(state, "encoder")
    return {f"encoder.{name}": value for name, value in state.items() if not name.startswith("fc.")}


def training_logits(outputs: Any) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
    """The logits; U-Net has no auxiliary heads."""
    return outputs, {}


def graph(network: nn.Module, card: Card) -> nn.Module:
    """images [batch, height, width, 3] uint8 → class_map [batch, height, width] u8."""
    return class_maps.graph(network, lambda logits: logits)


def wake(network: nn.Module, card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained network tell regions of `images` [n, height, width, 3] apart."""
    class_maps.wake(network, lambda logits: logits, network.get_submodule("classify"), images)


def reference(network: nn.Module, card: Card) -> Callable[[Tensor], dict[str, Tensor]]:
    """The same by torchvision's own steps: scale to 0…1, normalise, network, the best class of each pixel."""
    return class_maps.reference(network, lambda logits: logits)
