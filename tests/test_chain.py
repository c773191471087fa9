"""The order of pipeline: each step works on exactly what the one before gave."""

from types import SimpleNamespace

import pytest

from flows import chain
from models.settings.pipeline import PipelineSettings


def settings(**changes) -> PipelineSettings:
    """As a person would give them."""
    given = {
        "source": "flowers",
        "name": "flowers",
        "model": "resnet18",
        "images": "photos",
        "table": "holiday",
        "seed": 7,
        "lr": 0.01,
        "split": "train=.5,test=.5",
        "export_precision": "int8",
        "tolerance": 0.02,
    }
    return PipelineSettings(**given | changes)


class Recorder:
    """Steps that only note what they were asked."""

    def __init__(self, splits: dict[str, int]):
        self.asked: dict[str, object] = {}
        answers = {
            "ingest": SimpleNamespace(dataset="flowers@000000000001", splits=splits),
            "train": SimpleNamespace(model="flowers@000000000002"),
            "export": SimpleNamespace(model="flowers@000000000002.int8"),
            "evaluate": SimpleNamespace(),
            "predict": SimpleNamespace(),
        }
        self.steps = chain.Steps(**{name: self._step(name, answer) for name, answer in answers.items()})

    def _step(self, name, answer):
        def step(store, settings):
            assert store == "mill"
            self.asked[name] = settings
            return answer

        return step


def test_each_step_works_on_what_the_one_before_gave():
    recorder = Recorder({"train": 8, "test": 2})
    done = chain.pipeline("mill", settings(), recorder.steps)
    asked = recorder.asked
    assert list(asked) == ["ingest", "train", "export", "evaluate", "predict"]
    assert (asked["ingest"].source, asked["ingest"].split, asked["ingest"].seed) == ("flowers", "train=.5,test=.5", 7)
    assert (asked["train"].dataset, asked["train"].name, asked["train"].lr) == ("flowers@000000000001", "flowers", 0.01)
    assert asked["train"].seed == 7
    assert (asked["export"].model, asked["export"].precision) == ("flowers@000000000002", "int8")
    assert asked["export"].tolerance == 0.02
    assert (asked["evaluate"].model, asked["evaluate"].dataset) == ("flowers@000000000002.int8", "flowers@000000000001")
    assert (asked["predict"].source, asked["predict"].model, asked["predict"].table) == (
        "photos",
        "flowers@000000000002.int8",
        "holiday",
    )
    assert done.evaluate is not None


def test_a_data_set_without_a_test_split_is_not_evaluated():
    recorder = Recorder({"train": 8})
    assert chain.pipeline("mill", settings(), recorder.steps).evaluate is None
    assert "evaluate" not in recorder.asked


@pytest.mark.parametrize("missing", ["source", "name", "model", "images", "table"])
def test_what_is_needed(missing):
    given = settings().model_dump()
    del given[missing]
    with pytest.raises(ValueError, match=missing):
        PipelineSettings(**given)
