"""Metrics as tables: which figures stand alone, and what was taken for what."""

import pytest

from flows.figures import class_rows, confusion_rows, print_metrics, print_split, single_figures

SPLIT = {
    "images": 7,
    "ap": 0.5,
    "ap_small": None,
    "at_score": {"score": 0.25, "f1": 0.75},
    "operating_point": None,
    "per_class": {"red": {"ap": None, "support": 0}, "white": {"ap": 0.5, "support": 3}},
    "confusion": {
        "rows": ["red", "white", "(background)"],
        "columns": ["red", "white", "(background)"],
        "counts": [[0, 0, 0], [1, 2, 0], [0, 4, 0]],
    },
    "pr_curve": {"iou": 0.5, "recall": [0.0, 1.0], "precision": {"white": [1.0, 0.5]}},
    "by_status": {"ok": 7},
}


def test_single_figures():
    alone = {"images": 7, "ap": 0.5, "at_score score": 0.25, "at_score f1": 0.75}
    assert single_figures(SPLIT) == alone
    assert single_figures({"dataset": "cells@0", "val": SPLIT}) == {f"val {name}": each for name, each in alone.items()}


@pytest.mark.parametrize("rows", [class_rows, confusion_rows])
@pytest.mark.parametrize("metrics", [{}, {"val": SPLIT}], ids=["nothing", "several splits"])
def test_no_rows(rows, metrics):
    assert rows(metrics) == []


def test_a_row_per_class():
    assert class_rows(SPLIT) == [
        {"class": "red", "ap": None, "support": 0},
        {"class": "white", "ap": 0.5, "support": 3},
    ]


def test_a_confusion_with_the_background():
    (first, *numbers), *_ = [list(row) for row in confusion_rows(SPLIT)]
    assert numbers == ["red", "white", "(background)"]
    assert [list(row.values()) for row in confusion_rows(SPLIT)] == [
        ["red", 0, 0, 0],
        ["white", 1, 2, 0],
        ["(background)", 0, 4, 0],
    ]
    assert first.split() == ["true", "↓", "found", "→"]


def test_of_many_classes_only_the_worst_mistakes():
    names = [f"class {number}" for number in range(40)]
    counts = [[0] * 40 for _ in names]
    for row in range(30):
        counts[row][row] = 1000
        counts[row][39 - row] += row + 1
    rows = confusion_rows({"confusion": {"rows": names, "columns": names, "counts": counts}})
    assert rows[0] == {"true": "class 29", "found": "class 10", "count": 30}
    assert [row["count"] for row in rows] == list(range(30, 18, -1))


def test_what_a_person_sees(capsys):
    print_split(SPLIT)
    shown = capsys.readouterr().out
    for text in ("support", "(background)", "at_score f1", "0.75"):
        assert text in shown
    assert "pr_curve" not in shown


def test_what_prefect_shows(monkeypatch):
    from flows import artifacts

    tables = {}

    def keep(table: list[dict], key: str, description: str) -> str:
        tables[key] = table
        return "a table"

    monkeypatch.setattr(artifacts, "create_table_artifact", keep)
    artifacts.put_metrics("cells@0 on blood@1, test", "cells", SPLIT)
    artifacts.put_metrics("cells@0-metrics", "cells", {"test": SPLIT})
    key = "cells-0-on-blood-1-test"
    assert set(tables) == {key, f"{key}-classes", f"{key}-confusion", "cells-0-metrics"}
    assert {"what": "at_score f1", "value": 0.75} in tables[key]
    assert [row["class"] for row in tables[f"{key}-classes"]] == ["red", "white"]
    assert [row["white"] for row in tables[f"{key}-confusion"]] == [0, 2, 4]


@pytest.mark.parametrize(
    "metrics",
    [{"frechet": 3.5, "judge": "pixels"}, {"dataset": "a@1", "val": {"frechet": 3.5, "judge": "pixels"}}],
    ids=["of a split", "of a card"],
)
def test_the_judge_stands_below_what_it_judged(capsys, metrics):
    print_metrics(metrics)
    assert "\njudged by pixels: " in capsys.readouterr().out
    print_metrics(SPLIT)
    assert "judged" not in capsys.readouterr().out
