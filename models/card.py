"""The card of a model: all that bulk inference needs to know, so that the folder describes itself."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from models.errors import UsageError
from models.imaging.geometry import ResizeRule
from models.records import Task
from models.settings.fields import Precision

ONNX_FILE = "model.onnx"
CARD_FILE = "card.json"
DECODER_FILE = "decoder.onnx"
WEIGHTS_FILE = "weights.safetensors"


def onnx_file(precision: Precision) -> str:
    """The name of the graph of an export: model.onnx, model.int8.onnx …"""
    return ONNX_FILE if precision == "fp32" else f"model.{precision}.onnx"


def card_file(precision: Precision) -> str:
    """The name of the card that an export brings: card.int8.json …; card.json is that of the version itself."""
    return f"card.{precision}.json"


@dataclass(frozen=True)
class Card:
    """One version of one model. Written as card.json, and repeated in the ONNX metadata under the key `pixelmill`."""

    name: str
    # First 12 hex digits of the SHA-256 over the weights and the fields that change answers; then ".int8" or ".fp16"
    # for the less exact exports of that version.
    version: str
    task: Task
    architecture: str
    labels: tuple[str, ...]  # by output index
    input: ResizeRule
    score: float = 0.25  # findings below it are dropped, unless predict says otherwise
    score_floor: float = 0.0  # the graph itself never gives findings below it
    latent_size: int = 0  # length of the latent vectors that it makes images of; 0: it only takes images
    precision: Precision = "fp32"
    source: str = ""  # e.g. "torchvision:mobilenet_v2"
    licence: str = ""  # of the weights
    weights_sha256: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # file name → sha256, bytes
    parity: dict[str, Any] = field(default_factory=dict)  # what was compared, and the largest differences
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)  # data set, settings and their key; {} for adopted models
    conversion: dict[str, Any] = field(default_factory=dict)  # how a less exact export was made; {} for fp32
    created_at: str = ""  # ISO 8601, UTC

    @property
    def reference(self) -> str:
        """`NAME@VERSION`, as it stands in tables."""
        return f"{self.name}@{self.version}"

    @property
    def base_version(self) -> str:
        """The version without its precision: that of the exact model, and the name of the folder."""
        return self.version.partition(".")[0]

    @property
    def is_variant(self) -> bool:
        """Whether this is a less exact export of another version."""
        return self.version != self.base_version

    @property
    def onnx_file(self) -> str:
        """The name of the graph's file in the version's folder."""
        return onnx_file(self.precision)

    @property
    def is_conditional(self) -> bool:
        """Whether a generator is told the class of the image it makes."""
        return self.latent_size > 0 and bool(self.labels)

    @property
    def generator_file(self) -> str | None:
        """The file of the graph that makes images of latent vectors; None for models that only take images."""
        if not self.latent_size:
            return None
        return self.onnx_file if self.task is Task.GENERATE else DECODER_FILE

    @property
    def as_generator(self) -> "Card":
        """The card of the graph in `generator_file`: of a model that also takes images, its decoder's."""
        return self if self.task is Task.GENERATE else replace(self, task=Task.GENERATE)

    @property
    def is_exported(self) -> bool:
        """Whether there is a graph to predict with: a model may have been trained without an export."""
        return self.onnx_file in self.files

    def variant(self, precision: Precision) -> "Card":
        """The card of an export of this version, without the facts of the version's own file."""
        version = self.base_version if precision == "fp32" else f"{self.base_version}.{precision}"
        return replace(self, version=version, precision=precision, files={}, parity={}, metrics={}, conversion={})

    def threshold(self, score: float | None) -> float:
        """The score below which findings are dropped: what was asked for, else the model's own.

        Raises UsageError if the graph itself already drops findings that are asked for.
        """
        asked = self.score if score is None else score
        if asked < self.score_floor:
            raise UsageError(
                f"score {asked:g} is too low: the graph of {self.reference} drops findings below "
                f"{self.score_floor:g}; use --score {self.score_floor:g} or more"
            )
        return asked

    def to_json(self) -> str:
        """The card as text, keys in the order of the fields."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def with_version(self) -> "Card":
        """The card with the version that follows from its weights and from what changes its answers."""
        decisive = {
            "weights_sha256": self.weights_sha256,
            "task": self.task,
            "architecture": self.architecture,
            "labels": self.labels,
            "input": asdict(self.input),
            "score": self.score,
            "score_floor": self.score_floor,
        }
        if self.latent_size:  # models without one keep the version that they always had
            decisive["latent_size"] = self.latent_size
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        suffix = "" if self.precision == "fp32" else f".{self.precision}"
        return replace(self, version=digest[:12] + suffix)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Card":
        """Reads what `to_json` wrote; ignores keys it does not know. Raises KeyError, TypeError or ValueError."""
        raw = json.loads(text)
        known = {key: raw[key] for key in cls.__dataclass_fields__ if key in raw}
        rule = dict(known["input"])
        rule["pad_rgb"] = tuple(rule.get("pad_rgb", (0, 0, 0)))
        known["input"] = ResizeRule(**rule)
        known["task"] = Task(known["task"])
        known["labels"] = tuple(known["labels"])
        return cls(**known)
