"""data.yaml of a YOLO data set: the names of the classes and where the images of each split are.

All of it is taken as text: nothing is executed, downloaded or built of it, and `no` is a class called no. A path in it
may be wrong in the ways in which exported ones usually are: too many leading "..", or a `path` from another machine. It
is looked for in the source, and never outside.
"""

import posixpath
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from models.errors import UsageError
from tasks.datasets.folder import SPLIT_FOLDERS
from tasks.datasets.label_files import decode_text, is_text, peek
from tasks.datasets.tree import Tree

YAML_EXTENSIONS = (".yaml", ".yml")
MOST_CLASSES = 100_000

_USUAL = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_SPLITS = ("train", "val", "test")
_NOTHING = ("", "null", "~")
_KEYS = re.compile(rb"^(names|nc)\s*:", re.M), re.compile(rb"^(train|val|valid|test|path|nc)\s*:", re.M)
_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:/|[A-Za-z][A-Za-z0-9+.-]*://")


class _TextLoader(yaml.BaseLoader):
    """Builds text, lists and mappings only; BaseLoader itself would take any tag for text without a word."""


def _build(loader: Any, node: Any) -> Any:
    if node.tag.removeprefix("tag:yaml.org,2002:") not in ("str", "int", "float", "bool", "null", "seq", "map"):
        raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} is not read here", node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    return loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else loader.construct_mapping(node)


_TextLoader.add_constructor(None, _build)  # type: ignore[type-var] # None: for every tag


@dataclass(frozen=True)
class Description:
    """What a data.yaml says."""

    uri: str
    folders: tuple[str, ...]  # of the tree; its paths count from the first of them that has what they name
    names: dict[int, str] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)
    has_key_points: bool = False

    def inside(self, tree: Tree, written: str) -> str | None:
        """A path as it is written, relative; None for an absolute one that does not lead into the tree."""
        for root in (tree.name, tree.root):
            if written.startswith(root.rstrip("/") + "/"):
                return written.removeprefix(root.rstrip("/") + "/")
        return None if _ABSOLUTE.match(written) else written

    def find(self, tree: Tree, split: str, entry: str) -> str | None:
        """The folder or file of the tree that an entry names; None for a test split that is not there.

        Raises UsageError for any other that is not there, or is outside the source.
        """
        written = entry.replace("\\", "/")
        inside = self.inside(tree, written)
        if inside is None:
            raise UsageError(
                f"{self.uri}: {split}: {entry!r} leads out of the source {tree.name}: "
                "write it relative to the folder of this file"
            )
        candidates = [posixpath.normpath(posixpath.join(folder, inside)) for folder in self.folders]
        shorter = re.sub(r"^(\./|\.\./)+", "", inside)
        candidates += [posixpath.normpath(posixpath.join(folder, shorter)) for folder in self.folders]
        for path in candidates:
            folder = "" if path == "." else path
            if folder in tree.files or any(other.startswith(f"{folder}/") or not folder for other in tree.files):
                return folder
        if split == "test":
            return None
        where = (
            "leads out of"
            if all(path.split("/")[0] == ".." for path in candidates[: len(self.folders)])
            else "is not in"
        )
        raise UsageError(
            f"{self.uri}: {split}: {entry!r} {where} the source {tree.name}: "
            "write it relative to the folder of this file"
        )


def find_description(tree: Tree, files: Tree, *, strict: bool) -> Description | None:
    """The data.yaml of `files`, the one with the most usual name and nearest to the root; None where there is none.

    `strict`: raises UsageError for one that cannot be used; else the beginning is enough to say that there is one.
    """
    paths = [path for path in files.files if path.lower().endswith(YAML_EXTENSIONS)]
    paths.sort(key=lambda path: (posixpath.basename(path).lower() not in _USUAL, path.count("/"), path))
    named = files is not tree and len(files.files) == 1
    for path in paths[:16]:
        start = peek(files, path).replace(b"\0", b"").removeprefix(b"\xef\xbb\xbf").removeprefix(b"\xff\xfe")
        usual = posixpath.basename(path).lower() in _USUAL
        if not strict and all(keys.search(start) for keys in _KEYS):
            return Description(files.uri(path), ())
        if strict and (named or usual or all(keys.search(start) for keys in _KEYS)):
            return _read(tree, files, path)
    return None


