"""What planning costs: new images against a table that claims many, `python -m benchmarks.planning`.

Makes up a table of --rows claimed images in --plans plans, and a listing that names all of them and --new more, as the
nightly run over a bucket that only grows does; then claims what is new. No image exists, and nothing is predicted.
Each size is measured in a process of its own: wall and processor seconds, and the largest resident set.
"""

import argparse
import hashlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MODEL = "resnet50@0123456789ab"
BATCH_ROWS = 16_384  # as listings come
SHARD_ROWS = 4_096


def names(start: int, end: int) -> tuple[list[str], list[str]]:
    """URIs and ETags of the images numbered `start` to `end`: 70 and 32 characters."""
    uris = [
        f"s3://photographs/raw/camera={number % 97:02}/month={number // 10_000_000:04}/{number:012x}-original.jpg"
        for number in range(start, end)
    ]
    return uris, [hashlib.md5(uri.encode()).hexdigest() for uri in uris]


def make_table(store: str, rows: int, plans: int) -> None:
    """A table of one model whose plans claim the images numbered 0 to `rows`."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    from models.records import PLAN_SCHEMA, Task
    from tasks.table import METADATA_KEY, Table, parquet_options

    table = Table(store, "made_up")
    table.define(Task.CLASSIFY, {})
    for number in range(1, plans + 1):
        start, end = rows * (number - 1) // plans, rows * number // plans
        head = {"model": MODEL, "source": "s3://photographs/raw", "created_at": "2026-01-01T00:00:00.000000+00:00"}
        schema = PLAN_SCHEMA.with_metadata({METADATA_KEY: json.dumps(head).encode()})
        path = Path(table.plan_uri(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        uris, tags = names(start, end)
        order = sorted(range(len(uris)), key=uris.__getitem__)
        columns: list[list[Any]] = [[uris[at] for at in order], [tags[at] for at in order]]
        columns += [[100_000] * len(uris), [1] * len(uris), [MODEL] * len(uris)]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, SHARD_ROWS, **parquet_options(schema))


def write_listing(path: Path, rows: int) -> None:
    """The listing as a file, so that making it up is no part of what is measured."""
    import pyarrow as pa

    from models.records import LISTING_SCHEMA

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, LISTING_SCHEMA) as writer:
        for start in range(0, rows, BATCH_ROWS):
            uris, tags = names(start, min(start + BATCH_ROWS, rows))
            columns = [pa.array(uris), pa.array(tags), pa.array([100_000] * len(uris), pa.int64())]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA))


def read_listing(path: Path) -> Iterator[Any]:
    """Batches of the file, read one at a time."""
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source) as file:
        for index in range(file.num_record_batches):
            yield file.get_batch(index)


def measure(store: str, listing: Path, new: int) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak MB of one claim."""
    from tasks.plan import claim
    from tasks.table import Table

    started, before = time.perf_counter(), time.process_time()
    table = Table(store, "made_up")
    claimed = claim(table, read_listing(listing), model=MODEL, source="s3://photographs/raw", settings={})
    seconds, busy = time.perf_counter() - started, time.process_time() - before
    assert (claimed.new, claimed.planned) == (new, new), claimed
    return seconds, busy, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000], help="claimed before")
    parser.add_argument("--new", type=int, nargs="+", default=[1_000_000], help="images that no plan claims yet")
    parser.add_argument("--plans", type=int, default=1_000, help="plans that claimed them")
    parser.add_argument("--folder", type=Path, help="where to make the files; by default the system's temporary folder")
    options = parser.parse_args()
    print("| rows in the table | plans | listed | new | seconds | processor seconds | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for rows in options.rows:
        for new in options.new:
            with tempfile.TemporaryDirectory(prefix="pixelmill-planning-", dir=options.folder) as folder:
                make_table(folder, rows, options.plans)
                listing = Path(folder) / "listing.arrow"
                write_listing(listing, rows + new)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, busy, peak = pool.apply(measure, (folder, listing, new))
            row = (f"{rows:,}", f"{options.plans:,}", f"{rows + new:,}", f"{new:,}")
            print(f"| {' | '.join(row)} | {seconds:.1f} | {busy:.1f} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
