"""Exactly once, on local disk: kills at every step, runs in the midst of each other, random rounds, and sabotage."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from protocol_rounds import (
    Killed,
    Life,
    LocalWorld,
    MortalLocal,
    Violation,
    World,
    Worlds,
    interrupt_everywhere,
    kill_everywhere,
    picture,
    predict,
    random_round,
)

from models.records import ListedImage
from tasks import plan
from tasks.storage import local_path
from tasks.table import Shard, Table


def new_tables(tmp_path: Path, make_storage: type[MortalLocal] = MortalLocal) -> Worlds:
    """Worlds in which nothing was predicted yet, all over the same images."""
    first = LocalWorld(tmp_path / "source", tmp_path / "store")
    first.fill(random.Random(1))

    def make(number: int) -> World:
        world = LocalWorld(tmp_path / "source", tmp_path / f"store-{number}", make_storage)
        world.history = first.history
        return world

    return make


def used_tables(tmp_path: Path, make_storage: type[MortalLocal] = MortalLocal) -> Worlds:
    """Worlds with rows, open shards, images that could not be read, and images that changed since."""
    rng = random.Random(2)
    first = LocalWorld(tmp_path / "source", tmp_path / "store")
    first.fill(rng)
    names = first.names()
    for name, mishap in zip(names, ("gets no answer", "changes", "vanishes"), strict=False):
        first.mishaps[first.version(name)[0]] = mishap
    with pytest.raises(Killed):
        predict(first, Life(120))
    first.mishaps.clear()
    first.put("new.png", picture(rng))
    first.put(names[4], picture(rng))
    first.remove(names[5])

    def make(number: int) -> World:
        store = tmp_path / f"store-{number}"
        shutil.copytree(first.store, store)
        world = LocalWorld(tmp_path / "source", store, make_storage)
        world.history, world.gone, world.refused = first.history, first.gone, first.refused
        return world

    return make


def test_kill_at_every_step_of_a_first_run(tmp_path: Path) -> None:
    assert kill_everywhere(new_tables(tmp_path), range(1, 1000)) > 100


def test_kill_at_every_fourth_step_of_a_later_run(tmp_path: Path) -> None:
    assert kill_everywhere(used_tables(tmp_path), range(1, 1000, 4), retry_unreadable=True) > 18


def test_another_run_in_the_midst_of_a_first_run(tmp_path: Path) -> None:
    assert interrupt_everywhere(new_tables(tmp_path), range(1, 1000, 6)) > 18


def test_another_run_in_the_midst_of_a_later_run(tmp_path: Path) -> None:
    assert interrupt_everywhere(used_tables(tmp_path), range(2, 1000, 6), retry_unreadable=True) > 12


@pytest.mark.parametrize("seed", range(5))
def test_random_rounds(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    world = LocalWorld(tmp_path / "source", tmp_path / "store")
    world.fill(rng)
    for _ in range(4):
        random_round(world, rng)


# Each sabotage breaks one rule of the protocol; the rounds above must notice.


class WritesInPlace(MortalLocal):
    """Streams to the final name instead of linking a complete file to it."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        if self.exists(uri):
            return False
        path = Path(local_path(uri))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            self.write_slowly(file, data)
        return True

    def put_file_if_absent(self, uri: str, path: Path) -> bool:
        return self.put_if_absent(uri, path.read_bytes())


class Overwrites(MortalLocal):
    """Replaces what another run has published."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        self.replace(uri, data)
        return True

    def put_file_if_absent(self, uri: str, path: Path) -> bool:
        return self.put_if_absent(uri, path.read_bytes())


class LooksBeforeItWrites(Overwrites):
    """Puts if absent in two steps, between which another run may write."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        return not self.exists(uri) and super().put_if_absent(uri, data)


class CachesListings(MortalLocal):
    """Answers from what it listed earlier."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._listings: dict[str, list[str]] = {}

    def names(self, uri: str) -> list[str]:
        return self._listings.setdefault(uri, super().names(uri))


class ReadsWhateverIsThere(MortalLocal):
    """Does not compare an image with its fingerprint."""

    def read_image(self, image: ListedImage, max_bytes: int) -> bytes:
        if self._world is not None:
            self._world.before_read(image)
        path = Path(local_path(image.image))
        return path.read_bytes() if path.exists() else b""


class DropsARow(Table):
    """Commits fewer rows than were claimed."""

    def commit(self, model: str, shard: Shard, rows: pa.Table, statistics: dict[str, Any]) -> bool:
        return super().commit(model, shard, rows.slice(1), statistics)


class ForgetsOlderPlans(Table):
    """Works only on what the newest plan claims."""

    def open_shards(self, model: str) -> list[Shard]:
        newest = max(self.plan_numbers(), default=0)
        return [shard for shard in super().open_shards(model) if shard.plan == newest]


def _kills(worlds: Worlds, **run: Any) -> None:
    kill_everywhere(worlds, range(1, 200), **run)


def _encounters(worlds: Worlds, **run: Any) -> None:
    interrupt_everywhere(worlds, range(20, 200, 2), **run)


def _changing_sources(worlds: Worlds, **run: Any) -> None:
    rng = random.Random(0)
    world = worlds(0)
    for _ in range(10):
        random_round(world, rng, **run)


@pytest.mark.parametrize(
    ("make_storage", "make_table", "rounds", "finding"),
    [
        pytest.param(WritesInPlace, Table, _kills, "torn", id="writes before the part is complete"),
        pytest.param(Overwrites, Table, _encounters, "was changed", id="overwrites instead of put-if-absent"),
        pytest.param(LooksBeforeItWrites, Table, _encounters, "was changed", id="looks, then writes"),
        pytest.param(CachesListings, Table, _kills, "open|steps|no row", id="caches listings"),
        pytest.param(ReadsWhateverIsThere, Table, _changing_sources, "became", id="reads another version"),
        pytest.param(MortalLocal, DropsARow, _kills, "claimed images", id="commits fewer rows"),
    ],
)
def test_sabotage_is_noticed(
    make_storage: type[MortalLocal],
    make_table: type[Table],
    rounds: Callable[..., None],
    finding: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(Violation, match=finding):
        rounds(new_tables(tmp_path, make_storage), make_table=make_table)


def test_a_lost_plan_race_without_another_subtraction_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subtract, answers = plan._subtract, {}

    def once(database: Any, *more: Any) -> tuple[int, int]:
        if database not in answers:
            answers[database] = subtract(database, *more)
        return answers[database]

    monkeypatch.setattr(plan, "_subtract", once)
    with pytest.raises(Violation, match="claimed more than once"):
        _encounters(new_tables(tmp_path))


def test_shards_of_older_plans_forgotten_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(Violation, match=r"shards .* are open"):
        _kills(used_tables(tmp_path), make_table=ForgetsOlderPlans)


def test_a_retry_claimed_while_it_is_open_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(database: Any, table: Table, model: str) -> None:
        database.execute(
            "INSERT INTO plan SELECT image, fingerprint, bytes, max(attempt) + 1 FROM listing "
            "JOIN all_claims USING (image, fingerprint) WHERE image LIKE '%00.png' GROUP BY ALL"
        )

    worlds = used_tables(tmp_path)
    monkeypatch.setattr(plan, "_add_retries", add)
    with pytest.raises(Violation, match=r"attempt \d at"):
        _encounters(worlds, retry_unreadable=True)
