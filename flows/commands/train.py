"""`pixelmill train`: transfer learning."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.commands.command import Direct, Outcome, command, store_flag, use_of
from models.settings.fields import StoreSettings
from models.settings.train import TrainSettings

if TYPE_CHECKING:
    from tasks.train import Trained


@command("train", TrainSettings, positional="dataset")
def train(settings: TrainSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """Fine-tune a pretrained model on a data set, export it to ONNX and measure it.

    For example:

        pixelmill train flowers --model mobilenet_v2 --name flowers --mode features
        pixelmill train flowers --model resnet50 --name flowers --epochs 20 --lr auto
        pixelmill train flowers --model resnet50 --name flowers --weights flowers@production \\
            --promote-if-better

    The model is published only when its ONNX file gives what PyTorch gives. Stop it at
    any moment and run it again: it goes on after the last whole epoch. The same data
    set, settings and seed give the same model, which is then not trained again.
    """
    from flows.running import run_step

    trained = run_step("train", store.store, settings, direct)
    return Outcome(lambda: _result(trained), lambda: _show(trained, settings, store.store))


def _result(trained: "Trained") -> dict:
    return asdict(trained)


def _show(trained: "Trained", settings: TrainSettings, store: str) -> None:
    from flows.figures import print_metrics
    from models import catalog
    from models.records import Task
    from tasks.export import EXACT_ONLY

    print_metrics(trained.metrics)
    entry = catalog.entry(settings.model)
    how = f"{trained.epochs} epochs in {trained.seconds:,.1f} s" if trained.new else "it was there already"
    mode = settings.mode or entry.usual_mode(settings.weights)
    print(f"{trained.model}: {settings.model}, {mode}, {how}")
    flag = store_flag(store)
    print("next:")
    if settings.export:
        print(f"  {use_of(settings.name, entry.task is Task.GENERATE, store)}")
        if entry.task not in EXACT_ONLY:
            print(f"  pixelmill export {settings.name} --precision int8{flag}")
    else:
        print(f"  pixelmill export {settings.name}{flag}")
    print(f"  pixelmill promote {trained.model}{flag}")
