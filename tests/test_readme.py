"""The README is held by the code: its commands parse, its options exist, its links and files are there."""

import re
import shlex
from pathlib import Path

import pytest

from flows.__main__ import COMMANDS, make_app
from tasks.adopt import foreign_card

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
PIXELMILL = [line for line in LINES if line.startswith("pixelmill ")]
MAKE = [line for line in LINES if line.startswith("make ")]


@pytest.mark.parametrize("line", PIXELMILL)
def test_every_command_parses(line):
    make_app().parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


def test_the_card_of_a_foreign_model_is_accepted_as_shown():
    (shown,) = re.findall(r"^```json\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    card = foreign_card(shown.encode(), "card.json", "pets")
    assert (card.task, card.labels, card.input.short_side) == ("classify", ("cat", "dog"), 256)


@pytest.mark.parametrize("line", MAKE)
def test_every_target_exists(line):
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_command_is_shown():
    shown = {line.split()[1] for line in PIXELMILL} | {line.split()[1] for line in MAKE}
    assert set(COMMANDS) <= shown


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#][^)]*)\)", README))
def test_every_linked_file_is_there(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("path", re.findall(r"`(benchmarks/\w+\.py)`", README))
def test_every_named_benchmark_is_there(path):
    assert (ROOT / path).exists()
