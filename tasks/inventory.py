"""What is in a store, as `ls` shows it: read off names, cards and the footers of plans, never off rows."""

from collections import defaultdict
from dataclasses import dataclass, field

from models.card import Card
from models.learning.metrics import main_metric
from tasks import registry
from tasks.datasets import datasets
from tasks.storage import join, normalise, open_storage
from tasks.table import Table


@dataclass(frozen=True)
class DatasetEntry:
    """One version of a data set."""

    name: str
    version: str
    format: str
    images: int
    annotations: int
    classes: int
    splits: dict[str, int]
    bytes: int  # without the images
    created_at: str


@dataclass(frozen=True)
class ModelEntry:
    """One version of a model, or a less exact variant of it."""

    name: str
    version: str  # VERSION.int8 for a variant
    aliases: list[str]
    task: str
    architecture: str
    precision: str
    metric: str  # the main one of its task, on the data set that it was trained on or gated by; "" if not measured
    bytes: int
    created_at: str


@dataclass(frozen=True)
class TableEntry:
    """One table."""

    name: str
    task: str
    models: list[str]
    images: int  # rows when no shard is open; an image counts once per version and model
    plans: int
    open_shards: int
    bytes: int
    created_at: str


@dataclass(frozen=True)
class Inventory:
    """Everything in a store; the keys of `ls --json`."""

    datasets: list[DatasetEntry] = field(default_factory=list)
    models: list[ModelEntry] = field(default_factory=list)
    tables: list[TableEntry] = field(default_factory=list)


def list_datasets(store: str) -> list[DatasetEntry]:
    """All versions of all data sets, by name, from old to new."""
    return [
        DatasetEntry(
            name=dataset.name,
            version=dataset.version,
            format=dataset.format,
            images=dataset.images,
            annotations=dataset.annotations,
            classes=len(dataset.classes),
            splits=dataset.splits,
            bytes=sum(file["bytes"] for file in dataset.files.values()),
            created_at=dataset.created_at,
        )
        for dataset in datasets.list_datasets(store)
    ]


def list_models(store: str) -> list[ModelEntry]:
    """All versions of all models, by name, from old to new."""
    cards = registry.list_models(store)
    aliases: dict[str, list[str]] = defaultdict(list)
    for name in {card.name for card in cards}:
        for alias, version in registry.aliases(store, name).items():
            aliases[f"{name}@{version}"].append(alias)
    return [
        ModelEntry(
            name=card.name,
            version=card.version,
            aliases=sorted(aliases[card.reference]),
            task=str(card.task),
            architecture=card.architecture,
            precision=card.precision,
            metric=_metric(card),
            bytes=sum(file["bytes"] for file in card.files.values()),
            created_at=card.created_at,
        )
        for card in cards
    ]


def _metric(card: Card) -> str:
    measured = main_metric(card)
    if measured is None:
        return ""
    judge = card.metrics[measured.split].get("judge")  # without it, a distance of made images says nothing
    where = measured.split if judge is None else f"{measured.split}, {judge}"
    return f"{measured.name} {measured.value:.3f} ({where})"


def list_tables(store: str) -> list[TableEntry]:
    """All tables, by name."""
    store = normalise(store)
    return [_table(store, name) for name in open_storage(store).names(join(store, "tables"))]


def _table(store: str, name: str) -> TableEntry:
    table = Table(store, name)
    heads = table.heads()
    models = sorted({head.model for head in heads})
    files = table.storage.walk(table.uri, recursive=True, ignore=lambda name, is_folder: None, ignored=defaultdict(int))
    return TableEntry(
        name=name,
        task=str(table.task),
        models=models,
        images=sum(shard.images for head in heads for shard in head.shards),
        plans=len(heads),
        open_shards=sum(len(table.open_shards(model)) for model in models),
        bytes=sum(file.bytes for file in files),
        created_at=heads[0].created_at if heads else "",
    )
