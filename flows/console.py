"""What people see: progress bars and logs on stderr, tables on stdout."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flows.watch import Lines, Overall, Watch
from models.progress import Step

if TYPE_CHECKING:
    from tasks.slot_report import SlotProgress


WIDEST = 10_000  # columns of a table on a pipe


class _ConsoleLog(logging.Handler):
    """Log lines above the progress bar."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the message alone."""
        self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Shows our log lines and the progress of a run on stderr: a bar on a terminal, else a line every ten seconds."""
    console = Console(stderr=True)
    log = logging.getLogger("pixelmill")
    handler = _ConsoleLog(console)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    propagate, log.propagate = log.propagate, False
    try:
        if console.is_terminal:
            with Bars(console) as bars:
                yield bars
        else:
            yield Lines()
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


class Bars:
    """A watch that draws: a count while listing, then a bar with rate and time left."""

    def __init__(self, console: Console):
        self._overall = Overall()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._stage = "listing"
        self._task = self._progress.add_task(self._stage, total=None, text="")

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def refresh(self) -> None:
        """Draws now; it is drawn ten times a second anyway."""
        self._progress.refresh()

    def listed(self, images: int) -> None:
        """Shows the count."""
        self._progress.update(self._task, text=f"{images:,} images")

    def progress(self, progress: "SlotProgress") -> None:
        """Shows how far all slots are."""
        self._overall.add(progress)
        done, total = self._overall.done, self._overall.total
        not_ok = " ".join(f"{count:,} {status}" for status, count in self._overall.by_status.items() if status != "ok")
        text = f"{done:,}/{total:,} {self._overall.rate:,.1f} images/s {not_ok}"
        self._progress.update(self._task, description="predicting", completed=done, total=total or None, text=text)

    def step(self, step: Step) -> None:
        """Shows how far the stage is; a new stage begins a new bar, so that the time left is its own."""
        if step.stage != self._stage:
            self._stage = step.stage
            self._progress.remove_task(self._task)
            self._task = self._progress.add_task(step.stage, total=step.total, text="")
        count = f"{step.done:,}/{step.total:,}" if step.total is not None else f"{step.done:,}"
        self._progress.update(self._task, completed=step.done, total=step.total, text=f"{count} {step.text}")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", right: Sequence[str] = (), cell: int = 80
) -> None:
    """A table on stdout; columns named in `right` are aligned right, cells longer than `cell` characters are cut."""
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(escape(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(shorten(value, cell)) for value in row))
    console = Console(file=sys.stdout)
    if not console.is_terminal:  # a pipe has no width to keep to
        wide = console.options.update(width=WIDEST)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)


def shorten(value: Any, length: int) -> str:
    """The value as one line of at most so many characters."""
    match value:
        case None:
            text = ""
        case bool() | str():
            text = str(value)
        case int():
            text = f"{value:,}"
        case float():
            text = f"{value:.4g}"
        case list() | dict() | tuple():
            text = json.dumps(value, ensure_ascii=False)
        case _:
            text = str(value)
    text = text.translate({ord("\n"): "↵", ord("\r"): "↵", ord("\t"): " "})
    return text if len(text) <= length else f"{text[: length - 1]}…"
