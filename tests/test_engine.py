"""Engines, the predictor over them, and findings as Arrow columns."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest

from models.card import Card
from models.errors import ModelError, Rejected, UsageError
from models.imaging import masks
from models.imaging.geometry import Geometry, ResizeRule
from models.records import RESULT_FIELDS, Status, Task
from models.runtime import gpu, openvino
from models.runtime.engine import OutOfMemory, as_out_of_memory, open_engine
from models.runtime.predictor import Predictor
from models.runtime.results import Classification, Detection, Instances, Segments, result_columns

SIZE = 4
LABELS = ("ant", "bee", "cat", "dog")

# The mean of an image's three channels, and zero for a fourth class, through a softmax.
TINY = """
<ir_version: 10, opset_import: ["" : 20]>
tiny (uint8[batch, 4, 4, 3] images) => (float[batch, classes] probabilities)
<int64[2] axes = {1, 2}, int64[4] pads = {0, 0, 0, 1}>
{
    floats = Cast <to = 1> (images)
    means = ReduceMean <keepdims = 0> (floats, axes)
    logits = Pad (means, pads)
    probabilities = Softmax <axis = 1> (logits)
}
"""


def make_card(task: Task = Task.CLASSIFY, **changes) -> Card:
    rule = ResizeRule("stretch", SIZE, SIZE)
    return Card(
        **{"name": "tiny", "version": "0" * 12, "task": task, "architecture": "tiny", "labels": LABELS, "input": rule}
        | changes
    )


def geometry(width: int = SIZE, height: int = SIZE) -> Geometry:
    return Geometry(width, height, SIZE / width, SIZE / height, 0.0, 0.0)


def images(*values: int) -> np.ndarray:
    """One image per value: its second channel has it, the others are black."""
    batch = np.zeros((len(values), SIZE, SIZE, 3), np.uint8)
    batch[..., 1] = np.array(values)[:, None, None]
    return batch


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(onnx.parser.parse_model(TINY), path)
    return path


class FakeEngine:
    """Answers each image with its own second channel as the score of label 1, unless `misbehave` says otherwise."""

    name, reason, device, concurrency = "fake", "", "cpu", 1

    def __init__(self, misbehave: Callable[[np.ndarray], None] = lambda values: None):
        self.misbehave = misbehave
        self.batches: list[int] = []

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append(len(images))
        values = images[:, 0, 0, 1]
        self.misbehave(values)
        scores = values.astype(np.float32) / 255
        scores[values == 255] = np.nan
        return {"probabilities": np.stack([1 - scores, scores], axis=1)}

    def close(self) -> None:
        pass


def fail_on(value: int) -> Callable[[np.ndarray], None]:
    def misbehave(values: np.ndarray) -> None:
        if value in values:
            raise RuntimeError("no kernel\nfor this")

    return misbehave


def more_than(limit: int) -> Callable[[np.ndarray], None]:
    def misbehave(values: np.ndarray) -> None:
        if len(values) > limit:
            raise OutOfMemory("std::bad_alloc")

    return misbehave


def scores_of_label_1(found: list) -> list:
    """The score of label 1, or the status, for each image."""
    return [
        f.status if isinstance(f, Rejected) else round(float(f.scores[list(f.labels).index(1)] * 255)) for f in found
    ]


@pytest.mark.parametrize(
    ("values", "misbehave", "expected", "batches"),
    [
        pytest.param([], fail_on(7), [], [], id="empty"),
        pytest.param([1, 2, 3], fail_on(7), [1, 2, 3], [3], id="all well"),
        pytest.param([1, 255, 3], fail_on(7), [1, Status.FAILED, 3], [3], id="NaN"),
        pytest.param([1, 2, 7, 4], fail_on(7), [1, 2, Status.FAILED, 4], [4, 2, 2, 1, 1, 1], id="one image fails"),
        pytest.param([7], fail_on(7), [Status.FAILED], [1, 1], id="a single image fails"),
        pytest.param([1, 2, 3, 4, 5], more_than(2), [1, 2, 3, 4, 5], [5, 2, 3, 1, 2], id="out of memory"),
    ],
)
def test_predictor_gives_one_finding_per_image_in_order(values, misbehave, expected, batches):
    engine = FakeEngine(misbehave)
    found = Predictor(make_card(labels=LABELS[:2]), engine).predict(images(*values), [geometry()] * len(values))
    assert scores_of_label_1(found) == expected
    assert engine.batches == batches


def test_a_failed_image_has_a_reason_in_one_line():
    (found,) = Predictor(make_card(), FakeEngine(fail_on(7))).predict(images(7), [geometry()])
    assert found.reason == "the model failed on this image: no kernel for this"


def test_running_out_of_memory_lowers_the_batches_to_come():
    engine = FakeEngine(more_than(2))
    predictor = Predictor(make_card(labels=LABELS[:2]), engine)
    predictor.predict(images(*range(8)), [geometry()] * 8)
    assert predictor.max_batch == 2
    engine.batches.clear()
    assert scores_of_label_1(predictor.predict(images(1, 2, 3, 4, 5), [geometry()] * 5)) == [1, 2, 3, 4, 5]
    assert engine.batches == [2, 2, 1]


def test_an_engine_that_cannot_even_run_a_blank_image_ends_the_run():
    predictor = Predictor(make_card(), FakeEngine(more_than(0)))
    with pytest.raises(
        ModelError, match="can no longer run tiny@000000000000, not even on one blank image: std::bad_a"
    ):
        predictor.predict(images(1, 2), [geometry()] * 2)


def test_equal_scores_are_ordered_by_label():
    class Uniform(FakeEngine):
        def run(self, images):
            return {"probabilities": np.full((len(images), 4), 0.25, np.float32)}

    (found,) = Predictor(make_card(), Uniform(), top_k=3).predict(images(1), [geometry()])
    assert found.labels.tolist() == [0, 1, 2]


class DetectingEngine(FakeEngine):
    """The same objects, in no order, for every batch of three: the last image has none, the second has one with NaN."""

    def run(self, images):
        return {
            "boxes_xyxy": np.array([[0, 0, 2, 2], [1, 1, 9, 9], [0, 0, 1, 1], [0, 1, 2, 2], [4, 4, 4, 4]], np.float32),
            "scores": np.array([0.5, 0.9, np.nan, 0.5, 0.8], np.float32),
            "labels": np.array([3, 2, 1, 0, 1], np.int64),
            "batch_index": np.array([0, 0, 1, 0, 2], np.int64),
        }


def test_detections_are_sorted_scaled_and_clipped():
    predictor = Predictor(make_card(Task.DETECT), DetectingEngine())
    first, second, third = predictor.predict(images(1, 2, 3), [geometry(8, 4)] * 3)
    assert first.labels.tolist() == [2, 0, 3]
    assert first.scores.tolist() == pytest.approx([0.9, 0.5, 0.5])
    assert first.boxes_xyxy.tolist() == [[2, 1, 8, 4], [0, 1, 4, 2], [0, 0, 4, 2]]
    assert second.status == Status.FAILED
    assert third.scores.tolist() == [], "a box without area after clipping is no object"


class MaskingEngine(FakeEngine):
    """Two objects in the first image, of which the padding hides one; NaN in the mask of the second image's."""

    def run(self, images):
        shapes = np.ones((3, 2, 2), np.float32)
        shapes[1, :, 1] = 0  # of the whole box, not of what is left of it
        shapes[2, 0, 0] = np.nan
        return {
            "boxes_xyxy": np.array([[0, 2, 2, 4], [1, 0, 4, 2], [0, 0, 1, 1]], np.float32),
            "scores": np.array([0.9, 0.5, 0.9], np.float32),
            "labels": np.array([1, 2, 1], np.int64),
            "batch_index": np.array([0, 0, 1], np.int64),
            "masks": shapes,
        }


