"""The class list of masks: which value or colour of a pixel is which class.

nucleus                    names, a line each; the first belongs to the value 0 (see `masks` for the exception)
name,value                 a table, with or without a header; separated by commas, semicolons or tabs
name,r,g,b    r g b name   colours, as CamVid's two forms
name:r,g,b::               colours, as CVAT writes them
"""

import posixpath
import re
from dataclasses import dataclass

from models.errors import UsageError
from tasks.datasets.label_files import decode_text
from tasks.datasets.tree import Tree

_USUAL = (
    "classes.txt", "classes.csv", "class_dict.csv", "class_names.txt", "label_colors.txt", "labelmap.txt",
    "labels.txt", "labels.csv", "colormap.csv",
)  # fmt: skip
_SEPARATOR = re.compile(r"\s*[,;\t]\s*")
_CVAT = re.compile(r"(.+?):(\d+),(\d+),(\d+):[^:]*:[^:]*")
_COLOUR_FIRST = re.compile(r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+(.*\D.*)")


@dataclass(frozen=True)
class ClassList:
    """Names by value, and by colour (r·65536 + g·256 + b) where the list has colours."""

    uri: str
    by_value: dict[int, str]
    by_colour: dict[int, str]
    values_stated: bool  # False: they are the lines' numbers, from 0


def find_class_list(files: Tree, *, named: bool) -> ClassList | None:
    """The list with a usual name, nearest to the root; `named`: the only file, whatever its name. None: there is none.

    Raises UsageError, with the line, for one that cannot be read.
    """
    paths = [path for path in files.files if named or posixpath.basename(path).lower() in _USUAL]
    paths.sort(key=lambda path: (path.count("/"), _rank(path), path))
    if not paths:
        return None
    uri = files.uri(paths[0])
    try:
        text = decode_text(files.read(paths[0]))
    except (ValueError, FileNotFoundError):
        raise UsageError(f"{uri}: expected a list of classes in UTF-8, a line each, but it is no text") from None
    return parse(text, uri)


def parse(text: str, uri: str) -> ClassList:
    """The list that a file holds. Raises UsageError that names the line."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    entries = [(number, *_entry(line)) for number, line in lines]
    if len(entries) > 1 and entries[0][2] is None and all(key is not None for _, _, key in entries[1:]):
        entries = entries[1:]  # a header
    if not entries:
        raise UsageError(f"{uri}: expected a list of classes, a line each, but it is empty")
    names: dict[tuple[int, ...] | None, str] = {}
    kind = _kind(entries[0][2])
    for number, name, key in entries:
        if _kind(key) != kind or not name or (key and max(key) > (65535 if kind == 1 else 255)):
            expected = ("a name", "a name and a value", "", "a name and r, g, b from 0 to 255")[kind]
            raise UsageError(f"{uri}, line {number}: expected {expected}, got {dict(lines)[number][:60]!r}")
        if key in names and key is not None:
            raise UsageError(
                f"{uri}, line {number}: {name!r} has the same {'value' if kind == 1 else 'colour'} as another"
            )
        names[key if key is not None else (number, -1)] = name
    in_order = dict(enumerate(names.values()))
    if kind == 1:
        return ClassList(uri, {key[0]: name for key, name in names.items() if key}, {}, True)
    if kind == 3:
        colours = {key[0] << 16 | key[1] << 8 | key[2]: name for key, name in names.items() if key}
        return ClassList(uri, in_order, colours, False)
    return ClassList(uri, in_order, {}, False)


def _entry(line: str) -> tuple[str, tuple[int, ...] | None]:
    """A name, and the value or colour beside it."""
    if cvat := _CVAT.fullmatch(line):
        return cvat[1].strip(), _whole(cvat.groups()[1:])
    if first := _COLOUR_FIRST.fullmatch(line):
        return first[4].strip(), _whole(first.groups()[:3])
    fields = _SEPARATOR.split(line)
    if len(fields) in (2, 4) and all(re.fullmatch(r"[0-9]{1,9}", field) for field in fields[1:]):
        return fields[0], _whole(fields[1:])
    if len(fields) == 2 and re.fullmatch(r"[0-9]{1,9}", fields[0]):
        return fields[1], _whole(fields[:1])
    return line, None


def _whole(fields: list[str] | tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(field[:9]) for field in fields)


def _kind(key: tuple[int, ...] | None) -> int:
    return 0 if key is None else len(key)


def _rank(path: str) -> int:
    name = posixpath.basename(path).lower()
    return _USUAL.index(name) if name in _USUAL else 0
