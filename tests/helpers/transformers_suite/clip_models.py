"""Transformers' own tests of models, on its own CLIP classes with our adapters: they fail no fewer than ours.

TRANSFORMERS_TESTS=transformers-5.23.0/tests python -m pytest tests/helpers/transformers_suite/clip_models.py
"""

from __future__ import annotations

from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from tests.helpers.towers import TOWERS
from tests.helpers.transformers_suite.models import DUAL, INAPPLICABLE_TO_DUAL, TEXT, VISION, Tester, make_case


INPUTS = {
    CLIPModel: DUAL,
    CLIPVisionModelWithProjection: VISION,
    CLIPTextModelWithProjection: TEXT,
    CLIPForImageClassification: VISION,
}


def make_config(model_class: type):
    """Make the configuration of a tiny model, with the sizes of ours."""
    vision, text = ({k: v for k, v in tower.items() if k != "model_type"} for tower in TOWERS["clip"])
    sides = {"vision_config": {**vision, "projection_dim": 24}, "text_config": {**text, "projection_dim": 24}}
    config = CLIPConfig(**sides, projection_dim=24)
    side = {CLIPVisionModelWithProjection: "vision_config", CLIPTextModelWithProjection: "text_config"}.get(model_class)
    return getattr(config, side) if side else config


def make_cases() -> dict[str, type]:
    """Make the test cases of Transformers' CLIP."""
    cases = {}
    for model_class, inputs in INPUTS.items():
        tester = Tester(lambda model_class=model_class: make_config(model_class), inputs, 5)
        name = f"Test_{model_class.__name__}"
        inapplicable = INAPPLICABLE_TO_DUAL if inputs == DUAL else {}
        cases[name] = make_case(name, model_class, tester, inapplicable, has_attentions=inputs != DUAL)
    return cases


globals().update(make_cases())
