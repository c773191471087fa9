"""How well an embedding model knows its images, and how well it tells strange ones from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.records import Status

_QUANTILES = (0.5, 0.95, 0.99)


def measure(
    rows: pa.Table,  # image, status, anomaly
    images: pa.Table,  # image, label
    annotations: pa.Table,
    labels: Sequence[str],
    classes: Sequence[str],
    temperature: float | None,
    fit: bool,
    score: float,
) -> dict[str, Any]:
    """The figures of one split, plain JSON; see models.learning.metrics.Measure.

    `labels`: the classes that were among the training images; images of other classes are the strange ones. There is
    nothing to tell apart, and no AUROC, where the training had no labels, or the split shows no strange images or no
    others. There is no temperature and no score, and annotations are not looked at.

    Keys: images, not_ok, elbo (the mean of the anomaly of images that are not strange, negative: nats per value of an
    image, see models.nets.vae), anomaly (of the same: mean, and quantiles p50, p95 and p99), auroc (how often a strange
    image has a higher anomaly than another one; null where there is nothing to compare), per_class (class → images,
    anomaly: its mean, is_strange, auroc: of strange classes alone, against all that are not), unknown_classes (those of
    strange images).
    """
    row_of = {image: number for number, image in enumerate(rows.column("image").to_pylist())}
    statuses, anomalies = rows.column("status").to_pylist(), rows.column("anomaly").to_pylist()
    found: dict[str | None, list[float]] = {}  # by class
    failed = 0
    for image, label in zip(images.column("image").to_pylist(), images.column("label").to_pylist(), strict=True):
        row = row_of.get(image)
        if row is None or statuses[row] != Status.OK:
            failed += 1
        else:
            found.setdefault(label, []).append(anomalies[row])
    strange = [name for name in classes if labels and name not in set(labels) and name in found]
    usual = np.array([value for label, values in found.items() if label not in strange for value in values])
    values = {name: np.array(found[name]) for name in classes if name in found}
    return {
        "images": images.num_rows,
        "not_ok": failed,
        "elbo": -float(usual.mean()) if len(usual) else None,
        "anomaly": {
            "mean": float(usual.mean()),
            **{f"p{round(100 * share)}": float(np.quantile(usual, share)) for share in _QUANTILES},
        }
        if len(usual)
        else None,
        "auroc": auroc(usual, np.concatenate([values[name] for name in strange])) if strange else None,
        "per_class": {
            name: {
                "images": len(of_class),
                "anomaly": float(of_class.mean()),
                "is_strange": name in strange,
                "auroc": auroc(usual, of_class) if name in strange else None,
            }
            for name, of_class in values.items()
        },
        "unknown_classes": strange,
    }


def per_class(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The bound of the images of each class, and so what an export may not lose unseen."""
    return {name: -figures["anomaly"] for name, figures in metrics["per_class"].items()}


def auroc(usual: NDArray[np.float64], strange: NDArray[np.float64]) -> float | None:
    """The share of pairs of a usual and a strange image in which the strange one has the higher anomaly.

    That is the area under the ROC curve; equal anomalies count half (Mann and Whitney). None where one kind is missing.
    """
    if not len(usual) or not len(strange):
        return None
    order = np.sort(usual)
    below, up_to = (np.searchsorted(order, strange, side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * len(usual) * len(strange)))
