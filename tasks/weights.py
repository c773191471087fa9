"""Weights to start from: torchvision's, those of a file or of a model in the store. No file's content is ever run."""

import contextlib
import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import catalog
from models.card import WEIGHTS_FILE, Card
from models.errors import ModelError, UsageError
from models.imaging.geometry import ResizeRule
from models.nets.parts import Parts
from models.nets.pretrained import Pretrained, pretrained
from models.records import Task
from models.runtime.predictor import one_line
from models.settings.train import Mode
from tasks import registry
from tasks.registry import sha256_of
from tasks.storage import join, normalise, open_storage

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("pixelmill.weights")

TORCHVISION_LICENCE = "BSD-3-Clause (torchvision); the terms of the training images are their own"
FILE_SUFFIXES = (".pth", ".pt", ".safetensors")

# The first layer in files of torchvision's classifiers; where they are a backbone, something stands before its name.
_CLASSIFIERS_FIRST = frozenset({"conv1.weight", "features.0.0.weight"})


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    state: "dict[str, Tensor] | None"  # None: random weights
    labels: tuple[str, ...] | None  # by output index of these weights; None: nobody knows
    input: ResizeRule  # for the new model
    source: str  # for the card
    licence: str  # of the weights, for the card; "" where nobody knows
    latent_size: int = 0  # of the latent vectors of a model of the store; 0: it has none, or nobody knows


def starting_state(
    weights: str | None, architecture: str, mode: Mode, store: str, image_size: int | None = None
) -> Start:
    """What `--weights` stands for.

    weights: imagenet or coco (torchvision's best entry for the architecture), another entry by its name, none, a file
    (.pth, .pt or .safetensors; local or s3://), or a model of the store with the same architecture; None is none for
    scratch, and else the data that the architecture was trained on. Where the backbone is a classifier of the
    catalogue, imagenet, the entries, files and models of that one are possible too: all behind it is then new.
    image_size: see catalog.input_rule.

    Raises UsageError for what cannot be, and ModelError when a download fails or a model of the store is damaged.
    """
    entry = catalog.entry(architecture)
    if mode == "scratch" and weights not in (None, "none"):
        raise UsageError(
            f"--mode scratch starts from random weights, so --weights {weights} has no place: "
            "leave it out, or use --mode finetune"
        )
    if weights is None:
        weights = "none" if mode == "scratch" else (entry.data or "none")
    usual = pretrained(entry.builder, entry.weights) if entry.weights else None
    known = usual.others if usual else ()
    name = entry.weights_named(weights)
    if name in known:
        trained = pretrained(entry.builder, name)
        rule = catalog.input_rule(architecture, trained, image_size)
        state = as_built(entry, load_pretrained(trained, entry.builder))
        return Start(state, trained.labels, rule, f"torchvision:{architecture} {name}", TORCHVISION_LICENCE)
    if entry.backbone and (of_backbone := _entry_of_backbone(entry.backbone, weights)):
        loaded = load_pretrained(of_backbone, catalog.entry(entry.backbone).builder)
        state = entry.family_module().backbone_state(loaded)
        rule = catalog.input_rule(architecture, usual, image_size)
        source = f"{architecture} on torchvision:{entry.backbone} {of_backbone.name}"
        return Start(state, None, rule, source, TORCHVISION_LICENCE)
    if weights == "none":
        if mode == "features" and entry.task == Task.GENERATE:
            raise UsageError(
                f"--mode features freezes what a discriminator has learned, and a new {architecture} has learned "
                "nothing: add --weights MODEL, or leave out --mode"
            )
        if mode == "features":
            logger.warning("the backbone is frozen at random weights: the head learns from noise")
        return Start(None, None, catalog.input_rule(architecture, usual, image_size), f"{architecture} untrained", "")
    if weights.endswith(FILE_SUFFIXES):
        rule = catalog.input_rule(architecture, usual, image_size)
        return Start(as_built(entry, load_uri(weights)), None, rule, f"{architecture} {weights.rpartition('/')[2]}", "")
    card = _model(weights, architecture, known, store)
    if card.architecture == entry.backbone:
        state = entry.family_module().backbone_state(load_model(store, card))
        rule = catalog.input_rule(architecture, usual, image_size)
        return Start(state, None, rule, f"{architecture} on {card.reference}", card.licence)
    rule = catalog.input_rule(architecture, usual, image_size, card.input)
    if (entry.sizes or entry.has_latent_size) and rule != card.input:
        raise UsageError(
            f"{card.reference} is built for images of {card.input.height} pixels, and --image-size {image_size} asks "
            "for others: leave it out, or start without --weights"
        )
    return Start(load_model(store, card), card.labels, rule, card.reference, card.licence, card.latent_size)


