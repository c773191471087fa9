"""torchvision's classifiers as the backbones of single-shot detectors: their feature maps at strides 8, 16 and 32."""

from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models import get_model

STRIDES = (8, 16, 32)  # pixels of the input per cell of each map


@dataclass(frozen=True)
class Layout:
    """Where a classifier reaches its strides."""

    # Children in the order of the input; the last three stages end with the maps. What comes after them only serves
    # the classifier's own answer, and is left out.
    stages: tuple[tuple[str, ...], ...]
    channels: tuple[int, int, int]  # of the three maps


_RESNET_STAGES = (("conv1", "bn1", "relu", "maxpool"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
LAYOUTS: dict[str, Layout] = {
    "mobilenet_v2": Layout(
        (("0", "1"), ("2", "3"), ("4", "5", "6"), ("7", "8", "9", "10", "11", "12", "13"), ("14", "15", "16", "17")),
        (32, 96, 320),
    ),
    "resnet18": Layout(_RESNET_STAGES, (128, 256, 512)),
    "resnet34": Layout(_RESNET_STAGES, (128, 256, 512)),
    "resnet50": Layout(_RESNET_STAGES, (512, 1024, 2048)),
}


class Backbone(nn.Module):
    """images f32 [batch, 3, height, width], normalised → maps [batch, channels, height / stride, width / stride]."""

    def __init__(self, classifier: str):
        super().__init__()
        self.layout = LAYOUTS[classifier]
        network = get_model(classifier, weights=None)
        children = dict(getattr(network, "features", network).named_children())
        for name in (name for stage in self.layout.stages for name in stage):
            self.add_module(name, children[name])

    def forward(self, images: Tensor) -> list[Tensor]:
        """See the class; one map for each of STRIDES."""
        return self.maps(images)[-len(STRIDES) :]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The map that each stage ends with, the larger ones before those of STRIDES as well."""
        maps = []
        for stage in self.layout.stages:
            for name in stage:
                images = self.get_submodule(name)(images)
            maps.append(images)
        return maps


def stages(classifier: str, module: str = "backbone") -> tuple[tuple[str, ...], ...]:
    """The stages of the Backbone that a network has as `module` from the input on, as models.nets.parts wants them."""
    return tuple(tuple(f"{module}.{name}" for name in stage) for stage in LAYOUTS[classifier].stages)


def backbone_state(state: dict[str, Tensor], module: str = "backbone") -> dict[str, Tensor]:
    """A classifier's weights as those of a network's `module`; those of a whole network stay as they are."""
    if any(name.startswith(f"{module}.") for name in state):
        return state
    known = {name for layout in LAYOUTS.values() for stage in layout.stages for name in stage}
    renamed = {name.removeprefix("features."): value for name, value in state.items()}
    return {f"{module}.{name}": value for name, value in renamed.items() if name.partition(".")[0] in known}
