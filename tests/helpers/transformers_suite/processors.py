"""Transformers' own tests of processors, on the one that a folder of ours loads."""

import tempfile
import unittest

from transformers import AutoProcessor

from tests.helpers.models import make_model, save_model
from tests.helpers.transformers_suite import mount


class ProcessorTest(mount.load("test_processing_common").ProcessorTesterMixin, unittest.TestCase):
    processor_class = type(make_model()[1])

    @classmethod
    def _setup_from_components(cls):
        with tempfile.TemporaryDirectory() as folder:
            processor = AutoProcessor.from_pretrained(save_model(folder))
        assert type(processor) is cls.processor_class
        return processor
