"""`pixelmill ingest`: data sets."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.commands.command import Direct, Outcome, command, store_flag
from models.settings.fields import StoreSettings
from models.settings.ingest import IngestSettings

if TYPE_CHECKING:
    from tasks.datasets.ingest import Ingested


@command("ingest", IngestSettings, positional="source")
def ingest(settings: IngestSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """Turn a labelled folder, bucket prefix or archive into a versioned data set.

    For example:

        pixelmill ingest ./flowers --name flowers
        pixelmill ingest s3://bucket/coco --name street --format coco
        pixelmill ingest ./cells.zip --name cells --split train=.7,val=.15,test=.15

    Every image is opened and hashed. What cannot be used is kept as a row of
    rejects.parquet with file, line and reason. Images that are identical or nearly so
    never end in different splits, and a split stays when images are added. Doing the
    same again makes nothing new.
    """
    from flows.running import run_step

    ingested = run_step("ingest", store.store, settings, direct)
    return Outcome(lambda: asdict(ingested), lambda: _show(ingested, store.store))


def _show(ingested: "Ingested", store: str) -> None:
    from tasks.datasets.summary import describe

    for line in describe(ingested):
        print(line)
    flag = store_flag(store)
    name = ingested.dataset.partition("@")[0]
    print("next:")
    print(f'  pixelmill query "from {name}_images limit 10"{flag}')
    if ingested.rejected:
        print(f'  pixelmill query "select reason, count(*) from {name}_rejects group by 1"{flag}')
    if ingested.has_labels:
        print(f"  pixelmill train {name} --model mobilenet_v2 --name {name} --mode features{flag}")
