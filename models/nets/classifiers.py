"""torchvision's image classifiers: build them, name their parts, and the graph from uint8 images to probabilities."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.nets.parts import Parts
from models.nets.untrained import measure_batch_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

# What a builder needs beyond the number of classes. Both Inceptions were trained on inputs scaled in another way, which
# `transform_input` undoes.
_OPTIONS: dict[str, dict[str, Any]] = {
    "inception_v3": {"transform_input": True, "init_weights": False},
    "googlenet": {"transform_input": True, "init_weights": False},
}
# Auxiliary heads serve training alone: they are not built for inference, and published weights leave them out.
IGNORED_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")

# Of the networks that keep all convolutions in `features`: where in it each stage begins, as a rule at half the
# resolution of the one before. What comes between `features` and the last layer is one more stage.
_STAGE_STARTS: dict[str, tuple[int, ...]] = {
    "vgg16": (0, 5, 10, 17, 24),
    "vgg16_bn": (0, 7, 14, 24, 34),
    "vgg19": (0, 5, 10, 19, 28),
    "vgg19_bn": (0, 7, 14, 27, 40),
    "mobilenet_v2": (0, 2, 4, 7, 14),
    "mobilenet_v3_small": (0, 1, 2, 4, 9),
    "mobilenet_v3_large": (0, 2, 4, 7, 13),
    "efficientnet_b0": (0, 2, 3, 4, 6),
    "convnext_tiny": (0, 2, 4, 6),
}
_RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
_STAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), _RESNET_STAGES),
    "inception_v3": (
        ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
        ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
        ("Mixed_5b", "Mixed_5c", "Mixed_5d"),
        ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "AuxLogits.conv0", "AuxLogits.conv1"),
        ("Mixed_7a", "Mixed_7b", "Mixed_7c", "dropout"),
    ),
    "googlenet": (
        ("conv1", "conv2", "conv3"),
        ("inception3a", "inception3b"),
        ("inception4a", "aux1.conv", "aux1.fc1", "aux1.dropout"),
        ("inception4b", "inception4c", "inception4d", "aux2.conv", "aux2.fc1", "aux2.dropout", "inception4e"),
        ("inception5a", "inception5b", "dropout"),
    ),
}
_AUXILIARY = {"inception_v3": ("AuxLogits.fc",), "googlenet": ("aux1.fc2", "aux2.fc2")}

# Of all pretrained weights of torchvision.
MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)


def build(builder: str, num_classes: int) -> "nn.Module":
    """An untrained network that gives logits [batch, num_classes]."""
    from torchvision.models import get_model

    options = dict(_OPTIONS.get(builder, {}))
    if builder in _AUXILIARY:
        options["aux_logits"] = False
    return get_model(builder, weights=None, num_classes=num_classes, **options).eval()


def build_for_training(builder: str, num_classes: int) -> "nn.Module":
    """The same with the auxiliary heads of the Inceptions, whose logits `training_logits` finds in what it gives."""
    from torchvision.models import get_model

    if builder not in _AUXILIARY:
        return build(builder, num_classes)
    options = dict(_OPTIONS[builder])
    if builder == "inception_v3":
        options["inception_blocks"] = _inception_blocks()
    return get_model(builder, weights=None, num_classes=num_classes, aux_logits=True, **options).eval()


def parts(network: "nn.Module", builder: str) -> Parts:
    """The last layer, and with them those of the auxiliary heads that are built, over five stages or six."""
    built = {name for name, _ in network.named_modules()}
    if builder not in _STAGE_STARTS:
        head = ("fc", *_AUXILIARY.get(builder, ()))
        return Parts(
            tuple(name for name in head if name in built),
            tuple(tuple(name for name in stage if name in built) for stage in _STAGES[builder]),
        )
    blocks = [name for name, _ in network.get_submodule("features").named_children()]
    layers = [f"classifier.{name}" for name, _ in network.get_submodule("classifier").named_children()]
    starts = _STAGE_STARTS[builder]
    stages = [
        tuple(f"features.{name}" for name in blocks[start:stop])
        for start, stop in zip(starts, (*starts[1:], len(blocks)), strict=True)
    ]
    if any(True for name in layers[:-1] for _ in network.get_submodule(name).parameters()):
        stages.append(tuple(layers[:-1]))
    else:
        stages[-1] += tuple(layers[:-1])  # a dropout has nothing to learn
    return Parts((layers[-1],), tuple(stages))


def training_logits(outputs: Any) -> "tuple[Tensor, dict[str, tuple[float, Tensor]]]":
    """The logits [batch, classes] of what a network gives, and by name the weight and the logits of auxiliary heads.

    The weights are .4 for Inception v3, as its authors trained it in TF-Slim, and .3 each for GoogLeNet (Szegedy et
    al., Going Deeper with Convolutions, arXiv 1409.4842, section 5).
    """
    from torchvision.models import GoogLeNetOutputs, InceptionOutputs

    if isinstance(outputs, InceptionOutputs):
        return outputs.logits, {"auxiliary": (0.4, outputs.aux_logits)}
    if isinstance(outputs, GoogLeNetOutputs):
        return outputs.logits, {"auxiliary_1": (0.3, outputs.aux_logits1), "auxiliary_2": (0.3, outputs.aux_logits2)}
    return outputs, {}


def features(network: "nn.Module", parts: Parts, images: "Tensor") -> "Tensor":
    """What the last layer is given: images f32 [batch, 3, height, width], normalised → [batch, channels]."""
    given: list[Tensor] = []
    with head(network, parts).register_forward_pre_hook(lambda _layer, inputs: given.append(inputs[0])):
        network(images)
    return given[0]


def head(network: "nn.Module", parts: Parts) -> "nn.Module":
    """The last layer: features [batch, channels] → logits [batch, classes]."""
    return network.get_submodule(parts.head[0])


def _inception_blocks() -> "list[Callable[..., nn.Module]]":
    """Inception v3 of the usual blocks, but with an auxiliary head that also takes images of less than 299 pixels."""
    from torch.nn.functional import interpolate
    from torchvision.models import inception

    side = 17  # of the grid at 299 pixels, which the head's pooling and its 5×5 convolution bring down to one cell

    class AuxiliaryHead(inception.InceptionAux):
        def forward(self, grid: "Tensor") -> "Tensor":
            if min(grid.shape[-2:]) < side:
                grid = interpolate(grid, size=(side, side), mode="bilinear")  # [batch, 768, 17, 17]
            return super().forward(grid)

    return [
        inception.BasicConv2d,
        inception.InceptionA,
        inception.InceptionB,
        inception.InceptionC,
        inception.InceptionD,
        inception.InceptionE,
        AuxiliaryHead,
    ]


def graph(network: "nn.Module", card: Card) -> "nn.Module":
    """images [batch, height, width, 3] uint8 → probabilities [batch, classes] f32."""
    from torch import nn

    from models.nets.normalisation import Normalise

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = Normalise(MEAN_RGB, STD_RGB)
            self.network = network

        def forward(self, images: "Tensor") -> "Tensor":
            logits = self.network(self.normalise(images))  # [batch, classes]
            return logits.softmax(dim=1)

    return Classifier().eval()


def wake(network: "nn.Module", card: Card, images: NDArray[np.uint8]) -> None:
    """Makes an untrained network respond to `images` [n, height, width, 3]."""
    measure_batch_norms(network, graph(network, card), images)


def reference(network: "nn.Module", card: Card) -> "Callable[[Tensor], dict[str, Tensor]]":
    """The same by torchvision's own steps: scale to 0…1, normalise, network, softmax."""
    from torchvision.transforms.v2.functional import normalize

    def probabilities(images: "Tensor") -> "dict[str, Tensor]":
        scaled = images.permute(0, 3, 1, 2).float() / 255  # [batch, 3, height, width]
        return {"probabilities": network(normalize(scaled, list(MEAN_RGB), list(STD_RGB))).softmax(dim=1)}

    return probabilities
