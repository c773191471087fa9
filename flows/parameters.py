"""Turns settings into the flat parameters of a function: one declaration gives flags, Prefect's form and validation."""

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from models.errors import UsageError

Function = Callable[..., Any]


def flat(
    *classes: type[BaseModel], positional: str = "", note: Callable[[str, FieldInfo], Any] = lambda name, field: field
) -> Callable[[Function], Function]:
    """Decorates a function whose first arguments are one object of each class, so that it takes their fields instead.

    The result takes every field by keyword (those in `positional`, a list of names with spaces, may also stand alone),
    and what else the function takes. Names, types, constraints and defaults are in its signature and the descriptions
    in its docstring, which is where cyclopts and Prefect look. `note` says what annotates the type of each field: by
    default the field itself, so that its constraints show. A value that a class refuses raises UsageError in one line.
    """
    fields = {name: field for cls in classes for name, field in cls.model_fields.items()}

    def decorate(function: Function) -> Function:
        own = list(inspect.signature(function).parameters.values())[len(classes) :]

        @functools.wraps(function)
        def flattened(*values: Any, **given: Any) -> Any:
            given |= zip(places, values, strict=False)
            built = [
                build(cls, {name: given.pop(name) for name in cls.model_fields if name in given}) for cls in classes
            ]
            return function(*built, **given)

        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if name in positional.split()
                else inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.default,
                annotation=Annotated[field.annotation, note(name, field)],
            )
            for name, field in fields.items()
        ]
        parameters = sorted([*parameters, *own], key=lambda parameter: parameter.kind)
        places = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        set_signature(flattened, parameters)
        descriptions = {name: field.description or "" for name, field in fields.items()}
        flattened.__doc__ = _docstring(inspect.getdoc(function) or "", descriptions)
        return flattened

    return decorate


def set_signature(function: Function, parameters: list[inspect.Parameter]) -> None:
    """Gives a function that takes anything the signature that others shall see."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def build(cls: type[BaseModel], values: dict[str, Any]) -> Any:
    """An object of a settings class. Raises UsageError in one line: each wrong value, and what was expected."""
    try:
        return cls(**values)
    except ValidationError as error:
        raise UsageError("; ".join(_complaint(problem) for problem in error.errors())) from None


def _complaint(problem: Any) -> str:
    name = ".".join(map(str, problem["loc"]))
    flag = f"--{name.replace('_', '-').rstrip('-')}"  # from_ is --from, which is a word of Python
    if problem["type"] == "missing":
        return f"{flag} is missing"
    if problem["type"] == "value_error":  # in our own words, without the value: it may be a secret
        return f"{flag}: {problem['ctx']['error']}"
    return f"{flag} {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _docstring(text: str, descriptions: dict[str, str]) -> str:
    """Adds the descriptions to the docstring's own `Args:` section, or makes one."""
    lines = textwrap.indent("\n".join(f"{name}: {description}" for name, description in descriptions.items()), "    ")
    if "Args:\n" in text:
        return text.replace("Args:\n", f"Args:\n{lines}\n", 1)
    return f"{text}\n\nArgs:\n{lines}\n"
