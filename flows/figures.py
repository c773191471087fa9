"""Metrics as a person reads them: single figures by name; what is per class stays in --json and in the card."""

from typing import Any

SPLITS = ("train", "val", "test")


def single_figures(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The figures that stand alone, each by its path: "val top1", "macro f1"."""
    figures: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict) and name not in ("per_class", "by_status", "confusion"):
            figures |= single_figures(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            figures[f"{prefix}{name}"] = value
    return figures


def print_metrics(metrics: dict[str, Any]) -> None:
    """A row per figure, and a column per split where there are several."""
    from flows.console import print_table

    splits = {split: single_figures(metrics[split]) for split in SPLITS if isinstance(metrics.get(split), dict)}
    columns = splits or {"value": single_figures(metrics)}
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    rows = [[name, *(figures.get(name) for figures in columns.values())] for name in names]
    if rows:
        print_table(("metric", *columns), rows, right=tuple(columns))
