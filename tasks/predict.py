"""The three steps of a bulk prediction: plan what is new, work through what is open, say what came of it.

Each is a plain function of names and numbers, so that it can run in this process, as a Prefect task, or on another
machine.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from models.card import Card
from models.errors import NotFound, UsageError
from models.records import Task
from models.settings.fields import Scope
from models.settings.predict import OVERLAP, PredictSettings
from tasks import registry
from tasks.datasets import datasets
from tasks.listing import LIST_EXTENSIONS, list_source
from tasks.plan import claim
from tasks.slot import SlotConfig
from tasks.slot_report import SlotProgress, SlotReport, add_seconds
from tasks.storage import local_path, normalise
from tasks.table import Table
from tasks.work import cores
from tasks.work import work as work_through

# The settings that change results, by task; a table keeps them, and refuses others.
RESULT_SETTINGS: dict[Task, tuple[str, ...]] = {
    Task.CLASSIFY: ("top_k", "max_pixels"),
    Task.DETECT: ("score", "tile", "overlap", "max_pixels"),
    Task.INSTANCE: ("score", "tile", "overlap", "max_pixels"),
    Task.SEMANTIC: ("tile", "overlap", "max_pixels"),
    Task.TRANSLATE: ("tile", "overlap", "image_format", "max_pixels"),
    Task.EMBED: ("max_pixels",),
}

# What a run does about shards that other runs may have in hand. help: it takes whatever is open, also what others claim
# meanwhile; finish: it takes what earlier runs left open; leave: others are at work, so it keeps to its own claims.
Others = Literal["help", "finish", "leave"]


@dataclass(frozen=True)
class Planned:
    """What the plan step found and claimed."""

    table: str
    model: str  # NAME@VERSION
    source: str  # the URI that was listed
    listed: int  # distinct images in the source
    planned: int  # claimed by this run
    skipped: int  # claimed by earlier runs
    ignored: dict[str, int]  # files that are not listed as images, by reason
    plan: int | None  # the number of the plan written, if any
    open_shards: int  # of this run's plan and of earlier ones
    open_images: int
    plans: tuple[int, ...] | None = None  # those whose shards this run works on; None: all, also later ones


@dataclass(frozen=True)
class Summary:
    """What a run did; the keys of `predict --json`."""

    table: str
    model: str
    listed: int
    planned: int
    skipped: int
    ignored: dict[str, int]
    rows: int  # written by this run
    by_status: dict[str, int]
    shards: int
    open_shards: int  # still open of those that this run was to work on; 0 when it has done everything
    failures: list[str]
    seconds: float
    working_seconds: float  # of these, from the loaded model to the last part
    images_per_second: float
    stages: dict[str, float]  # busy seconds, summed over threads
    limit: str  # what bound the speed: storage, decoding or model
    engine: str


def result_settings(settings: PredictSettings, task: Task) -> dict[str, Any]:
    """The settings that change results of this task. Raises UsageError for one that only another task knows."""
    applying = RESULT_SETTINGS[task]
    for name in sorted({name for names in RESULT_SETTINGS.values() for name in names} - set(applying)):
        if getattr(settings, name) != PredictSettings.model_fields[name].default:
            raise UsageError(f"--{name.replace('_', '-')} does not apply to models of task {task}")
    results = {name: getattr(settings, name) for name in applying}
    if results.get("tile") is not None and results["overlap"] is None:
        results["overlap"] = OVERLAP
    return results


def plan(
    store: str,
    settings: PredictSettings,
    on_listed: Callable[[int], None] = lambda count: None,
    others: Others = "help",
) -> Planned:
    """Lists the source and claims what this table does not claim yet for this model.

    `on_listed` hears the number of images listed so far; `others` is how this run stands to others. Raises UsageError,
    StorageError.
    """
    store = normalise(store)
    card = registry.check_exported(registry.resolve(store, settings.model))
    _check_sees(card)
    source = source_uri(store, settings.source)
    results = result_settings(settings, card.task)
    if settings.tile is not None and card.input.mode == "crop":
        raise UsageError(f"--tile needs a model that sees the whole of a tile; {card.reference} crops what it is shown")
    card.threshold(settings.score)
    table = Table(store, settings.table)
    if table.exists():
        table.check(card.task, results)
    before = table.plan_numbers()
    listing = list_source(source, recursive=settings.recursive, exclude=store, report=on_listed)

    def batches() -> Iterator[pa.RecordBatch]:
        yield from listing  # raises NotFound where there is no image: then no table is made either
        table.define(card.task, results)

    claimed = claim(
        table,
        batches(),
        model=card.reference,
        source=source,
        settings=results,
        limit=settings.limit,
        shard_size=settings.shard_size,
        retry_unreadable=settings.retry_unreadable,
    )
    plans = _plans(table, card.reference, source, settings.scope, before, claimed.number, others)
    open_shards = table.open_shards(card.reference, plans)
    return Planned(
        table=settings.table,
        model=card.reference,
        source=source,
        listed=claimed.listed,
        planned=claimed.planned,
        skipped=claimed.listed - claimed.new,
        ignored=dict(listing.ignored),
        plan=claimed.number,
        open_shards=len(open_shards),
        open_images=sum(shard.images for shard in open_shards),
        plans=plans,
    )


def _check_sees(card: Card) -> None:
    """Raises UsageError for a model that no image can be shown to, or that would answer with a part of it."""
    if card.task is Task.GENERATE:
        raise UsageError(
            f"{card.reference} makes images and is shown none: pixelmill generate {card.reference} --count 100 --out …"
        )
    if card.task is Task.TRANSLATE and card.input.mode == "crop":
        raise UsageError(
            f"{card.reference} crops what it is shown, so that it cannot translate the whole of an image: "
            "its card needs the mode letterbox or stretch"
        )


def _plans(
    table: Table, model: str, source: str, scope: Scope, before: Sequence[int], own: int | None, others: Others
) -> tuple[int, ...] | None:
    """The plans whose shards a run works on, given those that were there before and the one that it wrote itself."""
    mine = () if own is None else (own,)
    if others == "leave":
        return mine
    if others == "help" and scope == "table":
        return None
    heads = [head for head in table.heads(model) if others == "help" or head.number in {*before, *mine}]
    return tuple(head.number for head in heads if scope == "table" or head.source == source)


def source_uri(store: str, source: str) -> str:
    """What to list for a source that a person typed: it, or the images of the data set NAME or NAME@VERSION.

    A path of that name is meant before a data set is. Raises NotFound for a version that the data set does not have.
    """
    uri = normalise(source)
    if "/" in source or os.path.lexists(local_path(uri)):
        return uri
    try:
        return datasets.images_uri(store, datasets.resolve(store, source))
    except NotFound:
        if "@" in source and datasets.list_datasets(store, source.partition("@")[0]):
            raise
        known = ", ".join(datasets.dataset_names(store)) or "none yet"
        raise NotFound(
            f"{uri} does not exist; expected a folder, an image, a list of images or a data set (there are: {known})"
        ) from None
    except UsageError:  # no name that a data set can have
        return uri


def is_remote(source: str) -> bool:
    """Whether its images may lie on an object store, as those that a list names may."""
    return source.startswith("s3://") or source.lower().endswith(tuple(f".{name}" for name in LIST_EXTENSIONS))


def work(
    store: str,
    settings: PredictSettings,
    planned: Planned,
    slot: int = 0,
    slots: int = 1,
    on_progress: Callable[[SlotProgress], None] = lambda progress: None,
    is_wanted: Callable[[], bool] = lambda: True,
    threads: int | None = None,
    run: str = "",
) -> SlotReport:
    """Computes open shards of the table in a child process, as slot `slot` (from 0) of `slots`, until none is left.

    `threads`: the cores that it may keep busy; by default its share of this machine's. `run` is noted in its parts.
    Raises ModelError when the model cannot be loaded, Stopped when it is not wanted any more; a shard that fails is in
    the report, and stays open.
    """
    config = SlotConfig(
        store=normalise(store),
        table=settings.table,
        model=planned.model,
        engine=settings.engine,
        device=settings.device,
        threads=threads or max(1, cores() // slots),
        batch_size=settings.batch_size,
        score=settings.score,
        top_k=settings.top_k,
        max_pixels=settings.max_pixels,
        tile=settings.tile,
        overlap=OVERLAP if settings.overlap is None else settings.overlap,
        image_format=settings.image_format,
        remote_source=is_remote(planned.source),
        run=run,
        slot=slot,
    )
    return work_through(config, planned.plan, planned.open_images, slot, slots, on_progress, planned.plans, is_wanted)


def summarise(
    store: str, settings: PredictSettings, planned: Planned, reports: Sequence[SlotReport], seconds: float
) -> Summary:
    """Adds up the slots' reports; whether the run succeeded is decided by what is open now, not by what they say."""
    rows = sum(report.rows for report in reports)
    stages = add_seconds(report.stages for report in reports)
    still_open = Table(normalise(store), settings.table).open_shards(planned.model, planned.plans)
    return Summary(
        table=planned.table,
        model=planned.model,
        listed=planned.listed,
        planned=planned.planned,
        skipped=planned.skipped,
        ignored=planned.ignored,
        rows=rows,
        by_status=dict(sum((report.by_status for report in reports), Counter())),
        shards=sum(report.shards for report in reports),
        open_shards=len(still_open),
        failures=[line for report in reports for line in report.failed_shards],
        seconds=round(seconds, 3),
        working_seconds=round(max((report.working_seconds for report in reports), default=0.0), 3),
        images_per_second=round(rows / seconds, 2) if seconds else 0.0,
        stages={stage: round(busy, 3) for stage, busy in sorted(stages.items())},
        limit=bottleneck(stages),
        engine=next((report.engine for report in reports if report.engine), ""),
    )


def bottleneck(stages: Mapping[str, float]) -> str:
    """What the cores spent most of their time on: waiting for storage, decoding, or the model.

    The parts alone, which are all that is known of slots on a work pool, do not say how long cores have waited.
    """
    if any(stages.values()) and "wait" not in stages:
        return "not known"
    spent = {
        name: stages.get(stage, 0.0)
        for name, stage in (("storage", "wait"), ("decoding", "decode"), ("model", "infer"))
    }
    return max(spent, key=lambda name: spent[name]) if any(spent.values()) else "nothing"
