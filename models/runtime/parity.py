"""The gate before publishing: the exported graph gives what PyTorch gives, on real images, alone and in any batch."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.errors import ModelError, ParityError, PixelmillError
from models.records import Task
from models.runtime import openvino
from models.runtime.comparisons import COMPARISONS
from models.runtime.engine import Engine, OnnxRuntimeEngine, open_engine
from models.runtime.latents import Latents, draw
from models.runtime.predictor import one_line
from models.runtime.results import Outputs

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = NDArray[np.uint8] | Latents

MIN_IMAGES = 5
_ODD_BATCH = 3
_LATENTS = 8
_LATENT_SEED = 0


def check_parity(
    network: "nn.Module",
    family: ModuleType,
    card: Card,
    onnx_path: Path,
    images: Batch,  # [n, height, width, 3], prepared by the card's rule; at least MIN_IMAGES
) -> dict[str, Any]:
    """Compares the ONNX file with the family's reference at batch 1, 3 and n; returns the record for the card.

    Raises ParityError beyond the tolerance, or where there was nothing to compare. OpenVINO is only recorded.
    """
    if len(images) < MIN_IMAGES:
        raise ValueError(f"parity needs {MIN_IMAGES} images, got {len(images)}")
    record = _compare_with_torch(network, family, card, onnx_path, images)
    if record["compared"] == 0 and card.score_floor > 0:
        # The model finds nothing in these images: lower its floor, in a twin that differs by this one constant.
        with tempfile.TemporaryDirectory() as folder:
            from models.runtime.export import export_onnx

            twin_card, twin_path = replace(card, score_floor=0.0), Path(folder, "twin.onnx")
            export_onnx(family.graph(network, twin_card), twin_card, twin_path, images[:2])
            record = _compare_with_torch(network, family, twin_card, twin_path, images)
        record["score_floor"] = 0.0
    if record["compared"] == 0:
        raise ParityError(
            f"{card.architecture} was not published: it finds nothing in any image, or the same in all, "
            "so nothing could be compared: train it for longer, or start from other weights"
        )
    return record


def parity_latents(card: Card) -> Latents:
    """What a generator's graph is compared on: seeded latents, with every class at least once."""
    return draw(card, _LATENT_SEED, range(max(_LATENTS, len(card.labels))))


def check_invariance(card: Card, onnx_path: Path, images: Batch) -> dict[str, Any]:
    """The trial of a foreign ONNX file: it keeps the contract, and an image gets the same answer alone and in a batch.

    Raises ModelError for a broken contract, or ParityError.
    """
    engine = OnnxRuntimeEngine(onnx_path, card, concurrency=1)
    try:
        alone = _alone(engine, images)
        check_values(card, alone)
        measured = _measure(engine, card, alone, images, "fp32")
    except PixelmillError:
        raise
    except Exception as error:
        raise ModelError(f"{card.name}: the ONNX file failed on its trial images: {one_line(error)}") from None
    if not measured["agrees"]:
        raise ParityError(
            f"{card.name} was not published: an image alone differs from itself in a batch: {measured['reason']}"
        )
    return {"engine": f"onnxruntime {metadata.version('onnxruntime')}", **measured}


def check_variant(card: Card, onnx_path: Path, exact_path: Path, images: Batch) -> dict[str, Any]:
    """The trial of a less exact export, which `card` describes, on images [n, height, width, 3].

    fp16 must agree with the exact export, and an image with itself in any batch. How much int8 may change is for the
    metric of the task to say: it must agree with itself, and its distance from the exact export is noted. Of a detector
    the findings are compared that its score lets pass, if there are any: which of many unlikely boxes outlives the
    others hangs on the last digit, and the metric sees them all. OpenVINO is only recorded: against the exact export
    for fp16, and for int8 against ONNX Runtime, because that is what the metric is measured with. Raises ModelError for
    a broken contract, or ParityError.
    """
    exact = _alone(OnnxRuntimeEngine(exact_path, replace(card, precision="fp32"), concurrency=1), images)
    engine: Engine = open_engine(onnx_path, card, engine="onnxruntime")  # half precision on a GPU, if one is here
    own = _alone(engine, images)
    check_values(card, own)
    is_gated = card.precision == "fp16"
    against, what = (exact, "the exact export") if is_gated else (own, "itself alone")
    from_score = card.score if "scores" in exact and (exact["scores"] >= card.score).any() else None
    measured = _measure(engine, card, against, images, card.precision, what, from_score)
    if not measured["agrees"]:
        raise ParityError(f"{card.reference} was not published: {engine.name} differs: {measured['reason']}")
    record = {"engine": f"{engine.name} {metadata.version('onnxruntime')}", "compared_with": what, **measured}
    if not is_gated:
        comparison = COMPARISONS[card.task]
        tolerance = comparison.tolerance[card.precision]
        pair = _from(exact, from_score), _from(own, from_score)
        _, record["from_exact"] = comparison.differences(*pair, tolerance, _with_floor(card, from_score))
    for precision in openvino.cpu_precisions():
        limits = "bf16" if is_gated and precision == "bf16" else card.precision
        record[f"openvino_{precision}"] = _measure_openvino(
            card, onnx_path, against, images, precision, limits, openvino.yardstick(card), from_score
        )
    return record


