"""The settings of `train`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from models.settings.fields import Device, Settings, StoreName

Mode = Literal["features", "finetune", "scratch"]
Augment = Literal["none", "light", "strong"]
Observation = Literal["gaussian", "bernoulli"]


def _is_rate(value: float | Literal["auto"] | None) -> float | Literal["auto"] | None:
    if isinstance(value, float) and not 0 < value < 100:
        raise ValueError(f"a learning rate is greater than 0, got {value:g}")
    return value


class Training(Settings):
    """How to train. What is None here has a default that depends on mode and architecture."""

    model: Annotated[str, Field(min_length=1, description="The architecture, e.g. mobilenet_v2 or resnet50.")]
    mode: Annotated[
        Mode | None,
        Field(
            description="features: only the new head learns, on the frozen backbone's outputs; finetune: everything "
            "learns, the backbone at a lower rate; scratch: everything learns, from random weights. By default "
            "finetune. Of generators, features: the discriminator's early layers are frozen (FreezeD); finetune: both "
            "networks learn on from --weights MODEL; by default scratch without --weights, and else finetune."
        ),
    ] = None
    weights: Annotated[
        str | None,
        Field(
            description="Where to start from: imagenet, coco, none, the name of a torchvision entry, a weights file, "
            "or a model of the store; by default the pretrained ones, for scratch none."
        ),
    ] = None
    epochs: Annotated[int | None, Field(ge=1, description="Passes over the training split.")] = None
    batch_size: Annotated[int | None, Field(ge=1, description="Images per step and device.")] = None
    lr: Annotated[
        float | Literal["auto"] | None,
        Field(description="Peak learning rate of the head; auto looks for it before training."),
        AfterValidator(_is_rate),
    ] = None
    backbone_lr_factor: Annotated[
        float, Field(gt=0, le=1, description="finetune: the first layers learn at this share of the head's rate.")
    ] = 0.1
    unfreeze_epochs: Annotated[
        int, Field(ge=0, description="finetune: unfreeze the backbone step by step over so many epochs; 0: at once.")
    ] = 0
    image_size: Annotated[
        int | None, Field(ge=16, le=4096, description="Side of the network's input in pixels; by default the weights'.")
    ] = None
    augment: Annotated[
        Augment | None,
        Field(
            description="How much training images are varied; by default light, for a classifier's features none. Of "
            "generators real and made ones, differentiably (DiffAugment): by default light for conditional_gan, else "
            "none; for a few hundred images or less."
        ),
    ] = None
    flip: Annotated[
        bool,
        Field(
            description="Mirror training images; switch off where left and right differ, as in text. Generators never "
            "do: they would make mirrored images."
        ),
    ] = True
    mosaic: Annotated[
        bool, Field(description="Detectors: show several training images in one, until shortly before the end.")
    ] = False
    multi_scale: Annotated[
        bool, Field(description="Detectors: train on batches of other sizes, two thirds to four thirds.")
    ] = False
    optimizer: Annotated[Literal["adamw", "sgd"], Field(description="How weights are updated.")] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, description="Of weights, not of biases and norms.")] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0, description="The rate rises so long, then falls as a cosine.")] = 1.0
    label_smoothing: Annotated[
        float | None,
        Field(ge=0, lt=1, description="Share of each target spread over classes; by default .1 for whole classifiers."),
    ] = None
    accumulate: Annotated[int, Field(ge=1, description="Batches per update of the weights.")] = 1
    clip_norm: Annotated[
        float | None,
        Field(ge=0, description="Largest norm of the gradient, by default 1, of generators 0; 0: no limit."),
    ] = None
    ema: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="Decay of the averaged weights that are kept; 0: the weights themselves.",
        ),
    ] = None
    patience: Annotated[
        int, Field(ge=0, description="Stop when so many epochs brought no better metric; 0: never.")
    ] = 0
    balance: Annotated[
        bool, Field(description="Draw every class equally often; images of rare objects more often.")
    ] = False
    latent_size: Annotated[
        int | None,
        Field(ge=1, le=4096, description="Autoencoders: numbers of the latent vector, which is the embedding."),
    ] = None
    observation: Annotated[
        Observation | None,
        Field(
            description="Autoencoders: how pixels lie around what is decoded. gaussian, the usual one: with a "
            "deviation that is learnt; bernoulli: for ink on paper, whose levels are nearly black or white."
        ),
    ] = None
    beta: Annotated[
        float | None,
        Field(gt=0, description="Autoencoders: weight of KL; above 1 fewer numbers carry more. By default 1."),
    ] = None
    kl_warmup: Annotated[
        float | None,
        Field(ge=0, le=1, description="Autoencoders: share of the training over which KL is let in. By default .3."),
    ] = None
    cycle_weight: Annotated[
        float | None,
        Field(gt=0, description="Translators: weight of coming back as before, by default 10."),
    ] = None
    identity_weight: Annotated[
        float | None,
        Field(
            ge=0,
            description="Translators: weight of leaving alone what is of the target already, by default 0; "
            "5 where colours are to stay.",
        ),
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Field(description="Of the arithmetic; auto: bf16 or fp16 where the device is built for it."),
    ] = "auto"
    critic_steps: Annotated[
        int | None,
        Field(
            ge=1, description="Generators: updates of the discriminator for each of the generator; wgan_gp 2, else 1."
        ),
    ] = None
    critic_lr_factor: Annotated[
        float, Field(gt=0, le=10, description="Generators: rate of the discriminator, by the generator's (TTUR).")
    ] = 1.0
    penalty: Annotated[
        float | None, Field(ge=0, description="wgan_gp: weight of the gradient penalty; by default 10.")
    ] = None
    clip_weights: Annotated[
        float | None,
        Field(gt=0, description="wgan_gp: clip the critic's weights to ± this, e.g. .01, in place of the penalty."),
    ] = None
    judge: Annotated[
        str | None,
        Field(
            description="Generators: what compares made images with real ones: a classifier of the store, imagenet or "
            "pixels; by default imagenet, and pixels where its weights cannot be had."
        ),
    ] = None
    device: Annotated[Device, Field(description="auto takes all GPUs that are there, else the CPU.")] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32, description="The same seed and machine give the same model.")] = 0
    resume: Annotated[bool, Field(description="Go on from the last epoch of a training that was interrupted.")] = True
    promote_if_better: Annotated[
        bool,
        Field(description="Make it NAME@production unless the present one is better on the same test split."),
    ] = False


class TrainSettings(Training):
    """What to train on what, and how."""

    dataset: Annotated[str, Field(min_length=1, description="NAME (newest version) or NAME@VERSION of a data set.")]
    target: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Translators: the data set whose images those of the other one are to look like; no image of "
            "the one belongs to any of the other.",
        ),
    ] = None
    extra_data: Annotated[
        str | None,
        Field(description="Other data sets, with commas, whose training images are learned from too, e.g. generated."),
    ] = None
    name: StoreName
    export: Annotated[bool, Field(description="Export to ONNX at the end, and publish only if it agrees.")] = True
