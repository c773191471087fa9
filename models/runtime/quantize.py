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

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # what has weights, and takes the time
_DECISIONS = ("NonMaxSuppression", "RoiAlign", "TopK")  # what makes places of sums, and looks there

# What is computed in int8, by task. Between quantised layers the rest would cost a conversion there and back.
_AROUND = ("Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Relu", "Reshape")
INT8_OPERATORS: dict[Task, tuple[str, ...]] = {
    Task.CLASSIFY: (*_LAYERS, *_AROUND),
    Task.DETECT: ("Conv",),  # coordinates need more than 256 steps
    Task.INSTANCE: ("Conv",),
    Task.SEMANTIC: (*_LAYERS, *_AROUND, "Resize"),
}
HALF_MAX = 65_504.0
_SENSITIVE_SHARE = 0.1  # of the quantised tensors; the layers around the worst of them go back to fp32
_SENSITIVITY_IMAGES = 8
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
    outside = _before_layers(model) | _after_layers(model)
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

    model = _named(onnx.load(exact))
    with _quiet("fp16"):
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        # Told to leave nodes alone, the converter still rounds what goes from one to the next: it sees only the rest.
        before, after = _before_layers(model), _after_layers(model)
        _keep_apart(model, dict.fromkeys(before | after, "what stays exact"))
        body = convert_float_to_float16(_body(model, before | after), keep_io_types=True)
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
    import onnx

    model = _named(onnx.load(exact))
    _keep_apart(model, {node.name: node.name for node in model.graph.node if node.op_type in _LAYERS})
    onnx.save(model, out)
    with _quiet("int8"):
        from onnxruntime.quantization.shape_inference import quant_pre_process

        # Our exports state their shapes; the symbolic inference takes a doubled map's batch for another one, and fails.
        quant_pre_process(out, out, skip_symbolic_shape=True)
    onnx.save(_named(onnx.load(out)), out)


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
            nodes_to_exclude=sorted({*_before_layers(model), *_after_layers(model), *attempt.exact_nodes}),
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
    layers = [
        node.name for node in model.graph.node if node.op_type in _LAYERS and node.op_type in INT8_OPERATORS[task]
    ]
    ends = tuple(layer for number, layer in enumerate(layers) if number in (0, len(layers) - 1))
    if len(ends) == len(layers):
        return
    yield Attempt("all but the first and the last layer", ends)
    if task != Task.CLASSIFY:  # boxes come in any number and order: there is no difference to measure
        return
    sensitive = sensitive_nodes(prepared, whole, images[:_SENSITIVITY_IMAGES])
    count = len(sensitive.intersection(layers).difference(ends))
    if 0 < count < len(layers) - len(ends):
        exact = tuple(node.name for node in model.graph.node if node.name in {*ends, *sensitive})
        yield Attempt(f"all but the first, the last and the {count} most sensitive layers", exact)


def sensitive_nodes(prepared: Path, quantised: Path, images: NDArray[np.uint8]) -> set[str]:
    """The nodes next to the tensors whose rounding alone changes the answers most; images [n, height, width, 3].

    One tensor after the other is rounded in the exact graph as it is in the quantised one. How much of a tensor's own
    strength is lost says little: a channel that vanishes beside a strong one may be the one that decides.
    """
    import onnx

    model, whole = onnx.load(prepared), onnx.load(quantised)
    constants = {constant.name: constant for constant in whole.graph.initializer}
    tensors = {name for node in model.graph.node for name in node.output}
    exact = _answers(model, images)
    changes: dict[str, float] = {}
    for node in whole.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in tensors:
            rounded = _with_rounded(model, node.input[0], [constants[name] for name in node.input[1:]])
            changes[node.input[0]] = float(np.abs(_answers(rounded, images) - exact).mean())
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


def _answers(model: Any, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])


def _reader(batches: Iterable[NDArray[np.uint8]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:  # type: ignore[override]
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    return Reader()


def _body(model: Any, outside: set[str]) -> Any:
    """The part of a model without the nodes `outside`, as a model of its own."""
    import onnx
    from onnx.utils import Extractor

    nodes = model.graph.node
    made_inside = {name for node in nodes if node.name not in outside for name in node.output}
    made_outside = {name for node in nodes if node.name in outside for name in node.output}
    made_outside |= {value.name for value in model.graph.input}
    used_outside = {name for node in nodes if node.name in outside for name in node.input}
    used_outside |= {value.name for value in model.graph.output}
    used_inside = {name for node in nodes if node.name not in outside for name in node.input}
    extractor = Extractor(onnx.shape_inference.infer_shapes(model))
    return extractor.extract_model(sorted(made_outside & used_inside), sorted(made_inside & used_outside))


def _before_layers(model: Any) -> set[str]:
    """The names of the nodes that no layer's sums reach: they prepare the images, or what a second stage looks at."""
    reached: set[str] = set()  # tensors
    names = set()
    sums = _sums(model)
    for node in model.graph.node:  # in topological order
        if node.op_type in _LAYERS or not reached.isdisjoint(node.input):
            reached.update(sums.intersection(node.output))
        else:
            names.add(node.name)
    return names


def _after_layers(model: Any) -> set[str]:
    """The names of the nodes whose sums reach no layer: they make the answers, or the places of a second stage."""
    needed: set[str] = set()  # tensors
    names = set()
    sums = _sums(model)
    for node in reversed(model.graph.node):
        if node.op_type in _LAYERS or not needed.isdisjoint(sums.intersection(node.output)):
            needed.update(node.input)
        else:
            names.add(node.name)
    return names


def _sums(model: Any) -> set[str]:
    """The tensors through which one layer's sums go on to the next: they hold floats, and no decision made them."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    others = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.UNDEFINED)
    }
    return {
        name
        for node in model.graph.node
        if node.op_type not in _DECISIONS
        for name in node.output
        if name not in others
    }


def _keep_apart(model: Any, groups: dict[str, str]) -> None:
    """Gives nodes of different groups constants of their own; `groups`: by the name of the node, all others are one."""
    import onnx

    constants = {constant.name: constant for constant in model.graph.initializer}
    owners: dict[str, str] = {}
    for node in model.graph.node:
        group = groups.get(node.name, "the rest")
        for position, name in enumerate(node.input):
            if name not in constants or owners.setdefault(name, group) == group:
                continue
            own = f"{name} of {group}"
            if own not in constants:
                copy = onnx.TensorProto()
                copy.CopyFrom(constants[name])
                copy.name = own
                constants[own], owners[own] = copy, group
                model.graph.initializer.append(copy)
            node.input[position] = own


def _named(model: Any) -> Any:
    """The model, each node with a name of its own: nodes are spoken of by name."""
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}_unnamed"
        taken.add(node.name)
    return model


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
