"""Whether this machine sees what another one asks it to work on: a local path means something else on each machine.

Without this check a slot elsewhere would say of every image of a local folder that it is missing.
"""

import os
from collections.abc import Collection

from models.errors import PixelmillError
from tasks.storage import local_path
from tasks.table import Shard, Table

SAMPLE = 64  # images that are looked for; some may really have gone since they were listed


def check_sight(table: Table, model: str, plans: Collection[int] | None = None) -> None:
    """Raises PixelmillError in one line when the store, or the images of an open shard, are not to be seen here.

    `plans`: those that will be worked on, by default all.
    """
    host = os.uname().nodename
    if not table.exists():
        raise PixelmillError(
            f"{host} does not see table {table.name} in {table.store}: "
            "a store of several machines is a bucket, or a folder that all of them mount at this path"
        )
    for shard in _one_by_source(table, model, plans):
        rows = table.shard_rows(shard).slice(0, SAMPLE).to_pylist()
        images = [row["image"] for row in rows if row["attempt"] == 1]  # a second attempt may be at what has gone
        if images and not any(image.startswith("s3://") or os.path.lexists(local_path(image)) for image in images):
            raise PixelmillError(
                f"{host} does not see {images[0]} nor other images of table {table.name}: "
                "images for several machines lie in a bucket, or in a folder that all of them mount at this path"
            )


def _one_by_source(table: Table, model: str, plans: Collection[int] | None) -> list[Shard]:
    """The first open shard of each source."""
    sources = {head.number: head.source for head in table.heads(model)}
    first: dict[str, Shard] = {}
    for shard in table.open_shards(model, plans):
        first.setdefault(sources[shard.plan], shard)
    return list(first.values())
