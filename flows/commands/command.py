"""What every command shares: --store, --json, and how its outcome reaches stdout, stderr and the exit code."""

import contextlib
import functools
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import App, Parameter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.parameters import Function, flat, set_signature
from models.settings.fields import StoreSettings


@dataclass(frozen=True)
class Outcome:
    """How a command ended. Only one of `result` and `show` is called."""

    result: Callable[[], dict[str, Any]]  # what --json prints
    show: Callable[[], None]  # prints for people
    problem: str = ""  # one line; not empty when the command did what it could and something is left


def command(name: str, *classes: type[BaseModel], positional: str = "") -> Callable[[Function], App]:
    """Makes a command of a function that takes settings objects, the last one StoreSettings, and returns an Outcome.

    The command has the fields as flat flags, and --json.
    """

    def decorate(function: Function) -> App:
        flattened = flat(*classes, StoreSettings, positional=positional, note=_flag)(function)

        @functools.wraps(flattened)
        def run(*values: Any, as_json: bool = False, **given: Any) -> int:
            # Whatever a library prints must not end up in the JSON.
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                outcome: Outcome = flattened(*values, **given)
                result = outcome.result() if as_json else {}
            if as_json:
                print(json.dumps(result, ensure_ascii=False, default=str))
            else:
                outcome.show()
            if outcome.problem:
                print(f"pixelmill: {outcome.problem}", file=sys.stderr)
            return 1 if outcome.problem else 0

        as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_JSON)
        set_signature(run, [*inspect.signature(flattened).parameters.values(), as_json])
        app = App(name=name, help_epilogue=_after_summary(inspect.getdoc(function) or ""), help_format="plaintext")
        app.default(run)
        return app

    return decorate


def store_flag(store: str) -> str:
    """What a command that is suggested needs to reach the same store."""
    default = os.environ.get("PIXELMILL_STORE") or StoreSettings.model_fields["store"].default
    return "" if store == default else f" --store {shlex.quote(store)}"


def use_of(model: str, makes_images: bool, store: str) -> str:
    """The command that puts a model to work; `makes_images`: from nothing, so that it is shown none."""
    if makes_images:
        return f"pixelmill generate {model} --count 100 --out FOLDER{store_flag(store)}"
    return f"pixelmill predict FOLDER --model {model} --table NAME{store_flag(store)}"


def _after_summary(docstring: str) -> str:
    """What stands between the first line, which `pixelmill --help` shows too, and the arguments."""
    return docstring.partition("\n")[2].partition("Args:\n")[0].strip()


def _flag(name: str, field: FieldInfo) -> Parameter:
    # The settings class validates, not cyclopts: its complaints repeat the value, which may hold a password.
    off_only_if_on = None if field.default is True else ""
    return Parameter(env_var="PIXELMILL_STORE" if name == "store" else None, negative=off_only_if_on)


Direct = Annotated[
    bool, Parameter(negative="", help="Run without Prefect: nothing is recorded, and the start is quicker.")
]
_JSON = Annotated[
    bool, Parameter(name="--json", negative="", help="Print one JSON object on stdout, and nothing else there.")
]
