"""How long the nearest of many embeddings take to find: `python benchmarks/neighbours.py [--images 1000000]`.

Writes tables of made-up vectors with the program's own parts, asks for ten neighbours in a process of its own, and
removes them. `--make FOLDER` only writes them, `--use FOLDER` only asks.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PER_PART = 20_000
MODEL = "made-up@000000000000"


def make_table(store: str, images: int, dimensions: int) -> None:
    """A table whose vectors are random, around a hundred centres."""
    from models.records import Task, part_schema
    from tasks.table import Shard, Table

    table = Table(store, f"d{dimensions}")
    table.define(Task.EMBED, {"max_pixels": 100_000_000})
    schema = part_schema(Task.EMBED)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((100, dimensions), np.float32)
    for index, start in enumerate(range(0, images, PER_PART)):
        count = min(PER_PART, images - start)
        vectors = centres[rng.integers(0, 100, count)] + 0.5 * rng.standard_normal((count, dimensions), np.float32)
        offsets = np.arange(0, (count + 1) * dimensions, dimensions, dtype=np.int32)
        names = [f"/photos/{number:08d}.jpg" for number in range(start, start + count)]
        columns = {
            "image": names,
            "fingerprint": [f"{number}-0" for number in range(count)],
            "sha256": [f"{number:064x}" for number in range(start, start + count)],
            "bytes": [100_000] * count,
            "width": [640] * count,
            "height": [480] * count,
            "status": ["ok"] * count,
            "error": [None] * count,
            "embedding": pa.ListArray.from_arrays(offsets, vectors.ravel()),
            "anomaly": np.abs(vectors).mean(axis=1),
            "predicted_at": [datetime.now(UTC)] * count,
            "attempt": [1] * count,
        }
        rows = pa.table({name: columns[name] for name in schema.names}, schema=schema)
        table.commit(MODEL, Shard(1, index, count), rows, {})


def ask(store: str, dimensions: int, by: str) -> tuple[int, float, float, float]:
    """Rows compared, seconds, and the peak memory in MB before and after."""
    import tasks.neighbours as neighbours
    from models.settings.neighbours import NeighboursSettings

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    image = "/photos/00000123.jpg"
    started = time.perf_counter()
    settings = NeighboursSettings(image=image, table=f"d{dimensions}", by=by)  # type: ignore[arg-type]
    found = neighbours.find_neighbours(store, settings)
    seconds = time.perf_counter() - started
    assert found.neighbours[0].image == image
    assert len(found.neighbours) == 10
    return found.compared, seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--make", type=Path, help="only write the tables, into this folder")
    parser.add_argument("--use", type=Path, help="only ask the tables in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pixelmill-neighbours-") as scratch:
        store = str(options.make or options.use or scratch)
        if options.use is None:
            for dimensions in options.dimensions:
                make_table(store, options.images, dimensions)
        if options.make is not None:
            return
        print("| dimensions | distance | rows | seconds | peak MB | of it Python and libraries |")
        print("|---|---|---|---|---|---|")
        for dimensions in options.dimensions:
            for by in ("cosine", "l2"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows, seconds, before, after = pool.apply(ask, (store, dimensions, by))
                print(f"| {dimensions} | {by} | {rows:,} | {seconds:.1f} | {after:.0f} | {before:.0f} |", flush=True)


if __name__ == "__main__":
    main()