def test_masks_are_cut_off_where_the_image_ends():
    padded = Geometry(width=2, height=2, scale_x=1.0, scale_y=1.0, offset_x=0.0, offset_y=0.0)
    first, second = Predictor(make_card(Task.INSTANCE), MaskingEngine()).predict(images(1, 2), [padded] * 2)
    assert (first.labels.tolist(), first.boxes_xyxy.tolist(), first.areas.tolist()) == ([2], [[1, 0, 2, 2]], [2])
    assert masks.decode(first.masks[0], 2, 2).tolist() == [[False, True], [False, True]]
    assert "masks holds NaN" in second.reason


class MappingEngine(FakeEngine):
    """The value of each image as the class of the right half of its map."""

    def run(self, images):
        class_map = images[..., 1].copy()
        class_map[:, :, : SIZE // 2] = 0
        return {"class_map": class_map}


def test_segments_are_classes_without_the_background():
    found = Predictor(make_card(Task.SEMANTIC), MappingEngine()).predict(images(0, 4, 5), [geometry(8, 4)] * 3)
    assert (found[0].labels.tolist(), found[0].masks) == ([], [])
    assert (found[1].labels.tolist(), found[1].areas.tolist()) == ([3], [16])
    assert masks.decode(found[1].masks[0], 4, 8).tolist() == [[False] * 4 + [True] * 4] * 4
    assert "class_map has class 5 of 4" in found[2].reason


@pytest.mark.parametrize(
    ("score", "count"), [(None, 1), (0.5, 3), (0.95, 0)], ids=["the card's", "equal stays", "none"]
)
def test_detections_below_the_threshold_are_dropped(score, count):
    card = make_card(Task.DETECT, score=0.6)
    assert (
        len(Predictor(card, DetectingEngine(), score=score).predict(images(1, 2, 3), [geometry()] * 3)[0].scores)
        == count
    )


def test_a_threshold_below_what_the_graph_gives_is_refused():
    with pytest.raises(UsageError, match=r"drops findings below 0\.05; use --score 0\.05 or more"):
        Predictor(make_card(Task.DETECT, score_floor=0.05), FakeEngine(), score=0.01)


ONE_LABEL = Classification(np.array([2]), np.array([0.5], np.float32))
NO_OBJECT = Detection(np.empty(0, np.int64), np.empty(0, np.float32), np.empty((0, 4), np.float32))
TWO_OBJECTS = Detection(
    np.array([1, 0]), np.array([0.5, 0.25], np.float32), np.arange(8, dtype=np.float32).reshape(2, 4)
)
AREAS, COUNTS = np.array([6, 2], np.float32), ["a1", "b2"]
ROWS = [
    {"label": "bee", "score": 0.5, "x_min": 0, "y_min": 1, "x_max": 2, "y_max": 3},
    {"label": "ant", "score": 0.25, "x_min": 4, "y_min": 5, "x_max": 6, "y_max": 7},
]

NO_INSTANCE = Instances(*NO_OBJECT, np.empty(0, np.float32), [])
TWO_INSTANCES = Instances(*TWO_OBJECTS, AREAS, COUNTS)
INSTANCE_ROWS = [{**row, "area": area, "mask": mask} for row, area, mask in zip(ROWS, (6, 2), COUNTS, strict=True)]


@pytest.mark.parametrize(
    ("task", "findings", "expected"),
    [
        pytest.param(Task.CLASSIFY, [], [], id="no labels"),
        pytest.param(Task.CLASSIFY, [None], [None], id="only an image that is not ok"),
        pytest.param(Task.CLASSIFY, [None, ONE_LABEL], [None, [{"label": "cat", "score": 0.5}]], id="labels"),
        pytest.param(Task.DETECT, [], [], id="no objects"),
        pytest.param(Task.DETECT, [NO_OBJECT, None], [[], None], id="nothing found is an empty list"),
        pytest.param(Task.INSTANCE, [None, NO_INSTANCE], [None, []], id="no instances"),
        pytest.param(Task.INSTANCE, [TWO_INSTANCES], [INSTANCE_ROWS], id="instances"),
        pytest.param(
            Task.SEMANTIC, [Segments(NO_OBJECT.labels, NO_OBJECT.scores, []), None], [[], None], id="no segments"
        ),
        pytest.param(
            Task.SEMANTIC,
            [Segments(TWO_OBJECTS.labels, AREAS, COUNTS)],
            [[{key: row[key] for key in ("label", "area", "mask")} for row in INSTANCE_ROWS]],
            id="segments",
        ),
        pytest.param(Task.DETECT, [TWO_OBJECTS, NO_OBJECT, None, TWO_OBJECTS], [ROWS, [], None, ROWS], id="objects"),
    ],
)
def test_result_columns(task, findings, expected):
    columns = result_columns(task, findings, LABELS)
    assert [pa.field(name, array.type) for name, array in columns.items()] == RESULT_FIELDS[task]
    assert next(iter(columns.values())).to_pylist() == expected


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_run_batches_of_any_size_from_many_threads(tiny, engine):
    opened = open_engine(tiny, make_card(), engine=engine, device="cpu", threads=4)
    assert (opened.name, opened.device, opened.concurrency) == (f"{engine} cpu fp32", "cpu", 4)
    wrong = []

    def work(value: int) -> None:
        for count in (1, 2, 5, 3):
            found = opened.run(images(*[value] * count))["probabilities"]
            expected = 1 / (np.exp(-value) * 3 + 1)
            if found.shape != (count, 4) or not np.allclose(found[:, 1], expected, atol=1e-5):
                wrong.append((value, count, found))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.close()
    assert not wrong


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("images", "pictures", r"one input images: tensor\(uint8\) \[batch, 4, 4, 3\]", id="name"),
        pytest.param("uint8[batch", "float[batch", r"the file has images: tensor\(float\)", id="type"),
        pytest.param("uint8[batch, 4, 4, 3]", "uint8[batch, 4, 5, 3]", r"the file has .*'batch', 4, 5, 3", id="size"),
        pytest.param("[batch,", "[8,", "batch is fixed at 8", id="fixed batch"),
        pytest.param("probabilities", "logit", r"output probabilities: tensor\(float\) of rank 2", id="output"),
        pytest.param("keepdims = 0> (floats, axes)", "keepdims = 1> (floats, axes)", "cannot load", id="broken graph"),
    ],
)  # fmt: skip
def test_a_file_that_breaks_the_contract_is_refused(tmp_path, old, new, message):
    path = tmp_path / "other.onnx"
    onnx.save(onnx.parser.parse_model(TINY.replace(old, new)), path)
    with pytest.raises(ModelError, match=message):
        open_engine(path, make_card(), engine="onnxruntime", device="cpu")


