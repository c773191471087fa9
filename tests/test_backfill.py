"""What a backfill finds, what is left of it, and how it goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows import partitions
from flows.__main__ import main
from flows.catch_up import may_meet
from models.errors import NotFound, PixelmillError, UsageError
from models.progress import silent
from models.settings.backfill import BackfillSettings
from models.settings.predict import PredictSettings
from tasks import predict as steps
from tasks.backfill import done_of, survey
from tasks.partitions import find_partitions
from tasks.past_rate import covered_seconds, past_rate
from tasks.storage import join, open_storage
from tasks.table import Table
from tests.tiny_models import publish_classifier

MODEL = "tiny@000000000000"
FOLDERS = ("date=2026-01-30", "date=2026-01-31", "date=2026-02-01", "year=2025/month=12", "year=2026/month=01", "misc")


def given(source: str, partitions: str, **more: Any) -> BackfillSettings:
    return BackfillSettings(source=source, model="tiny", table="t", partitions=partitions, **more)


# --- which partitions there are


@pytest.fixture
def source(root: str) -> str:
    """A file in each of FOLDERS, one beside them, and a hidden folder."""
    for name in (*(f"{folder}/a.jpg" for folder in FOLDERS), "beside.jpg", ".date=2026-01-30/a.jpg"):
        open_storage(root).put_if_absent(join(root, *name.split("/")), b"no image")
    return root


@pytest.mark.parametrize(
    ("pattern", "bounds", "found"),
    [
        pytest.param("misc", {}, ["misc"], id="literal"),
        pytest.param("date=2026-01-*", {}, list(FOLDERS[:2]), id="star"),
        pytest.param("2026-01-31..2026-02-01", {}, list(FOLDERS[1:3]), id="range"),
        pytest.param("year=*/month=*", {}, list(FOLDERS[3:5]), id="nested"),
        pytest.param("year=2026/month=*", {}, [FOLDERS[4]], id="nested, the first literal"),
        pytest.param("date=*", {"from_": "2026-01-31"}, list(FOLDERS[1:3]), id="from"),
        pytest.param("date=*", {"to": "2026-01"}, list(FOLDERS[:2]), id="to"),
        pytest.param("year=*/month=*", {"from_": "2025-11", "to": "2025"}, [FOLDERS[3]], id="nested, between"),
        pytest.param("*", {}, [*FOLDERS[:3], "misc", "year=2025", "year=2026"], id="all folders, no file"),
    ],
)
def test_find_partitions(source, pattern, bounds, found):
    assert find_partitions(source, given(source, pattern, **bounds)) == sorted(found)


def test_images_are_not_listed(source, monkeypatch):
    monkeypatch.setattr(type(open_storage(source)), "walk", lambda *values, **named: pytest.fail("it lists images"))
    assert len(find_partitions(source, given(source, "date=*"))) == 3


@pytest.mark.parametrize(
    ("pattern", "bounds", "error", "complaint"),
    [
        pytest.param("day=*", {}, NotFound, "fits 'day=.*'; folders there: date=2026-01-30", id="none"),
        pytest.param("beside.jpg", {}, NotFound, "no folder below .* fits 'beside.jpg'", id="a file"),
        pytest.param("date=*", {"from_": "2027"}, NotFound, "none of 3 .* between 2027", id="none between"),
        pytest.param("misc", {"from_": "2026"}, UsageError, "with a date.*; misc has none", id="no date"),
    ],
)
def test_nothing_to_find(source, pattern, bounds, error, complaint):
    with pytest.raises(error, match=complaint):
        find_partitions(source, given(source, pattern, **bounds))


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        pytest.param("misc\n\n# a comment\ndate=2026-01-*  # January\n", [*FOLDERS[:2], "misc"], id="patterns"),
        pytest.param("misc\nmisc/\n", ["misc"], id="twice"),
        pytest.param("\n# nothing\n", "names no partition", id="empty"),
        pytest.param("misc\nnowhere\n", "fits 'nowhere'", id="one that is not there"),
        pytest.param("misc\n/absolute\n", "line 2: expected folder names", id="wrong"),
        pytest.param("year=2026\nyear=2026/month=01\n", "lies within partition year=2026", id="within each other"),
    ],
)
def test_a_list_of_partitions(source, tmp_path, lines, found):
    (tmp_path / "list.txt").write_text(lines)
    settings = given(source, str(tmp_path / "list.txt"))
    if isinstance(found, list):
        assert find_partitions(source, settings) == found
    else:
        with pytest.raises(UsageError, match=found):
            find_partitions(source, settings)


# --- what is left of each


class Mill:
    """A store with a tiny model, and photographs of three days."""

    days = ("date=2026-01-01", "date=2026-01-02", "date=2026-01-03")

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = str(folder / "mill")
        self.photos = folder / "photos"
        publish_classifier(self.store, folder)
        for day in self.days:
            self.add(day, 4)

    def add(self, day: str, count: int) -> None:
        folder = self.photos / day
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(list(folder.iterdir())), count + len(list(folder.iterdir()))):
            pixels = np.random.default_rng(hash((day, number)) % 2**32).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03}.jpg")

    def settings(self, pattern: str = "date=*", **more: Any) -> BackfillSettings:
        return given(str(self.photos), pattern, shard_size=2, **more)

    def claim(self, source: str = "", **more: Any) -> steps.Planned:
        """A plan of a run that then does nothing."""
        place = {"source": str(self.photos / source), "model": "tiny", "table": "t", "shard_size": 2}
        others = more.pop("others", "help")
        return steps.plan(self.store, PredictSettings(**place | more), others=others)

    def left(self, pattern: str = "date=*") -> list[tuple[int, int, int]]:
        """Images, new and open ones of each partition."""
        found = survey(self.store, self.settings(pattern), silent)
        return [(one.images, one.new, one.open) for one in found.partitions]

    def backfill(self, predict: Callable[..., Any], **more: Any) -> partitions.Backfilled:
        return partitions.backfill(
            self.store,
            self.settings(**more),
            lambda store, settings: survey(store, settings, silent),
            partitions.run_here(predict),
            silent,
        )

    @property
    def table(self) -> Table:
        return Table(self.store, "t")


@pytest.fixture
def mill(tmp_path: Path) -> Mill:
    return Mill(tmp_path)


def fake(store: str, settings: PredictSettings) -> None:
    """Predicts without a model: each open shard becomes an empty part."""
    planned = steps.plan(store, settings)
    table = Table(store, settings.table)
    for shard in table.open_shards(planned.model, planned.plans):
        table.storage.put_if_absent(table.part_uri(planned.model, shard), b"")


def test_everything_is_new_in_a_table_that_is_not_there(mill):
    assert mill.left() == [(4, 4, 0)] * 3
    assert not mill.table.exists()


def test_an_empty_partition_has_no_images(mill):
    (mill.photos / "date=2026-01-04").mkdir()
    assert mill.left() == [(4, 4, 0)] * 3 + [(0, 0, 0)]


def test_what_is_claimed_is_open_until_it_is_done(mill):
    mill.claim(mill.days[1])
    assert mill.left() == [(4, 4, 0), (4, 0, 4), (4, 4, 0)]
    (head,) = mill.table.heads()
    mill.table.storage.put_if_absent(mill.table.part_uri(MODEL, head.shards[0]), b"")
    assert mill.left() == [(4, 4, 0), (4, 0, 2), (4, 4, 0)]


def test_another_model_counts_for_itself(mill):
    mill.backfill(fake)
    assert mill.left() == [(4, 0, 0)] * 3
    publish_classifier(mill.store, mill.folder, seed=1)
    assert mill.left() == [(4, 4, 0)] * 3


def test_an_image_that_is_claimed_again_counts_once(mill):
    mill.claim(mill.days[0])
    for shard in mill.table.open_shards(MODEL):
        rows = mill.table.shard_rows(shard).append_column("status", [["missing"] * shard.images])
        mill.table.commit(MODEL, shard, rows, {})
    planned = mill.claim(mill.days[0], retry_unreadable=True)
    assert planned.planned == 4
    assert mill.left(mill.days[0]) == [(4, 0, 4)]


def test_rows_of_each_source(mill):
    mill.claim(mill.days[0])
    fake(mill.store, PredictSettings(source=str(mill.photos / mill.days[1]), model="tiny", table="t", scope="source"))
    sources = [str(mill.photos / day) for day in mill.days]
    done = done_of(mill.table, MODEL, sources)
    assert [(one.rows, one.open_shards > 0, one.plans) for one in done.values()] == [
        (0, True, 1),
        (4, False, 1),
        (0, False, 0),
    ]


# --- which shards a run takes


def plans_of(mill: Mill, **more: Any) -> tuple[int, ...] | None:
    return mill.claim(**more).plans


def test_a_run_helps_with_all_that_is_open(mill):
    mill.claim(mill.days[0])
    planned = mill.claim(mill.days[1])
    assert (planned.plans, planned.open_images) == (None, 8)


def test_a_run_that_finishes_takes_nothing_that_is_claimed_later(mill):
    mill.claim(mill.days[0])
    planned = mill.claim(mill.days[1], others="finish")
    assert (planned.plans, planned.open_images) == ((1, 2), 8)


@pytest.mark.parametrize(
    ("source", "plans", "open_images"),
    [pytest.param(Mill.days[0], (), 0, id="nothing new"), pytest.param(Mill.days[1], (2,), 4, id="something new")],
)
def test_a_run_among_others_keeps_to_what_it_claims(mill, source, plans, open_images):
    mill.claim(mill.days[0])
    planned = mill.claim(source, others="leave")
    assert (planned.plans, planned.open_images) == (plans, open_images)


def test_a_run_of_one_source_finishes_that_source(mill):
    mill.claim(mill.days[0])
    mill.claim(mill.days[1])
    planned = mill.claim(mill.days[0], scope="source")
    assert (planned.plans, planned.open_images) == ((1,), 4)


ONE = {"source": "/a", "model": "pets@production", "table": "t", "store": "/mill"}


@pytest.mark.parametrize(
    ("other", "may"),
    [
        pytest.param({}, True, id="the same"),
        pytest.param({"source": "/b"}, True, id="another source, each of the whole table"),
        pytest.param({"source": "/b", "scope": "source"}, True, id="another source, one of the whole table"),
        pytest.param({"model": "pets"}, True, id="perhaps the same version"),
        pytest.param({"model": "plants"}, False, id="another model"),
        pytest.param({"table": "u"}, False, id="another table"),
        pytest.param({"store": "/mill/"}, True, id="the same store"),
        pytest.param({"store": "/other"}, False, id="another store"),
    ],
)
def test_who_may_meet(other, may):
    assert may_meet(ONE, ONE | other) is may
    assert may_meet(ONE | other, ONE) is may


def test_runs_that_keep_to_their_sources_meet_on_the_same_alone():
    own = ONE | {"scope": "source"}
    assert may_meet(own, own)
    assert not may_meet(own, own | {"source": "/b"})


# --- the whole


def test_a_backfill_passes_over_what_is_complete(mill):
    assert [one.rows for one in mill.backfill(fake).partitions] == [4, 4, 4]
    mill.add(mill.days[1], 3)
    ran = []

    def predict(store: str, settings: PredictSettings) -> None:
        ran.append((settings.source, settings.model, settings.scope))
        fake(store, settings)

    done = mill.backfill(predict)
    assert ran == [(str(mill.photos / mill.days[1]), MODEL, "source")]
    assert [(one.rows, one.state) for one in done.partitions] == [(0, "was complete"), (3, "done"), (0, "was complete")]
    assert done.rows == 3


def test_retries_pass_over_a_partition_without_images(mill):
    """Predict would refuse it, and with that end the others."""
    (mill.photos / "date=2026-01-02x").mkdir()
    mill.backfill(fake)
    ran = []
    mill.backfill(lambda store, settings: ran.append(settings.source), retry_unreadable=True)
    assert ran == [str(mill.photos / day) for day in mill.days]


def test_a_partition_that_fails_does_not_keep_the_others(mill):
    def predict(store: str, settings: PredictSettings) -> None:
        if settings.source.endswith(mill.days[1]):
            raise PixelmillError("the storage does not answer")
        fake(store, settings)

    with pytest.raises(partitions.Unfinished, match=r"1 of 3 partitions are incomplete.*does not answer") as raised:
        mill.backfill(predict)
    assert [one.state for one in raised.value.done.partitions] == ["done", "incomplete", "done"]
    assert [one.rows for one in mill.backfill(fake).partitions] == [0, 4, 0]


def test_what_ails_three_in_a_row_ails_all(mill):
    mill.add("date=2026-01-04", 1)
    tried = []

    def predict(store: str, settings: PredictSettings) -> None:
        tried.append(settings.source)
        raise PixelmillError("the storage does not answer")

    with pytest.raises(partitions.Unfinished) as raised:
        mill.backfill(predict)
    assert len(tried) == 3
    assert raised.value.done.partitions[3].problem == "not tried, since 3 partitions in a row failed"


def test_a_mistake_ends_it_at_once(mill):
    def predict(store: str, settings: PredictSettings) -> None:
        raise UsageError("the table was written with other settings")

    with pytest.raises(UsageError, match="other settings"):
        mill.backfill(predict)


def test_what_a_larger_run_claimed_is_named(mill):
    mill.claim()
    with pytest.raises(partitions.Unfinished, match=r"a run over .*/photos claimed are still open"):
        mill.backfill(fake)


def test_slots_are_as_many_as_partitions_may_be_at_work(mill):
    slots = []

    def predict(store: str, settings: PredictSettings) -> None:
        slots.append(settings.slots)
        fake(store, settings)

    mill.backfill(predict, concurrency=3)
    assert slots == [3, 3, 3]


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        pytest.param([], 0, id="none"),
        pytest.param([(0, 4)], 4, id="one"),
        pytest.param([(0, 4), (10, 11)], 5, id="a pause between"),
        pytest.param([(0, 4), (2, 6)], 6, id="at once"),
        pytest.param([(0, 10), (2, 3)], 10, id="within"),
    ],
)
def test_covered_seconds(spans, seconds):
    from datetime import UTC, datetime

    spans = [tuple(datetime.fromtimestamp(second, UTC) for second in span) for span in spans]
    assert covered_seconds(spans) == seconds


def test_the_command(mill, capsys):
    """The real thing, as it is typed."""
    arguments = [
        "backfill",
        str(mill.photos),
        "--model",
        "tiny",
        "--table",
        "t",
        "--store",
        mill.store,
        "--shard-size",
        "2",
    ]
    plan = [*arguments, "--partitions", "2026-01-01..2026-01-02", "--plan-only", "--json"]
    assert main(plan) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [(one["images"], one["new"]) for one in planned["partitions"]] == [(4, 4), (4, 4)]
    assert (planned["rows"], planned["seconds"]) == (0, None)
    assert main([*arguments, "--partitions", "date=*", "--from", "2026-01-02", "--direct", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [(one["partition"], one["rows"]) for one in done["partitions"]] == [(day, 4) for day in mill.days[1:]]
    assert done["rows"] == 8
    assert past_rate(mill.table, MODEL) > 0
    assert main(plan) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [(one["images"], one["new"]) for one in planned["partitions"]] == [(4, 4), (4, 0)]
    assert planned["seconds"] == round(4 / past_rate(mill.table, MODEL), 1)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        pytest.param(["--partitions", "../x"], "--partitions: expected folder names below the source", id="pattern"),
        pytest.param(["--partitions", "*", "--from", "May"], "--from: expected a date like 2026-01-15", id="from"),
        pytest.param(["--partitions", "*", "--deployment", "predict"], "--deployment 'predict'", id="deployment"),
        pytest.param(["--partitions", "none*", "--direct"], "no folder below", id="nothing there"),
        pytest.param(["--partitions", "*", "--deployment", "a/b"], "set PREFECT_API_URL", id="no server"),
        pytest.param(
            ["--partitions", "date=*1", "--deployment", "a/b", "--direct"],
            "set PREFECT_API_URL",
            id="no server, directly",
        ),
    ],
)
def test_a_mistake_is_one_line(mill, capsys, wrong, complaint):
    arguments = ["backfill", str(mill.photos), "--model", "tiny", "--table", "t", "--store", mill.store]
    assert main([*arguments, *wrong]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert complaint in captured.err
