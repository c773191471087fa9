"""Less exact, faster copies of an ONNX graph: fp16 for GPUs, int8 for CPUs. Both take and give what the exact one does.

What prepares the input (the normalisation) and what makes answers of the last layer's sums (softmax; decoding and NMS)
stay in fp32: they cost next to nothing, and small errors there are errors of the answer.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError
from models.records import Task
from models.runtime import layers

# What is computed in int8, by task. Between quantised layers the rest would cost a conversion there and back.
_AROUND = ("Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Relu", "Reshape")
INT8_OPERATORS: dict[Task, tuple[str, ...]] = {
    Task.CLASSIFY: (*layers.LAYERS, *_AROUND),
    Task.DETECT: ("Conv",),  # coordinates need more than 256 steps
    Task.INSTANCE: ("Conv",),
    Task.SEMANTIC: (*layers.LAYERS, *_AROUND, "Resize"),
}
HALF_MAX = 65_504.0
_SENSITIVE_SHARE = 0.1  # of the quantised tensors; the layers around the worst of them go back to fp32
_SENSITIVITY_IMAGES = 8
_SENSITIVITY_MAPS = 2  # every place of a map is an answer
_SAME_RANGE = ("Clip", "Flatten", "MaxPool", "Relu", "Reshape")  # of values; they are rounded as their neighbours are


@dataclass(frozen=True)
class Attempt:
    """One way to quantise a graph."""

    what: str  # for people: "all layers"
    exact_nodes: tuple[str, ...]  # what stays in fp32, besides what comes before and after all layers


def largest_value(exact: Path, images: NDArray[np.uint8]) -> tuple[float, str]:
    """The largest magnitude between the layers of a graph on these images [n, height, width, 3], and its tensor.

    Beyond HALF_MAX a GPU computes infinity. On a CPU, ONNX Runtime keeps such sums in fp32, so that running the
    converted graph there shows nothing.
    """
    import onnx

    model = onnx.load(exact)
    outside = layers.before_layers(model) | layers.after_layers(model)
    inside = {name for node in model.graph.node if node.name not in outside for name in node.output}
    with _quiet("fp16"), tempfile.TemporaryDirectory(prefix="pixelmill-fp16-") as folder:
        from onnxruntime.quantization.calibrate import create_calibrator

        calibrator = create_calibrator(exact, augmented_model_path=str(Path(folder, "augmented.onnx")))
        calibrator.collect_data(_reader(images[None, i] for i in range(len(images))))
        ranges = {
            name: float(max(abs(np.min(found.lowest)), abs(np.max(found.highest))))
            for name, found in calibrator.compute_data().items()
            if name in inside
        }
    name = max(ranges, key=lambda name: ranges[name])
    return ranges[name], name


def to_fp16(exact: Path, out: Path) -> None:
    """Writes `exact` with weights and sums in half precision. Raises ModelError where that cannot be done."""
    import onnx

    model = layers.named(onnx.load(exact))
    with _quiet("fp16"):
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        # Told to leave nodes alone, the converter still rounds what goes from one to the next: it sees only the rest.
        before, after = layers.before_layers(model), layers.after_layers(model)
        layers.keep_apart(model, dict.fromkeys(before | after, "what stays exact"))
        body = convert_float_to_float16(layers.body(model, before | after), keep_io_types=True)
        nodes = [node for node in model.graph.node if node.name in before | after]
        needed = {name for node in nodes for name in node.input} - {i.name for i in body.graph.initializer}
        kept = [initializer for initializer in model.graph.initializer if initializer.name in needed]
        for field, values in (
            ("node", [*nodes, *body.graph.node]),
            ("initializer", [*kept, *body.graph.initializer]),
            ("value_info", []),
        ):
            del getattr(model.graph, field)[:]
            getattr(model.graph, field).extend(values)
        OnnxModel(model).topological_sort()
    onnx.save(model, out)


def prepare_int8(exact: Path, out: Path) -> None:
    """Writes the graph as quantisation wants it: shapes inferred, BatchNorm folded into the convolutions before it.

    Layers that share their weights, as those of a head that looks at several maps, get weights of their own: of shared
    ones the quantiser makes a graph that ONNX Runtime cannot load.
    """
    _part_layers(exact, out)
    with _quiet("int8"):
        from onnxruntime.quantization.shape_inference import quant_pre_process

        # Our exports state their shapes; the symbolic inference takes a doubled map's batch for another one, and fails.
        quant_pre_process(out, out, skip_symbolic_shape=True)
    _part_layers(out, out)  # it makes one of small weights that are equal


def _part_layers(path: Path, out: Path) -> None:
    import onnx

    model = layers.named(onnx.load(path))
    layers.keep_apart(model, {node.name: node.name for node in model.graph.node if node.op_type in layers.LAYERS})
    onnx.save(model, out)


def to_int8(prepared: Path, task: Task, attempt: Attempt, batches: Iterable[NDArray[np.uint8]], out: Path) -> None:
    """Static quantisation, per channel, in QDQ form, calibrated on `batches` of images [n, height, width, 3].

    Weights are signed and activations unsigned, which suits x86 best and ARM well.
    """
    import onnx

    model = onnx.load(prepared)
    with _quiet("int8"):
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        quantize_static(
            model,
            out,
            _reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(INT8_OPERATORS[task]),
            nodes_to_exclude=sorted({*layers.before_layers(model), *layers.after_layers(model), *attempt.exact_nodes}),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


def attempts(prepared: Path, whole: Path, task: Task, images: NDArray[np.uint8]) -> Iterator[Attempt]:
    """Ways to quantise, from the fastest to the most careful; ask for the next one where one lost too much.

    `whole`: where the first attempt was written when the third is asked for; `images` [n, height, width, 3] are looked
    at to find the layers that suffer most.
    """
    import onnx

    yield Attempt("all layers", ())
    model = onnx.load(prepared)
    candidates = [
        node.name for node in model.graph.node if node.op_type in layers.LAYERS and node.op_type in INT8_OPERATORS[task]
    ]
    first_and_last = {*layers.first_layers(model), *layers.last_layers(model)}
    ends = tuple(layer for layer in candidates if layer in first_and_last)
    if len(ends) == len(candidates):
        return
    yield Attempt(f"all but the first and the last {'layer' if len(ends) == 2 else 'layers'}", ends)
    looked_at = images[: _SENSITIVITY_IMAGES if task == Task.CLASSIFY else _SENSITIVITY_MAPS]
    sensitive = sensitive_nodes(prepared, whole, task, looked_at)
    count = len(sensitive.intersection(candidates).difference(ends))
    if 0 < count < len(candidates) - len(ends):
        exact = tuple(node.name for node in model.graph.node if node.name in {*ends, *sensitive})
        yield Attempt(f"all but the first, the last and the {count} most sensitive layers", exact)


def sensitive_nodes(prepared: Path, quantised: Path, task: Task, images: NDArray[np.uint8]) -> set[str]:
    """The nodes next to the tensors whose rounding alone changes the answers most; images [n, height, width, 3].

    One tensor after the other is rounded in the exact graph as it is in the quantised one. How much of a tensor's own
    strength is lost says little: a channel that vanishes beside a strong one may be the one that decides. Probabilities
    are compared as they are; boxes come in any number and order, and classes of pixels without a degree, so of these
    what they are made from is compared, the last layers' sums.
    """
    import onnx

    model, whole = onnx.load(prepared), onnx.load(quantised)
    if task != Task.CLASSIFY:
        _answer_sums(model)
    constants = {constant.name: constant for constant in whole.graph.initializer}
    tensors = {name for node in model.graph.node for name in node.output}
    exact = _answers(model, images)
    changes: dict[str, float] = {}
    for node in whole.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in tensors:
            rounded = _with_rounded(model, node.input[0], [constants[name] for name in node.input[1:]])
            changes[node.input[0]] = _change(exact, _answers(rounded, images))
    worst = sorted(changes, key=lambda name: -changes[name])[: max(1, int(len(changes) * _SENSITIVE_SHARE))]
    return set().union(*(_around(model, tensor) for tensor in worst))


def _around(model: Any, tensor: str) -> set[str]:
    """The nodes that make a tensor and that take it, and what lies between it and the next layers on both sides."""
    names: set[str] = set()
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        for node in model.graph.node:
            if node.name not in names and current in [*node.input, *node.output]:
                names.add(node.name)
                if node.op_type in _SAME_RANGE:
                    waiting += [node.input[0], *node.output]
    return names


def _with_rounded(model: Any, tensor: str, parameters: list[Any]) -> Any:
    """A copy of the model that rounds one tensor to 256 steps; `parameters`: their scale and zero point."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    users = [number for number, node in enumerate(copy.graph.node) if tensor in node.input]
    for number in users:
        for position, name in enumerate(copy.graph.node[number].input):
            if name == tensor:
                copy.graph.node[number].input[position] = f"{tensor} rounded"
    names = [parameter.name for parameter in parameters]
    pair = [
        onnx.helper.make_node("QuantizeLinear", [tensor, *names], [f"{tensor} in steps"]),
        onnx.helper.make_node("DequantizeLinear", [f"{tensor} in steps", *names], [f"{tensor} rounded"]),
    ]
    for node in reversed(pair):
        copy.graph.node.insert(users[0], node)
    copy.graph.initializer.extend(parameters)
    return copy


