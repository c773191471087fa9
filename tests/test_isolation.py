"""tasks/isolation: real child processes that a marked image makes crash, bloat, spin, hang or disappear."""

import gc
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from odd_images import OddImage, encode, odd_images, photograph

from models.errors import PixelmillError, Rejected
from models.imaging.geometry import Geometry, ResizeRule
from models.imaging.prepare import Limits, Preparer
from models.records import Status
from tasks import isolation
from tasks.isolation import IsolatedPreparer

RULE = ResizeRule("letterbox", 96, 128, interpolation="bicubic", pad_rgb=(1, 2, 3))

# What the child runs in these tests: the real server, with a preparer that does as the first bytes of a file say.
SABOTAGED = """
    import ctypes, os, sys, time
    from models.imaging.prepare import Preparer
    from tasks import isolation

    prepare = Preparer.prepare

    def sabotaged(self, data, out):
        match data[:5]:
            case b"CRASH":
                ctypes.string_at(0)
            case b"ABORT":
                os.abort()
            case b"LEAVE":
                os._exit(3)
            case b"BLOAT":
                bytearray(300 * 2**20)
            case b"SPIN!":
                while True:
                    pass
            case b"HANG!":
                time.sleep(600)
            case b"PRINT":
                os.write(1, b"x" * 99)
                data = data[5:]
            case b"ENVIR":
                assert not [name for name in os.environ if name.startswith("AWS_")]
                data = data[5:]
        return prepare(self, data, out)

    Preparer.prepare = sabotaged
    isolation.serve()
"""


@pytest.fixture
def sabotaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., IsolatedPreparer]]:
    script = tmp_path / "sabotaged.py"
    script.write_text(textwrap.dedent(SABOTAGED))
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, str(script)))
    opened = []

    def make(**limits: float) -> IsolatedPreparer:
        opened.append(IsolatedPreparer(RULE, **limits))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for preparer in opened:
        preparer.close()


@pytest.fixture
def out() -> np.ndarray:
    return np.zeros((RULE.height, RULE.width, 3), np.uint8)


def prepare(preparer: IsolatedPreparer, data: bytes, out: np.ndarray) -> Geometry:
    """The one view of an image that is not tiled."""
    (geometry,) = preparer.views(data, lambda: out)
    return geometry


def child_of(preparer: IsolatedPreparer) -> int:
    assert preparer._child is not None
    return preparer._child.pid


def is_gone(pid: int) -> bool:
    """Neither running nor a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


SABOTAGE = {
    "segmentation fault": (b"CRASH", "the decoder died: signal 11"),
    "abort": (b"ABORT", "the decoder died: signal 6"),
    "exit": (b"LEAVE", "the decoder died: exit code 3"),
    "memory": (b"BLOAT", "the decoder needed more than 200 MB"),
    "processor": (b"SPIN!", "the decoder took more than 1 s of processor time"),
    "silence": (b"HANG!", "the decoder took more than 2 s"),
}


@pytest.mark.parametrize(("mark", "reason"), SABOTAGE.values(), ids=SABOTAGE)
def test_one_image_is_lost_and_the_next_is_read(
    mark: bytes, reason: str, sabotaged: Callable[..., IsolatedPreparer], out: np.ndarray
) -> None:
    good = encode(photograph(), "PNG")
    expected = np.empty_like(out)
    Preparer(RULE).prepare(good, expected)
    preparer = sabotaged(memory_mb=200, cpu_s=1, wall_s=2.0 if mark == b"HANG!" else 60.0)
    prepare(preparer, good, out)
    first = child_of(preparer)
    with pytest.raises(Rejected) as rejected:
        prepare(preparer, mark + b"x" * 3_000_000, out)  # more than a pipe holds
    assert rejected.value.status == Status.CORRUPT
    assert reason in rejected.value.reason
    assert is_gone(first)
    out[:] = 0
    prepare(preparer, good, out)
    np.testing.assert_array_equal(out, expected)
    second = child_of(preparer)
    preparer.close()
    assert is_gone(second)


def test_what_a_library_prints_is_no_answer(sabotaged: Callable[..., IsolatedPreparer], out: np.ndarray) -> None:
    assert prepare(sabotaged(), b"PRINT" + encode(photograph(), "PNG"), out).width == 451


def test_the_child_sees_no_credentials(
    sabotaged: Callable[..., IsolatedPreparer], out: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert prepare(sabotaged(), b"ENVIR" + encode(photograph(), "PNG"), out).width == 451


def test_a_child_that_died_while_it_waited_costs_no_image(
    sabotaged: Callable[..., IsolatedPreparer], out: np.ndarray
) -> None:
    preparer = sabotaged()
    good = encode(photograph(), "PNG")
    prepare(preparer, good, out)
    os.kill(child_of(preparer), 9)
    while not is_gone(child_of(preparer)) and preparer._child.poll() is None:  # type: ignore[union-attr]
        time.sleep(0.01)
    prepare(preparer, good, out)


def test_a_child_that_cannot_start_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch, out: np.ndarray) -> None:
    monkeypatch.setattr(isolation, "COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))
    with IsolatedPreparer(RULE) as preparer, pytest.raises(PixelmillError, match="exit code 7"):
        prepare(preparer, b"anything", out)


def test_a_forgotten_preparer_leaves_no_process(sabotaged: Callable[..., IsolatedPreparer], out: np.ndarray) -> None:
    preparer = IsolatedPreparer(RULE)
    prepare(preparer, encode(photograph(), "PNG"), out)
    child = child_of(preparer)
    del preparer
    gc.collect()
    assert is_gone(child)


SHOWN = [odd for odd in odd_images() if odd.name in {
    "empty.jpg", "plain.jpg", "orientation-6.jpg", "animated.gif", "cut-at-50.jpg", "claims-60000.png", "text.jpg",
}]  # fmt: skip


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedPreparer]:
    with IsolatedPreparer(RULE, Limits(max_pixels=1_000_000)) as preparer:
        yield preparer


@pytest.mark.parametrize("odd", SHOWN, ids=lambda odd: odd.name)
def test_the_answer_is_that_of_preparer(odd: OddImage, isolated: IsolatedPreparer, out: np.ndarray) -> None:
    expected = np.zeros_like(out)
    if odd.status == Status.OK:
        assert prepare(isolated, odd.data, out) == Preparer(RULE).prepare(odd.data, expected)
    else:
        with pytest.raises(Rejected) as rejected:
            prepare(isolated, odd.data, out)
        with pytest.raises(Rejected) as in_this_process:
            Preparer(RULE, Limits(max_pixels=1_000_000)).prepare(odd.data, expected)
        assert (rejected.value.status, rejected.value.reason) == (odd.status, in_this_process.value.reason)
    np.testing.assert_array_equal(out, expected if odd.status == Status.OK else 0)
