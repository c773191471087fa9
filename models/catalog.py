"""The architectures that pixelmill knows: name → task, family, builder, pretrained weights and size of input."""

from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from models.errors import UsageError
from models.imaging.geometry import ResizeRule
from models.records import Task
from models.settings.train import Mode

if TYPE_CHECKING:
    from torch import nn

    from models.nets.pretrained import Pretrained

_TELLING_APART = (Task.CLASSIFY, Task.DETECT, Task.INSTANCE, Task.SEMANTIC)
_NOT_SHIPPED = (Task.GENERATE, Task.TRANSLATE, Task.EMBED)  # nobody publishes trained weights for these


@dataclass(frozen=True)
class Entry:
    """One architecture. Reading the catalogue imports no torch; `family_module` does once its functions are called."""

    task: Task
    family: str  # the module of models.nets that builds it
    builder: str  # what the family builds it from; torchvision's own name
    weights: str | None = None  # torchvision's weights entry that `--weights default` stands for
    input: ResizeRule | None = None  # None: that of the weights' own transforms
    score_floor: float = 0.0  # the graph never gives findings below it
    backbone: str | None = None  # the classifier of this catalogue whose weights the backbone can start from
    multiple: int = 1  # pixels: the sides of the input are whole multiples of it
    sizes: tuple[int, ...] = ()  # pixels: the only sides of the input; (): any
    is_conditional: bool = False  # of generators: it is told which class to make
    has_latent_size: bool = False  # the length of its latent vectors can be chosen
    has_target: bool = False  # it learns from two data sets

    def family_module(self) -> ModuleType:
        """The functions `build`, `graph` and `reference` of the family; see models.nets."""
        return import_module(f"models.nets.{self.family}")

    def build(self, num_classes: int, size: int, latent_size: int = 0) -> "nn.Module":
        """The family's network; `size`: the side of the input in pixels, on which some networks depend.

        latent_size: of families that leave it open (`has_latent_size`), where it is not to be the usual one.
        """
        family = self.family_module()
        return family.build(self.builder, num_classes, *self._sized(size, latent_size))

    def build_for_training(self, num_classes: int, size: int, latent_size: int = 0) -> "nn.Module":
        """The same with what only serves training."""
        family = self.family_module()
        return family.build_for_training(self.builder, num_classes, *self._sized(size, latent_size))

    def _sized(self, size: int, latent_size: int) -> tuple[int, ...]:
        if not getattr(self.family_module(), "SIZED", False):
            return ()
        return (size, latent_size) if self.has_latent_size and latent_size else (size,)

    def usual_mode(self, weights: str | None) -> Mode:
        """How it is trained where nothing is said: from what was trained before, if there is anything."""
        return "scratch" if self.task in _NOT_SHIPPED and weights in (None, "none") else "finetune"

    @property
    def knows_classes(self) -> bool:
        """Whether a model of it has labels: it tells classes apart, or makes images of one."""
        return self.is_conditional or self.task in _TELLING_APART

    @property
    def data(self) -> str | None:
        """What the usual weights were trained on, as it is said to `--weights`: imagenet or coco."""
        if self.weights is None:
            return CATALOG[self.backbone].data if self.backbone else None
        return self.weights.partition("_")[0].removesuffix("1K").lower()

    def weights_named(self, name: str) -> str:
        """torchvision's name of an entry: the default one for `default` and for the data that it was trained on."""
        return self.weights if self.weights and name in ("default", self.data) else name


def _classifier(builder: str, weights: str) -> Entry:
    return Entry(Task.CLASSIFY, "classifiers", builder, weights)


def _faster_rcnn(builder: str, size: int, backbone: str, weights: str | None = "COCO_V1") -> Entry:
    # torchvision pads after the normalisation, with zeros: that is the mean colour of ImageNet.
    rule = ResizeRule("letterbox", height=size, width=size, pad_rgb=(124, 116, 104))
    return Entry(Task.DETECT, "faster_rcnn", builder, weights, rule, score_floor=0.05, backbone=backbone)


def _mask_rcnn(builder: str, size: int, backbone: str, weights: str | None = "COCO_V1") -> Entry:
    return replace(_faster_rcnn(builder, size, backbone, weights), task=Task.INSTANCE, family="mask_rcnn")


def _yolo(family: str, backbone: str, size: int) -> Entry:
    rule = ResizeRule("letterbox", height=size, width=size, pad_rgb=(124, 116, 104))
    return Entry(Task.DETECT, family, builder=backbone, input=rule, score_floor=0.05, backbone=backbone, multiple=32)


def _segmenter(family: str, builder: str, backbone: str | None = None, weights: str | None = None) -> Entry:
    # Letterboxed: things keep their shape, and what is padded counts neither in training nor in the results.
    rule = ResizeRule("letterbox", 512, 512, pad_rgb=(124, 116, 104))
    return Entry(Task.SEMANTIC, family, builder, weights, rule, backbone=backbone)


