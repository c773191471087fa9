"""All graphs that a model publishes, each compared with its PyTorch network before it may leave."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.card import DECODER_FILE, Card
from models.records import Task
from models.runtime.export import export_onnx
from models.runtime.parity import check_parity, parity_latents

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class _DecoderFamily:
    """A family whose one graph is the decoder of another one."""

    family: ModuleType

    def graph(self, network: "nn.Module", card: Card) -> "nn.Module":
        return self.family.decoder_graph(network, card)

    def reference(self, network: "nn.Module", card: Card) -> Any:
        return self.family.decoder_reference(network, card)


def export_graphs(
    network: "nn.Module",
    family: ModuleType,
    card: Card,
    images: NDArray[np.uint8],  # [n, height, width, 3], prepared by the card's rule
    names: list[str],  # of these images
    folder: Path,
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Writes every graph of an exact model into `folder`: the files by name, and the record of what was compared.

    A generator is compared on seeded latents instead of images; a model that also has a decoder on both. Raises
    ModelError where torch cannot export a graph, and ParityError.
    """
    files = {card.onnx_file: folder / card.onnx_file}
    of_images = card.task is not Task.GENERATE
    batch = images if of_images else parity_latents(card)
    export_onnx(family.graph(network, card), card, files[card.onnx_file], batch[:2])
    parity = check_parity(network, family, card, files[card.onnx_file], batch)
    record = {"images": names, **parity} if of_images else {"latents": len(batch), **parity}
    if of_images and card.latent_size:
        files[DECODER_FILE] = folder / DECODER_FILE
        decoder: Any = _DecoderFamily(family)
        generator, latents = card.as_generator, parity_latents(card)
        export_onnx(decoder.graph(network, generator), generator, files[DECODER_FILE], latents[:2])
        compared = check_parity(network, decoder, generator, files[DECODER_FILE], latents)
        record["decoder"] = {"latents": len(latents), **compared}
    return files, record
