"""The demo: each chain from labelled images to a table, and the commands that it shows."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from flows.__main__ import main, make_app
from flows.demo import CHAINS, Shown
from flows.shown_steps import ShownSteps, typed
from models.errors import PixelmillError
from models.settings.ingest import IngestSettings
from models.settings.train import TrainSettings
from tasks import adopt, demo, digits
from tasks.registry import resolve
from tests.tiny_models import publish_classifier

FIGURES = {"detect": ("ap", "ap50"), "segment": ("miou", "boundary_f1")}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, and a demo that is as small as can be."""
    monkeypatch.delenv("PIXELMILL_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("PIXELMILL_TRAINING", str(tmp_path / "training"))
    monkeypatch.setattr("flows.demo.NUM_SCENES", 8)
    monkeypatch.setattr("flows.demo.NUM_UNSEEN", 2)
    return tmp_path


@pytest.fixture
def hurried(monkeypatch) -> None:
    """One epoch on smallest inputs, whatever the demo asks for."""
    train = ShownSteps.train
    quick = {"epochs": 1, "image_size": 64, "batch_size": 4}
    monkeypatch.setattr(ShownSteps, "train", lambda self, settings: train(self, settings.model_copy(update=quick)))


def commands(err: str) -> list[list[str]]:
    """What was said to be typed."""
    return [shlex.split(line)[1:] for line in re.findall(r"^\$ (pixelmill .*)$", err, re.MULTILINE)]


def test_classify(here, capsys, monkeypatch):
    publish_classifier(str(here / "mill"), here)
    monkeypatch.setattr(adopt, "import_model", lambda source, name, store, weights: resolve(store, "tiny"))
    monkeypatch.setattr(digits, "write_digits", partial(digits.write_digits, per_class=10))
    assert main(["demo", "--task", "classify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["classify"]
    shown = {row["photograph"]: row["status"] for row in result["top"]}
    assert {"chelsea.png": "ok", "empty.jpg": "empty", "letter.jpg": "unsupported"}.items() <= shown.items()
    assert result["metrics"]["top1"] > 0.5
    assert sum(row["images"] for row in result["digits"]) == result["metrics"]["images"]
    right = sum(row["images"] * row["right"] for row in result["digits"]) / result["metrics"]["images"]
    assert right == pytest.approx(result["metrics"]["top1"], abs=0.11)  # of ten images; engines may differ
    assert main(["demo", "--task", "classify"]) == 0
    out, err = capsys.readouterr()
    assert f"{len(shown)} rows in the table demo, 0 of them new" in out
    assert f"{len(shown)} files in demo-photos" in err
    assert f"{result['trained']} was trained so before: nothing to do" in err
    for command in ("query", "verify", "ls", "export", "evaluate"):
        assert f"\n  pixelmill {command}" in out


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_model_of_scenes(here, hurried, capsys, task):
    assert main(["demo", "--task", task]) == 0
    out, err = capsys.readouterr()
    assert "on 1 scenes that it has not learnt from" in out
    said = commands(err)
    assert [words[0] for words in said][-5:] == ["ingest", "train", "evaluate", "predict", "query"]
    suggested = re.findall(r"^  pixelmill (.*?)(?:    # .*)?$", out, re.MULTILINE)
    for line in suggested:
        make_app().parse_args(shlex.split(line), exit_on_error=False, print_error=False)

    # Typed by hand, each finds what the demo did.
    for words in said:
        direct = [] if words[0] == "query" else ["--direct"]
        assert main([*words, *direct]) == 0
        assert "Error" not in capsys.readouterr().out
    assert main(["demo", "--task", task, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)[task]
    assert f"{result['trained']} was trained so before: nothing to do" in err
    assert set(FIGURES[task]) <= result["metrics"].keys()
    assert main(["query", f"select count(*) as rows from {result['table']}", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"rows": 2}]


def test_without_weights_the_detector_starts_from_nothing(here, monkeypatch, capsys):
    asked = []

    def stop(self, settings):
        asked.append(settings)
        raise PixelmillError("enough")

    monkeypatch.setattr(demo, "weights_file", lambda: None)
    monkeypatch.setattr(ShownSteps, "train", stop)
    assert main(["demo", "--task", "detect"]) == 1
    assert (asked[0].mode, asked[0].weights) == ("scratch", None)
    assert "random weights" in capsys.readouterr().err


def test_all_is_every_task(here, monkeypatch, capsys):
    for name in CHAINS:
        monkeypatch.setitem(CHAINS, name, lambda steps, folders, name=name: Shown({"name": name}, [], f"did {name}"))
    assert main(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("seconds") >= 0
    assert result == {name: {"name": name} for name in ("classify", "detect", "segment")}
    assert main(["demo", "--task", "segment"]) == 0
    out = capsys.readouterr().out
    assert "did segment" in out
    assert "did detect" not in out


@pytest.mark.parametrize(
    ("settings", "positional", "line"),
    [
        pytest.param(
            IngestSettings(source="a b", name="n"), "source", "pixelmill ingest 'a b' --name n", id="as-by-default"
        ),
        pytest.param(
            TrainSettings(dataset="d", model="unet", name="n", flip=False, balance=True, lr=0.5),
            "dataset",
            "pixelmill train d --model unet --lr 0.5 --no-flip --balance --name n",
            id="switched-on-and-off",
        ),
    ],
)
def test_settings_as_they_are_typed(settings, positional, line):
    assert typed(line.split()[1], settings, positional) == line
