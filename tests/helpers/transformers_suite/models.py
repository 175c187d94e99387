"""Transformers' own tests of models, on every class of ours with every pair of encoders.

TRANSFORMERS_TESTS=transformers-5.23.0/tests python -m pytest tests/helpers/transformers_suite/models.py
"""

from __future__ import annotations

import contextlib
import functools
import unittest
from unittest import mock

import torch
from torch import nn

from modeling_amorlip import (
    AmorLIPForImageClassification,
    AmorLIPModel,
    AmorLIPTextModelWithProjection,
    AmorLIPVisionModelWithProjection,
)
from tests.helpers.towers import TOWERS, make_config, make_inputs
from tests.helpers.transformers_suite import mount


common = mount.load("test_modeling_common")

# Tests that ask for what these classes do not have, with the reason. Nothing else is skipped by hand.
INAPPLICABLE_TO_DUAL = {
    "test_hidden_states_output": "hidden states are in the two encoders' outputs, as in CLIPModel",
    "test_retain_grad_hidden_states_attentions": "hidden states are in the two encoders' outputs, as in CLIPModel",
}
INAPPLICABLE_TO_RESNET = {
    "test_get_image_features_hidden_states": "one state per block, not per layer; see test_resnet.py",
    "test_get_image_features_output_0": "the last state is a feature map, its width not in the last place",
    "test_get_image_features_output_1": "the last state is a feature map, its width not in the last place",
    "test_get_image_features_output_2": "the last state is a feature map, its width not in the last place",
    "test_hidden_states_output": "one state per block, not per layer; see test_resnet.py",
}
DUAL, VISION, TEXT = ("input_ids", "attention_mask", "pixel_values"), ("pixel_values",), ("input_ids", "attention_mask")
INPUTS = {
    AmorLIPModel: DUAL,
    AmorLIPVisionModelWithProjection: VISION,
    AmorLIPTextModelWithProjection: TEXT,
    AmorLIPForImageClassification: VISION,
}


class Tester:
    """What Transformers' mixin asks of a model's tester."""

    is_training = True
    batch_size, seq_length = 3, 9
    num_hidden_layers = num_attention_heads = 2
    hidden_size, image_size, patch_size = 32, 32, 16

    def __init__(self, get_config, inputs: tuple[str, ...], num_patches: int):
        self.get_config, self.inputs = get_config, inputs
        self.encoder_seq_length = self.seq_length if inputs == TEXT else num_patches

    def prepare_config_and_inputs_for_common(self):
        inputs = {name: tensor for name, tensor in make_inputs(3).items() if name in self.inputs}
        if self.inputs == DUAL:
            inputs["return_loss"] = True
        return self.get_config(), inputs


@contextlib.contextmanager
def loss_of_outputs(model_class: type):
    """Give the outputs of a class that has no loss of its own the sum of their squares for one, to test gradients."""
    forward = model_class.forward

    @functools.wraps(forward)
    def forward_with_loss(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.loss = outputs[0].square().sum()
        return outputs

    with mock.patch.object(model_class, "forward", forward_with_loss):
        yield


class CaseMixin:
    """Labels for classifiers, which the mixin knows by name, losses for classes without, and image encoders, whose
    embedding is a convolution."""

    def test_training(self):
        with self.with_loss():
            super().test_training()

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        with self.with_loss():
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    def with_loss(self):
        (model_class,) = self.all_model_classes
        has_loss = self.model_tester.inputs == DUAL or model_class.__name__.endswith("ForImageClassification")
        return contextlib.nullcontext() if has_loss else loss_of_outputs(model_class)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("ForImageClassification"):
            inputs["labels"] = torch.zeros(3, dtype=torch.long)
        return inputs

    def test_model_get_set_embeddings(self):
        if "input_ids" in self.model_tester.inputs:
            return super().test_model_get_set_embeddings()
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            replacement = nn.Conv2d(3, 32, 16)
            model.set_input_embeddings(replacement)
            self.assertIs(model.get_input_embeddings(), replacement)
            self.assertIsNone(model.get_output_embeddings())


def make_case(name: str, model_class: type, tester: Tester, inapplicable: dict[str, str], has_attentions: bool) -> type:
    """Make the test case of a class."""
    has_texts = "input_ids" in tester.inputs
    members = {
        "setUp": lambda self: setattr(self, "model_tester", tester),
        "all_model_classes": (model_class,),
        "_is_composite": hasattr(model_class.config_class, "sub_configs")
        and bool(model_class.config_class.sub_configs),
        "has_attentions": has_attentions,
        "test_resize_embeddings": has_texts,
    }
    for test, reason in inapplicable.items():
        assert hasattr(common.ModelTesterMixin, test), test
        members[test] = unittest.skip(reason)(lambda self: None)
    return type(name, (CaseMixin, common.ModelTesterMixin, unittest.TestCase), members)


def make_cases() -> dict[str, type]:
    """Make the test cases of our classes."""
    cases = {}
    for towers in TOWERS:
        for model_class, inputs in INPUTS.items():
            is_resnet = "resnet" in towers and "pixel_values" in inputs
            inapplicable = (INAPPLICABLE_TO_DUAL if inputs == DUAL else {}) | (
                INAPPLICABLE_TO_RESNET if is_resnet else {}
            )
            tester = Tester(lambda towers=towers: make_config(towers), inputs, 4 if towers == "siglip" else 5)
            name = f"Test_{towers.replace('-', '_')}_{model_class.__name__}"
            has_attentions = inputs != DUAL and not is_resnet
            cases[name] = make_case(name, model_class, tester, inapplicable, has_attentions)
    return cases


globals().update(make_cases())
