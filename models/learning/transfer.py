"""Transfer learning: what of a network learns in each mode, when, and how fast.

features: the head and the neck learn; the backbone gives what it gave before, bit for bit.
finetune: all weights learn, head and neck at the full rate and the backbone's stages the slower the nearer to the input
(discriminative rates; Howard and Ruder, arXiv 1801.06146, section 3.2), at once or unfrozen from the head down (gradual
unfreezing, section 3.3). The statistics of pretrained BatchNorms stay, only their scales and shifts learn: otherwise a
training of some hundred steps is evaluated with statistics that are neither the old ones nor those of the new weights,
and batches of few images make them noise. (MobileNetV2, 20 digits per class, top-1 with statistics that learn and that
stay: .57 and .89 at 4 images a batch, .30 and .73 after 24 steps of 32, .90 and .92 after 60, .95 and .96 after 460 of
8.)
scratch: everything learns at the full rate.

A frozen module is not only without gradients. It also runs in evaluation mode, whatever `train()` is called later: its
BatchNorm uses and keeps the statistics that it has, and nothing of it is dropped at random.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.nets.parts import Parts
from models.settings.train import Mode

# Per step, where statistics are learned. Some networks come with .01, made for training of many epochs: in a short one
# their statistics would stay those of other weights and other images, and evaluation would be ruined by them. For the
# same reason statistics that start from nothing are the plain average of the first steps.
STATISTICS_MOMENTUM = 0.1

# Attributes of modules: whether it is to stay in evaluation mode; and how many batches a new BatchNorm has seen.
_FROZEN = "is_frozen"
_SEEN = "batches_seen"
# Attributes of the network: the BatchNorms that keep their statistics, and those that have none yet. These are names,
# because training on several GPUs puts other modules in their place.
_KEPT = "norms_that_keep_statistics"
_NEW = "norms_without_statistics"


def prepare(network: nn.Module, parts: Parts, mode: Mode) -> None:
    """Makes a network that has its starting weights ready for `set_trainable` and for training; once per training.

    Raises ValueError unless head, neck and stages together hold every parameter once.
    """
    held = [id(parameter) for name in _names(parts) for parameter in network.get_submodule(name).parameters()]
    missing = {id(parameter) for parameter in network.parameters()} - set(held)
    if missing or len(held) != len(set(held)):
        raise ValueError(f"head, neck and stages hold {len(held)} parameters, {len(set(held))} of them once; {parts}")
    norms = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    new = {name for name, norm in norms.items() if not _has_statistics(norm)}
    for norm in norms.values():
        if norm.momentum is not None:
            norm.momentum = max(norm.momentum, STATISTICS_MOMENTUM)
    setattr(network, _KEPT, norms.keys() - new if mode == "finetune" else set())
    setattr(network, _NEW, new)
    set_trainable(network, parts, mode, 0, 0)


def set_trainable(network: nn.Module, parts: Parts, mode: Mode, epoch: int, unfreeze_epochs: int) -> bool:
    """Freezes and unfreezes for an epoch, counted from 0; to be called before each. True if what learns has changed.

    With `unfreeze_epochs` the first epoch is the head's and the neck's alone, then stage after stage joins, the last
    ones first, until the whole network learns from epoch `unfreeze_epochs` on.
    """
    learning = num_learning_stages(len(parts.stages), mode, epoch, unfreeze_epochs)
    frozen = parts.stages[: len(parts.stages) - learning]
    before = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(True)
    kept, new = getattr(network, _KEPT), getattr(network, _NEW)
    for name, module in network.named_modules():
        if not hasattr(module, _FROZEN):
            module.register_forward_pre_hook(_before_forward)
        setattr(module, _FROZEN, name in kept)
        if name in new:  # read here and not in each step, where a GPU would have to be waited for
            setattr(module, _SEEN, int(module.num_batches_tracked))  # type: ignore[arg-type]
    for name in (name for stage in frozen for name in stage):
        for module in network.get_submodule(name).requires_grad_(False).modules():
            setattr(module, _FROZEN, True)
    return before != [parameter.requires_grad for parameter in network.parameters()]


def num_learning_stages(num_stages: int, mode: Mode, epoch: int, unfreeze_epochs: int) -> int:
    """How many stages of the backbone learn in an epoch, counted from the head."""
    if mode == "features":
        return 0
    if mode == "scratch" or epoch >= unfreeze_epochs:
        return num_stages
    return num_stages * epoch // unfreeze_epochs


def parameter_groups(
    network: nn.Module, parts: Parts, mode: Mode, lr: float, backbone_lr_factor: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The groups of an optimiser, all that ever learns: `params`, `lr`, `weight_decay`, and a `name` for people.

    When fine-tuning the rates fall geometrically from `lr` at the head to `lr * backbone_lr_factor` at the first stage.
    Biases, norms and scales per channel have no weight decay.
    """
    groups = [("head", lr, parts.head), ("neck", lr, parts.neck)]
    if mode != "features":
        factor = 1.0 if mode == "scratch" else backbone_lr_factor
        count = len(parts.stages)
        groups += [
            (f"stage {index + 1}", lr * factor ** ((count - index) / count), names)
            for index, names in reversed(list(enumerate(parts.stages)))
        ]
    return [
        {"params": chosen, "lr": rate, "weight_decay": decay, "name": name if decays else f"{name}, biases and norms"}
        for name, rate, modules in groups
        for decays, decay in ((True, weight_decay), (False, 0.0))
        if (chosen := [p for p, p_decays in _parameters(network, modules) if p_decays == decays])
    ]


def _parameters(network: nn.Module, modules: tuple[str, ...]) -> Iterator[tuple[nn.Parameter, bool]]:
    """The parameters of some modules, and whether they decay: matrices and kernels do."""
    for module in modules:
        for name, parameter in network.get_submodule(module).named_parameters():
            yield parameter, parameter.ndim > 1 and name.rpartition(".")[2] == "weight"


def _names(parts: Parts) -> tuple[str, ...]:
    return (*parts.head, *parts.neck, *(name for stage in parts.stages for name in stage))


def _has_statistics(norm: _BatchNorm) -> bool:
    """Whether it has seen images, and is not as it was initialised; or is one that never keeps any."""
    return norm.running_mean is None or bool((norm.running_mean != 0).any())


def _before_forward(module: nn.Module, inputs: Any) -> None:
    """A hook: `train()` may have been called on the whole network since it was frozen."""
    if not module.training:
        return
    if getattr(module, _FROZEN):
        module.training = False
    elif (seen := getattr(module, _SEEN, None)) is not None:
        module.momentum = max(1 / (seen + 1), STATISTICS_MOMENTUM)  # type: ignore[assignment]
        setattr(module, _SEEN, seen + 1)