def _entry_of_backbone(classifier: str, name: str) -> Pretrained | None:
    """The torchvision entry of a classifier that `--weights` names, if it names one."""
    entry = catalog.entry(classifier)
    if entry.weights is None:
        return None
    known = pretrained(entry.builder, entry.weights).others
    name = entry.weights_named(name)
    return pretrained(entry.builder, name) if name in known else None


def _model(reference: str, architecture: str, entries: tuple[str, ...], store: str) -> Card:
    """The model of the store that `--weights` names. Raises UsageError that lists what could have been meant."""
    entry = catalog.entry(architecture)
    possible = [entry.data, "none", *entries]
    if entry.backbone:
        of_backbone = catalog.entry(entry.backbone)
        possible.insert(1, of_backbone.data)
        if of_backbone.weights:
            possible += pretrained(of_backbone.builder, of_backbone.weights).others
    try:
        card = registry.resolve(store, reference)
    except UsageError as error:
        known = ", ".join(dict.fromkeys(name for name in possible if name))
        raise UsageError(
            f"--weights {reference} is nothing that {architecture} can start from: expected {known}, a weights file "
            f"({', '.join(FILE_SUFFIXES)}) or a model of the store ({error})"
        ) from None
    if card.architecture not in (architecture, entry.backbone):
        fitting = f", or those of a {entry.backbone}" if entry.backbone else ""
        raise UsageError(
            f"--weights {reference} is a {card.architecture}, whose weights do not fit {architecture}: "
            f"use --model {card.architecture}, or other weights{fitting}"
        )
    return card


