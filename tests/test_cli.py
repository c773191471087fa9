"""The command line: flags, help, output, exit codes. Prefect is in test_flow.py."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from flows import order
from flows.__main__ import COMMANDS, main, make_app
from flows.console import Bars, print_table, shorten
from flows.watch import Lines, Overall, Seldom, describe
from models.errors import PixelmillError
from tasks.predict import Summary
from tasks.slot_report import SlotProgress
from tests.tiny_models import publish_classifier

ROOT = Path(__file__).parent.parent
PREDICT = ("predict", "photos", "--model", "tiny", "--table", "holiday", "--direct")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory without settings from outside."""
    for name in ("PIXELMILL_STORE", "PIXELMILL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def add_photos(folder: Path, count: int) -> None:
    """Small JPEGs, each of other pixels."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg")


@pytest.fixture
def mill(here) -> Path:
    """A working directory with a tiny model in ./mill and four files in ./photos, one of them broken."""
    publish_classifier(str(here / "mill"), here)
    add_photos(here / "photos", 3)
    (here / "photos" / "broken.jpg").write_bytes(b"no image")
    return here


def a_summary(**changes) -> Summary:
    """A summary of a run that went well."""
    fields = {
        "table": "holiday",
        "model": "tiny@000000000000",
        "listed": 4,
        "planned": 3,
        "skipped": 1,
        "ignored": {"hidden": 2},
        "rows": 3,
        "by_status": {"ok": 2, "corrupt": 1},
        "shards": 2,
        "open_shards": 0,
        "failures": [],
        "seconds": 2.0,
        "working_seconds": 1.0,
        "images_per_second": 1.5,
        "stages": {"read": 0.1, "decode": 0.5, "infer": 1.25},
        "limit": "model",
        "engine": "onnxruntime",
    }
    return Summary(**fields | changes)


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_teaches(here, capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert COMMANDS[command][1] in " ".join(text.split())
    assert f"pixelmill {command}" in text.partition("For example:")[2]
    assert {"--store", "--json"} <= set(text.split())


def test_help_shows_every_command_and_says_what_it_does(here, capsys):
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text and summary in text for name, (_, summary) in COMMANDS.items())


def test_help_of_predict_comes_from_the_settings(here, capsys):
    from models.settings.predict import PredictSettings

    main(["predict", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, field in PredictSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert (field.description or "?") in text
    assert "[default: 100000000]" in text
    assert "[env var: PIXELMILL_STORE]" in text


# --- usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["predcit"], "no command 'predcit'; did you mean predict? Commands: demo, ingest", id="command"),
        pytest.param(["predict"], "predict needs --source; see: pixelmill predict --help", id="nothing given"),
        pytest.param(["predict", "a"], "predict needs --model", id="missing flag"),
        pytest.param([*PREDICT, "--modle", "b"], "Unknown option: --modle. Did you mean --model?", id="unknown flag"),
        pytest.param([*PREDICT, "--top-k", "many"], 'for --top-k: unable to convert "many" into int', id="no number"),
        pytest.param([*PREDICT, "--score", "2"], "--score 2.0: input should be less than or equal to 1", id="range"),
        pytest.param([*PREDICT, "--slots", "0"], "--slots 0: input should be greater than or equal to 1", id="slots"),
        pytest.param([*PREDICT, "--engine", "x"], 'Choose from: "auto", "onnxruntime", "openvino"', id="choice"),
        pytest.param([*PREDICT, "--runner", "slurm"], "--runner 'slurm': ", id="runner"),
        pytest.param(
            ["train", "d", "--model", "m", "--name", "n", "--warmup-epochs", "inf", "--direct"],
            "--warmup-epochs inf: input should be a finite number",
            id="not finite",
        ),
        pytest.param(
            ["train", "d", "--model", "m", "--name", "n", "--seed", "99999999999999999999999", "--direct"],
            "--seed 99999999999999999999999: input should be less than 4294967296",
            id="seed too large",
        ),
        pytest.param([*PREDICT, "more"], "Unused Tokens: ['more']", id="one too many"),
        pytest.param(
            ["predict", "a", "--model", "m", "--table", "1t"], "--table '1t': string should match", id="table"
        ),
        pytest.param(
            ["generate", "m", "--count", "1", "--out", "o", "--as-dataset", "a/b"],
            "--as-dataset 'a/b': string should match",
            id="name of a data set",
        ),
        pytest.param(["predict", "", "--model", "m", "--table", "t"], "--source '': ", id="empty source"),
        pytest.param(PREDICT, "no model 'tiny' in ", id="no model"),
        pytest.param(["query", "select"], "Parser Error", id="no SQL"),
        pytest.param(["query", "select 1", "--format", "xml"], "Choose from", id="format"),
        pytest.param(
            ["query", "select 1", "--out", "rows.xml"], "ends in .csv, .json or .parquet", id="form of a file"
        ),
        pytest.param(
            ["query", "select 1", "--out", "no/rows.csv"], "cannot write no/rows.csv: no is no folder", id="no folder"
        ),
        pytest.param(["verify", "holiday"], "no table 'holiday'", id="no table"),
        pytest.param(["import", "resnet50", "--name", "r"], "expected torchvision:NAME or the path of an", id="import"),
        pytest.param(["ls", "planets"], "Choose from", id="ls"),
        pytest.param(["ls", "--store", "ftp://host/x"], "ftp:// is not supported", id="store"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(here, capsys, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pixelmill: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("place", ["source", "store", "environment"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(here, capsys, monkeypatch, place):
    uri = "s3://someone:hunter2@bucket/photos"
    source, arguments = (uri, []) if place == "source" else ("photos", [])
    if place == "store":
        arguments = ["--store", uri]
    if place == "environment":
        monkeypatch.setenv("PIXELMILL_STORE", uri)
    assert main(["predict", source, "--model", "m", "--table", "t", "--direct", *arguments]) == 2
    err = capsys.readouterr().err
    assert "credentials do not belong in a URI" in err
    assert "hunter2" not in err


def test_an_at_sign_in_a_path_is_no_credential(here, capsys):
    assert main(["predict", "s3://bucket/me@home/x", "--model", "m", "--table", "t", "--direct"]) == 2
    assert "no model 'm'" in capsys.readouterr().err


# --- outcome


def test_predict_query_verify_and_ls(mill, capsys):
    assert main([*PREDICT, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert out.count("\n") == 1
    assert "Traceback" not in err
    assert {"table", "model", "listed", "planned", "skipped", "rows", "by_status", "shards", "seconds"} <= set(result)
    assert {"images_per_second", "stages"} <= set(result)
    assert (result["rows"], result["by_status"]) == (4, {"ok": 3, "unsupported": 1})

    assert main([*PREDICT, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["planned"], again["skipped"], again["rows"]) == (0, 4, 0)

    assert main(["query", "select count(*) as n from holiday where status = 'ok'", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"columns": ["n"], "rows": [[3]]}

    assert main(["verify", "holiday", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []

    assert main(["ls", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in found["models"]] == ["tiny"]
    assert [(table["name"], table["images"], table["open_shards"]) for table in found["tables"]] == [("holiday", 4, 0)]


def test_what_people_see_of_a_run(mill, capsys):
    assert main(PREDICT) == 0
    out, _ = capsys.readouterr()
    assert "holiday ← tiny@000000000000: 4 new rows in 1 shards" in out
    assert "│ unsupported │" in out
    assert "the limit: " in out
    assert "pixelmill verify holiday\n" in out
    assert main(["ls"]) == 0
    assert "tiny_classifier" in capsys.readouterr().out
    assert main(["ls", "tables", "--store", "mill"]) == 0
    assert "holiday" in capsys.readouterr().out


def test_the_store_comes_from_the_flag_the_environment_or_here(mill, capsys, monkeypatch):
    monkeypatch.setenv("PIXELMILL_STORE", str(mill / "elsewhere"))
    assert main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == []
    assert main(["ls", "--json", "--store", "mill"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 1
    monkeypatch.delenv("PIXELMILL_STORE")
    assert main(["ls", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 1


def test_open_shards_are_exit_code_1_with_the_result(here, capsys, monkeypatch):
    summary = a_summary(open_shards=2, failures=["shard 1-3: the storage does not answer"])

    def incomplete(*_):
        raise order.Incomplete(summary)

    monkeypatch.setattr(order, "predict_directly", incomplete)
    assert main([*PREDICT, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == asdict(summary)
    assert err == (
        "pixelmill: 2 shards of holiday are still open, run the same command again: "
        "shard 1-3: the storage does not answer\n"
    )


def test_problems_of_a_table_are_exit_code_1(mill, capsys):
    main(PREDICT)
    next((mill / "mill").rglob("parts/**/*.parquet")).unlink()
    capsys.readouterr()
    assert main(["verify", "holiday"]) == 1
    out, err = capsys.readouterr()
    assert "1 of 1 shards of tiny@000000000000 are open" in out
    assert err == "pixelmill: 1 problem in table holiday\n"


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        pytest.param(PixelmillError("the bucket\nis on fire"), 1, "pixelmill: the bucket is on fire\n", id="ours"),
        pytest.param(ZeroDivisionError("oh"), 1, "unexpected ZeroDivisionError: oh; please report it", id="a bug"),
        pytest.param(KeyboardInterrupt(), 130, "interrupted; run the same command again to go on\n", id="Ctrl-C"),
    ],
)
def test_whatever_goes_wrong_is_one_line(here, capsys, monkeypatch, error, exit_code, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(order, "predict_directly", fail)
    assert main(PREDICT) == exit_code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_bug_shows_its_traceback_when_asked_to(here, capsys, monkeypatch):
    monkeypatch.setattr(order, "predict_directly", lambda *_: 1 / 0)
    monkeypatch.setenv("PIXELMILL_DEBUG", "1")
    assert main(PREDICT) == 1
    assert "Traceback" in capsys.readouterr().err


def test_prints_of_libraries_do_not_reach_the_json(here, capsys, monkeypatch):
    def noisy(*_):
        print("downloading …")
        return a_summary()

    monkeypatch.setattr(order, "predict_directly", noisy)
    assert main([*PREDICT, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == 3
    assert "downloading …" in err


# --- what a command suggests


def test_suggested_commands_name_the_store_when_they_must(mill, capsys, monkeypatch):
    assert main([*PREDICT, "--store", "my mill"]) == 2
    publish_classifier(str(mill / "my mill"), mill)
    capsys.readouterr()
    assert main([*PREDICT, "--store", "my mill"]) == 0
    assert "pixelmill verify holiday --store 'my mill'\n" in capsys.readouterr().out
    monkeypatch.setenv("PIXELMILL_STORE", "my mill")
    assert main(PREDICT) == 0
    assert "pixelmill verify holiday\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "suggested", "is_shrunk"),
    [
        pytest.param("resnet18", "pixelmill predict FOLDER --model mine --table NAME", True, id="classifier"),
        pytest.param("dcgan", "pixelmill generate mine --count 100 --out FOLDER", False, id="generator"),
        pytest.param("vae", "pixelmill predict FOLDER --model mine --table NAME", False, id="autoencoder"),
        pytest.param("cyclegan", "pixelmill predict FOLDER --model mine --table NAME", False, id="translator"),
    ],
)
def test_train_suggests_what_its_model_can_do(capsys, model, suggested, is_shrunk):
    from flows.commands.train import _show
    from models.settings.train import TrainSettings
    from tasks.train import Trained

    trained = Trained("mine@1", {"val": {"images": 1}}, 1, 1, 1.0, new=True, promoted=None)
    _show(trained, TrainSettings(dataset="pets", model=model, name="mine"), "./mill")
    shown = capsys.readouterr().out
    assert f"next:\n  {suggested}" in shown
    assert ("--precision int8" in shown) == is_shrunk


# --- the process


def run(*arguments: str, **more) -> subprocess.Popen:
    """The command in a process of its own, in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **more,
    )


