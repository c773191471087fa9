"""What runs a model: one small interface over ONNX Runtime and OpenVINO, and the choice between them."""

import ctypes
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.errors import ModelError, UsageError
from models.runtime.results import ANSWERS
from models.settings import Device
from models.settings import Engine as EngineName

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


class OutOfMemory(Exception):
    """A batch did not fit in memory; a smaller one may."""


class Engine(Protocol):
    """A model loaded on one device. `run` may be called by `concurrency` threads at once."""

    name: str  # what was chosen, for people: "onnxruntime cpu fp32"
    device: str  # "cpu" or "cuda"
    concurrency: int

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray]:
        """Outputs by their name in the ONNX contract, for images [batch, height, width, 3]. Raises OutOfMemory."""
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
    if engine == "openvino" and device == "cuda":
        raise UsageError("OpenVINO runs on the CPU here: use --device cpu, or --engine onnxruntime for a GPU")
    if engine != "openvino" and device != "cpu":
        providers = gpu_providers()
        if device == "cuda" or (providers and cuda_device_present()):
            return OnnxRuntimeEngine(onnx_path, card, providers=require_gpu(providers), concurrency=2)
    if engine != "onnxruntime":
        from models.runtime import openvino

        reason = openvino.why_not(card)
        if engine == "openvino" or reason is None:
            return openvino.OpenVinoEngine(onnx_path, card, concurrency=threads)
    return OnnxRuntimeEngine(onnx_path, card, providers=[], concurrency=threads)


class OnnxRuntimeEngine:
    """One session. On the CPU each call runs on its calling thread alone, so that calls from all cores run at once."""

    def __init__(self, onnx_path: str | Path, card: Card, *, providers: list[str], concurrency: int):
        """`providers`: GPU providers, best first; none means the CPU. Raises ModelError, also when none comes up."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised, and said once
        options.enable_mem_pattern = False
        self.device = "cuda" if providers else "cpu"
        self.concurrency = concurrency
        try:
            # Without enable_fallback=False a provider that fails is replaced by the CPU, with a print on stdout.
            self._session = onnxruntime.InferenceSession(
                str(onnx_path), options, providers=[*providers, "CPUExecutionProvider"], enable_fallback=False
            )
        except Exception as error:
            raise ModelError(f"cannot load {card.reference} from {onnx_path}: {' '.join(str(error).split())}") from None
        active = self._session.get_providers()
        if providers and not any(provider in active for provider in providers):
            raise ModelError(_no_gpu(f"the session came up with {', '.join(active)} only"))
        check_contract(self._session, card)
        self._output_names = [output.name for output in ANSWERS[card.task].outputs]
        short = {"TensorrtExecutionProvider": "tensorrt", "CUDAExecutionProvider": "cuda"}
        self.name = f"onnxruntime {short.get(active[0], 'cpu')} fp32"

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray]:
        """See `Engine.run`."""
        try:
            outputs = self._session.run(self._output_names, {"images": images})
        except Exception as error:
            raise as_out_of_memory(error) from None
        return dict(zip(self._output_names, outputs, strict=True))

    def close(self) -> None:
        """See `Engine.close`."""
        del self._session


def as_out_of_memory(error: Exception) -> Exception:
    """The error itself, or OutOfMemory if that is what it says."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return OutOfMemory(str(error))
    return error


def check_contract(session, card: Card) -> None:
    """Raises ModelError if the inputs or outputs of an ONNX Runtime session are not what the task's contract says."""
    rule = card.input
    found = {i.name: (i.type, list(i.shape)) for i in session.get_inputs()}
    expected = f"images: tensor(uint8) [batch, {rule.height}, {rule.width}, 3]"
    kind, shape = found.get("images", ("", []))
    if list(found) != ["images"] or kind != "tensor(uint8)" or shape[1:] != [rule.height, rule.width, 3]:
        have = "; ".join(f"{name}: {kind} {shape}" for name, (kind, shape) in found.items())
        raise ModelError(f"{card.reference}: expected the one input {expected}, the file has {have}")
    if isinstance(shape[0], int):
        raise ModelError(
            f"{card.reference}: the batch of input images is fixed at {shape[0]}; export it with a dynamic batch"
        )
    outputs = {o.name: (o.type, len(o.shape or [])) for o in session.get_outputs()}
    for output in ANSWERS[card.task].outputs:
        if outputs.get(output.name) != (output.onnx_type, output.rank):
            have = ", ".join(f"{name}: {kind} rank {rank}" for name, (kind, rank) in outputs.items())
            raise ModelError(
                f"{card.reference}: a {card.task} model needs the output {output.name}: {output.onnx_type} of rank "
                f"{output.rank}, the file has {have}"
            )


def gpu_providers() -> list[str]:
    """The GPU providers that the installed ONNX Runtime has, best first; TensorRT only if its library can be loaded."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    found = []
    if "TensorrtExecutionProvider" in available and _loads("libnvinfer.so.10"):
        found.append("TensorrtExecutionProvider")
    if "CUDAExecutionProvider" in available:
        found.append("CUDAExecutionProvider")
    return found


def cuda_device_present() -> bool:
    """Whether the NVIDIA driver is there and reports a device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def require_gpu(providers: list[str]) -> list[str]:
    """The providers, if they can work at all. Raises ModelError with what is installed and the fix."""
    if not providers:
        raise ModelError(_no_gpu("it has no CUDA provider"))
    if not cuda_device_present():
        raise ModelError(_no_gpu("the NVIDIA driver reports no device"))
    return providers


def _no_gpu(found: str) -> str:
    """One line: what is installed, what it offers, and how to mend it."""
    import onnxruntime

    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    have = (
        f"{' and '.join(installed)} {onnxruntime.__version__} with {', '.join(onnxruntime.get_available_providers())}"
    )
    if len(installed) == 2:
        fix = (
            "the two packages overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    elif installed == ["onnxruntime-gpu"]:
        fix = "check nvidia-smi, and that CUDA and cuDNN match this version"
    else:
        fix = "pip uninstall -y onnxruntime && pip install 'pixelmill[gpu]'"
    return f"--device cuda is not possible: {found}. Installed: {have}. To mend: {fix}; or use --device cpu"


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
