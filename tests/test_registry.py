"""Models in the store, on local disk and on S3: published whole or not at all, found, fetched."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from models.card import CARD_FILE, ONNX_FILE, WEIGHTS_FILE, Card
from models.errors import ModelError, NotFound, StorageError, UsageError
from models.imaging.geometry import ResizeRule
from models.records import Task
from tasks import registry
from tasks.storage import join, open_storage


def make_card(name: str = "birds", weights: str = "a") -> Card:
    rule = ResizeRule("crop", 8, 8, short_side=10)
    return Card(name, "", Task.CLASSIFY, "resnet18", ("owl", "wren"), rule, weights_sha256=weights).with_version()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name in (WEIGHTS_FILE, ONNX_FILE):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    return {name: tmp_path / name for name in (WEIGHTS_FILE, ONNX_FILE)}


@pytest.fixture
def store(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return join(root, "mill")


def all_files(store: str) -> dict[str, bytes]:
    storage = open_storage(store)
    return {
        state.uri: storage.read(state.uri)
        for state in storage.walk(store, recursive=True, ignore=lambda *_: None, ignored={})
    }


def test_an_empty_store_has_no_models(store):
    assert registry.list_models(store) == []
    with pytest.raises(NotFound, match=r"no model 'birds' in .*; models there: none yet"):
        registry.resolve(store, "birds")


def test_a_published_model_is_found_whole(store, files):
    card = registry.publish(store, make_card(), files)
    folder = join(store, "models", "birds", card.version)
    assert set(all_files(store)) == {join(folder, name) for name in (CARD_FILE, WEIGHTS_FILE, ONNX_FILE)}
    assert card.files[ONNX_FILE] == {"bytes": 10_000, "sha256": registry.sha256_of(files[ONNX_FILE])}
    assert registry.resolve(store, card.reference) == registry.resolve(store, "birds") == card
    assert registry.fetch_model(store, card).read_bytes() == files[ONNX_FILE].read_bytes()


def test_publishing_again_writes_nothing(store, files):
    card = registry.publish(store, make_card(), files)
    before = all_files(store)
    assert registry.publish(store, make_card(), files) == card
    assert all_files(store) == before


def test_the_version_follows_from_weights_and_answers_only():
    card = make_card()
    same = [replace(card, created_at="2026"), replace(card, parity={"a": 1}), replace(card, licence="MIT")]
    other = [
        replace(card, weights_sha256="b"),
        replace(card, labels=("wren", "owl")),
        replace(card, input=ResizeRule("crop", 8, 8, short_side=9)),
        replace(card, score=0.5),
        replace(card, score_floor=0.1),
        replace(card, architecture="resnet34"),
    ]
    assert {c.with_version().version for c in same} == {card.version}
    assert len({c.with_version().version for c in [card, *other]}) == 1 + len(other)


def test_a_version_without_its_card_does_not_exist(store, files):
    """The process died after the weights: the card is the last file."""

    class Died(Exception):
        pass

    card, storage = make_card(), open_storage(store)
    put = storage.put_file_if_absent
    written = []

    def die_after_one(uri: str, path: Path) -> bool:
        if written:
            raise Died
        written.append(uri)
        return put(uri, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "put_file_if_absent", die_after_one)
        with pytest.raises(Died):
            registry.publish(store, card, files)
    assert registry.list_models(store) == []
    with pytest.raises(NotFound):
        registry.resolve(store, card.reference)
    assert registry.publish(store, card, files).version == card.version
    assert registry.resolve(store, "birds").version == card.version


def test_other_files_of_an_unfinished_import_are_not_mixed_in(store, files):
    card = make_card()
    open_storage(store).put_if_absent(join(store, "models", "birds", card.version, ONNX_FILE), b"of another torch")
    with pytest.raises(StorageError, match=rf"differs: delete .*models/birds/{card.version} and try again"):
        registry.publish(store, card, files)
    assert registry.list_models(store) == []


def test_the_newest_version_the_promoted_one_and_any_other(store, files):
    old = registry.publish(store, make_card(weights="a"), files)
    new = registry.publish(store, make_card(weights="b"), files)
    other = registry.publish(store, make_card("cars"), files)
    open_storage(store).replace(
        join(store, "models", "birds", registry.ALIASES_FILE), json.dumps({"production": old.version}).encode()
    )
    assert registry.resolve(store, "birds") == new
    assert registry.resolve(store, old.reference) == registry.resolve(store, "birds@production") == old
    assert registry.list_models(store) == [old, new, other]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("bird", r"no model 'bird' in .*; models there: birds"),
        ("birds@0123456789ab", r"no 'birds@0123456789ab' in .*; versions of birds: {version} .*; aliases: none"),
        ("birds@production", r"no 'birds@production' in .*; versions of birds: {version} .*; aliases: none"),
        ("birds@", r"no 'birds@' in .*"),
    ],
    ids=["name", "version", "alias", "nothing after @"],
)
def test_an_unknown_model_lists_the_known_ones(store, files, reference, message):
    card = registry.publish(store, make_card(), files)
    with pytest.raises(NotFound, match=message.format(version=card.version)):
        registry.resolve(store, reference)


@pytest.fixture
def with_int8(store, files, tmp_path) -> tuple[Card, Card]:
    """A version, and a less exact export of it."""
    card = registry.publish(store, make_card(), files)
    (tmp_path / "model.int8.onnx").write_bytes(b"rounded")
    return card, registry.publish(store, card.variant("int8"), {"model.int8.onnx": tmp_path / "model.int8.onnx"})


def test_a_variant_lies_beside_its_version_and_changes_nothing_of_it(store, files, with_int8):
    card, variant = with_int8
    assert (variant.version, variant.precision) == (f"{card.version}.int8", "int8")
    folder = join(store, "models", "birds", card.version)
    assert set(all_files(store)) == {
        join(folder, name) for name in (CARD_FILE, WEIGHTS_FILE, ONNX_FILE, "card.int8.json", "model.int8.onnx")
    }
    assert registry.fetch_model(store, variant).read_bytes() == b"rounded"
    assert registry.fetch_model(store, card).read_bytes() == files[ONNX_FILE].read_bytes()
    assert registry.list_models(store) == [card, variant]
    assert registry.publish(store, card.variant("int8"), {"model.int8.onnx": files[ONNX_FILE]}) == variant
    assert variant.with_version().version == variant.version


@pytest.mark.parametrize(
    ("reference", "is_variant"),
    [
        ("birds", False),
        ("birds@{version}", False),
        ("birds@{version}.fp32", False),
        ("birds@{version}.int8", True),
        ("birds@production", True),
        ("birds@production.int8", True),
        ("birds@production.fp32", False),
        ("birds@staging", False),
        ("birds@staging.int8", True),
    ],
)
def test_a_variant_is_only_meant_when_it_is_named(store, with_int8, reference, is_variant):
    card, variant = with_int8
    registry.set_alias(store, variant, "production")
    registry.set_alias(store, card, "staging")
    assert registry.aliases(store, "birds") == {"production": f"{card.version}.int8", "staging": card.version}
    assert registry.resolve(store, reference.format(version=card.version)) == (variant if is_variant else card)


@pytest.mark.parametrize("reference", ["birds@{version}.fp16", "birds@staging.fp16"])
def test_a_variant_that_is_not_there_says_how_to_make_it(store, with_int8, reference):
    card, variant = with_int8
    registry.set_alias(store, card, "staging")
    make = f"to make it: pixelmill export birds@{card.version} --precision fp16"
    with pytest.raises(NotFound, match=f"versions of birds: {card.version}, {variant.version} .*{make}"):
        registry.resolve(store, reference.format(version=card.version))


def test_the_newest_version_is_the_newest_exact_one(store, files, with_int8):
    newer = registry.publish(store, make_card(weights="b"), files)
    assert registry.resolve(store, "birds") == newer
    assert [card.is_variant for card in registry.list_models(store)] == [False, True, False]


def test_a_version_without_a_graph_says_how_to_make_one(store, files):
    card = registry.publish(store, make_card(), {WEIGHTS_FILE: files[WEIGHTS_FILE]})
    assert not card.is_exported
    message = f"{card.reference} has no model.onnx, it was trained without an export: pixelmill export"
    with pytest.raises(ModelError, match=message):
        registry.fetch_model(store, card)


def test_an_export_that_comes_later_speaks_for_its_version(store, files):
    card = registry.publish(store, make_card(), {WEIGHTS_FILE: files[WEIGHTS_FILE]})
    before = all_files(store)
    later = registry.publish(store, replace(make_card(), parity={"agrees": True}), {ONNX_FILE: files[ONNX_FILE]})
    assert later.version == card.version
    assert set(later.files) == {WEIGHTS_FILE, ONNX_FILE}
    assert registry.resolve(store, "birds") == registry.resolve(store, card.reference) == later
    assert registry.list_models(store) == [later]
    assert before.items() <= all_files(store).items()
    after = all_files(store)
    assert registry.publish(store, make_card(), files) == later
    assert all_files(store) == after


def test_a_leftover_of_a_variant_is_named_alone(store, files):
    card = registry.publish(store, make_card(), files)
    uri = join(store, "models", "birds", card.version, "model.int8.onnx")
    open_storage(store).put_if_absent(uri, b"of another tool")
    with pytest.raises(StorageError, match=f"{uri} is left from .* differs: delete it and try again"):
        registry.publish(store, card.variant("int8"), {"model.int8.onnx": files[ONNX_FILE]})
    assert registry.list_models(store) == [card]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a@b", "a b", "-x", "ä"])
def test_names_that_would_not_survive_as_folders_are_refused(name):
    with pytest.raises(UsageError, match="a model's name is letters"):
        registry.check_name(name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": "birds"}'], ids=["empty", "cut", "list", "short"])
def test_a_damaged_card_is_named(store, content):
    uri = join(store, "models", "birds", "0123456789ab", CARD_FILE)
    open_storage(store).put_if_absent(uri, content)
    with pytest.raises(ModelError, match=f"{uri} is damaged"):
        registry.resolve(store, "birds")


def test_a_card_written_by_a_newer_version_can_be_read():
    card = make_card()
    assert Card.from_json(json.dumps(json.loads(card.to_json()) | {"newer": 1})) == card


def test_a_missing_or_changed_graph_is_an_error(store, files):
    card = registry.publish(store, make_card(), files)
    uri = join(store, "models", "birds", card.version, ONNX_FILE)
    open_storage(store).replace(uri, b"other")
    with pytest.raises(ModelError, match=r"its card says 10000|its SHA-256 differs"):
        registry.fetch_model(store, card)


def test_a_local_model_is_not_copied(tmp_path, files, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    card = registry.publish(str(tmp_path), make_card(), files)
    assert registry.fetch_model(str(tmp_path), card) == tmp_path / "models" / "birds" / card.version / ONNX_FILE
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def remote(bucket: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Card]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"s3://{bucket}", registry.publish(f"s3://{bucket}", make_card(), files)


def test_a_remote_model_is_downloaded_once(remote, monkeypatch):
    path = registry.fetch_model(*remote)
    monkeypatch.setattr(open_storage(remote[0]), "fetch", None)
    assert registry.fetch_model(*remote) == path


def test_a_cut_copy_in_the_cache_is_replaced(remote, files):
    path = registry.fetch_model(*remote)
    path.write_bytes(path.read_bytes()[:-1])
    assert registry.fetch_model(*remote).read_bytes() == files[ONNX_FILE].read_bytes()


def test_many_processes_fetch_at_once(remote, files):
    """Threads stand for processes: they share nothing but the folder."""
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(registry.fetch_model(*remote).read_bytes())) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [files[ONNX_FILE].read_bytes()] * 6
    assert [path.suffix for path in registry.cache_folder().iterdir()] == [".onnx"]


def test_a_cache_that_cannot_be_written_names_the_way_out(remote, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "file"))
    with pytest.raises(StorageError, match="set XDG_CACHE_HOME to another folder"):
        registry.fetch_model(*remote)
