"""`pixelmill pipeline`: from a labelled source to a table."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.commands.command import Direct, Outcome, command
from models.settings.fields import StoreSettings
from models.settings.pipeline import PipelineSettings

if TYPE_CHECKING:
    from flows.chain import Chain


@command("pipeline", PipelineSettings, positional="source")
def pipeline(settings: PipelineSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """From a labelled source to a table of predictions: ingest, train, export, evaluate, predict.

    For example:

        pixelmill pipeline ./flowers --name flowers --model mobilenet_v2 --mode features \\
            --images s3://bucket/photos --table photos

    A step whose result is there already is passed over, so running it again goes on
    where it was, and adds only images that are new.
    """
    from flows.running import run_pipeline

    done = run_pipeline(store.store, settings, direct)
    return Outcome(lambda: asdict(done), lambda: _show(done, store.store))


def _show(done: "Chain", store: str) -> None:
    from flows.commands.predict import show_summary
    from flows.figures import print_metrics

    print_metrics(done.train.metrics)
    print(f"data set {done.ingest.dataset} · model {done.export.model}")
    show_summary(done.predict, store)
