"""Metrics on the terminal."""

from typing import Any


def print_metrics(metrics: dict[str, Any]) -> None:
    """One column per split, one row per figure; what is per class stays in --json and in the card."""
    from flows.console import print_table

    splits = {name: value for name, value in metrics.items() if isinstance(value, dict)}
    columns = splits or {"": metrics}
    single = {
        split: {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for split, figures in columns.items()
    }
    names = list(dict.fromkeys(name for figures in single.values() for name in figures))
    rows = [[name, *(figures.get(name) for figures in single.values())] for name in names]
    if rows:
        print_table(("metric", *columns), rows, right=tuple(columns))
