"""The architectures that pixelmill knows: name → task, family, builder, pretrained weights and size of input."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from models.errors import UsageError
from models.imaging.geometry import ResizeRule
from models.records import Task


@dataclass(frozen=True)
class Entry:
    """One architecture. Reading the catalogue imports no torch; `family_module` does once its functions are called."""

    task: Task
    family: str  # the module of models.nets that builds it
    builder: str  # what the family builds it from; torchvision's own name
    weights: str | None = None  # torchvision's weights entry that `--weights default` stands for
    input: ResizeRule | None = None  # None: that of the weights' own transforms
    score_floor: float = 0.0  # the graph never gives findings below it

    def family_module(self) -> ModuleType:
        """The functions `build`, `graph` and `reference` of the family; see models.nets."""
        return import_module(f"models.nets.{self.family}")


def _classifier(builder: str, weights: str) -> Entry:
    return Entry(Task.CLASSIFY, "classifiers", builder, weights)


def _faster_rcnn(builder: str, size: int) -> Entry:
    # torchvision pads after the normalisation, with zeros: that is the mean colour of ImageNet.
    rule = ResizeRule("letterbox", height=size, width=size, pad_rgb=(124, 116, 104))
    return Entry(Task.DETECT, "faster_rcnn", builder, "COCO_V1", rule, score_floor=0.05)


CATALOG: dict[str, Entry] = {
    "resnet18": _classifier("resnet18", "IMAGENET1K_V1"),
    "resnet34": _classifier("resnet34", "IMAGENET1K_V1"),
    "resnet50": _classifier("resnet50", "IMAGENET1K_V2"),
    "resnet101": _classifier("resnet101", "IMAGENET1K_V2"),
    "resnet152": _classifier("resnet152", "IMAGENET1K_V2"),
    "vgg16": _classifier("vgg16", "IMAGENET1K_V1"),
    "vgg16_bn": _classifier("vgg16_bn", "IMAGENET1K_V1"),
    "vgg19": _classifier("vgg19", "IMAGENET1K_V1"),
    "vgg19_bn": _classifier("vgg19_bn", "IMAGENET1K_V1"),
    "inception_v3": _classifier("inception_v3", "IMAGENET1K_V1"),
    "googlenet": _classifier("googlenet", "IMAGENET1K_V1"),
    # V1, .3 points below V2: a package ships its file, so that it works where nothing can be downloaded.
    "mobilenet_v2": _classifier("mobilenet_v2", "IMAGENET1K_V1"),
    "mobilenet_v3_small": _classifier("mobilenet_v3_small", "IMAGENET1K_V1"),
    "mobilenet_v3_large": _classifier("mobilenet_v3_large", "IMAGENET1K_V2"),
    "efficientnet_b0": _classifier("efficientnet_b0", "IMAGENET1K_V1"),
    "convnext_tiny": _classifier("convnext_tiny", "IMAGENET1K_V1"),
    # Square inputs with about the pixels of torchvision's own resizing of a 4:3 photograph.
    "fasterrcnn_mobilenet_v3_large_320_fpn": _faster_rcnn("fasterrcnn_mobilenet_v3_large_320_fpn", 448),
    "fasterrcnn_mobilenet_v3_large_fpn": _faster_rcnn("fasterrcnn_mobilenet_v3_large_fpn", 1024),
    "fasterrcnn_resnet50": _faster_rcnn("fasterrcnn_resnet50_fpn", 1024),
    "fasterrcnn_resnet50_fpn": _faster_rcnn("fasterrcnn_resnet50_fpn", 1024),  # torchvision's name of the same
    "fasterrcnn_resnet50_fpn_v2": _faster_rcnn("fasterrcnn_resnet50_fpn_v2", 1024),
}


def entry(name: str) -> Entry:
    """The catalogue's entry. Raises UsageError that lists the known names."""
    if name not in CATALOG:
        raise UsageError(f"no architecture is named {name!r}; known are {', '.join(sorted(CATALOG))}")
    return CATALOG[name]
