"""`pixelmill demo`: the whole chain, from labelled images to a table, on what packages ship."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flows.commands.command import Outcome, command, store_flag
from models.settings.fields import StoreSettings

if TYPE_CHECKING:
    from flows.demo import Shown

_TASK = Literal["all", "classify", "detect", "segment"]


@command("demo")
def demo(
    store: StoreSettings,
    *,
    task: _TASK = "all",
    photos: Path = Path("demo-photos"),
    digits: Path = Path("demo-digits"),
    scenes: Path = Path("demo-scenes"),
    unseen: Path = Path("demo-unseen"),
) -> Outcome:
    """The whole chain on real images that packages ship, offline, in minutes.

    For example:

        pixelmill demo
        pixelmill demo --task detect

    classify: predicts photographs with a pretrained MobileNetV2, then trains a head of
    its own on 1,797 handwritten digits. detect: trains our YOLO to find such digits on
    photographs, and reads scenes that it has never seen. segment: trains a U-Net to mark
    their ink. Each goes from labelled images over an exported and measured model to a
    table and a query, and says every command, which you could type as well. A second
    demo finds everything done.

    Args:
        task: Which of the three; by default one after the other.
        photos: The folder that receives the photographs.
        digits: The folder that receives the digits.
        scenes: The folder that receives photographs with digits on them.
        unseen: The folder that receives more of them, to be predicted.
    """
    from flows.console import watching
    from flows.demo import CHAINS, Folders
    from flows.shown_steps import ShownSteps

    start = time.monotonic()
    folders = Folders(photos, digits, scenes, unseen)
    with watching() as watch:
        steps = ShownSteps(store.store, watch)
        shown = {name: chain(steps, folders) for name, chain in CHAINS.items() if task in (name, "all")}
    seconds = round(time.monotonic() - start, 1)
    return Outcome(
        lambda: {"seconds": seconds, **{name: part.result for name, part in shown.items()}},
        lambda: _show(list(shown.values()), seconds, store.store),
    )


def _show(parts: "list[Shown]", seconds: float, store: str) -> None:
    from flows.console import print_table

    for part in parts:
        for answer, right in part.answers:
            print_table(answer.columns, answer.rows, right=right)
        print(f"{part.verdict}\n")
    print(f"{seconds} s in all\n")
    print("try next:")
    suggested = [line for part in parts for line in part.next]
    suggested += [
        ("ls", ""),
        ("ingest FOLDER --name NAME", "your own images: a folder per class, COCO, VOC, YOLO or masks"),
    ]
    for arguments, what in suggested:
        comment = f"    # {what}" if what else ""
        print(f"  pixelmill {arguments}{store_flag(store)}{comment}")
