"""Steps that say the command that they are, as one would type it, and then do what that command does."""

import logging
import shlex
from typing import TYPE_CHECKING

from flows.commands.command import store_flag
from flows.watch import Watch
from models.settings.export import EvaluateSettings
from models.settings.fields import Settings
from models.settings.ingest import IngestSettings
from models.settings.predict import PredictSettings
from models.settings.train import TrainSettings

if TYPE_CHECKING:
    from models.card import Card
    from tasks.evaluate import Evaluation
    from tasks.predict import Summary
    from tasks.query import Answer

log = logging.getLogger("pixelmill")


class ShownSteps:
    """Of one store."""

    def __init__(self, store: str, watch: Watch):
        self.store = store
        self._watch = watch

    def say(self, text: str) -> None:
        """A line above the progress."""
        log.info("%s", text)

    def adopt(self, source: str, name: str, weights: str) -> "Card":
        """Imports pretrained weights."""
        from models.settings.adopt import ImportSettings
        from tasks.adopt import import_model

        self._say_command("import", ImportSettings(source=source, name=name, weights=weights), "source")
        return import_model(source, name, self.store, weights=weights)

    def ingest(self, settings: IngestSettings) -> str:
        """Makes a data set, and returns its NAME@VERSION."""
        from tasks.datasets.ingest import ingest

        self._say_command("ingest", settings, "source")
        return ingest(self.store, settings, self._watch.step).dataset

    def train(self, settings: TrainSettings) -> str:
        """Trains, exports and measures a model, and returns its NAME@VERSION."""
        from tasks.train import train

        self._say_command("train", settings, "dataset")
        return train(self.store, settings, self._watch.step).model

    def evaluate(self, settings: EvaluateSettings) -> "Evaluation":
        """What the model is worth on images that it has not learnt from."""
        from tasks.evaluate import evaluate

        self._say_command("evaluate", settings, "model dataset")
        return evaluate(self.store, settings, self._watch.step)

    def predict(self, settings: PredictSettings) -> "Summary":
        """Fills a table."""
        from flows.order import predict_directly

        self._say_command("predict", settings, "source")
        return predict_directly(self.store, settings, self._watch)

    def query(self, sql: str) -> "Answer":
        """Asks the tables."""
        from tasks.query import ask

        self.say(f'$ pixelmill query "{shortened(sql)}"{store_flag(self.store)}')
        return ask(self.store, sql)

    def _say_command(self, name: str, settings: Settings, positional: str) -> None:
        self.say(f"$ {typed(name, settings, positional)}{store_flag(self.store)}")


def typed(name: str, settings: Settings, positional: str) -> str:
    """The command line that stands for these settings; what is as by default is left out."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    words = ["pixelmill", name, *(str(values.pop(place)) for place in positional.split())]
    for option, value in values.items():
        flag = option.replace("_", "-")
        if value == type(settings).model_fields[option].default:
            continue
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words)


def shortened(sql: str) -> str:
    """On one line, as it is typed between double quotes."""
    return " ".join(sql.split()).replace('"', r"\"")
