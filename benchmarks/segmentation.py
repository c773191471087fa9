"""What segmenters learn from some sixty microscope images in some minutes: U-Net by pixels, Mask R-CNN by objects.

    python -m benchmarks.segmentation FOLDER --models unet_mobilenet_v2 --ema 0.97 [--seeds 0 1 2]
    python -m benchmarks.segmentation FOLDER --models maskrcnn_mobilenet_v2 --epochs 16 --batch-size 2 --lr 0.001
    python -m benchmarks.segmentation FOLDER --models unet_resnet34 --modes scratch

FOLDER: images and one COCO file with the mask of each object, such as nuclei of the Data Science Bowl 2018 (BBBC038,
CC0): 80 images with 3,959 nuclei as images/ and instances.json. It is not part of this project. A fifth of the images
is the test split, chosen by their content. OMP_NUM_THREADS=1 makes minutes comparable.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.training import compare, options


def figures(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Of maps: IoU of all pixels and by image, Dice and boundary F1 of each class; of objects: COCO's AP."""
    if "mask_ap" in metrics:
        return {
            "mask AP": metrics["mask_ap"],
            "mask AP50": metrics["mask_ap50"],
            "box AP50": metrics["ap50"],
            "F1": metrics["at_score"]["f1"],
        }
    of_classes = {label: each for label, each in metrics["per_class"].items() if each["boundary_f1"] is not None}
    return {
        "mIoU": metrics["miou"],
        **{
            f"{name} {label}": each[key]
            for label, each in of_classes.items()
            for name, key in (
                ("IoU", "iou"),
                ("IoU by image", "image_iou"),
                ("Dice", "dice"),
                ("boundary F1", "boundary_f1"),
            )
        },
    }


def main() -> None:
    """Prints one row per model, mode and seed."""
    parser = options(
        __doc__ or "",
        "images with a COCO file of masks",
        models=["unet_mobilenet_v2", "maskrcnn_mobilenet_v2"],
        modes=["finetune"],
        epochs=20,
        image_size=384,
        batch_size=4,
    )
    compare(parser.parse_args(), {"split": "train=.7,val=.1,test=.2"}, figures)


if __name__ == "__main__":
    main()
