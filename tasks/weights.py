"""Pretrained weights: from torchvision's cache or server, or from a file, never by running what a file contains."""

import contextlib
import io
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ModelError, UsageError
from models.nets.pretrained import Pretrained
from models.runtime.predictor import one_line
from tasks.registry import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("pixelmill.weights")


def load_pretrained(weights: Pretrained, builder: str) -> "dict[str, Tensor]":
    """The state dict of a torchvision entry, through torchvision's own loader and cache folder.

    Raises ModelError that says where the file can be put by hand when the download fails.
    """
    import torch
    from torchvision.models import get_model_weights

    cached = Path(torch.hub.get_dir(), "checkpoints", weights.file_name)
    if not cached.exists():
        logger.info("downloading %s (%.0f MB) to %s", weights.url, weights.megabytes, cached)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what is logged above
                get_model_weights(builder)[weights.name].get_state_dict(
                    progress=False, check_hash=True, map_location="cpu", weights_only=True
                )
        except Exception as error:  # URLError, HTTPError, OSError, or RuntimeError for a wrong hash
            raise ModelError(
                f"cannot download {weights.url} ({one_line(error)}): fetch it on another machine and put it into "
                f"{cached.parent} as {cached.name}, or pass it with --weights FILE"
            ) from None
    return load_file(cached)


def load_file(path: Path) -> "dict[str, Tensor]":
    """The state dict of a .pth, .pt or .safetensors file; a hash in its name, as torchvision's have, is checked.

    Raises UsageError for a file that is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UsageError(
            f"expected default, none, the name of a torchvision entry or a weights file, got {path}: no such file"
        )
    stated = re.search(r"-([0-9a-f]{8,64})\.(pth|pt|safetensors)$", path.name)
    if stated and not sha256_of(path).startswith(stated.group(1)):
        raise UsageError(
            f"{path} is damaged: its SHA-256 does not start with {stated.group(1)}, as its name says; delete it"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors

            state: Any = load_safetensors(path)
        else:
            import torch

            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} is no weights file that can be read safely: {one_line(error)}") from None
    for key in ("model", "state_dict"):  # training scripts save more than the weights
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(hasattr(value, "shape") for value in state.values()):
        raise UsageError(f"{path} holds no state dict: expected names of parameters with their tensors")
    return state


def apply_state(network: Any, state: "dict[str, Tensor]", ignored_prefixes: tuple[str, ...], what: str) -> None:
    """Loads a state dict that must fit completely. Raises UsageError that names what does not."""
    own = network.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(ignored_prefixes or ("\0",))}
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own and not name.endswith("num_batches_tracked")]
    unequal = [name for name, value in state.items() if name in own and value.shape != own[name].shape]
    problems = [
        f"{len(names)} {kind} (first: {names[0]})"
        for kind, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if unequal:
        name = unequal[0]
        problems.append(
            f"{len(unequal)} of another shape "
            f"(first: {name}, expected {list(own[name].shape)}, got {list(state[name].shape)})"
        )
    if problems:
        raise UsageError(f"the weights do not fit {what}: parameters {', '.join(problems)}")
    network.load_state_dict(state, strict=False)