def _from(outputs: Outputs, score: float | None) -> Outputs:
    """The findings that score at least so much; None: all."""
    if score is None:
        return outputs
    rows = outputs["scores"] >= score
    return {name: value[rows] for name, value in outputs.items()}


def _with_floor(card: Card, score: float | None) -> Card:
    """The card as if its graph gave no findings below the score: one that just misses it may lack a counterpart."""
    return card if score is None else replace(card, score_floor=score)


def _alone(engine: Engine, images: Batch) -> dict[str, NDArray]:
    return _joined([engine.run(images[i : i + 1]) for i in range(len(images))])


def check_values(card: Card, outputs: Outputs) -> None:
    """Raises ModelError if outputs do not fit the card's labels, or are not the probabilities of the contract."""
    if card.task == Task.SEMANTIC:
        _check_class_map(card, outputs["class_map"])
        return
    if card.task in (Task.GENERATE, Task.TRANSLATE):
        _check_images(card, outputs["images_out"])
        return
    if card.task == Task.EMBED:
        _check_embeddings(card, outputs)
        return
    if card.task == Task.CLASSIFY:
        found = outputs["probabilities"]
        if found.shape[1] != len(card.labels):
            raise ModelError(
                f"{card.name}: the card has {len(card.labels)} labels, the output probabilities {found.shape[1]}"
            )
        scores = found
    else:
        labels, scores = outputs["labels"], outputs["scores"]
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(card.labels):
            raise ModelError(
                f"{card.name}: the card has {len(card.labels)} labels, the output labels "
                f"goes from {labels.min()} to {labels.max()}"
            )
    if not np.isfinite(scores).all() or (scores.size and not 0 <= scores.min() <= scores.max() <= 1 + 1e-5):
        raise ModelError(
            f"{card.name}: expected scores between 0 and 1, got {scores.min():g} to {scores.max():g}; "
            "is the softmax missing?"
        )
    if card.task == Task.INSTANCE:
        _check_masks(card, outputs["masks"])


def _check_masks(card: Card, masks: NDArray) -> None:
    if masks.shape[1] != masks.shape[2]:
        raise ModelError(f"{card.name}: expected square masks [n, m, m], got {list(masks.shape)}")
    if not np.isfinite(masks).all() or (masks.size and not -1e-5 <= masks.min() <= masks.max() <= 1 + 1e-5):
        raise ModelError(
            f"{card.name}: expected masks between 0 and 1, got {masks.min():g} to {masks.max():g}; "
            "is the sigmoid missing?"
        )


def _check_images(card: Card, images: NDArray) -> None:
    shape = (card.input.height, card.input.width, 3)
    if images.shape[1:] != shape:
        raise ModelError(
            f"{card.name}: expected images_out of the card's size [batch, {', '.join(map(str, shape))}], "
            f"got {list(images.shape)}"
        )


def _check_embeddings(card: Card, outputs: Outputs) -> None:
    for name in ("embedding", "anomaly"):
        if not np.isfinite(outputs[name]).all():
            raise ModelError(f"{card.name}: the output {name} holds NaN or infinity")


def _check_class_map(card: Card, class_map: NDArray) -> None:
    size_hw = (card.input.height, card.input.width)
    if class_map.shape[1:] != size_hw:
        raise ModelError(
            f"{card.name}: expected a class_map of the input's size {list(size_hw)}, got {list(class_map.shape[1:])}"
        )
    if class_map.max() > len(card.labels):
        raise ModelError(
            f"{card.name}: the card has {len(card.labels)} labels, so that classes go from 0, the background, to "
            f"{len(card.labels)}; the output class_map goes to {class_map.max()}"
        )


