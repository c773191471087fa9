"""How long listing a local folder takes, and how much memory: `python benchmarks/listing.py [--files 1000000]`.

Makes empty files in a temporary folder, lists them in a process of its own, and removes them.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FILES_PER_FOLDER = 1_000


def make_files(folder: Path, count: int) -> None:
    """Spreads `count` empty files over folders of FILES_PER_FOLDER."""
    for start in range(0, count, FILES_PER_FOLDER):
        below = folder / f"{start // FILES_PER_FOLDER // 100:03}" / f"{start // FILES_PER_FOLDER % 100:02}"
        below.mkdir(parents=True)
        for number in range(start, min(start + FILES_PER_FOLDER, count)):
            (below / f"image-{number:08}.jpg").touch()


def peak_megabytes() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: str) -> tuple[int, float, float, float]:
    """Files listed, seconds, and the peak memory in MB before and after."""
    from tasks.listing import list_source

    before = peak_megabytes()
    started = time.perf_counter()
    listing = list_source(folder)
    rows = sum(batch.num_rows for batch in listing)
    return rows, time.perf_counter() - started, before, peak_megabytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to make the files; by default the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pixelmill-listing-", dir=options.folder) as folder:
        make_files(Path(folder), options.files)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows, seconds, before, after = pool.apply(measure, (folder,))
    print("| files listed | seconds | files per second | peak MB | of it Python and libraries |")
    print("|---|---|---|---|---|")
    print(f"| {rows:,} | {seconds:.1f} | {rows / seconds:,.0f} | {after:.0f} | {before:.0f} |")


if __name__ == "__main__":
    main()
