"""What runs a model: one small interface over ONNX Runtime and OpenVINO, and the choice between them."""

import logging
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.errors import ModelError, UsageError
from models.records import Task
from models.runtime import gpu
from models.runtime.latents import Latents
from models.runtime.results import ANSWERS
from models.settings.fields import Device
from models.settings.fields import Engine as EngineName

logger = logging.getLogger("pixelmill.engine")

# Texts by which the libraries below ONNX Runtime and OpenVINO say that memory ran out.
_OUT_OF_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "is smaller than requested bytes",
    "out of memory",
    "outofmemory",
    "alloc_failed",
    "unable to allocate",
)

_GPU_CONCURRENCY = 2  # one batch is computed while the next one is on its way to the device


class OutOfMemory(Exception):
    """A batch did not fit in memory; a smaller one may."""


class Engine(Protocol):
    """A model loaded on one device. `run` may be called by `concurrency` threads at once."""

    name: str  # what was chosen, for people: "onnxruntime cpu fp32"
    reason: str  # why
    device: str  # "cpu" or "cuda"
    concurrency: int

    def run(self, images: NDArray[np.uint8] | Latents) -> dict[str, NDArray]:
        """Outputs by their name in the ONNX contract, for images [batch, height, width, 3], or for what a generator
        makes images of. Raises OutOfMemory."""
        ...

    def close(self) -> None:
        """Frees the model and its device memory."""
        ...


def open_engine(
    onnx_path: str | Path, card: Card, *, engine: EngineName = "auto", device: Device = "auto", threads: int = 1
) -> Engine:
    """Loads the model for `threads` calling threads, on what was asked for, else the fastest that agrees with PyTorch.

    Raises ModelError if what was asked for is not installed or not there, or if the file breaks the ONNX contract.
    """
    from models.runtime import openvino

    if engine == "openvino":
        if card.task is Task.GENERATE:
            raise UsageError(f"{card.reference} makes images: a generator runs on ONNX Runtime")
        if device == "cuda":
            raise UsageError("OpenVINO runs on the CPU here: use --device cpu, or --engine onnxruntime for a GPU")
        return openvino.OpenVinoEngine(onnx_path, card, concurrency=threads, reason="asked for")
    if device == "cuda" or (device == "auto" and card.precision != "int8"):  # int8 is made for CPUs
        try:
            return _open_on_gpu(onnx_path, card, reason="asked for" if device == "cuda" else "a GPU is there")
        except ModelError as error:
            if device == "cuda":
                raise
            if gpu.device_present():
                logger.warning("the GPU is not used: %s", error)
    if engine == "onnxruntime":
        return OnnxRuntimeEngine(onnx_path, card, concurrency=threads, reason="asked for")
    refusal = "a generator runs on ONNX Runtime" if card.task is Task.GENERATE else openvino.why_not(card)
    if refusal is None:
        reason = f"it agrees with {openvino.yardstick(card)}"
        return openvino.OpenVinoEngine(onnx_path, card, concurrency=threads, reason=reason)
    return OnnxRuntimeEngine(onnx_path, card, concurrency=threads, reason=refusal)


