"""The layers of an ONNX graph, and what lies before, between and behind them.

What prepares the images lies before all layers. Behind them lie the answers: softmax, decoding, suppression. A detector
of two stages has such answers in its middle, too: they are the places that the second stage looks at.
"""

from typing import Any

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # what has weights, and takes the time
DECISIONS = ("NonMaxSuppression", "RoiAlign", "TopK")  # what makes places of sums, and looks there


def before_layers(model: Any) -> set[str]:
    """The names of the nodes that no layer's sums reach: they prepare the images, or what a second stage looks at."""
    reached: set[str] = set()  # tensors
    names = set()
    sums = _sums(model)
    for node in model.graph.node:  # in topological order
        if node.op_type in LAYERS or not reached.isdisjoint(node.input):
            reached.update(sums.intersection(node.output))
        else:
            names.add(node.name)
    return names


def after_layers(model: Any) -> set[str]:
    """The names of the nodes whose sums reach no layer: they make the answers, or the places of a second stage."""
    needed: set[str] = set()  # tensors
    names = set()
    sums = _sums(model)
    for node in reversed(model.graph.node):
        if node.op_type in LAYERS or not needed.isdisjoint(sums.intersection(node.output)):
            needed.update(node.input)
        else:
            names.add(node.name)
    return names


def first_layers(model: Any) -> list[str]:
    """The names of the layers that no other layer's sums reach."""
    reached: set[str] = set()  # tensors
    names = []
    sums = _sums(model)
    for node in model.graph.node:
        if node.op_type in LAYERS and reached.isdisjoint(node.input):
            names.append(node.name)
        if node.op_type in LAYERS or not reached.isdisjoint(node.input):
            reached.update(sums.intersection(node.output))
    return names


def last_layers(model: Any) -> list[str]:
    """The names of the layers whose sums reach no other layer."""
    needed: set[str] = set()  # tensors
    names = []
    sums = _sums(model)
    for node in reversed(model.graph.node):
        leads_on = not needed.isdisjoint(sums.intersection(node.output))
        if node.op_type in LAYERS and not leads_on:
            names.append(node.name)
        if node.op_type in LAYERS or leads_on:
            needed.update(node.input)
    return names[::-1]


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
        name for node in model.graph.node if node.op_type not in DECISIONS for name in node.output if name not in others
    }


def body(model: Any, outside: set[str]) -> Any:
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


def keep_apart(model: Any, groups: dict[str, str]) -> None:
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


def named(model: Any) -> Any:
    """The model, each node with a name of its own: nodes are spoken of by name."""
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}_unnamed"
        taken.add(node.name)
    return model
