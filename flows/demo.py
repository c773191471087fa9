"""The demo's chains: from labelled images to a table, once for each task, in commands that anyone can type.

Every step says the command that it is; see flows.shown_steps.
"""

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.shown_steps import ShownSteps
from models.settings.export import EvaluateSettings
from models.settings.ingest import IngestSettings
from models.settings.predict import PredictSettings
from models.settings.train import TrainSettings

if TYPE_CHECKING:
    from tasks.query import Answer

log = logging.getLogger("pixelmill")

DemoTask = Literal["classify", "detect", "segment"]
NUM_SCENES, NUM_UNSEEN = 240, 24
# Small inputs for small things, so that minutes are enough: the digits of the first data set have 8×8 pixels, and those
# of the scenes about 35 at this size.
DIGITS_SIZE, BOXES_SIZE, INK_SIZE = 112, 128, 96

BEST_LABELS = """\
select parse_filename(image) as photograph, labels[1].label as label, round(labels[1].score, 3) as score, status
from demo order by score desc nulls last"""
BY_DIGIT = """\
select truth.label as digit, count(*) as images, avg((labels[1].label = truth.label)::int) as "right",
       mode(labels[1].label) filter (labels[1].label <> truth.label) as "most often taken for"
from demo_digits join digits_images as truth using (image) where split = 'test' group by 1 order by 1"""
READ_DIGITS = """\
with there as (select image, string_agg(label, ' ' order by x_min) as there from unseen_annotations group by image),
     found as (select image, string_agg(label, ' ' order by x_min) as found from demo_scenes_objects group by image)
select parse_filename(image) as scene, there, found from there left join found using (image) order by scene limit 8"""
INKED = """\
select parse_filename(image) as scene, label, area::int as pixels, round(100 * area / (width * height), 1) as percent
from demo_ink_segments order by area desc limit 8"""


@dataclass(frozen=True)
class Folders:
    """Where the images that the demo makes come to lie."""

    photos: Path
    digits: Path
    scenes: Path
    unseen: Path  # scenes that no model learns from


@dataclass
class Shown:
    """What one chain leaves to be seen."""

    result: dict[str, Any]  # for --json
    answers: "list[tuple[Answer, tuple[str, ...]]]"  # of queries, and the columns that are aligned right
    verdict: str
    next: list[tuple[str, str]] = field(default_factory=list)  # commands without `pixelmill`, and what they are for


def classify(steps: ShownSteps, folders: Folders) -> Shown:
    """Photographs by a pretrained model; then a head of our own for handwritten digits."""
    from tasks import demo as shipped
    from tasks.digits import write_digits

    weights = str(shipped.weights_file() or "imagenet")
    count = shipped.write_photographs(folders.photos)
    steps.say(f"classify: {count} files in {folders.photos}: photographs, and three that are none")
    card = steps.adopt(f"torchvision:{shipped.ARCHITECTURE}", "mobilenet", weights)
    photographs = steps.predict(PredictSettings(source=str(folders.photos), model=card.name, table="demo"))
    best = steps.query(BEST_LABELS)
    steps.say(f"{write_digits(folders.digits):,} handwritten digits in {folders.digits}, a folder per class")
    dataset = steps.ingest(IngestSettings(source=str(folders.digits), name="digits"))
    model = steps.train(
        TrainSettings(
            dataset="digits",
            model=shipped.ARCHITECTURE,
            name="digits",
            mode="features",
            weights=weights,
            image_size=DIGITS_SIZE,
            flip=False,
        )
    )
    evaluation = steps.evaluate(EvaluateSettings(model="digits", dataset="digits"))
    steps.predict(PredictSettings(source="digits", model="digits", table="demo_digits"))
    by_digit = steps.query(BY_DIGIT)
    return Shown(
        result={
            "model": card.reference,
            "table": "demo",
            "photos": str(folders.photos),
            "top": records(best),
            "dataset": dataset,
            "trained": model,
            "metrics": evaluation.metrics,
            "digits": records(by_digit),
        },
        answers=[(best, ("score",)), (by_digit, ("images", "right"))],
        verdict=f"{best.total} rows in the table demo, {photographs.rows} of them new; "
        f"{model} on images that it has not learnt from: {evaluation.metrics['top1']:.1%} right",
        next=[
            (
                f"predict {shlex.quote(str(folders.photos))} --model {card.name} --table demo",
                "done already: it writes nothing",
            ),
            ('query "select status, count(*) from demo group by 1"', ""),
            ('query "from demo_labels where score > 0.1" --out labels.csv', ""),
            ("evaluate digits digits", "every figure, class by class"),
            ("export digits --precision int8", "a quarter of the size; published only if it is as good"),
            ("verify demo_digits", ""),
        ],
    )


