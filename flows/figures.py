"""Metrics as a person reads them: single figures by name, a row per class, and what was taken for what."""

from collections.abc import Mapping
from typing import Any

SPLITS = ("train", "val", "test")
_MANY = ("per_class", "by_status", "confusion", "pr_curve")
_WIDEST_CONFUSION = 12  # columns; beyond, nobody finds the mistakes in it
_WORST_MISTAKES = 12


def single_figures(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The figures that stand alone, each by its path: "val top1", "macro f1"."""
    figures: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict) and name not in _MANY:
            figures |= single_figures(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            figures[f"{prefix}{name}"] = value
    return figures


def class_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per class, all with the same keys; none where the metrics are not of one split."""
    return [{"class": name, **figures} for name, figures in metrics.get("per_class", {}).items()]


def confusion_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was taken for what: a row per true class, or where there are many, one per mistake, the most frequent first.

    All rows have the same keys; there are none where the metrics are not of one split, or nothing is there.
    """
    confusion = metrics.get("confusion")
    if not confusion:
        return []
    rows, columns, counts = confusion["rows"], confusion["columns"], confusion["counts"]
    if len(columns) <= _WIDEST_CONFUSION:
        return [
            {"true ↓ found →": row, **dict(zip(columns, each, strict=True))}
            for row, each in zip(rows, counts, strict=True)
        ]
    mistakes = [
        {"true": row, "found": column, "count": count}
        for row, each in zip(rows, counts, strict=True)
        for column, count in zip(columns, each, strict=True)
        if count and row != column
    ]
    return sorted(mistakes, key=lambda mistake: -mistake["count"])[:_WORST_MISTAKES]


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """A row per figure, and a column per split where there are several; below, the judge of those of made images."""
    from flows.console import print_table

    splits = {split: single_figures(metrics[split]) for split in SPLITS if isinstance(metrics.get(split), dict)}
    columns = splits or {"value": single_figures(metrics)}
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    rows = [[name, *(figures.get(name) for figures in columns.values())] for name in names]
    if rows:
        print_table(("metric", *columns), rows, right=tuple(columns))
    parts = [metrics, *(metrics[split] for split in splits)]
    if judges := dict.fromkeys(part["judge"] for part in parts if "judge" in part):
        print(f"judged by {' and '.join(judges)}: compare with figures of the same judge and number of images only")


def print_split(metrics: Mapping[str, Any]) -> None:
    """The metrics of one split: its classes, what was taken for what, and the single figures."""
    from flows.console import print_table

    for rows in (class_rows(metrics), confusion_rows(metrics)):
        if rows:
            columns = list(rows[0])
            numbers = [name for name in columns if not isinstance(rows[0][name], str)]
            print_table(columns, [list(row.values()) for row in rows], right=numbers)
    print_metrics(metrics)
