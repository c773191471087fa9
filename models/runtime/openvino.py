"""The OpenVINO engine: about twice as fast as ONNX Runtime on CPUs with bfloat16 units."""

import importlib.util
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.errors import ModelError
from models.runtime.latents import Latents
from models.runtime.results import ANSWERS


def is_installed() -> bool:
    """Whether the package is there; it is not imported to find out."""
    try:
        return importlib.util.find_spec("openvino") is not None
    except ValueError:  # something put None into sys.modules
        return False


def why_not(card: Card) -> str | None:
    """Why `--engine auto` leaves OpenVINO alone for this model on this machine; None when it takes it."""
    if not is_installed():
        return "openvino is not installed"
    precision = cpu_precisions()[-1]
    record = card.parity.get(f"openvino_{precision}")
    if record is None:
        return f"the card has no parity record for OpenVINO {precision}"
    if not record["agrees"]:
        return f"OpenVINO {precision} disagrees with {yardstick(card)} beyond its tolerance"
    return None


def yardstick(card: Card) -> str:
    """What OpenVINO's answers were compared with, for people."""
    return {"fp32": "PyTorch", "fp16": "the exact export", "int8": "ONNX Runtime"}[card.precision]


def new_core() -> Any:
    """OpenVINO's Core. The package tells its maker of every import, unless its messenger cannot be imported."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    from openvino import Core

    return Core()


def cpu_precisions() -> list[str]:
    """What the package, if installed, computes natively on this CPU, slowest first: `fp32`, then perhaps `bf16`."""
    if not is_installed():
        return []
    return ["fp32", "bf16"] if "BF16" in new_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else ["fp32"]


class OpenVinoEngine:
    """One stream, hence one core, per calling thread."""

    device = "cpu"

    def __init__(
        self, onnx_path: str | Path, card: Card, *, concurrency: int, reason: str = "", precision: str | None = None
    ):
        """`precision` is `bf16` or `fp32`; by default bf16 where the CPU has it and the card's parity record allows it.

        Raises ModelError if the package is missing or cannot read the model.
        """
        if not is_installed():
            raise ModelError("--engine openvino needs the package: pip install 'pixelmill[openvino]'")
        if precision is None:
            precision = cpu_precisions()[-1]
            if not card.parity.get(f"openvino_{precision}", {}).get("agrees", False):
                precision = "fp32"
            refusal = card.precision == "int8" and why_not(card)
            if refusal:  # fp32 is right in any case; what it makes of int8 may be far off
                raise ModelError(f"{card.reference}: {refusal}; use --engine onnxruntime")
        options = {
            "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[precision],
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": str(concurrency),
            "INFERENCE_NUM_THREADS": str(concurrency),
            "ENABLE_CPU_PINNING": False,  # the decoding threads move about the same cores
        }
        core = new_core()
        try:
            self._model = core.compile_model(core.read_model(str(onnx_path)), "CPU", options)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot run {card.reference}: {' '.join(str(error).split())}") from None
        # The record of an int8 graph is kept by the precision of what is not quantised in it.
        self.name = f"openvino cpu {'int8' if card.precision == 'int8' else precision}"
        self.reason = reason
        self.concurrency = concurrency
        self._output_names = [output.name for output in ANSWERS[card.task].outputs]
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(concurrency):
            self._requests.put(self._model.create_infer_request())
        # Two threads that make their first inference together can deadlock: the first one is made here, alone.
        self.run(np.zeros((1, card.input.height, card.input.width, 3), np.uint8))

    def run(self, images: NDArray[np.uint8] | Latents) -> dict[str, NDArray]:
        """See `Engine.run`."""
        from models.runtime.engine import as_out_of_memory

        request = self._requests.get()
        try:
            results = request.infer({"images": images})  # it takes no generators
            return {name: np.array(results[name]) for name in self._output_names}
        except Exception as error:
            raise as_out_of_memory(error) from None
        finally:
            self._requests.put(request)

    def close(self) -> None:
        """See `Engine.close`."""
        del self._requests, self._model
