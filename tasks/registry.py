"""Models in the store: publish, resolve, list and fetch. The card is written last; it is the commit of its files.

models/NAME/VERSION/card.json       the version: model.onnx, weights.safetensors
models/NAME/VERSION/card.int8.json  a less exact export of it, the variant NAME@VERSION.int8: model.int8.onnx
models/NAME/VERSION/card.fp32.json  the exact export, where it was made after the version; it then speaks for it
models/NAME/aliases.json            e.g. {"production": "VERSION.int8"}
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path
from typing import cast

from models.card import CARD_FILE, Card, card_file
from models.errors import ModelError, NotFound, StorageError, UsageError
from models.settings.fields import Precision
from tasks.storage import join, local_path, normalise, open_storage

logger = logging.getLogger("pixelmill.registry")

ALIASES_FILE = "aliases.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"[0-9a-f]{12}")
_WHICH = re.compile(r"(?P<which>.*?)(?:\.(?P<precision>fp32|fp16|int8))?")  # what stands after NAME@
_VARIANTS: tuple[Precision, ...] = ("fp16", "int8")


def check_name(name: str) -> str:
    """The name, if it can be a model's. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"a model's name is letters, digits, '_', '-' and '.', with a letter or digit first, got {name!r}"
        )
    return name


def publish(store: str, card: Card, files: Mapping[str, Path], *, quietly: bool = False) -> Card:
    """Puts a version, or an export of one, into the store and returns its card as it stands there.

    `files`: local files by the name they get. Writes nothing if it is there already. An export that comes after its
    version gets a card of its own, because no card is ever changed. Raises StorageError if an unfinished attempt left
    other files there.
    """
    store = normalise(store)
    check_name(card.name)
    existing = find_version(store, card.name, card.version)
    if existing is not None and (existing.is_exported or card.onnx_file not in files):
        return existing
    storage = open_storage(store)
    folder = version_folder(store, card)
    facts = {name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for name, path in files.items()}
    is_first = existing is None and not card.is_variant
    for name, path in files.items():
        if not storage.put_file_if_absent(join(folder, name), path):
            raise StorageError(
                f"{join(folder, name)} is left from an import or export that did not finish, and differs: "
                f"delete {folder if is_first else 'it'} and try again"
            )
    facts = (existing.files if existing is not None else {}) | facts
    card = replace(card, files=facts, created_at=datetime.now(UTC).isoformat(timespec="microseconds"))
    uri = join(folder, CARD_FILE if is_first else card_file(card.precision))
    if not storage.put_if_absent(uri, card.to_json().encode()):  # another process was first with the same version
        return _read_card(uri)
    for name in files.keys() - set(storage.names(folder)):  # it lay there from an earlier attempt, and was just removed
        storage.put_file_if_absent(join(folder, name), files[name])
    if not quietly:
        logger.info("published %s", card.reference)
    return card


def resolve(store: str, reference: str) -> Card:
    """The card for NAME (newest version), NAME@VERSION or NAME@ALIAS, the last two also with .int8 or .fp16.

    NAME alone is never a less exact variant. Raises NotFound that lists what exists.
    """
    store = normalise(store)
    name, at, version = reference.partition("@")
    check_name(name)
    asked = _WHICH.fullmatch(version)
    assert asked is not None
    which, precision = asked["which"], asked["precision"]
    if at and _VERSION.fullmatch(which):
        card = find_version(store, name, _with_precision(which, precision))
        if card is not None:
            return card
    cards = list_models(store, name)
    if not cards:
        known = ", ".join(_model_names(store)) or "none yet: see pixelmill import"
        raise NotFound(f"no model {name!r} in {store}; models there: {known}")
    if not at:
        return next(card for card in reversed(cards) if not card.is_variant)
    alias = aliases(store, name).get(which)
    if alias is not None and (card := find_version(store, name, _with_precision(alias, precision))) is not None:
        return card
    known = ", ".join(card.version for card in cards)
    others = ", ".join(aliases(store, name)) or "none"
    base = (alias or which).partition(".")[0]
    hint = ""
    if precision and any(card.version == base for card in cards):
        hint = f"; to make it: pixelmill export {name}@{base} --precision {precision}"
    raise NotFound(f"no {reference!r} in {store}; versions of {name}: {known} (newest last); aliases: {others}{hint}")


def _with_precision(version: str, precision: str | None) -> str:
    """The version with the precision that was asked for, whatever it had."""
    if precision is None:
        return version
    base = version.partition(".")[0]
    return base if precision == "fp32" else f"{base}.{precision}"


