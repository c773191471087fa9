"""`pixelmill import`: models that were made elsewhere."""

from typing import Any

from flows.commands.command import Outcome, command, store_flag
from models.settings.adopt import ImportSettings
from models.settings.fields import StoreSettings


@command("import", ImportSettings, positional="source")
def adopt(settings: ImportSettings, store: StoreSettings) -> Outcome:
    """Adopt pretrained weights or a foreign ONNX file as a model of the store.

    For example:

        pixelmill import torchvision:mobilenet_v2 --name mobilenet
        pixelmill import torchvision:resnet50 --name resnet --weights ./resnet50.pth
        pixelmill import ./model.onnx --name mine --card ./card.json

    torchvision's weights are exported to ONNX and published only if PyTorch and
    ONNX Runtime agree on real images; this needs the extra `train`. Doing the same
    again makes nothing new.
    """
    from tasks.adopt import import_model

    card = import_model(
        settings.source,
        settings.name,
        store.store,
        card_file=settings.card,
        weights=settings.weights,
        parity_images=settings.parity_images,
    )
    result = {"model": card.reference, "task": str(card.task), "architecture": card.architecture, "parity": card.parity}

    def show() -> None:
        print(f"{card.reference}: {card.architecture}, {card.task}, {len(card.labels):,} labels")
        if card.parity:
            print(describe(card.parity))
        print("next:")
        print(f"  pixelmill predict FOLDER --model {card.name} --table NAME{store_flag(store.store)}")

    return Outcome(lambda: result, show)


def describe(parity: dict[str, Any]) -> str:
    """What was checked before publishing; a foreign file has no PyTorch model to be held against."""
    largest = ", ".join(f"{what} {difference:.2g}" for what, difference in parity["largest"].items())
    checked = "agrees with PyTorch" if "torch" in parity else "answers each image alike, alone or in a batch,"
    shown = f"{len(parity['images'])} images" if "images" in parity else f"{parity['latents']} latents"
    return f"{checked} on {shown} ({parity['compared']} findings); largest differences: {largest}"