@pytest.mark.parametrize("content", [b"", b"not a model"], ids=["empty", "text"])
def test_a_file_that_is_no_model_is_one_line(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"^cannot load tiny@000000000000 from .*model\.onnx: [^\n]*$"):
        open_engine(tmp_path / "model.onnx", make_card(), engine="onnxruntime", device="cpu")


@pytest.mark.parametrize(
    ("installed", "providers", "device", "message"),
    [
        (["onnxruntime"], [], False, "no CUDA provider.*pip uninstall -y onnxruntime && pip install onnxruntime-gpu"),
        (["onnxruntime", "onnxruntime-gpu"], [], True, "the two packages overwrite each other's files"),
        (["onnxruntime-gpu"], [gpu.CUDA], False, "reports no device.*check nvidia-smi"),
        (["onnxruntime-gpu"], [gpu.CUDA], True, "CUDAExecutionProvider did not start|cannot load"),
    ],
    ids=["CPU package", "both packages", "no device", "does not start"],
)
def test_cuda_that_was_asked_for_never_becomes_the_cpu(tiny, monkeypatch, installed, providers, device, message):
    import onnxruntime

    monkeypatch.setattr(gpu, "_is_installed", lambda name: name in installed)
    monkeypatch.setattr(gpu, "device_present", lambda: device)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])
    with pytest.raises(ModelError, match=message):
        open_engine(tiny, make_card(), device="cuda")


