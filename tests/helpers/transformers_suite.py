"""Transformers' own model tests on our classes; run by `test_transformers_suite.py` with the sdist's tests folder.

TRANSFORMERS_TESTS=transformers-5.23.0/tests python -m pytest tests/helpers/transformers_suite.py
"""

import importlib
import os
import sys
import types
import unittest

import torch

from modeling_amorlip import (
    AmorLIPConfig,
    AmorLIPForImageClassification,
    AmorLIPModel,
    AmorLIPResNetConfig,
    AmorLIPTextModelWithProjection,
    AmorLIPVisionModelWithProjection,
)
from tests.helpers.towers import RESNET, TOWERS, make_config, make_inputs


def mount(folder: str) -> types.ModuleType:
    """Make the sdist's tests importable as `suite`, with stand-ins for the parts that the sdist leaves out."""
    package = types.ModuleType("suite")
    package.__path__ = [folder]
    sys.modules["suite"] = package
    stand_ins = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": {}},
    }
    for name, content in stand_ins.items():
        parent, _, _ = name.partition(".")
        sys.modules.setdefault(f"suite.{parent}", types.ModuleType(f"suite.{parent}"))
        module = types.ModuleType(f"suite.{name}")
        vars(module).update(content)
        sys.modules[f"suite.{name}"] = module
    return package


mount(os.environ["TRANSFORMERS_TESTS"])
common = importlib.import_module("suite.test_modeling_common")
configuration = importlib.import_module("suite.test_configuration_common")

# Tests that ask for what these classes do not have.
INAPPLICABLE = {
    "test_inputs_embeds": "forward takes token ids, which pooling at the end of text reads",
    "test_inputs_embeds_matches_input_ids": "forward takes token ids, which pooling at the end of text reads",
    "test_tie_model_weights": "there are no output embeddings to tie",
    "test_tied_weights_keys": "there are no output embeddings to tie",
    "test_resize_tokens_embeddings": "its second half feeds ids to vision-only classes; ours is in test_common.py",
    "test_resize_embeddings_untied": "there are no output embeddings",
}
INAPPLICABLE_TO_DUAL = {
    "test_hidden_states_output": "hidden states are in the two encoders' outputs, as in CLIPModel",
    "test_retain_grad_hidden_states_attentions": "hidden states are in the two encoders' outputs, as in CLIPModel",
}
INAPPLICABLE_TO_VISION = {
    "test_model_get_set_embeddings": "an image encoder's embedding is a convolution; see test_capabilities.py",
}
INAPPLICABLE_TO_RESNET = {
    "test_get_image_features_hidden_states": "one state per block, not per layer; see test_resnet.py",
    "test_get_image_features_output_0": "the last state is a feature map, its width not in the last place",
    "test_get_image_features_output_1": "the last state is a feature map, its width not in the last place",
    "test_get_image_features_output_2": "the last state is a feature map, its width not in the last place",
    "test_hidden_states_output": "one state per block, not per layer; see test_resnet.py",
}
INPUTS = {
    AmorLIPModel: ("input_ids", "attention_mask", "pixel_values"),
    AmorLIPVisionModelWithProjection: ("pixel_values",),
    AmorLIPTextModelWithProjection: ("input_ids", "attention_mask"),
    AmorLIPForImageClassification: ("pixel_values",),
}


class Tester:
    """What Transformers' mixin asks of a model's tester."""

    is_training = True
    batch_size, seq_length = 3, 9
    num_hidden_layers = num_attention_heads = 2
    hidden_size, image_size, patch_size = 32, 32, 16

    def __init__(self, towers: str, model_class: type):
        self.towers, self.model_class = towers, model_class
        self.encoder_seq_length = self.seq_length if model_class is AmorLIPTextModelWithProjection else 5
        if towers == "siglip" and model_class is not AmorLIPTextModelWithProjection:
            self.encoder_seq_length = 4

    def get_config(self) -> AmorLIPConfig:
        return make_config(self.towers)

    def prepare_config_and_inputs_for_common(self):
        inputs = {name: tensor for name, tensor in make_inputs(3).items() if name in INPUTS[self.model_class]}
        if self.model_class is AmorLIPModel:
            inputs["return_loss"] = True
        return self.get_config(), inputs


def make_case(towers: str, model_class: type) -> type:
    """Make the test case of a class with a pair of encoders."""

    def set_up(self):
        self.model_tester = Tester(towers, model_class)

    def prepare(self, inputs_dict, model_class, return_labels=False):
        inputs = common.ModelTesterMixin._prepare_for_class(self, inputs_dict, model_class, return_labels)
        if return_labels and model_class is AmorLIPForImageClassification:
            inputs["labels"] = torch.zeros(3, dtype=torch.long)
        return inputs

    is_dual = model_class is AmorLIPModel
    members = {
        "setUp": set_up,
        "_prepare_for_class": prepare,
        "all_model_classes": (model_class,),
        "_is_composite": True,
        "has_attentions": not is_dual and "resnet" not in towers,
        "test_resize_embeddings": model_class is AmorLIPTextModelWithProjection,
    }
    has_texts = "input_ids" in INPUTS[model_class]
    inapplicable = (
        INAPPLICABLE | (INAPPLICABLE_TO_DUAL if is_dual else {}) | ({} if has_texts else INAPPLICABLE_TO_VISION)
    )
    if "resnet" in towers and model_class is not AmorLIPTextModelWithProjection:
        inapplicable |= INAPPLICABLE_TO_RESNET
    for name, reason in inapplicable.items():
        if hasattr(common.ModelTesterMixin, name):
            members[name] = unittest.skip(reason)(lambda self: None)
    return type(f"Test{model_class.__name__}", (common.ModelTesterMixin, unittest.TestCase), members)


for _towers in TOWERS:
    for _class in INPUTS:
        _case = make_case(_towers, _class)
        _case.__name__ = _case.__qualname__ = f"Test_{_towers.replace('-', '_')}_{_class.__name__}"
        globals()[_case.__name__] = _case


class ConfigurationTest(unittest.TestCase):
    def test_config(self):
        tester = configuration.ConfigTester(self, config_class=AmorLIPConfig, has_text_modality=False)
        tester.run_common_tests()

    def test_resnet_config(self):
        fields = {name: value for name, value in RESNET.items() if name != "model_type"}
        tester = configuration.ConfigTester(
            self, config_class=AmorLIPResNetConfig, has_text_modality=False, common_properties=["hidden_size"], **fields
        )
        tester.run_common_tests()
