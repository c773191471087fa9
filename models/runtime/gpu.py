"""Whether the installed ONNX Runtime can use a GPU here, and if not, what to do about it."""

import ctypes
import os
from importlib import metadata
from pathlib import Path

from models.errors import ModelError
from models.settings.fields import Precision

TENSORRT = "TensorrtExecutionProvider"
CUDA = "CUDAExecutionProvider"

# One TensorRT engine serves all batches up to this; another batch would mean minutes of building it anew.
_LARGEST_BATCH = 64


def provider_choices(height: int, width: int, precision: Precision = "fp32") -> list[list[tuple[str, dict]]]:
    """Lists of providers with their options to try one after the other, the fastest first.

    Raises ModelError if ONNX Runtime has none for GPUs, or there is no device.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if CUDA not in available:
        raise ModelError(no_gpu("it has no CUDA provider"))
    if not device_present():
        raise ModelError(no_gpu("the NVIDIA driver reports no device"))
    cuda: tuple[str, dict] = (CUDA, {"cudnn_conv_algo_search": "HEURISTIC"})  # the default tries all, per batch size
    # TensorRT takes only int8 whose zero is zero, and ours are made for CPUs.
    if TENSORRT not in available or not _loads("libnvinfer.so.10") or precision == "int8":
        return [[cuda]]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pixelmill", "tensorrt")
    tensorrt = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_fp16_enable": "1" if precision == "fp16" else "0",
        **{
            f"trt_profile_{bound}_shapes": f"images:{batch}x{height}x{width}x3"
            for bound, batch in (("min", 1), ("opt", _LARGEST_BATCH // 2), ("max", _LARGEST_BATCH))
        },
    }
    return [[(TENSORRT, tensorrt), cuda], [cuda]]


def device_present() -> bool:
    """Whether the NVIDIA driver is there and reports a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def no_gpu(found: str) -> str:
    """One line: what is wrong, what is installed, what that offers, and how to mend it."""
    import onnxruntime

    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    providers = ", ".join(onnxruntime.get_available_providers())
    if len(installed) == 2:
        fix = (
            "the two packages overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    elif installed == ["onnxruntime-gpu"]:
        fix = "check nvidia-smi, and that CUDA and cuDNN are those this version wants"
    else:
        fix = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    return (
        f"--device cuda is not possible: {found}. Installed: {' and '.join(installed) or 'onnxruntime'} "
        f"{onnxruntime.__version__} with {providers}. To mend: {fix}; or use --device cpu"
    )


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
