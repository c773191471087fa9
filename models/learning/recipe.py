"""The settings of one training with every default decided; what is in here changes the result."""

from dataclasses import dataclass
from typing import Literal

from models import catalog
from models.errors import UsageError
from models.learning.precision import Arithmetic
from models.records import Task
from models.settings.train import Augment, Mode, Observation, Training

# Variations of each image whose features are computed.
VIEWS: dict[Augment, int] = {"none": 1, "light": 2, "strong": 4}


@dataclass(frozen=True)
class Recipe:
    """See models.settings.train for what each of these means."""

    mode: Mode
    epochs: int
    batch_size: int
    lr: float | Literal["auto"]
    backbone_lr_factor: float = 0.1
    unfreeze_epochs: int = 0
    augment: Augment = "light"
    flip: bool = True
    mosaic: bool = False
    multi_scale: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    accumulate: int = 1
    clip_norm: float = 1.0
    ema: float = 0.0
    patience: int = 0
    balance: bool = False
    observation: Observation = "gaussian"
    beta: float = 1.0
    kl_warmup: float = 0.3
    cycle_weight: float = 10.0
    identity_weight: float = 0.0
    precision: Arithmetic = "fp32"
    critic_steps: int = 1
    critic_lr_factor: float = 1.0
    penalty: float = 0.0
    clip_weights: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class _Defaults:
    epochs: int
    batch_size: int
    lr: float  # of AdamW
    augment: Augment
    label_smoothing: float = 0.0
    ema: float = 0.0


# Classifiers, features: each variation costs another pass through the backbone, and brought nothing at 20 images per
# class. A head alone does not overfit so much that smoothing pays: MobileNetV2 on 1,449 digits answers as well without,
# and its calibration error is .02 instead of .16. The others have no features that could be kept, so that variations
# cost nothing.
_DEFAULTS: dict[Task, dict[Mode, _Defaults]] = {
    Task.CLASSIFY: {
        "features": _Defaults(epochs=40, batch_size=32, lr=5e-3, augment="none"),
        "finetune": _Defaults(epochs=10, batch_size=32, lr=1e-3, augment="light", label_smoothing=0.1),
        "scratch": _Defaults(epochs=40, batch_size=32, lr=3e-3, augment="light", label_smoothing=0.1),
    },
    Task.DETECT: {
        "features": _Defaults(epochs=30, batch_size=8, lr=2e-3, augment="light"),
        # yolo_n, 128 px, 10 epochs, one seed: rates of .001, .002 and .004 reach an AP of .405, .428 and .420 on 205
        # photographs of blood; averaged weights gain .002, batches of other sizes lose .013. Mosaics gain .013 there,
        # and lose .032 on 192 scenes of digits: they are there to be asked for.
        "finetune": _Defaults(epochs=30, batch_size=8, lr=2e-3, augment="light"),
        "scratch": _Defaults(epochs=100, batch_size=8, lr=2e-3, augment="light"),
    },
    Task.INSTANCE: {
        # fasterrcnn_resnet18 learns eight images at .0005 in 12 epochs, and at .002 not in 16.
        "features": _Defaults(epochs=20, batch_size=4, lr=5e-4, augment="light"),
        "finetune": _Defaults(epochs=20, batch_size=4, lr=5e-4, augment="light"),
        "scratch": _Defaults(epochs=60, batch_size=4, lr=5e-4, augment="light"),
    },
    Task.SEMANTIC: {
        # unet_resnet34 from scratch, 128 px, 10 epochs, one seed, on 64 images of nuclei, judged by 8: rates of .0003,
        # .001 and .003 reach a mean IoU of .844, .874 and .871; batches of 16 instead of 8 lose .014, strong variations
        # .023.
        "features": _Defaults(epochs=30, batch_size=8, lr=2e-3, augment="light"),
        "finetune": _Defaults(epochs=30, batch_size=8, lr=1e-3, augment="light"),
        "scratch": _Defaults(epochs=60, batch_size=8, lr=2e-3, augment="light"),
    },
    Task.EMBED: {
        # What is varied at random is to be encoded, too, and is no anomaly any more: unvaried images are the rule.
        # 16 px digits, 8 numbers, one seed: a rate of .004 reaches a squared error of .005 in 40 epochs, where as many
        # components of PCA leave .013 (benchmarks.generative).
        "features": _Defaults(epochs=30, batch_size=32, lr=4e-3, augment="none"),
        "finetune": _Defaults(epochs=30, batch_size=32, lr=2e-3, augment="none"),
        "scratch": _Defaults(epochs=60, batch_size=32, lr=4e-3, augment="none"),
    },
    Task.TRANSLATE: {
        # The paper's .0002 for one image at a time, by the root of the batch.
        "finetune": _Defaults(epochs=40, batch_size=4, lr=2e-4, augment="light"),
        "scratch": _Defaults(epochs=100, batch_size=4, lr=4e-4, augment="light"),
    },
    Task.GENERATE: {
        "features": _Defaults(epochs=40, batch_size=32, lr=5e-4, augment="none", ema=0.99),
        "finetune": _Defaults(epochs=40, batch_size=32, lr=5e-4, augment="none", ema=0.99),
        "scratch": _Defaults(epochs=60, batch_size=32, lr=1e-3, augment="none", ema=0.99),
    },
}
# Arjovsky et al. take 5 at a rate of .00005. At one as high as ours the critic keeps up with fewer, and the generator
# learns more often in the same time.
_CRITIC_STEPS = {"wgan_gp": 2}
# Of each class the discriminator sees few images, which it would soon know by heart: 16 px digits get worse after nine
# epochs without variations (Fréchet distance of seed 0: 13.8, accuracy .989), and with them after 17 (11.6 and .996;
# benchmarks.generative).
_AUGMENT: dict[str, Augment] = {"conditional_gan": "light"}
_PENALTY = 10.0  # Gulrajani et al., algorithm 1
_SGD_TO_ADAMW = 10.0  # plain gradients want about so much more


