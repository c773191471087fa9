"""Autoencoders and translators of a few thousand weights, and images by colour that they learn in seconds."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from models import catalog
from models.card import Card
from models.imaging.geometry import ResizeRule
from models.learning.fit import Fitted
from models.learning.learner import task_module
from models.learning.recipe import Recipe
from models.learning.samples import Samples
from models.nets.untrained import build_untrained
from tasks.photographs import encode_png
from tests.tiny_learning import COLOURS, Files

SIDE = 16  # pixels
LATENT = 4


def images_of(colours: Sequence[int], per_colour: int, seed: int = 0, noise: int = 10) -> np.ndarray:
    """Images [n, SIDE, SIDE, 3] of one of COLOURS each, brighter from left to right."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0.5, 1.0, SIDE)[None, None, :, None]
    plain = np.repeat(np.array([COLOURS[number] for number in colours]), per_colour, axis=0)[:, None, None]
    images = plain * ramp + random.integers(-noise, noise + 1, (len(plain), SIDE, SIDE, 3))
    return np.clip(images, 0, 255).astype(np.uint8)


def samples_of(images: np.ndarray, model: str, beside: np.ndarray | None = None, augment: str | None = None) -> Samples:
    """A split of these images; `beside`: those of the other data set."""
    rule = rule_of(model, images.shape[1])
    task = task_module(catalog.entry(model).task)
    return Samples(
        names=[f"/images/{number:03d}.png" for number in range(len(images))],
        targets=[None] * len(images),
        read=Files(tuple(encode_png(image) for image in images)),
        rule=rule,
        augmentation=task.augmentation(augment, rule) if augment else None,
        beside=None if beside is None else samples_of(beside, model, augment=augment),
    )


def rule_of(model: str, side: int = SIDE) -> ResizeRule:
    """That of the catalogue, for images of this size."""
    rule = catalog.entry(model).input
    return replace(rule, height=side, width=side, short_side=rule.short_side and side)


def learner_of(model: str, recipe: Recipe, side: int = SIDE, seed: int = 0, latent_size: int = LATENT):
    """A learner with a network of random weights."""
    entry = catalog.entry(model)
    network = build_untrained(lambda: entry.build_for_training(0, side, latent_size), seed=seed)
    card = card_of(model, side, latent_size)
    return task_module(entry.task).learner(network, entry.family_module().parts(network, entry.builder), card, recipe)


def card_of(model: str, side: int = SIDE, latent_size: int = LATENT) -> Card:
    """The card of such a model."""
    entry = catalog.entry(model)
    latent_size = latent_size if entry.has_latent_size else 0
    return Card(model, "0" * 12, entry.task, model, (), rule_of(model, side), latent_size=latent_size)


def recipe_of(**changes) -> Recipe:
    """Four quick epochs."""
    usual = {"mode": "scratch", "epochs": 4, "batch_size": 8, "lr": 4e-3, "augment": "none", "weight_decay": 0.0}
    return Recipe(**usual | {"label_smoothing": 0.0} | changes)


def weights(learner) -> dict[str, torch.Tensor]:
    """Copies of all tensors of its network."""
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def curves(fitted: Fitted) -> list[dict]:
    """The history without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in fitted.history]


class Interrupted(Exception):
    """Ends a training from outside."""
