"""What a check found, and the promise that none of them ever ends with a traceback or shows a secret."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from models.errors import PixelmillError

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`."""

    check: str
    state: State
    found: str
    mend: str = ""  # what to do; "" where nothing is to be done

    def __str__(self) -> str:
        mend = f"; to mend: {self.mend}" if self.mend else ""
        return f"{self.state:<8} {self.check:<15} {self.found}{mend}"


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, mend: str) -> Finding:
    """Runs work; slower, or not for long."""
    return Finding(check, "warning", found, mend)


def problem(check: str, found: str, mend: str) -> Finding:
    """Runs fail, or their promises do not hold."""
    return Finding(check, "problem", found, mend)


def guarded(check: str, function: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of one check; what it raises is a problem of that name.

    Of an error that is not our own only its kind is told: its text may hold an address with a password.
    """
    try:
        return function()
    except PixelmillError as error:
        return [problem(check, str(error), "see above, then run doctor again")]
    except ModuleNotFoundError as error:
        return [problem(check, f"the package {error.name} is missing", "pip install --force-reinstall pixelmill")]
    except Exception as error:
        kind = type(error).__name__
        return [problem(check, f"the check itself failed ({kind})", "PIXELMILL_DEBUG=1 pixelmill predict shows more")]
