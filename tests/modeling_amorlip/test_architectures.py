"""Any architecture of Transformers works as a tower or is refused by name."""

import re

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.architectures_amorlip import REFUSED
from tests.helpers.architectures import TEXT, VISION, survey, try_architecture
from tests.helpers.checkout import ROOT


@pytest.mark.parametrize(
    "side, model_type",
    [
        ("vision", "mobilevit"),  # its pooler is wider than its last stage
        ("vision", "internvl_vision"),  # no pooler
        ("vision", "siglip2_vision_model"),  # inputs of its own
        ("text", "squeezebert"),  # calls its pooler whether or not there is one
        ("text", "esm"),  # a head that is not used
        ("text", "bamba"),  # keeps states for generation
    ],
)
def test_towers_with_peculiarities_work(side, model_type):
    assert try_architecture(model_type, side) == "works"


@pytest.mark.parametrize(
    "side, model_type, reason",
    [
        ("vision", "bert", "does not take pixel_values"),
        ("text", "dinov2", "does not take input_ids"),
        ("vision", "seggpt", "takes several images at once"),
        ("vision", "muse_spark_vision", "also needs grid_thw"),
        ("text", "mbart", "is an encoder-decoder"),
        ("text", "wav2vec2", "does not take input_ids"),
        ("vision", "videomae", "takes video"),
        ("text", "siglip2_vision_model", "does not take input_ids"),
        ("text", "trocr", "has no encoder in Transformers"),
        ("text", "vilt", "takes image, text"),
    ],
)
def test_other_architectures_are_refused_by_name(side, model_type, reason):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of Transformers has no {model_type}")
    configs = {"vision_config": VISION, "text_config": TEXT, f"{side}_config": AutoConfig.for_model(model_type)}
    with pytest.raises(ValueError, match=f"{side}_config is '{model_type}', which {reason}.*Choose an? "):
        AmorLIPModel(AmorLIPConfig(**configs))


def test_reasons_are_of_architectures_that_transformers_knows():
    known = dict.fromkeys(AutoConfig.for_model(name).model_type for name in REFUSED if name in CONFIG_MAPPING)
    assert list(known) == [name for name in REFUSED if name in CONFIG_MAPPING]
    assert len(known) > len(REFUSED) / 2  # the others came with later versions


@pytest.mark.slow
@pytest.mark.parametrize("side", ["vision", "text"])
def test_every_architecture_works_or_is_refused(side):
    """And docs/interoperability.md lists those that work."""
    works = [name for name, result in survey(side).items() if result == "works"]
    page = (ROOT / "docs/interoperability.md").read_text(encoding="utf-8")
    (listed,) = re.findall(rf"^Architectures of {side} encoders that work: (.+?)\.$", page, re.M | re.S)
    assert re.findall(r"`([^`]+)`", listed) == sorted(works)
