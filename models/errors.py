"""The errors that a user of pixelmill can meet, and how a command ends with each.

PixelmillError                 exit 1: the run failed; one line on stderr
├── UsageError                 exit 2: the options or the input cannot work as given
│   ├── NotFound               a model, table, file or folder that is not there
│   └── TableMismatch          the table was written with another task or other settings
├── StorageError               the store or the source does not answer after all retries
│   └── TransientError         the same, but it may answer later: no connection, overload, 5xx
└── ModelError                 a model folder is incomplete, or no engine here can run it
    └── ParityError            an export disagrees with PyTorch, so it was not published

Rejected is not one of them: it never ends a run, it becomes the row of one image.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line answers --help without Arrow
    from models.records import Status


class PixelmillError(Exception):
    """A failure that ends the command with one line and exit code 1."""

    exit_code = 1


class UsageError(PixelmillError):
    """Options or input that cannot work as given; exit code 2."""

    exit_code = 2


class NotFound(UsageError):
    """Something named by the user does not exist; the message lists what does."""


class TableMismatch(UsageError):
    """The table exists with another task or with other settings that change results."""


class StorageError(PixelmillError):
    """The store or the source does not answer, after all retries; work can go on once it does."""


class TransientError(StorageError):
    """No answer now, after all retries, but nothing is wrong with the request: the same may work later."""


class ModelError(PixelmillError):
    """A model folder is incomplete or damaged, or no engine on this machine can run it."""


class ParityError(ModelError):
    """An exported graph disagrees with the PyTorch model beyond the tolerance."""


class Rejected(Exception):
    """One image cannot be predicted; its row gets this status and reason, and the run goes on."""

    def __init__(self, status: "Status", reason: str):
        super().__init__(reason)
        self.status = status
        self.reason = reason
