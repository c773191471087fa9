"""Models in the store: publish, resolve, list and fetch. The card is written last; it is the commit of a version."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path

from models.card import CARD_FILE, ONNX_FILE, Card
from models.errors import ModelError, NotFound, StorageError, UsageError
from tasks.storage import join, local_path, normalise, open_storage

logger = logging.getLogger("pixelmill.registry")

ALIASES_FILE = "aliases.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"[0-9a-f]{12}")


def check_name(name: str) -> str:
    """The name, if it can be a model's. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"a model's name is letters, digits, '_', '-' and '.', with a letter or digit first, got {name!r}"
        )
    return name


def publish(store: str, card: Card, files: Mapping[str, Path]) -> Card:
    """Puts a version into the store and returns its card as it stands there; writes nothing if the version exists.

    `files`: local files by the name they get. Raises StorageError if an unfinished attempt left other files there.
    """
    store = normalise(store)
    if (existing := find_version(store, card.name, card.version)) is not None:
        return existing
    storage = open_storage(store)
    folder = join(store, "models", check_name(card.name), card.version)
    facts = {name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for name, path in files.items()}
    for name, path in files.items():
        if not storage.put_file_if_absent(join(folder, name), path):
            raise StorageError(
                f"{join(folder, name)} is left from an import that did not finish, and differs: "
                f"delete {folder} and try again"
            )
    card = replace(card, files=facts, created_at=datetime.now(UTC).isoformat(timespec="microseconds"))
    if not storage.put_if_absent(join(folder, CARD_FILE), card.to_json().encode()):
        return _read_card(store, card.name, card.version)  # another process was first with the same version
    logger.info("published %s", card.reference)
    return card


def resolve(store: str, reference: str) -> Card:
    """The card for NAME (newest version), NAME@VERSION or NAME@production. Raises NotFound that lists what exists."""
    store = normalise(store)
    name, at, version = reference.partition("@")
    check_name(name)
    if at and _VERSION.fullmatch(version):
        card = find_version(store, name, version)
        if card is not None:
            return card
    cards = list_models(store, name)
    if not cards:
        known = ", ".join(_model_names(store)) or "none yet: see pixelmill import"
        raise NotFound(f"no model {name!r} in {store}; models there: {known}")
    if not at:
        return cards[-1]
    alias = aliases(store, name).get(version)
    if alias is not None and (card := find_version(store, name, alias)) is not None:
        return card
    known = ", ".join(card.version for card in cards)
    others = ", ".join(aliases(store, name)) or "none"
    raise NotFound(f"no {reference!r} in {store}; versions of {name}: {known} (newest last); aliases: {others}")


def list_models(store: str, name: str | None = None) -> list[Card]:
    """All versions of one model or of all, by name, then from old to new."""
    store = normalise(store)
    storage = open_storage(store)
    cards = []
    for model in [name] if name is not None else _model_names(store):
        versions = [v for v in storage.names(join(store, "models", model)) if _VERSION.fullmatch(v)]
        found = [card for v in versions if (card := find_version(store, model, v)) is not None]
        cards += sorted(found, key=lambda card: (card.created_at, card.version))
    return cards


def find_version(store: str, name: str, version: str) -> Card | None:
    """The card of one version; None if it was never published, or not completely."""
    try:
        return _read_card(store, name, version)
    except FileNotFoundError:
        return None


def fetch_model(store: str, card: Card) -> Path:
    """A local file with the model's ONNX graph: the store's own, or a verified copy in the user's cache folder.

    Raises ModelError if the file is missing or is not the one that the card describes.
    """
    store = normalise(store)
    uri = join(store, "models", card.name, card.version, ONNX_FILE)
    expected = card.files[ONNX_FILE]
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
            whole = Path(folder, ONNX_FILE)
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


def _read_card(store: str, name: str, version: str) -> Card:
    uri = join(store, "models", name, version, CARD_FILE)
    data = open_storage(store).read(uri)
    try:
        return Card.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{uri} is damaged: {type(error).__name__}: {error}") from None


def aliases(store: str, name: str) -> dict[str, str]:
    """Alias → version."""
    uri = join(store, "models", name, ALIASES_FILE)
    try:
        return dict(json.loads(open_storage(store).read(uri)))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError) as error:
        raise ModelError(f"{uri} is damaged: {error}") from None