def test_torch_is_never_imported_by_any_process_of_a_run(mill):
    trap = mill / "trap"
    trap.mkdir()
    (trap / "torch.py").write_text(f"open({str(mill / 'imported')!r}, 'w').close()\nraise ImportError('a trap')\n")
    process = run(*PREDICT, "--json", env={"PYTHONPATH": f"{ROOT}{os.pathsep}{trap}"})
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["rows"] == 4
    assert not (mill / "imported").exists()


def test_interrupted_and_run_again(mill):
    add_photos(mill / "photos", 200)
    arguments = [*PREDICT, "--shard-size", "1", "--json"]
    process = run(*arguments)
    deadline = time.monotonic() + 60
    while not list((mill / "mill").rglob("parts/**/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "pixelmill: interrupted; run the same command again to go on"
    assert "Traceback" not in err
    committed = len(list((mill / "mill").rglob("parts/**/*.parquet")))
    assert 0 < committed < 201
    process = run(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (json.loads(out)["planned"], json.loads(out)["rows"]) == (0, 201 - committed)


def test_a_reader_that_leaves_is_no_error(mill):
    main(PREDICT)
    process = run("query", "select range from range(200000)", "--format", "csv")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (0, "")


# --- progress


def progress(slot: int = 0, done: int = 5, total: int = 100, rate: float = 2.0, **by_status: int) -> SlotProgress:
    return SlotProgress(slot, done, total, rate, by_status, {})


@pytest.mark.parametrize(
    ("reports", "line"),
    [
        pytest.param([], "0 of 0 images", id="nothing yet"),
        pytest.param([progress(rate=0.0, done=0)], "0 of 100 images", id="no rate yet"),
        pytest.param([progress(ok=5)], "5 of 100 images · 2.0 images/s · 0:00:48 left", id="one slot"),
        pytest.param(
            [progress(ok=4, corrupt=1), progress(1, 15, rate=3.0, ok=13, empty=2)],
            "20 of 100 images · 5.0 images/s · 0:00:16 left · 1 corrupt · 2 empty",
            id="two slots",
        ),
        pytest.param(
            [progress(done=1), progress(done=8)], "8 of 100 images · 2.0 images/s · 0:00:46 left", id="latest"
        ),
        pytest.param([progress(done=120)], "120 of 100 images · 2.0 images/s · 0:00:00 left", id="helped another run"),
    ],
)
def test_progress_adds_up(reports, line):
    overall = Overall()
    for report in reports:
        overall.add(report)
    assert str(overall) == line


def test_a_quiet_line_now_and_then(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flows.watch.time.monotonic", lambda: now[0])
    watch = Lines(every_s=10.0)
    caplog.set_level("INFO", "pixelmill")
    for second in range(25):
        now[0] = float(second)
        watch.listed(second * 1000)
    assert caplog.messages == ["listed 10,000 images", "listed 20,000 images"]


def test_seldom_is_not_at_once_and_not_often(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("flows.watch.time.monotonic", lambda: now[0])
    seldom, heard = Seldom(3.0), []
    for now[0] in (100.0, 102.0, 103.5, 104.0, 107.0):
        seldom(lambda: heard.append(now[0]))
    assert heard == [103.5, 107.0]


def test_the_bar_shows_count_rate_and_what_is_not_ok():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with Bars(console) as bars:
        bars.listed(1234)
        bars.refresh()
        bars.progress(progress(ok=3, corrupt=2))
        bars.refresh()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1,234 images" in text
    assert "5/100 2.0 images/s 2 corrupt" in text


def test_describe_takes_hours():
    assert describe(0, 10_000_000, 100.0, {}) == "0 of 10,000,000 images · 100.0 images/s · 1 day, 3:46:40 left"


# --- tables


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (1234567, "1,234,567"),
        (True, "True"),
        (0.123456, "0.1235"),
        ("a\nb", "a↵b"),
        ("x" * 30, "x" * 9 + "…"),
        ([{"label": "cat"}], '[{"label"…'),
    ],
    ids=repr,
)
def test_cells_are_one_short_line(value, shown):
    assert shorten(value, 10) == shown


def test_a_table_on_a_pipe_is_as_wide_as_it_needs(capsys):
    print_table(["a [b]", "n"], [["x" * 70, 1], ["[red]", 22]], right=["n"])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "x" * 70 in lines[3]
    assert "[red]" in lines[4]
    assert lines[4].endswith(" 22 │")


@pytest.mark.parametrize(
    ("parity", "told"),
    [
        ({"images": ["a", "b"], "torch": "2.14"}, "agrees with PyTorch on 2 images"),
        ({"images": ["a", "b"]}, "answers each image alike, alone or in a batch, on 2 images"),
        ({"latents": 8, "torch": "2.14"}, "agrees with PyTorch on 8 latents"),
    ],
    ids=["trained here", "foreign", "generator"],
)
def test_import_and_export_tell_what_was_checked(parity, told):
    from flows.commands.adopt import describe

    shown = describe({"compared": 40, "largest": {"scores": 1e-4}, **parity})
    assert shown == f"{told} (40 findings); largest differences: scores 0.0001"


@pytest.mark.parametrize("flag", ["--no-flip", "--mosaic", "--no-resume"])
def test_what_may_be_on_by_default_can_be_switched_off(flag):
    words = ["train", "scenes", "--model", "yolo_n", "--name", "a", flag]
    _, bound, _ = make_app().parse_args(words, exit_on_error=False, print_error=False)
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    assert bound.arguments[name] is not flag.startswith("--no-")