def _answer_sums(model: Any) -> None:
    """Lets a model answer with the sums of its last layers, as far as no decision comes before them."""
    import onnx

    last = set(layers.last_layers(model))
    decided: set[str] = set()  # tensors
    sums = []
    for node in model.graph.node:
        if node.op_type in layers.DECISIONS or not decided.isdisjoint(node.input):
            decided.update(node.output)
        elif node.name in last:
            sums.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    del model.graph.output[:]
    model.graph.output.extend(sums)


def _answers(model: Any, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Each output, of all images one behind the other."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answers = zip(*(session.run(None, {"images": image[None]}) for image in images), strict=True)
    return [np.concatenate(of_images) for of_images in answers]


def _change(exact: list[NDArray[np.float32]], found: list[NDArray[np.float32]]) -> float:
    """The mean difference of each output, as a share of how much it varies; all together."""
    return sum(
        float(np.abs(after - before).mean() / max(float(before.std()), 1e-12))
        for before, after in zip(exact, found, strict=True)
    )


def _reader(batches: Iterable[NDArray[np.uint8]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:  # type: ignore[override]
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    return Reader()


@contextlib.contextmanager
def _quiet(precision: str) -> Iterator[None]:
    """The tools warn and log freely; what goes wrong is raised here in one line, or found by the checks that follow."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise ModelError(f"an export as {precision} needs {error.name}: pip install 'pixelmill[train]'") from None
    except Exception as error:
        text = " ".join(str(error).split())
        raise ModelError(
            f"ONNX Runtime cannot convert the graph to {precision}: {type(error).__name__}: {text}"
        ) from error
    finally:
        logging.disable(before)