def resolve(settings: Training) -> Recipe:
    """Fills in what the settings leave open, by task and mode; but the precision, which depends on the network.

    Raises UsageError for a setting that the task knows nothing of.
    """
    entry = catalog.entry(settings.model)
    task = entry.task
    finds_objects = task in (Task.DETECT, Task.INSTANCE)
    generates = task == Task.GENERATE
    fights = task in (Task.GENERATE, Task.TRANSLATE)
    usual = {name: field.default for name, field in Training.model_fields.items()}
    for option, is_known in (
        ("label_smoothing", task in (Task.CLASSIFY, Task.SEMANTIC)),
        ("mosaic", finds_objects),
        ("multi_scale", finds_objects),
        ("critic_steps", generates),
        ("critic_lr_factor", generates),
        ("penalty", settings.model == "wgan_gp"),
        ("clip_weights", settings.model == "wgan_gp"),
        ("judge", fights),
        # Networks that learn against each other do so by Adam at rates that must fit each other.
        ("optimizer", not fights),
        ("weight_decay", not fights),
        ("backbone_lr_factor", not fights),
        ("unfreeze_epochs", not fights),
        ("balance", task not in (Task.TRANSLATE, Task.EMBED) and (not generates or entry.is_conditional)),
        ("latent_size", task == Task.EMBED),
        ("observation", task == Task.EMBED),
        ("beta", task == Task.EMBED),
        ("kl_warmup", task == Task.EMBED),
        ("cycle_weight", task == Task.TRANSLATE),
        ("identity_weight", task == Task.TRANSLATE),
    ):
        if getattr(settings, option) not in (usual[option], 0) and not is_known:
            flag = f"--{option.replace('_', '-')}"
            raise UsageError(f"{flag} means nothing to models that {task}, such as {settings.model}: leave it out")
    if fights and settings.lr == "auto":
        raise UsageError(f"--lr auto looks at one loss, and {settings.model} has two that fight: give a number")
    if settings.penalty and settings.clip_weights:
        raise UsageError("--penalty and --clip-weights both bound the critic: use one of them")
    # A detector of two stages learns as the one that draws masks does.
    mode = settings.mode or entry.usual_mode(settings.weights)
    of_task = _DEFAULTS[Task.INSTANCE if entry.family == "faster_rcnn" else task]
    if mode not in of_task:
        raise UsageError(f"{settings.model} cannot be trained with --mode {mode}: use {' or '.join(of_task)}")
    defaults = of_task[mode]
    lr = settings.lr
    if lr is None:
        lr = defaults.lr * (_SGD_TO_ADAMW if settings.optimizer == "sgd" else 1.0)
    return Recipe(
        mode=mode,
        epochs=settings.epochs or defaults.epochs,
        batch_size=settings.batch_size or defaults.batch_size,
        lr=lr,
        backbone_lr_factor=settings.backbone_lr_factor,
        unfreeze_epochs=settings.unfreeze_epochs,
        augment=settings.augment or _AUGMENT.get(settings.model, defaults.augment),
        flip=settings.flip,
        mosaic=settings.mosaic,
        multi_scale=settings.multi_scale,
        optimizer=settings.optimizer,
        weight_decay=0.0 if generates else settings.weight_decay,
        warmup_epochs=settings.warmup_epochs,
        label_smoothing=defaults.label_smoothing if settings.label_smoothing is None else settings.label_smoothing,
        accumulate=settings.accumulate,
        clip_norm=(0.0 if generates else 1.0) if settings.clip_norm is None else settings.clip_norm,
        ema=defaults.ema if settings.ema is None else settings.ema,
        patience=settings.patience,
        balance=settings.balance,
        **{
            name: value
            for name in ("observation", "beta", "kl_warmup", "cycle_weight", "identity_weight")
            if (value := getattr(settings, name)) is not None
        },
        critic_steps=settings.critic_steps or _CRITIC_STEPS.get(settings.model, 1),
        critic_lr_factor=settings.critic_lr_factor,
        penalty=_penalty(settings),
        clip_weights=settings.clip_weights or 0.0,
        seed=settings.seed,
    )


def _penalty(settings: Training) -> float:
    """The weight of the gradient penalty: of a critic whose weights are not clipped, unless none is asked for."""
    if settings.model != "wgan_gp" or settings.clip_weights:
        return 0.0
    return _PENALTY if settings.penalty is None else settings.penalty
