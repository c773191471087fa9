"""One file of COCO's: an object that holds the arrays images, annotations and categories."""

import json
import re
from collections.abc import Iterator
from typing import Any

from models.errors import UsageError
from tasks.datasets.label_files import is_text, stem_of
from tasks.datasets.tree import Tree

_OTHER_USE = re.compile(r"(captions|panoptic|stuff|image_info|person_keypoints|keypoints)_|.*\bpackage(-lock)?$")
_USUAL = re.compile(r"instances|coco|annotations?|labels?|train|val|test")


class Malformed(Exception):
    """A part of a file that costs one row: the reason, and the detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def json_paths(files: Tree) -> list[str]:
    """Files that may hold instances, those with a usual name first."""
    paths = [path for path in files.files if path.lower().endswith(".json")]
    if len(paths) > 1:
        paths = [path for path in paths if not _OTHER_USE.match(stem_of(path).lower())] or paths
    return sorted(paths, key=lambda path: (not has_usual_name(path), path))


def has_usual_name(path: str) -> bool:
    """Whether a JSON file is called as COCO's are."""
    return bool(_USUAL.search(stem_of(path).lower()))


def load(files: Tree, path: str) -> dict[str, Any]:
    """The object, with its three arrays. Raises UsageError that names the file."""
    uri = files.uri(path)
    expected = "expected COCO's JSON, an object with the arrays images, annotations and categories"
    try:
        document = json.loads(files.read(path))
    except FileNotFoundError:
        raise UsageError(f"{uri} has gone since it was listed: try again") from None
    except RecursionError:
        raise UsageError(f"{uri}: {expected}, but it is nested too deep to be that") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{uri}: {expected}, but line {error.lineno} is no JSON: {error.msg}") from None
    except ValueError as error:  # bytes that are no text, or a number of thousands of digits
        raise UsageError(f"{uri}: {expected}, but it cannot be read: {str(error).split(';')[0]}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{uri}: {expected}, got {short(document)}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            got = short(document[key]) if key in document else "no such key"
            raise UsageError(f"{uri}: {expected}, got for {key} {got}")
    return document


def labels_of(document: dict[str, Any], source: str) -> dict[str, str]:
    """Class by category id, in the order of the ids. Raises UsageError that names the category."""
    names: dict[str, str] = {}
    order: list[tuple[Any, ...]] = []
    for number, category in enumerate(document["categories"], 1):
        try:
            if not isinstance(category, dict):
                raise Malformed(f"expected an object, got {short(category)}")
            key = id_of(category.get("id"), "the id")
            name = category.get("name")
            if not is_text(name) or not name.strip():
                raise Malformed(f"the name is {short(name)}")
        except Malformed as error:
            said = f"{error.reason} {error.detail}".strip()
            raise UsageError(f"{source}: category {number} needs an id and a name: {said}") from None
        if names.setdefault(key, name.strip()) != name.strip():
            both = f"both {names[key]!r} and {name.strip()!r}"
            raise UsageError(f"{source}: the category id {short(category['id'])} is {both}: give each its own id")
        order.append((0, int(key), "") if re.fullmatch(r"-?[0-9]{1,18}", key) else (1, 0, key))
    ordered = sorted(zip(order, map(_key_of, document["categories"]), strict=True))
    return {key: names[key] for _, key in ordered}


def _key_of(category: dict[str, Any]) -> str:
    return id_of(category["id"], "")


def id_of(value: Any, reason: str) -> str:
    """Text for an id: 7, 7.0 as some tables write it, and "7" are the same. Raises Malformed with the reason."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise Malformed(reason, f"expected a number or text, got {short(value)}")
    try:
        return str(value)
    except ValueError:  # thousands of digits
        raise Malformed(reason, "a number of thousands of digits") from None


def short(value: Any) -> str:
    """The value as JSON, its beginning only; nothing large is written out for it."""
    shown = ""
    try:
        for piece in _pieces(value):
            shown += piece
            if len(shown) > 60:
                shown = f"{shown[:60]}…"
                break
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return shown.encode(errors="backslashreplace").decode()


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield json.dumps(value[:80], ensure_ascii=False)
    else:
        yield from json.JSONEncoder(ensure_ascii=False).iterencode(value)
