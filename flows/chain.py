"""The order of pipeline, the same with Prefect's tasks as without: from a labelled source to a table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.progress import Report
from models.settings.export import EvaluateSettings, ExportSettings
from models.settings.ingest import IngestSettings
from models.settings.pipeline import PipelineSettings
from models.settings.predict import PredictSettings
from models.settings.train import Training, TrainSettings

if TYPE_CHECKING:
    from tasks.datasets.ingest import Ingested
    from tasks.evaluate import Evaluation
    from tasks.export import Exported
    from tasks.predict import Summary
    from tasks.train import Trained


@dataclass(frozen=True)
class Steps:
    """How each step is carried out: called plainly, or as a Prefect task. Each finds by itself what it did before."""

    ingest: "Callable[[str, IngestSettings], Ingested]"
    train: "Callable[[str, TrainSettings], Trained]"
    export: "Callable[[str, ExportSettings], Exported]"
    evaluate: "Callable[[str, EvaluateSettings], Evaluation]"
    predict: "Callable[[str, PredictSettings], Summary]"


@dataclass(frozen=True)
class Chain:
    """What each step gave; the keys of `pipeline --json`."""

    ingest: "Ingested"
    train: "Trained"
    export: "Exported"
    evaluate: "Evaluation | None"  # None: the data set has no test split
    predict: "Summary"


def pipeline(store: str, settings: PipelineSettings, steps: Steps) -> Chain:
    """Ingest → train → export → evaluate → predict, each exactly on what the one before gave."""
    ingested = steps.ingest(
        store, IngestSettings(**{name: getattr(settings, name) for name in IngestSettings.model_fields})
    )
    trained = steps.train(
        store,
        TrainSettings(
            dataset=ingested.dataset,
            name=settings.name,
            **{name: getattr(settings, name) for name in Training.model_fields},
        ),
    )
    exported = steps.export(
        store,
        ExportSettings(model=trained.model, precision=settings.export_precision, tolerance=settings.tolerance),
    )
    evaluated = None
    if ingested.splits.get("test"):
        evaluated = steps.evaluate(store, EvaluateSettings(model=exported.model, dataset=ingested.dataset))
    predicted = steps.predict(
        store, PredictSettings(source=settings.images, model=exported.model, table=settings.table)
    )
    return Chain(ingested, trained, exported, evaluated, predicted)


def plain_steps(report: Report, predict: "Callable[[str, PredictSettings], Summary]") -> Steps:
    """Without Prefect: nothing is recorded."""
    from tasks.datasets.ingest import ingest
    from tasks.evaluate import evaluate
    from tasks.export import export
    from tasks.train import train

    return Steps(
        ingest=lambda store, settings: ingest(store, settings, report),
        train=lambda store, settings: train(store, settings, report),
        export=lambda store, settings: export(store, settings, report),
        evaluate=lambda store, settings: evaluate(store, settings, report),
        predict=predict,
    )