def list_models(store: str, name: str | None = None) -> list[Card]:
    """All versions of one model or of all, by name, then from old to new, each followed by its variants."""
    store = normalise(store)
    storage = open_storage(store)
    cards = []
    for model in [name] if name is not None else _model_names(store):
        versions = [v for v in storage.names(join(store, "models", model)) if _VERSION.fullmatch(v)]
        found = [card for v in versions if (card := find_version(store, model, v)) is not None]
        for card in sorted(found, key=lambda card: (card.created_at, card.version)):
            cards += [card, *_variants(store, card)]
    return cards


def _variants(store: str, card: Card) -> Iterator[Card]:
    names = open_storage(store).names(version_folder(store, card))
    for precision in _VARIANTS:
        if card_file(precision) in names:
            yield _read_card(join(version_folder(store, card), card_file(precision)))


def find_version(store: str, name: str, version: str) -> Card | None:
    """The card of one version, or of a variant (VERSION.int8); None if it was never published, or not completely."""
    base, _, precision = version.partition(".")
    folder = join(normalise(store), "models", name, base)
    try:
        card = _read_card(join(folder, card_file(cast(Precision, precision)) if precision else CARD_FILE))
    except FileNotFoundError:
        return None
    if not card.is_exported and not precision:
        with contextlib.suppress(FileNotFoundError):
            return _read_card(join(folder, card_file("fp32")))
    return card


def version_folder(store: str, card: Card) -> str:
    """Where the files of a version and of its variants lie."""
    return join(normalise(store), "models", card.name, card.base_version)


def check_exported(card: Card) -> Card:
    """The card, if it has a graph to predict with. Raises ModelError that says how to make one."""
    if not card.is_exported:
        raise ModelError(
            f"{card.reference} has no {card.onnx_file}, it was trained without an export: "
            f"pixelmill export {card.reference}"
        )
    return card


def fetch_model(store: str, card: Card, file: str | None = None) -> Path:
    """A local file with the model's ONNX graph: the store's own, or a verified copy in the user's cache folder.

    `file`: another of its graphs, such as the decoder.

    Raises ModelError if there is no such file, or it is not the one that the card describes.
    """
    file = file or check_exported(card).onnx_file
    uri = join(version_folder(store, card), file)
    expected = card.files[file]
    if not uri.startswith("s3://"):
        path = Path(local_path(uri))
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, its card says {expected['bytes']}"
            raise ModelError(f"{uri} {found}: import the model again into another store, or restore the file")
        return path
    cached = cache_folder() / f"{expected['sha256']}.onnx"
    if cached.is_file() and sha256_of(cached) == expected["sha256"]:
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Two processes at once each rename their own complete file to the same name.
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetch-") as folder:
            whole = Path(folder, file)
            with open_storage(uri).fetch(uri) as downloaded:
                shutil.copyfile(downloaded, whole)
            if sha256_of(whole) != expected["sha256"]:
                raise ModelError(f"{uri} is not the file that its card describes: its SHA-256 differs")
            os.replace(whole, cached)
    except FileNotFoundError:
        raise ModelError(f"{uri} is missing, though its card is there") from None
    except OSError as error:
        raise StorageError(
            f"cannot cache the model in {cached.parent}: {error.strerror}; set XDG_CACHE_HOME to another folder"
        ) from None
    return cached


def cache_folder() -> Path:
    """Where copies of remote models are kept; the user may delete it at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pixelmill", "models")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a local file, in hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _model_names(store: str) -> list[str]:
    return [name for name in open_storage(store).names(join(store, "models")) if _NAME.fullmatch(name)]


def _read_card(uri: str) -> Card:
    data = open_storage(uri).read(uri)
    try:
        return Card.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{uri} is damaged: {type(error).__name__}: {error}") from None


def set_alias(store: str, card: Card, alias: str) -> None:
    """Lets NAME@ALIAS stand for this version or variant; of two that do so at once, the later one stays."""
    uri = join(normalise(store), "models", card.name, ALIASES_FILE)
    named = aliases(store, card.name) | {alias: card.version}
    open_storage(uri).replace(uri, json.dumps(named, indent=2, sort_keys=True).encode())


def aliases(store: str, name: str) -> dict[str, str]:
    """Alias → version, or variant."""
    uri = join(normalise(store), "models", name, ALIASES_FILE)
    try:
        return dict(json.loads(open_storage(store).read(uri)))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError) as error:
        raise ModelError(f"{uri} is damaged: {error}") from None
