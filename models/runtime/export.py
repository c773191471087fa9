"""From a PyTorch module to an ONNX file that describes itself."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.errors import ModelError
from models.runtime.latents import Latents
from models.runtime.results import ANSWERS

if TYPE_CHECKING:
    from torch import nn

METADATA_KEY = "pixelmill"
OPSET = 20


def export_onnx(graph: "nn.Module", card: Card, path: Path, example: NDArray[np.uint8] | Latents) -> None:
    """Writes `graph` to `path` with the card in its metadata: dynamic batch, fixed height and width.

    `graph` maps images [batch, height, width, 3] uint8 to the outputs of the card's task, in their order; that of a
    generator takes the arrays of Latents in their order. `example` is such a batch of at least two images. The file is
    byte for byte the same when repeated with the same versions of torch and onnxscript. Raises ModelError when torch
    cannot export the module.
    """
    import torch

    from models.runtime.detection_ops import translations

    if len(example) < 2:
        raise ValueError("the example needs two images or more: torch fixes a batch of one")
    names = [output.name for output in ANSWERS[card.task].outputs]
    inputs = example.by_name if isinstance(example, Latents) else {"images": example}
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                tuple(torch.from_numpy(array) for array in inputs.values()),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=names,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                custom_translation_table=translations(),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(f"torch cannot export {card.architecture} to ONNX: {_cause(error)}") from error
    assert program is not None
    model = program.model
    # The exporter notes for every node where in which source file it came from: paths of this machine.
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props[METADATA_KEY] = graph_card(card).to_json()
    program.save(str(path), external_data=False)


def embed_card(onnx_path: Path, card: Card, out: Path) -> None:
    """Copies a foreign ONNX file with the card in its metadata. Raises ModelError if it is not one whole ONNX file."""
    import onnx

    try:
        model = onnx.load(onnx_path, load_external_data=False)
    except Exception as error:
        raise ModelError(f"{onnx_path} is no ONNX file: {_cause(error)}") from None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ModelError(f"{onnx_path} keeps its weights in another file: save it as one, save_as_external_data=False")
    kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(
        [*kept, onnx.StringStringEntryProto(key=METADATA_KEY, value=graph_card(card).to_json())]
    )
    onnx.save(model, out)


def graph_card(card: Card) -> Card:
    """The card as it stands in the ONNX metadata: without what is only known once the file exists."""
    return replace(card, files={}, parity={}, metrics={}, created_at="")


def _cause(error: BaseException) -> str:
    """The first line of the innermost error: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, warns and logs freely; what matters is raised, or found by the parity check."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
