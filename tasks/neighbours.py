"""The rows of a table of embeddings that lie nearest to one image: exact, by DuckDB over the parts themselves.

Every vector is read once and only distances are kept, so memory does not grow with the table.
"""

from dataclasses import dataclass

import numpy as np

from models.errors import NotFound, Rejected, StorageError, UsageError
from models.records import Status, Task
from models.settings.neighbours import NeighboursSettings
from tasks import registry
from tasks.query import database
from tasks.storage import normalise, open_storage
from tasks.table import Table
from tasks.views import Views, quoted

_MEMORY = "1GB"
# Of a row's vector v from the vector q, whose length is 1 for cosine; null for a v that has no direction.
_DISTANCE = {
    "cosine": "CASE WHEN array_inner_product(v, v) > 0 "
    "THEN greatest(0, 1 - array_inner_product(v, q) / sqrt(array_inner_product(v, v))) END",
    "l2": "array_distance(v, q)",
}


@dataclass(frozen=True)
class Neighbour:
    """One row of the table."""

    image: str  # URI
    distance: float
    anomaly: float | None


@dataclass(frozen=True)
class Neighbours:
    """What was found; the keys of `neighbours --json`."""

    image: str  # URI
    table: str
    model: str  # NAME@VERSION
    by: str  # cosine or l2
    in_table: bool  # else the model embedded it now
    compared: int  # rows with an embedding
    neighbours: list[Neighbour]  # nearest first; of equal distance the image itself, then by URI


def find_neighbours(store: str, settings: NeighboursSettings) -> Neighbours:
    """The nearest rows, of which each image is compared in its newest version.

    Raises NotFound and UsageError for a table, model or image that cannot be compared, StorageError.
    """
    store = normalise(store)
    table = Table(store, settings.table)
    if table.task is not Task.EMBED:
        raise UsageError(f"table {settings.table!r} holds results of task {table.task}: neighbours need embeddings")
    model = _model(table, settings.model)
    image = normalise(settings.image)
    with database(store, store) as connection:  # no view is named: the rows are asked for below
        connection.execute(f"SET memory_limit = '{_MEMORY}'")
        connection.execute("SET preserve_insertion_order = false")
        rows, is_repeated = Views(store).rows(connection, settings.table)
        newest = "QUALIFY row_number() OVER (PARTITION BY image ORDER BY plan DESC) = 1" if is_repeated else ""
        of_model = f"FROM ({rows}) WHERE model = {quoted(model)}"
        found = connection.execute(
            f"SELECT embedding {of_model} AND image = ? ORDER BY plan DESC LIMIT 1", [image]
        ).fetchone()
        in_table = found is not None and found[0] is not None
        vector = np.array(found[0], np.float32) if found and in_table else _embed(store, model, image, settings.table)
        query = vector
        if settings.by == "cosine":
            if not np.any(vector):
                raise UsageError(f"the embedding of {image} is all zeros, which has no direction: use --by l2")
            query = vector / np.linalg.norm(vector)
        (compared,) = connection.execute(
            f"SELECT count(*) FROM (SELECT image, status, plan {of_model} {newest}) WHERE status = '{Status.OK}'"
        ).fetchall()[0]
        # A fixed length lets DuckDB take whole vectors at once. Which row is the newest is asked once the vectors have
        # become distances: sorted with them, a large table would go through the disk.
        of_size = f"FLOAT[{len(vector)}]"
        nearest = connection.execute(
            f"SELECT image, distance, anomaly FROM (SELECT image, anomaly, plan, {_DISTANCE[settings.by]} AS distance "
            f"FROM (SELECT image, anomaly, plan, TRY_CAST(embedding AS {of_size}) AS v, ?::{of_size} AS q {of_model}) "
            f"{newest}) WHERE distance IS NOT NULL ORDER BY distance, image <> ?, image LIMIT ?",
            [query.tolist(), image, settings.count],
        ).fetchall()
    return Neighbours(
        image=image,
        table=settings.table,
        model=model,
        by=settings.by,
        in_table=in_table,
        compared=compared,
        neighbours=[Neighbour(*row) for row in nearest],
    )


def _model(table: Table, asked: str | None) -> str:
    """The model whose rows are compared."""
    models = table.models()
    matching = [model for model in models if asked is None or asked in (model, model.partition("@")[0])]
    if len(matching) == 1:
        return matching[0]
    known = ", ".join(models) or "none yet"
    if not matching:
        what = "has no rows yet" if asked is None else f"has no rows of the model {asked!r}"
        raise NotFound(f"table {table.name!r} {what}; models there: {known}")
    raise UsageError(f"table {table.name!r} holds embeddings of several models, name one with --model: {known}")


def _embed(store: str, model: str, image: str, table: str) -> np.ndarray:
    """What the table's model says of a file that the table does not hold. Raises UsageError for one it cannot read."""
    from models.imaging.prepare import Preparer
    from models.runtime.engine import open_engine

    storage = open_storage(image)
    if storage.is_folder(image):
        raise UsageError(f"{image} is a folder: name one image")
    try:
        data = storage.read(image)
    except FileNotFoundError:
        raise NotFound(f"{image} is neither an image of table {table!r} nor a file") from None
    card = registry.resolve(store, model)
    rule = card.input
    pixels = np.empty((1, rule.height, rule.width, 3), np.uint8)
    try:
        Preparer(rule).prepare(data, pixels[0])
    except Rejected as rejection:
        raise UsageError(f"{image} is {rejection.status}: {rejection.reason}") from None
    engine = open_engine(registry.fetch_model(store, card), card)
    try:
        vector = engine.run(pixels)["embedding"][0]
    finally:
        engine.close()
    if not np.isfinite(vector).all():
        raise StorageError(f"{card.reference} gives NaN or infinity for {image}")
    return vector.astype(np.float32)