def as_built(entry: catalog.Entry, state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """What a file holds, in the names and the arithmetic of the network as its family builds it.

    Where the backbone is a classifier of the catalogue, that one's file is possible too.
    """
    family = entry.family_module()
    if entry.backbone and not _CLASSIFIERS_FIRST.isdisjoint(state):
        return family.backbone_state(state)
    convert = getattr(family, "published_state", None)
    return convert(state) if convert else state


def load_pretrained(weights: Pretrained, builder: str) -> "dict[str, Tensor]":
    """The state dict of a torchvision entry, through torchvision's own loader and cache folder.

    Raises ModelError that says where the file can be put by hand when the download fails.
    """
    import torch
    from torchvision.models import get_model_weights

    cached = Path(torch.hub.get_dir(), "checkpoints", weights.file_name)
    if not cached.exists():
        logger.info("downloading %s (%.0f MB) to %s", weights.url, weights.megabytes, cached)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what is logged above
                get_model_weights(builder)[weights.name].get_state_dict(
                    progress=False, check_hash=True, map_location="cpu", weights_only=True
                )
        except Exception as error:  # URLError, HTTPError, OSError, or RuntimeError for a wrong hash
            raise ModelError(
                f"cannot download {weights.url} ({one_line(error)}): fetch it on another machine and put it into "
                f"{cached.parent} as {cached.name}, or pass it with --weights FILE"
            ) from None
    return load_file(cached)


def load_model(store: str, card: Card) -> "dict[str, Tensor]":
    """The state dict of a model of the store; of a less exact variant, that of its version.

    Raises ModelError if it has none, because it was adopted as an ONNX file, or not the one that the card describes.
    """
    uri = join(registry.version_folder(store, card), WEIGHTS_FILE)
    try:
        with open_storage(uri).fetch(uri) as path:
            if sha256_of(path) != card.weights_sha256:
                raise ModelError(f"{uri} is not the file that its card describes: its SHA-256 differs")
            return load_file(path)
    except FileNotFoundError:
        raise ModelError(
            f"{card.reference} has no {WEIGHTS_FILE}: a model that came as an ONNX file can predict, but not learn"
        ) from None


def load_uri(uri: str) -> "dict[str, Tensor]":
    """`load_file` of a file that may lie in a bucket."""
    if not uri.startswith("s3://"):
        return load_file(Path(uri).expanduser())
    try:
        with open_storage(uri).fetch(normalise(uri)) as path:
            return load_file(path)
    except FileNotFoundError:
        raise UsageError(f"expected a weights file, got {uri}: no such file") from None


def load_file(path: Path) -> "dict[str, Tensor]":
    """The state dict of a .pth, .pt or .safetensors file; a hash in its name, as torchvision's have, is checked.

    Raises UsageError for a file that is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UsageError(
            f"expected default, none, the name of a torchvision entry or a weights file, got {path}: no such file"
        )
    stated = re.search(r"-([0-9a-f]{8,64})\.(pth|pt|safetensors)$", path.name)
    if stated and not sha256_of(path).startswith(stated.group(1)):
        raise UsageError(
            f"{path} is damaged: its SHA-256 does not start with {stated.group(1)}, as its name says; delete it"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors

            state: Any = load_safetensors(path)
        else:
            import torch

            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} is no weights file that can be read safely: {one_line(error)}") from None
    for key in ("model", "state_dict"):  # training scripts save more than the weights
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(hasattr(value, "shape") for value in state.values()):
        raise UsageError(f"{path} holds no state dict: expected names of parameters with their tensors")
    return state


def apply_start(
    network: Any, start: Start, parts: Parts, ignored_prefixes: tuple[str, ...], labels: Sequence[str], what: str
) -> bool:
    """Loads the weights to start from into a network that is to tell `labels` apart; True if its head stays as new.

    The head is taken over only from weights that answer the very same labels, or, where nobody knows what they answer,
    as many; the neck from those that have one. Everything else must fit completely: raises UsageError that names what
    does not.
    """
    if start.state is None:
        return True
    state = start.state
    own = network.state_dict()
    of_heads = [name for name in own if name.startswith(tuple(f"{module}." for module in parts.head))]
    answering = [name for name in of_heads if not name.startswith(ignored_prefixes)]
    fits = all(name in state and state[name].shape == own[name].shape for name in answering)
    is_new = not fits or (start.labels is not None and start.labels != tuple(labels))
    if is_new:
        state = {name: value for name, value in state.items() if name not in of_heads}
        state |= {name: own[name] for name in of_heads}
    of_neck = [name for name in own if name.startswith(tuple(f"{module}." for module in parts.neck))]
    if not any(name in state for name in of_neck):
        state = state | {name: own[name] for name in of_neck}
    apply_state(network, state, ignored_prefixes, what)
    return is_new


def apply_state(network: Any, state: "dict[str, Tensor]", ignored_prefixes: tuple[str, ...], what: str) -> None:
    """Loads a state dict that must fit completely. Raises UsageError that names what does not.

    Parameters of auxiliary parts, whose names start with `ignored_prefixes`, may be missing on either side.
    """
    own = network.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.startswith(ignored_prefixes)}
    absent = [name for name in own if name not in state and not name.startswith(ignored_prefixes)]
    missing = [name for name in absent if not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own and not name.endswith("num_batches_tracked")]
    unequal = [name for name, value in state.items() if name in own and value.shape != own[name].shape]
    problems = [
        f"{len(names)} {kind} (first: {names[0]})"
        for kind, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if unequal:
        name = unequal[0]
        problems.append(
            f"{len(unequal)} of another shape "
            f"(first: {name}, expected {list(own[name].shape)}, got {list(state[name].shape)})"
        )
    if problems:
        raise UsageError(f"the weights do not fit {what}: parameters {', '.join(problems)}")
    network.load_state_dict(state, strict=False)