def _compare_with_torch(
    network: "nn.Module", family: ModuleType, card: Card, onnx_path: Path, images: Batch
) -> dict[str, Any]:
    import torch

    reference = family.reference(network, card)
    with torch.no_grad():
        # Each image alone: what PyTorch says of one must hold in every batch.
        alone = [reference(*_tensors(images[i : i + 1])) for i in range(len(images))]
    expected = _joined([{name: value.numpy() for name, value in outputs.items()} for outputs in alone])

    engine: Engine = OnnxRuntimeEngine(onnx_path, card, concurrency=1)
    if card.task in (Task.GENERATE, Task.TRANSLATE, Task.EMBED):
        check_values(card, expected)
    measured = _measure(engine, card, expected, images, "fp32")
    if not measured["agrees"]:
        raise ParityError(
            f"{card.architecture} was not published: {engine.name} differs from PyTorch: {measured['reason']}"
        )
    record = {
        "engine": f"onnxruntime {metadata.version('onnxruntime')}",
        "torch": torch.__version__,
        "batch_sizes": [1, _ODD_BATCH, len(images)],
        **measured,
    }
    if card.task is Task.GENERATE:  # runs on ONNX Runtime alone
        return record
    for precision in openvino.cpu_precisions():
        record[f"openvino_{precision}"] = _measure_openvino(card, onnx_path, expected, images, precision, precision)
    return record


def _tensors(batch: Batch) -> "list[Tensor]":
    import torch

    return [torch.from_numpy(array) for array in (batch.arrays if isinstance(batch, Latents) else [batch])]


def _measure_openvino(
    card: Card,
    onnx_path: Path,
    expected: Outputs,
    images: Batch,
    precision: str,
    limits: str,
    what: str = "PyTorch",
    from_score: float | None = None,
) -> dict[str, Any]:
    try:
        engine = openvino.OpenVinoEngine(onnx_path, card, concurrency=1, precision=precision)
        return _measure(engine, card, expected, images, limits, what, from_score)
    except ModelError as error:
        return {"agrees": False, "reason": str(error)}


def _measure(
    engine: Engine,
    card: Card,
    expected: Outputs,
    images: Batch,
    limits: str,
    what: str = "PyTorch",
    from_score: float | None = None,
) -> dict[str, Any]:
    """The largest differences from `expected` (what `what` said) at each batch size, and of each image alone from
    itself in the batch; `limits`: the precision whose tolerance holds; `from_score`: of findings that score so much."""
    expected, card = _from(expected, from_score), _with_floor(card, from_score)
    comparison = COMPARISONS[card.task]
    tolerance = comparison.tolerance[limits]
    alone = _from(_alone(engine, images), from_score)
    together = _from(engine.run(images), from_score)
    parts = [engine.run(images[i : i + _ODD_BATCH]) for i in range(0, len(images), _ODD_BATCH)]
    odd = _from(_joined(parts, _ODD_BATCH), from_score)
    compared, largest = 0, dict.fromkeys(tolerance, 0.0)
    for outputs in (alone, odd, together):
        compared, differences = comparison.differences(expected, outputs, tolerance, card)
        largest = {name: _worse(largest[name], differences[name]) for name in largest}
    _, invariance = comparison.differences(alone, together, tolerance, card)
    record: dict[str, Any] = {
        "compared": compared,
        "largest": largest,
        "alone_vs_batch": invariance,
        "tolerance": tolerance,
        "agrees": True,
    }
    if from_score is not None:
        record["from_score"] = from_score
    for differences, other in ((largest, what), (invariance, "itself in a batch")):
        for name, limit in tolerance.items():
            if not differences[name] <= limit:  # NaN is beyond every limit
                record["agrees"] = False
                record["reason"] = f"{name} by {differences[name]:.3g} from {other}, where {limit:g} is allowed"
    return record


def _worse(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _joined(parts: Sequence[Outputs], batch_size: int = 1) -> dict[str, NDArray]:
    """The outputs of consecutive batches as those of one."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "batch_index" in joined:
        joined["batch_index"] = np.concatenate([part["batch_index"] + k * batch_size for k, part in enumerate(parts)])
    return joined