def test_a_provider_that_leaves_the_session_on_the_cpu_is_an_error(tiny, monkeypatch):
    import onnxruntime

    class Fallen(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers, **kwargs):
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(gpu, "provider_choices", lambda height, width, precision: [[(gpu.CUDA, {})]])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(ModelError, match="CUDAExecutionProvider did not start, the session has CPUExecutionProvider"):
        open_engine(tiny, make_card(), device="cuda")


def agreeing(**records: bool) -> dict:
    return {f"openvino_{precision}": {"agrees": agrees, "reason": ""} for precision, agrees in records.items()}


@pytest.mark.parametrize(
    ("precisions", "parity", "chosen", "reason"),
    [
        ([], {}, "onnxruntime cpu fp32", "openvino is not installed"),
        (["fp32"], {}, "onnxruntime cpu fp32", "no parity record for OpenVINO fp32"),
        (["fp32", "bf16"], agreeing(fp32=True, bf16=False), "onnxruntime cpu fp32", "OpenVINO bf16 disagrees"),
        (["fp32"], agreeing(fp32=True, bf16=False), "openvino cpu fp32", "it agrees"),
        (["fp32", "bf16"], agreeing(fp32=True, bf16=True), "openvino cpu bf16", "it agrees"),
    ],
    ids=["not installed", "no record", "bf16 disagrees", "no bf16 in this CPU", "bf16 agrees"],
)
def test_auto_takes_openvino_only_where_it_agrees(tiny, monkeypatch, precisions, parity, chosen, reason):
    monkeypatch.setattr(openvino, "cpu_precisions", lambda: precisions)
    monkeypatch.setattr(openvino, "is_installed", lambda: bool(precisions))
    opened = open_engine(tiny, make_card(parity=parity), device="cpu")
    assert opened.name == chosen
    assert reason in opened.reason


def test_openvino_without_its_package_names_the_extra(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModelError, match=r"pip install 'pixelmill\[openvino\]'"):
        open_engine(tiny, make_card(), engine="openvino")


def test_openvino_and_cuda_together_are_refused(tiny):
    with pytest.raises(UsageError, match="OpenVINO runs on the CPU here"):
        open_engine(tiny, make_card(), engine="openvino", device="cuda")


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("Failed to allocate memory for requested buffer of size 154140672"), True),
        (RuntimeError("Non-zero status code: std::bad_alloc"), True),
        (RuntimeError("Available memory of 12 is smaller than requested bytes of 99"), True),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0"), True),
        (RuntimeError("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("Got invalid dimensions for input: images"), False),
    ],
    ids=["arena", "bad_alloc", "limit", "CUDA", "cuDNN", "Python", "another error"],
)
def test_out_of_memory_is_recognised(error, is_memory):
    assert isinstance(as_out_of_memory(error), OutOfMemory) == is_memory