def detect(steps: ShownSteps, folders: Folders) -> Shown:
    """Our own YOLO finds digits on photographs."""
    from tasks import demo as shipped

    _write_scenes(steps, folders, "detect")
    weights = shipped.weights_file()
    steps.say(
        f"yolo_n starts from a {shipped.ARCHITECTURE} that knows ImageNet, which a package here ships"
        if weights
        else f"yolo_n starts from random weights: no package here ships those of {shipped.ARCHITECTURE}"
    )
    # Their boxes are known too, so that what is there can be laid beside what is found.
    steps.ingest(IngestSettings(source=str(folders.unseen), name="unseen", split="test=1"))
    return _learn(
        steps,
        folders,
        IngestSettings(source=str(folders.scenes), name="scenes"),
        TrainSettings(
            dataset="scenes",
            model="yolo_n",
            name="scenes",
            mode="finetune" if weights else "scratch",
            weights=str(weights) if weights else None,
            image_size=BOXES_SIZE,
            epochs=10,
            augment="light",
            flip=False,
        ),
        READ_DIGITS,
        right=(),
        verdict=lambda metrics: f"average precision {metrics['ap']:.3f}, at IoU .5 {metrics['ap50']:.3f}",
        more=[
            ('query "from demo_scenes_objects where score > 0.5" --out boxes.csv', "in pixels of the originals"),
            ("export-coco demo_scenes --out found.json --results", "for pycocotools, FiftyOne, CVAT"),
            ("export scenes --precision int8", "published only if its average precision holds"),
        ],
    )


def segment(steps: ShownSteps, folders: Folders) -> Shown:
    """A U-Net marks every pixel that is ink."""
    _write_scenes(steps, folders, "segment")
    steps.say("unet_resnet34 starts from random weights: no package ships pretrained ones")
    return _learn(
        steps,
        folders,
        IngestSettings(source=str(folders.scenes), name="ink", format="masks"),
        TrainSettings(
            dataset="ink",
            model="unet_resnet34",
            name="ink",
            mode="scratch",
            image_size=INK_SIZE,
            epochs=4,
            augment="light",
            flip=False,
        ),
        INKED,
        right=("pixels", "percent"),
        verdict=lambda metrics: f"mean IoU {metrics['miou']:.3f}, boundary F1 {metrics['boundary_f1']:.3f}",
        more=[
            ('query "select image, mask from demo_ink_segments" --out masks.csv', "masks as COCO run lengths"),
            ("evaluate ink ink", "every figure, class by class"),
        ],
    )


CHAINS: dict[DemoTask, Callable[[ShownSteps, Folders], Shown]] = {
    "classify": classify,
    "detect": detect,
    "segment": segment,
}


def _write_scenes(steps: ShownSteps, folders: Folders, task: DemoTask) -> None:
    from tasks.digits import write_scenes

    digits = write_scenes(folders.scenes, NUM_SCENES)
    write_scenes(folders.unseen, NUM_UNSEEN, seed=1)
    steps.say(
        f"{task}: {NUM_SCENES} photographs with {digits:,} digits on them in {folders.scenes}, "
        f"labelled with boxes (COCO) and with masks; {NUM_UNSEEN} more in {folders.unseen}"
    )


def _learn(
    steps: ShownSteps,
    folders: Folders,
    ingest: IngestSettings,
    train: TrainSettings,
    sql: str,
    *,
    right: tuple[str, ...],
    verdict: Callable[[dict[str, Any]], str],
    more: list[tuple[str, str]],
) -> Shown:
    """Ingest, train with its export, evaluate, predict the unseen scenes, ask the table."""
    table = f"demo_{train.name}"
    dataset = steps.ingest(ingest)
    model = steps.train(train)
    metrics = steps.evaluate(EvaluateSettings(model=train.name, dataset=ingest.name)).metrics
    unseen = str(folders.unseen / "images")
    steps.predict(PredictSettings(source=unseen, model=train.name, table=table))
    answer = steps.query(sql)
    return Shown(
        result={"dataset": dataset, "trained": model, "metrics": metrics, "table": table, "found": records(answer)},
        answers=[(answer, right)],
        verdict=f"{model} on {metrics['images']} scenes that it has not learnt from: {verdict(metrics)}",
        next=[
            (f'query "select label, count(*) from {ingest.name}_annotations group by 1"', "what was labelled"),
            *more,
        ],
    )


def records(answer: "Answer") -> list[dict[str, Any]]:
    """The rows of an answer, by name of their columns."""
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
