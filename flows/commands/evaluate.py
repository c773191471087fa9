"""`pixelmill evaluate`: a model's metrics on a data set."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.commands.command import Direct, Outcome, command, store_flag
from models.settings.export import EvaluateSettings
from models.settings.fields import StoreSettings

if TYPE_CHECKING:
    from tasks.evaluate import Evaluation


@command("evaluate", EvaluateSettings, positional="model dataset")
def evaluate(settings: EvaluateSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """Measure a model on a split of a data set.

    For example:

        pixelmill evaluate flowers flowers
        pixelmill evaluate flowers@production flowers --split val --table checked

    The ONNX file answers, through the same path that predicts in bulk, so the figures
    hold for the tables. They are kept beside the model: measuring the same again costs
    nothing.
    """
    from flows.running import run_step

    evaluation = run_step("evaluate", store.store, settings, direct)
    return Outcome(lambda: asdict(evaluation), lambda: _show(evaluation, settings, store.store))


def _show(evaluation: "Evaluation", settings: EvaluateSettings, store: str) -> None:
    from flows.figures import print_split

    print_split(evaluation.metrics)
    print(f"{evaluation.model} on {evaluation.dataset}, {settings.split}")
    if settings.table:
        print("next:")
        print(f'  pixelmill query "from {settings.table} limit 10"{store_flag(store)}')
