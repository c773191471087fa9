"""The order of backfill, the same with Prefect as without: survey, run what is not complete, sum up."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import PixelmillError
from models.progress import Report, Step
from models.settings.backfill import BackfillSettings
from models.settings.predict import PredictSettings
from tasks.backfill import Partition, Survey, done_of
from tasks.storage import normalise
from tasks.table import Table

log = logging.getLogger("pixelmill")

STRIKES = 3  # partitions given up in a row, after which the others are not tried


@dataclass(frozen=True)
class Ended:
    """What came of one partition."""

    partition: str  # below the source
    images: int
    bytes: int
    new: int  # before this command
    open: int  # before this command
    rows: int = 0  # written since it began
    problem: str = ""  # why rows are missing

    @property
    def state(self) -> str:
        """For people."""
        if self.problem:
            return "incomplete"
        return "done" if self.new + self.open else "was complete"


@dataclass(frozen=True)
class Backfilled:
    """What a backfill did; the keys of `backfill --json`."""

    table: str
    model: str
    partitions: list[Ended]
    rows: int
    seconds: float


class Unfinished(PixelmillError):
    """The backfill ended, and images of some partitions have no row."""

    def __init__(self, done: Backfilled):
        problems = [f"{ended.partition}: {ended.problem}" for ended in done.partitions if ended.problem]
        count = f"{len(problems)} of {len(done.partitions)} partitions are incomplete"
        super().__init__(f"{count}, run the same command again: {'; '.join(problems[:3])}")
        self.done = done


# Runs partitions, and says of each that is not complete why: (store, settings, survey, partitions, report).
Run = Callable[[str, BackfillSettings, Survey, Sequence[Partition], Report], dict[str, str]]


def backfill(
    store: str,
    settings: BackfillSettings,
    find_out: Callable[[str, BackfillSettings], Survey],
    run: Run,
    report: Report,
) -> Backfilled:
    """Surveys the partitions and runs those where an image has no row. Raises Unfinished when some stay incomplete."""
    start = time.monotonic()
    survey = find_out(store, settings)
    again = settings.retry_unreadable
    todo = [partition for partition in survey.partitions if partition.left or (again and partition.images)]
    log.info("%d of %d partitions are to be run", len(todo), len(survey.partitions))
    table = Table(normalise(store), settings.table)
    sources = [partition.uri for partition in survey.partitions]
    before = done_of(table, survey.model, sources) if table.exists() else {}
    problems = run(store, settings, survey, todo, report) if todo else {}
    after = done_of(table, survey.model, sources) if table.exists() else {}
    ended = [
        Ended(
            partition.name,
            partition.images,
            partition.bytes,
            partition.new,
            partition.open,
            rows=(after[partition.uri].rows if after else 0) - (before[partition.uri].rows if before else 0),
            problem=problems.get(partition.name, ""),
        )
        for partition in survey.partitions
    ]
    rows = sum(one.rows for one in ended)
    done = Backfilled(survey.table, survey.model, ended, rows, round(time.monotonic() - start, 3))
    if problems:
        raise Unfinished(done)
    return done


def run_here(predict: Callable[[str, PredictSettings], Any]) -> Run:
    """Runs one partition after the other in this process, with as many slots as there may be partitions at work."""

    def run(
        store: str, settings: BackfillSettings, survey: Survey, todo: Sequence[Partition], report: Report
    ) -> dict[str, str]:
        problems: dict[str, str] = {}
        strikes = 0
        for index, partition in enumerate(todo):
            report(Step("partitions", index, len(todo), partition.name))
            own = settings_of(settings, survey, partition)
            try:
                predict(store, own.model_copy(update={"slots": max(settings.slots, settings.concurrency)}))
            except PixelmillError as error:
                if error.exit_code != 1:  # a mistake that every partition would repeat, or an interruption
                    raise
                problems[partition.name] = str(error)
                log.warning("%s: %s", partition.name, error)
                strikes += 1
                if strikes == STRIKES:
                    return problems | not_tried(todo[index + 1 :])
                continue
            strikes = 0
            problems |= left_open(store, survey, partition)
            log.info("%s: complete, %d of %d partitions", partition.name, index + 1, len(todo))
        report(Step("partitions", len(todo), len(todo)))
        return problems

    return run


def not_tried(partitions: Iterable[Partition]) -> dict[str, str]:
    """Why partitions that were not run are incomplete: what ails so many in a row ails all."""
    return {partition.name: f"not tried, since {STRIKES} partitions in a row failed" for partition in partitions}


def settings_of(settings: BackfillSettings, survey: Survey, partition: Partition) -> PredictSettings:
    """The settings of one partition's run; the version of the model is the same for all."""
    common = {name: getattr(settings, name) for name in PredictSettings.model_fields}
    return PredictSettings(**common | {"source": partition.uri, "model": survey.model})


def left_open(store: str, survey: Survey, partition: Partition) -> dict[str, str]:
    """Why a partition whose run succeeded is not complete, by its name; {} when it is complete.

    Images that a run over a larger source has claimed are that run's to finish.
    """
    if partition.open == 0:
        return {}
    table = Table(normalise(store), survey.table)
    elsewhere = {
        head.source
        for head in table.heads(survey.model)
        if head.source != partition.uri and f"{partition.uri}/".startswith(f"{head.source}/")
    }
    unfinished = [source for source, done in done_of(table, survey.model, elsewhere).items() if done.open_shards]
    if not unfinished:
        return {}
    return {partition.name: f"images that a run over {unfinished[0]} claimed are still open: predict that source again"}
