"""Runs what a command asks for, recorded by Prefect or directly, while the terminal shows how far it is."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from flows import chain
from flows.chain import Chain
from flows.console import watching
from models.settings.fields import Settings
from models.settings.pipeline import PipelineSettings

# The functions (store, settings, report) behind the flows of one step.
STEPS = {
    "ingest": "tasks.datasets.ingest",
    "train": "tasks.train",
    "export": "tasks.export",
    "evaluate": "tasks.evaluate",
    "generate": "tasks.generate",
    "vacuum": "tasks.vacuum",
}


def run_step(name: str, store: str, settings: Settings, direct: bool) -> Any:
    """Runs one of STEPS and returns what it gives."""
    with watching() as watch:
        if not direct:
            from flows.embedded import run_recorded

            return run_recorded(name, store, settings, watch)
        step: Callable[..., Any] = getattr(import_module(STEPS[name]), name)
        return step(store, settings, watch.step)


def run_pipeline(store: str, settings: PipelineSettings, direct: bool) -> Chain:
    """Runs all steps of the pipeline."""
    with watching() as watch:
        if not direct:
            from flows.embedded import run_recorded

            return run_recorded("pipeline", store, settings, watch)
        from flows.order import predict_directly

        predict = partial(predict_directly, watch=watch)
        return chain.pipeline(store, settings, chain.plain_steps(watch.step, predict))
