"""What detectors learn from some hundred photographs in minutes: fine-tuned, with a frozen backbone, from scratch.

    python -m benchmarks.detection FOLDER [--models yolo_n] [--modes finetune features scratch] [--seeds 0 1 2]
    python -m benchmarks.detection FOLDER --models yolo_s --weights resnet18.pth

FOLDER: the public data set BCCD (github.com/Shenggan/BCCD_Dataset, MIT), its folder BCCD with JPEGImages, Annotations
and ImageSets: 364 microscope photographs of blood with 4,886 boxes of cells and platelets, in given splits; or any
other source of boxes that `pixelmill ingest` reads. It is not part of this project. OMP_NUM_THREADS=1
makes minutes comparable.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.training import MODES, compare, options


def figures(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """COCO's average precision, of each class as well, and F1 at the score that the validation images chose."""
    return {
        "AP": metrics["ap"],
        "AP50": metrics["ap50"],
        "AP75": metrics["ap75"],
        **{f"AP50 {label}": of_class["ap50"] for label, of_class in metrics["per_class"].items()},
        "F1": metrics["at_score"]["f1"],
    }


def main() -> None:
    """Prints one row per model, mode and seed."""
    parser = options(
        __doc__ or "",
        "BCCD, or another source of boxes",
        models=["yolo_n"],
        modes=MODES,
        epochs=20,
        image_size=320,
        batch_size=8,
    )
    compare(parser.parse_args(), {}, figures)


if __name__ == "__main__":
    main()
