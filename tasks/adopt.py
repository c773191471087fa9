"""Adopts models that were trained elsewhere: torchvision's pretrained networks, and foreign ONNX files."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import catalog
from models.card import ONNX_FILE, WEIGHTS_FILE, Card
from models.errors import ModelError, UsageError
from models.imaging.geometry import ResizeRule
from models.records import Task
from tasks import registry
from tasks.photographs import prepared_photographs
from tasks.storage import normalise, open_storage

logger = logging.getLogger("pixelmill.adopt")

TORCHVISION = "torchvision:"

_OPTIONAL = ("architecture", "score", "score_floor", "latent_size", "licence")  # of a card that a user wrote


def import_model(
    source: str,
    name: str,
    store: str,
    *,
    card_file: str | None = None,
    weights: str = "default",
    parity_images: str | None = None,
) -> Card:
    """Publishes a model as NAME and returns its card; importing the same twice writes nothing.

    source: `torchvision:ARCHITECTURE`, with weights `default`, `none` (random), the name of a torchvision entry, or a
    file; or an ONNX file that keeps the contract, with its `card_file`. parity_images: a folder of images to check the
    export on. Raises UsageError, ModelError or ParityError; then nothing is published.
    """
    registry.check_name(name)
    images = Path(parity_images) if parity_images else None
    if source.startswith(TORCHVISION):
        if card_file is not None:
            raise UsageError("--card belongs to an ONNX file; a torchvision model brings its own")
        with _torch_installed():
            return _import_torchvision(source.removeprefix(TORCHVISION), name, store, weights, images)
    if not source.endswith(".onnx"):
        raise UsageError(f"expected torchvision:NAME or the path of an .onnx file, got {source!r}")
    if weights != "default":
        raise UsageError("--weights belongs to torchvision models; an ONNX file contains its own")
    if card_file is None:
        raise UsageError(f"{source} needs --card FILE: a JSON object with task, labels and input (see the README)")
    return _import_onnx(source, name, store, card_file, images)


def _import_torchvision(architecture: str, name: str, store: str, weights: str, images: Path | None) -> Card:
    from safetensors.torch import save_file

    from models.nets.pretrained import pretrained
    from models.nets.untrained import build_untrained
    from models.runtime.export import export_onnx
    from models.runtime.parity import MIN_IMAGES, check_parity
    from tasks.weights import FILE_SUFFIXES, TORCHVISION_LICENCE, apply_state, as_built, load_file, load_pretrained

    entry = catalog.entry(architecture)
    if entry.weights is None:
        raise UsageError(
            f"torchvision has no trained {architecture}: train one, pixelmill train DATASET --model {architecture}"
        )
    family = entry.family_module()
    from_file = weights.endswith(FILE_SUFFIXES)
    # Files and random weights answer with the labels and the resizing of the default entry.
    entry_name = (
        (entry.weights or "none") if weights in ("default", "none") or from_file else entry.weights_named(weights)
    )
    trained = pretrained(entry.builder, entry_name)
    rule = catalog.input_rule(architecture, trained)

    logger.info("building %s", architecture)
    network = build_untrained(lambda: entry.build(len(trained.labels), rule.height))
    card = Card(name, "", entry.task, architecture, trained.labels, rule, score_floor=entry.score_floor)
    photographs, photograph_names = prepared_photographs(rule, MIN_IMAGES, images)
    if weights == "none":
        family.wake(network, card, photographs)
        card = replace(card, source=f"{TORCHVISION}{architecture} untrained")
    elif from_file:
        apply_state(network, as_built(entry, load_file(Path(weights))), family.IGNORED_PREFIXES, architecture)
        card = replace(card, source=f"{TORCHVISION}{architecture} {Path(weights).name}")
    else:
        state = as_built(entry, load_pretrained(trained, entry.builder))
        apply_state(network, state, family.IGNORED_PREFIXES, architecture)
        card = replace(card, source=f"{TORCHVISION}{architecture} {trained.name}", licence=TORCHVISION_LICENCE)

    with tempfile.TemporaryDirectory(prefix="pixelmill-") as folder:
        weights_path, onnx_path = Path(folder, WEIGHTS_FILE), Path(folder, ONNX_FILE)
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, weights_path)
        card = replace(card, weights_sha256=registry.sha256_of(weights_path)).with_version()
        if (existing := registry.find_version(store, name, card.version)) is not None:
            logger.info("%s is already in the store", existing.reference)
            return existing
        logger.info("exporting %s", card.reference)
        export_onnx(family.graph(network, card), card, onnx_path, photographs[:2])
        logger.info("comparing the export with PyTorch")
        parity = check_parity(network, family, card, onnx_path, photographs)
        card = replace(card, parity={"images": photograph_names, **parity})
        return registry.publish(store, card, {WEIGHTS_FILE: weights_path, ONNX_FILE: onnx_path})


def _import_onnx(source: str, name: str, store: str, card_file: str, images: Path | None) -> Card:
    from models.runtime.export import embed_card
    from models.runtime.parity import MIN_IMAGES, check_invariance, parity_latents

    uri, card_uri = normalise(source), normalise(card_file)
    try:
        card = foreign_card(open_storage(card_uri).read(card_uri), card_uri, name)
    except FileNotFoundError:
        raise UsageError(f"no card file {card_uri}") from None
    with tempfile.TemporaryDirectory(prefix="pixelmill-") as folder:
        try:
            with open_storage(uri).fetch(uri) as foreign:
                card = replace(card, weights_sha256=registry.sha256_of(foreign)).with_version()
                if (existing := registry.find_version(store, name, card.version)) is not None:
                    return existing
                onnx_path = Path(folder, ONNX_FILE)
                embed_card(foreign, card, onnx_path)
        except FileNotFoundError:
            raise UsageError(f"no ONNX file {uri}") from None
        if card.task is Task.GENERATE:
            latents = parity_latents(card)
            record = {"latents": len(latents), **check_invariance(card, onnx_path, latents)}
        else:
            photographs, photograph_names = prepared_photographs(card.input, MIN_IMAGES, images)
            record = {"images": photograph_names, **check_invariance(card, onnx_path, photographs)}
        card = replace(card, parity=record)
        return registry.publish(store, card, {ONNX_FILE: onnx_path})


def foreign_card(data: bytes, uri: str, name: str) -> Card:
    """The card that a user wrote for a foreign file. Raises UsageError that says what it lacks."""
    expected = (
        f"{uri}: expected a JSON object with task ({' or '.join(Task)}), labels (a list of names, by output index) "
        'and input (e.g. {"mode": "crop", "height": 224, "width": 224, "short_side": 256})'
    )
    try:
        raw: dict[str, Any] = json.loads(data)
        known = {key: raw[key] for key in _OPTIONAL if key in raw}
        rule = {"pad_rgb": (0, 0, 0), **raw["input"]}
        card = Card(
            name=name,
            version="",
            task=Task(raw["task"]),
            labels=tuple(raw["labels"]),
            input=ResizeRule(**{**rule, "pad_rgb": tuple(rule["pad_rgb"])}),
            source=uri,
            **{"architecture": "foreign", **known},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{expected}; got {type(error).__name__}: {error}") from None
    needs_labels = card.task not in (Task.GENERATE, Task.TRANSLATE, Task.EMBED)
    if (needs_labels and not card.labels) or not all(isinstance(label, str) for label in card.labels):
        raise UsageError(f"{expected}; labels must be texts, at least one")
    takes_latents = card.task is Task.GENERATE
    if not isinstance(card.latent_size, int) or (card.latent_size > 0) != takes_latents:
        needed = "at least 1, the length of its latent vectors" if takes_latents else "left out: it takes images"
        raise UsageError(f"{expected}; latent_size of a model of task {card.task} must be {needed}")
    return card


@contextmanager
def _torch_installed() -> Iterator[None]:
    """Turns a missing package of the `train` extra into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModelError(f"importing from torchvision needs {error.name}: pip install 'pixelmill[train]'") from None
