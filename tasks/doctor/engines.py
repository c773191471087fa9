"""What can run a model here: each engine computes one small convolution, and its answer must be right."""

from base64 import b64decode

import numpy as np

from models.errors import PixelmillError
from models.runtime import gpu, openvino
from tasks.doctor.finding import Finding, ok, problem, warning

# An ONNX graph (opset 18): x f32 [1, 1, 4, 4] → one 3×3 convolution with the weights 0 … 8 → y f32 [1, 1, 2, 2]. Held
# as bytes, because the package that writes such graphs belongs to the training extra; a test reads it with that one.
TRIAL_GRAPH = b64decode(
    "CAgSADqeAQomCgF4CgF3EgF5IgRDb252KhUKDGtlcm5lbF9zaGFwZUADQAOgAQcSBXRyaWFsKjMIAQgBCAMIAxABQgF3SiQAAAAAAACAPwAAAEAAAEBAAACAQAAA"
    "oEAAAMBAAADgQAAAAEFaGwoBeBIWChQIARIQCgIIAQoCCAEKAggECgIIBGIbCgF5EhYKFAgBEhAKAggBCgIIAQoCCAIKAggCQgQKABAS"
)
_INPUT = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
_ANSWER = np.array([[258, 294], [402, 438]], np.float32).reshape(1, 1, 2, 2)
_TOLERANCE = 2.0  # bf16 and TF32 keep 8 and 11 bits


def check_engines() -> list[Finding]:
    """ONNX Runtime on the CPU, on the GPU if there is one, and OpenVINO if it is installed."""
    return [_onnxruntime_cpu(), *_onnxruntime_gpu(), _openvino()]


def _onnxruntime_cpu() -> Finding:
    import onnxruntime

    mend = "pip install --force-reinstall onnxruntime"
    return _tried(f"onnxruntime {onnxruntime.__version__} on the CPU", ["CPUExecutionProvider"], problem, mend)


def _onnxruntime_gpu() -> list[Finding]:
    if not gpu.device_present():
        return [ok("gpu", "no NVIDIA device here; models run on the CPU")]
    try:
        choices = gpu.provider_choices(4, 4)
    except PixelmillError as error:
        return [warning("gpu", str(error), "see there; until then models run on the CPU")]
    names = list(dict.fromkeys(name for providers in choices for name, _ in providers))
    mend = "check nvidia-smi, and that CUDA, cuDNN and TensorRT are those that this onnxruntime-gpu wants"
    return [_tried(f"onnxruntime with {name}", [name], warning, mend, check="gpu") for name in names]


def _tried(what: str, providers: list[str], otherwise, mend: str, check: str = "engine") -> Finding:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(TRIAL_GRAPH, options, providers=providers, enable_fallback=False)
        active = session.get_providers()[0]
        (answer,) = session.run(None, {"x": _INPUT})
    except Exception as error:
        return otherwise(check, f"{what} does not run: {_one_line(error)}", mend)
    if active != providers[0]:
        return otherwise(check, f"{what} did not start; {active} took its place", mend)
    if not np.allclose(answer, _ANSWER, atol=_TOLERANCE):
        return otherwise(check, f"{what} gives wrong answers", mend)
    return ok(check, f"{what} answers rightly")


def _openvino() -> Finding:
    if not openvino.is_installed():
        return ok(
            "openvino", "not installed; on CPUs with bf16 it is about twice as fast: pip install 'pixelmill[openvino]'"
        )
    try:
        precisions = " and ".join(openvino.cpu_precisions())
        core = openvino.new_core()
        request = core.compile_model(core.read_model(TRIAL_GRAPH), "CPU").create_infer_request()
        (answer,) = request.infer({"x": _INPUT}).values()
    except Exception as error:
        mend = "pip install --force-reinstall openvino, or pip uninstall openvino"
        return warning("openvino", f"it does not run: {_one_line(error)}", mend)
    if not np.allclose(answer, _ANSWER, atol=_TOLERANCE):
        return warning("openvino", "it gives wrong answers", "pip uninstall openvino, or --engine onnxruntime")
    return ok("openvino", f"answers rightly; this CPU computes {precisions}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