def _gan(builder: str, is_conditional: bool = False) -> Entry:
    # The whole middle of an image: what is made has its proportions, and no padding.
    rule = ResizeRule("crop", 32, 32, short_side=32)
    sizes = (16, 32, 64, 128)
    return Entry(Task.GENERATE, "gan", builder, input=rule, sizes=sizes, is_conditional=is_conditional)


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
    "yolo_n": _yolo("yolo", "mobilenet_v2", 640),
    "yolo_s": _yolo("yolo", "resnet18", 640),
    "yolo_m": _yolo("yolo", "resnet50", 640),
    "yolo_v1": _yolo("yolo_v1", "resnet18", 448),
    # Square inputs with about the pixels of torchvision's own resizing of a 4:3 photograph.
    "fasterrcnn_mobilenet_v3_large_320_fpn": _faster_rcnn(
        "fasterrcnn_mobilenet_v3_large_320_fpn", 448, "mobilenet_v3_large"
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": _faster_rcnn("fasterrcnn_mobilenet_v3_large_fpn", 1024, "mobilenet_v3_large"),
    "fasterrcnn_resnet50": _faster_rcnn("fasterrcnn_resnet50_fpn", 1024, "resnet50"),
    # torchvision's name of the same
    "fasterrcnn_resnet50_fpn": _faster_rcnn("fasterrcnn_resnet50_fpn", 1024, "resnet50"),
    "fasterrcnn_resnet50_fpn_v2": _faster_rcnn("fasterrcnn_resnet50_fpn_v2", 1024, "resnet50"),
    "fasterrcnn_resnet18": _faster_rcnn("fasterrcnn_resnet18_fpn", 512, "resnet18", weights=None),
    "maskrcnn_resnet50": _mask_rcnn("maskrcnn_resnet50_fpn", 1024, "resnet50"),
    "maskrcnn_resnet18": _mask_rcnn("maskrcnn_resnet18_fpn", 512, "resnet18", weights=None),
    "maskrcnn_mobilenet_v2": _mask_rcnn("maskrcnn_mobilenet_v2_fpn", 512, "mobilenet_v2", weights=None),
    "fcn_resnet50": _segmenter("segmenters", "fcn_resnet50", "resnet50", "COCO_WITH_VOC_LABELS_V1"),
    "deeplabv3_resnet50": _segmenter("segmenters", "deeplabv3_resnet50", "resnet50", "COCO_WITH_VOC_LABELS_V1"),
    "unet": _segmenter("unet", "unet"),
    "unet_resnet34": _segmenter("unet", "unet_resnet34", "resnet34"),
    "unet_mobilenet_v2": _segmenter("unet", "unet_mobilenet_v2", "mobilenet_v2"),
    # Cropped: shapes keep their proportions, and padding would be one more thing to encode.
    "vae": Entry(
        Task.EMBED,
        "vae",
        "vae",
        input=ResizeRule("crop", 64, 64, short_side=64),
        multiple=16,
        has_latent_size=True,
    ),
    # Stretched: nothing of an image is left untranslated, and there are no bars for a discriminator to go by.
    "cyclegan": Entry(
        Task.TRANSLATE, "cyclegan", "cyclegan", input=ResizeRule("stretch", 128, 128), multiple=4, has_target=True
    ),
    "dcgan": _gan("dcgan"),
    "wgan_gp": _gan("wgan_gp"),
    "conditional_gan": _gan("conditional_gan", is_conditional=True),
}


def entry(name: str) -> Entry:
    """The catalogue's entry. Raises UsageError that lists the known names."""
    if name not in CATALOG:
        raise UsageError(f"no architecture is named {name!r}; known are {', '.join(sorted(CATALOG))}")
    return CATALOG[name]


def input_rule(
    name: str, trained: "Pretrained | None", image_size: int | None = None, rule: ResizeRule | None = None
) -> ResizeRule:
    """How images become the input of an architecture: the catalogue's rule, else that of the weights' own transforms.

    image_size: the longer side of the input in pixels, where it is not to be the usual one; what a crop cuts away stays
    the same share of the image. rule: in place of the usual one, e.g. that of another model. Raises UsageError for a
    size that the network cannot work with.
    """
    rule = rule or entry(name).input or (trained.input if trained else None)
    assert rule is not None, f"{name} has no resize rule, neither of its own nor of its weights"
    if image_size is None:
        return rule
    if trained and image_size < trained.min_side:
        raise UsageError(
            f"{name} needs images of at least {trained.min_side} pixels, got --image-size {image_size}: "
            "smaller images are enlarged, so ask for more"
        )
    if (sizes := entry(name).sizes) and image_size not in sizes:
        raise UsageError(
            f"{name} is built for images of {', '.join(map(str, sizes[:-1]))} or {sizes[-1]} pixels, "
            f"got --image-size {image_size}"
        )
    multiple = entry(name).multiple
    if image_size % multiple:
        lower = max(image_size // multiple, 1) * multiple
        raise UsageError(
            f"{name} needs images whose sides are multiples of {multiple} pixels, got --image-size {image_size}: "
            f"use {lower} or {lower + multiple}"
        )
    factor = image_size / max(rule.height, rule.width)
    short_side = rule.short_side and round(rule.short_side * factor)
    return replace(rule, height=round(rule.height * factor), width=round(rule.width * factor), short_side=short_side)
