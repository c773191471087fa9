"""`pixelmill demo`: import, predict and query on real photographs."""

import logging
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.command import Outcome, command, store_flag
from models.settings.common import StoreSettings
from models.settings.predict import PredictSettings

if TYPE_CHECKING:
    from tasks.predict import Summary
    from tasks.query import Answer

log = logging.getLogger("pixelmill")

TABLE = "demo"
TOP_LABELS = f"""\
select parse_filename(image) as photograph, labels[1].label as label, round(labels[1].score, 3) as score, status
from {TABLE} order by score desc nulls last"""


@command("demo")
def demo(store: StoreSettings, *, photos: Path = Path("demo-photos")) -> Outcome:
    """The whole chain on real photographs that packages ship, offline, in minutes.

    For example:

        pixelmill demo

    Copies the photographs into a folder, imports a pretrained MobileNetV2 into the
    store, predicts all of them into the table `demo` and shows the top labels. A
    second demo finds everything done.

    Args:
        photos: The folder that receives the photographs.
    """
    from flows.console import watching
    from flows.order import predict_directly
    from tasks import demo as task
    from tasks.adopt import import_model
    from tasks.query import ask

    start = time.monotonic()
    with watching() as watch:
        count = task.write_photographs(photos)
        log.info("%s", f"1/3 {count} files in {photos}: photographs, and three that are none")
        log.info(
            "%s", f"2/3 importing {task.ARCHITECTURE} with pretrained weights; PyTorch loads, exports and compares"
        )
        card = import_model(
            f"torchvision:{task.ARCHITECTURE}", "mobilenet", store.store, weights=str(task.weights_file() or "default")
        )
        log.info("%s", f"3/3 predicting with {card.reference}")
        settings = PredictSettings(source=str(photos), model=card.reference, table=TABLE)
        summary = predict_directly(store.store, settings, watch)
    top = ask(store.store, TOP_LABELS)
    seconds = round(time.monotonic() - start, 1)

    def result() -> dict[str, Any]:
        rows = [dict(zip(top.columns, row, strict=True)) for row in top.rows]
        return {"model": card.reference, "table": TABLE, "photos": str(photos), "seconds": seconds, "top": rows}

    return Outcome(result, lambda: _show(top, summary, photos, seconds, store.store))


def _show(top: "Answer", summary: "Summary", photos: Path, seconds: float, store: str) -> None:
    from flows.console import print_table

    print_table(top.columns, top.rows, right=("score",))
    print(f"{top.total} rows in the table {TABLE}, {summary.rows} of them new; {seconds} s in all\n")
    print("try next:")
    for arguments, what in (
        (
            f"predict {shlex.quote(str(photos))} --model mobilenet --table {TABLE}",
            "all done already: it writes nothing",
        ),
        (f'query "select status, count(*) from {TABLE} group by 1"', ""),
        (f'query "from {TABLE}_labels where score > 0.1" --out labels.csv', ""),
        (f"verify {TABLE}", ""),
        ("ls", ""),
        ("predict FOLDER --model mobilenet --table NAME", "your own images"),
    ):
        comment = f"    # {what}" if what else ""
        print(f"  pixelmill {arguments}{store_flag(store)}{comment}")
