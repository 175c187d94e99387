"""Transformers' own tests of configurations, on ours."""

import types
import unittest

from modeling_amorlip import AmorLIPConfig, AmorLIPResNetConfig
from tests.helpers.towers import RESNET, make_config
from tests.helpers.transformers_suite import mount


configuration = mount.load("test_configuration_common")


class ConfigurationTest(unittest.TestCase):
    model_tester = types.SimpleNamespace(get_config=lambda: make_config("clip"))

    def test_config(self):
        tester = configuration.ConfigTester(self, config_class=AmorLIPConfig, has_text_modality=False)
        tester.run_common_tests()

    def test_resnet_config(self):
        fields = {name: value for name, value in RESNET.items() if name != "model_type"}
        tester = configuration.ConfigTester(
            self, config_class=AmorLIPResNetConfig, has_text_modality=False, common_properties=["hidden_size"], **fields
        )
        tester.run_common_tests()
