"""The curves of a training as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa


def to_arrow(history: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One row per epoch: epoch, lr (of the head, at the end), train_loss and its terms, seconds, images_per_second,
    val_METRIC for each metric of the validation split."""
    names = list(dict.fromkeys(name for row in history for name in row))
    types = {"epoch": pa.int32()}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in names])
    return pa.Table.from_pylist([dict(row) for row in history], schema=schema)
