"""`pixelmill demo`: the whole chain, from labelled images to a table, on what packages ship."""

import logging
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.command import Outcome, command, store_flag
from models.settings.common import StoreSettings
from models.settings.ingest import IngestSettings
from models.settings.predict import PredictSettings
from models.settings.train import TrainSettings

if TYPE_CHECKING:
    from tasks.predict import Summary
    from tasks.query import Answer
    from tasks.train import Trained

log = logging.getLogger("pixelmill")

PHOTOS_TABLE, DIGITS_TABLE = "demo", "demo_digits"
NAME = "digits"  # of the data set and the model
SCENES, NUM_SCENES = "scenes", 120
# Small images need no large input: the digits have 8×8 pixels, and a quarter of the work is left.
IMAGE_SIZE = 112
TOP_LABELS = f"""\
select parse_filename(image) as photograph, labels[1].label as label, round(labels[1].score, 3) as score, status
from {PHOTOS_TABLE} order by score desc nulls last"""
BY_DIGIT = f"""\
select truth.label as digit, count(*) as images, avg((labels[1].label = truth.label)::int) as "right",
       mode(labels[1].label) filter (labels[1].label <> truth.label) as "most often taken for"
from {DIGITS_TABLE} join {NAME}_images as truth using (image) where split = 'test' group by 1 order by 1"""


@command("demo")
def demo(
    store: StoreSettings,
    *,
    photos: Path = Path("demo-photos"),
    digits: Path = Path("demo-digits"),
    scenes: Path = Path("demo-scenes"),
) -> Outcome:
    """The whole chain on real images that packages ship, offline, in minutes.

    For example:

        pixelmill demo

    Predicts photographs with a pretrained MobileNetV2 into the table `demo`. Then makes
    a data set of 1,797 handwritten digits, trains MobileNetV2's head on them, exports
    and measures it, and predicts all of them into the table `demo_digits`. Photographs
    with digits on them become the data set `scenes`, with boxes and masks. A second demo
    finds everything done.

    Args:
        photos: The folder that receives the photographs.
        digits: The folder that receives the digits.
        scenes: The folder that receives photographs with digits on them.
    """
    from flows.console import watching
    from flows.order import predict_directly
    from tasks import demo as shipped
    from tasks.adopt import import_model
    from tasks.datasets.ingest import ingest
    from tasks.digits import write_digits, write_scenes
    from tasks.query import ask
    from tasks.train import train

    start = time.monotonic()
    weights = str(shipped.weights_file() or "imagenet")
    with watching() as watch:

        def say(number: int, text: str) -> None:
            log.info("%s", f"{number}/6 {text}")

        say(1, f"{shipped.write_photographs(photos)} files in {photos}: photographs, and three that are none")
        say(2, f"importing {shipped.ARCHITECTURE} with pretrained weights; PyTorch loads, exports and compares")
        card = import_model(f"torchvision:{shipped.ARCHITECTURE}", "mobilenet", store.store, weights=weights)
        say(3, f"predicting the photographs with {card.reference}")
        settings = PredictSettings(source=str(photos), model=card.reference, table=PHOTOS_TABLE)
        photographs = predict_directly(store.store, settings, watch)
        say(4, f"{write_digits(digits):,} digits in {digits}, a folder per class: ingest")
        dataset = ingest(store.store, IngestSettings(source=str(digits), name=NAME), watch.step)
        objects = write_scenes(scenes, NUM_SCENES)
        log.info(
            "%s", f"    {NUM_SCENES} photographs with {objects} digits on them in {scenes}, labelled as COCO: ingest"
        )
        with_objects = ingest(store.store, IngestSettings(source=str(scenes), name=SCENES), watch.step)
        say(5, f"training the head of {shipped.ARCHITECTURE} on {dataset.dataset}; export, comparison, metrics")
        trained = train(
            store.store,
            TrainSettings(
                dataset=dataset.dataset,
                model=shipped.ARCHITECTURE,
                name=NAME,
                mode="features",
                weights=weights,
                image_size=IMAGE_SIZE,
                flip=False,
            ),
            watch.step,
        )
        say(6, f"predicting the digits with {trained.model}")
        settings = PredictSettings(source=dataset.dataset, model=trained.model, table=DIGITS_TABLE)
        predict_directly(store.store, settings, watch)
    top, by_digit = ask(store.store, TOP_LABELS), ask(store.store, BY_DIGIT)
    seconds = round(time.monotonic() - start, 1)

    def result() -> dict[str, Any]:
        return {
            "model": card.reference,
            "table": PHOTOS_TABLE,
            "photos": str(photos),
            "seconds": seconds,
            "top": _rows(top),
            "dataset": dataset.dataset,
            "trained": trained.model,
            "metrics": trained.metrics,
            "digits": _rows(by_digit),
            "scenes": with_objects.dataset,
        }

    return Outcome(result, lambda: _show(top, by_digit, photographs, trained, photos, seconds, store.store))


def _rows(answer: "Answer") -> list[dict[str, Any]]:
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def _show(
    top: "Answer",
    by_digit: "Answer",
    photographs: "Summary",
    trained: "Trained",
    photos: Path,
    seconds: float,
    store: str,
) -> None:
    from flows.console import print_table

    print_table(top.columns, top.rows, right=("score",))
    print(f"{top.total} rows in the table {PHOTOS_TABLE}, {photographs.rows} of them new")
    print_table(by_digit.columns, by_digit.rows, right=("images", "right"))
    print(f"{trained.model} on images it has not learnt from: {trained.metrics['test']['top1']:.1%} right")
    print(f"{seconds} s in all\n")
    print("try next:")
    for arguments, what in (
        (
            f"predict {shlex.quote(str(photos))} --model mobilenet --table {PHOTOS_TABLE}",
            "all done already: it writes nothing",
        ),
        (f'query "select status, count(*) from {PHOTOS_TABLE} group by 1"', ""),
        (f'query "from {PHOTOS_TABLE}_labels where score > 0.1" --out labels.csv', ""),
        (f"evaluate {NAME} {NAME}", "every figure, class by class"),
        (f"export {NAME} --precision int8", "a quarter of the size; published only if it is as good"),
        (f"verify {DIGITS_TABLE}", ""),
        (f'query "select label, count(*) from {SCENES}_annotations group by 1"', ""),
        ("ls", ""),
        ("ingest FOLDER --name NAME", "your own images: one folder per class, COCO, VOC, YOLO or masks"),
    ):
        comment = f"    # {what}" if what else ""
        print(f"  pixelmill {arguments}{store_flag(store)}{comment}")
