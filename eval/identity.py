"""What a result depends on, as hashes, so that no result passes for another one's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from eval.models import ModelRecord
from eval.tasks import Task


DISPLAY_FIELDS = ("title", "random_score", "pixel_baseline", "groups")
"""Fields of a task that a result does not depend on."""
MODEL_FIELDS = ("weights", "processor", "tokenizer", "config")


def result_identity(model: ModelRecord, task: Task, data: list[str], settings: dict[str, Any]) -> dict[str, str]:
    """Return hashes of a model's parts, a task's definition, its data and the settings.

    Args:
        data: Fingerprints of the splits that are read.
        settings: All options that change a score.
    """
    definition = {name: value for name, value in asdict(task).items() if name not in DISPLAY_FIELDS}
    return {
        **model_identity(model),
        "task": _hash(definition),
        "data": _hash(data),
        "settings": _hash(settings),
    }


def model_identity(model: ModelRecord) -> dict[str, str]:
    """Return the part of a result's identity that is the model's."""
    return {name: getattr(model, name) for name in MODEL_FIELDS}


def is_of_model(identity: dict[str, str], model: ModelRecord) -> bool:
    """Return whether a result is one of a model; results without an identity are nobody's."""
    return bool(identity) and all(identity.get(name) == value for name, value in model_identity(model).items())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