class OnnxRuntimeEngine:
    """One session. On the CPU each call runs on its calling thread alone, so that calls from all cores run at once."""

    def __init__(
        self,
        onnx_path: str | Path,
        card: Card,
        *,
        concurrency: int,
        reason: str = "",
        providers: list[tuple[str, dict]] | None = None,
    ):
        """`providers`: GPU providers with their options, best first. Raises ModelError, also when none comes up."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised, and said once
        # With the arena and without patterns, memory stays flat over batches of any size; without the arena a run takes
        # a third more time, and patterns, or shrinking the arena after each run, hold more at the peak.
        options.enable_mem_pattern = False
        # CPUs without VNNI add int8 products in 16 bits, which overflow; a little slower there, the same everywhere.
        options.add_session_config_entry("session.x64quantprecision", "1")
        providers = providers or []
        try:
            # Without enable_fallback=False a provider that fails is replaced by the CPU, with a print on stdout.
            self._session = onnxruntime.InferenceSession(
                str(onnx_path), options, providers=[*providers, "CPUExecutionProvider"], enable_fallback=False
            )
        except Exception as error:
            raise ModelError(f"cannot load {card.reference} from {onnx_path}: {' '.join(str(error).split())}") from None
        active = self._session.get_providers()
        if providers and active[0] != providers[0][0]:
            raise ModelError(gpu.no_gpu(f"{providers[0][0]} did not start, the session has {', '.join(active)}"))
        check_contract(self._session, card)
        self._output_names = [output.name for output in ANSWERS[card.task].outputs]
        on = {gpu.TENSORRT: "tensorrt", gpu.CUDA: "cuda"}.get(active[0], "cpu")
        self.device = "cuda" if providers else "cpu"
        self.name = f"onnxruntime {on} {card.precision}"
        self.reason = reason
        self.concurrency = concurrency

    def run(self, images: NDArray[np.uint8] | Latents) -> dict[str, NDArray]:
        """See `Engine.run`."""
        inputs = images.by_name if isinstance(images, Latents) else {"images": images}
        try:
            outputs = self._session.run(self._output_names, inputs)
        except Exception as error:
            raise as_out_of_memory(error) from None
        return dict(zip(self._output_names, outputs, strict=True))

    def close(self) -> None:
        """See `Engine.close`."""
        del self._session


def _open_on_gpu(onnx_path: str | Path, card: Card, reason: str) -> OnnxRuntimeEngine:
    """With the fastest providers that come up. Raises ModelError if none does."""
    failure: ModelError | None = None
    choices = gpu.provider_choices(card.input.height, card.input.width, card.precision)
    if card.task is Task.GENERATE:
        choices = choices[-1:]  # TensorRT is told the sizes of `images`, which a generator has none of
    for providers in choices:
        try:
            return OnnxRuntimeEngine(onnx_path, card, concurrency=_GPU_CONCURRENCY, reason=reason, providers=providers)
        except ModelError as error:
            failure = error
    assert failure is not None
    raise failure


def as_out_of_memory(error: Exception) -> Exception:
    """The error itself, or OutOfMemory if that is what it says."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return OutOfMemory(str(error))
    return error


def check_contract(session, card: Card) -> None:
    """Raises ModelError if the inputs or outputs of an ONNX Runtime session are not what the task's contract says."""
    found = {i.name: (i.type, list(i.shape)) for i in session.get_inputs()}
    expected = _inputs_of(card)
    if {name: (kind, shape[1:]) for name, (kind, shape) in found.items()} != expected:
        want = "; ".join(f"{name}: {kind} {['batch', *shape]}" for name, (kind, shape) in expected.items())
        have = "; ".join(f"{name}: {kind} {shape}" for name, (kind, shape) in found.items())
        raise ModelError(f"{card.reference}: expected the input {want}, the file has {have}".replace("'", ""))
    for _, shape in found.values():
        if isinstance(shape[0], int):
            raise ModelError(
                f"{card.reference}: the input's batch is fixed at {shape[0]}; export it with a dynamic batch"
            )
    outputs = {o.name: (o.type, len(o.shape or [])) for o in session.get_outputs()}
    for output in ANSWERS[card.task].outputs:
        if outputs.get(output.name) != (output.onnx_type, output.rank):
            have = ", ".join(f"{name}: {kind} of rank {rank}" for name, (kind, rank) in outputs.items())
            raise ModelError(
                f"{card.reference}: a {card.task} model needs the output {output.name}: {output.onnx_type} of rank "
                f"{output.rank}, the file has {have}"
            )


def _inputs_of(card: Card) -> dict[str, tuple[str, list[int]]]:
    """Type and shape, without the batch, of each input that the graph of a card has, by name."""
    if card.task is not Task.GENERATE:
        return {"images": ("tensor(uint8)", [card.input.height, card.input.width, 3])}
    inputs: dict[str, tuple[str, list[int]]] = {"latent": ("tensor(float)", [card.latent_size])}
    return inputs | ({"labels": ("tensor(int64)", [])} if card.is_conditional else {})
