"""What a training needs to go on after a kill, written whole after each epoch."""

import logging
from pathlib import Path
from typing import Any

import torch

from models.learning.whole_files import write_whole

logger = logging.getLogger("pixelmill.train")

CHECKPOINT_FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Tensors, numbers and texts in dicts and lists only, so that no code is run when it is read."""
    write_whole(folder / CHECKPOINT_FILE, lambda file: torch.save(checkpoint, file))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What was saved last, on the CPU; None if nothing was, or it cannot be read: then the training starts anew."""
    path = folder / CHECKPOINT_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged file raises
        logger.warning("%s cannot be read (%s): starting anew", path, type(error).__name__)
        return None
