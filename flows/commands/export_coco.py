"""`pixelmill export-coco`: what was found, or labelled, for tools that read COCO."""

from dataclasses import asdict
from pathlib import Path

from flows.commands.command import Outcome, command
from models.settings.fields import StoreSettings


@command("export-coco")
def export_coco(
    store: StoreSettings, source: str, *, out: Path, model: str | None = None, results: bool = False
) -> Outcome:
    """Write a table of objects, or a data set, as a COCO file.

    For example:

        pixelmill export-coco found --out found.json
        pixelmill export-coco found --model cells@production --out results.json --results
        pixelmill export-coco cells@0123456789ab --out cells.json

    The file has images, categories and annotations; those of a table have a score, and
    a mask where the model gives one. pycocotools' COCO reads it, and so do FiftyOne and
    CVAT.

    Args:
        source: A table, or a data set as NAME or NAME@VERSION; of equal names the table.
        out: The file to write.
        model: Whose findings, where a table holds those of several models.
        results: Write only the list of annotations, as pycocotools' loadRes takes it.
    """
    from tasks.export_coco import export_coco as write

    done = write(store.store, source, out, model=model, results=results)
    count = f"{done.annotations:,} annotations in {done.images:,} images"
    return Outcome(lambda: asdict(done), lambda: print(f"wrote {out}: {count}"))