def _read(tree: Tree, files: Tree, path: str) -> Description:
    uri = files.uri(path)
    content = _load(files, path, uri)
    inside = tree.name.rstrip("/") + "/"
    own = posixpath.dirname(path)
    if files is not tree:
        own = posixpath.join(files.name.removeprefix(inside), own) if files.name.startswith(inside) else ""
    folders = [own.rstrip("/"), ""]
    root = _text(content.get("path"), uri, "path").replace("\\", "/")
    if root and not _ABSOLUTE.match(root):
        folders.insert(0, posixpath.normpath(posixpath.join(own, root)))
    splits: dict[str, list[str]] = {}
    for key, split in SPLIT_FOLDERS.items():
        entries = content.get(key)
        for entry in entries if isinstance(entries, list) else [entries]:
            text = _text(entry, uri, key)
            if text:
                splits.setdefault(split, []).append(text)
    ordered = {split: splits[split] for split in _SPLITS if split in splits}
    return Description(uri, tuple(dict.fromkeys(folders)), _names(content, uri), ordered, "kpt_shape" in content)


def _load(files: Tree, path: str, uri: str) -> dict[str, Any]:
    try:
        content = yaml.load(decode_text(files.read(path)), _TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{uri}{where}: expected YAML with names and train: {' '.join(problem.split())}") from None
    except RecursionError:
        raise UsageError(f"{uri}: expected YAML with names and train, but it is nested too deep to be that") from None
    except FileNotFoundError:
        raise UsageError(f"{uri} has gone since it was listed: try again") from None
    except ValueError:
        raise UsageError(f"{uri}: expected YAML with names and train, but it is no text in UTF-8") from None
    if not isinstance(content, dict):
        raise UsageError(f"{uri}: expected YAML with the keys names and train, got a {type(content).__name__}")
    return content


def _text(value: Any, uri: str, key: str) -> str:
    if value is None or value in _NOTHING:
        return ""
    if not is_text(value):
        got = ascii(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"
        raise UsageError(f"{uri}: {key}: expected a path or a list of paths, got {got}")
    return str(value)


def _names(content: dict[str, Any], uri: str) -> dict[int, str]:
    """Class names by index; {} where none are given."""
    names = content.get("names", "")
    named: dict[int, str] = {}
    if isinstance(names, dict):
        for key, name in names.items():
            if not re.fullmatch(r"[0-9]{1,6}", str(key)):
                raise UsageError(f"{uri}: names: expected whole numbers as keys, got {str(key)[:40]!a}")
            named[int(key)] = name
    elif isinstance(names, list):
        named = dict(enumerate(names))
    elif names not in _NOTHING:
        raise UsageError(f"{uri}: names: expected a list, or a mapping of numbers to names, got {names[:40]!a}")
    for index, name in named.items():
        if not is_text(name) or not name.strip():
            raise UsageError(f"{uri}: names: class {index} has no name")
    count = content.get("nc", "")
    if count in _NOTHING:
        return {index: name.strip() for index, name in named.items()}
    if not isinstance(count, str) or not re.fullmatch(r"[0-9]{1,6}", count) or int(count) > MOST_CLASSES:
        shown = ascii(count[:40]) if isinstance(count, str) else f"a {type(count).__name__}"
        raise UsageError(f"{uri}: nc: expected the number of classes, at most {MOST_CLASSES}, got {shown}")
    if named and len(named) != int(count):
        raise UsageError(f"{uri}: nc is {count}, but names has {len(named)}: correct the one that is wrong")
    return {index: name.strip() for index, name in named.items()} or {n: str(n) for n in range(int(count))}
