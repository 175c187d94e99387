"""Transformers' own tests of pipelines, on ours. Its tests of single tasks are not in the source distribution; the
stand-ins here ask the same: an answer per input of the right form, and batches of several.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path

import torch
from PIL import Image
from transformers import pipeline

from modeling_amorlip import AmorLIPForImageClassification, AmorLIPModel, AmorLIPVisionModelWithProjection
from tests.helpers.models import make_model
from tests.helpers.transformers_suite import mount


IMAGES = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
LABELS = ["a red picture", "a green one"]


class TaskTest:
    """The part of a task's own test that the mixin calls."""

    task, examples = "", IMAGES

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, processor=None, dtype="float32", **_):
        model = model.to(getattr(torch, dtype))
        return pipeline(self.task, model=model, tokenizer=tokenizer, image_processor=image_processor), self.examples

    def run_pipeline_test(self, task_pipeline, examples):
        answers = task_pipeline(examples)
        assert len(answers) == len(examples)
        for answer in answers:
            self.check(answer)


class ZeroShotTest(TaskTest):
    task = "zero-shot-image-classification"

    def get_test_pipeline(self, *args, **kwargs):
        task_pipeline, examples = super().get_test_pipeline(*args, **kwargs)
        with_labels = functools.partial(task_pipeline, candidate_labels=LABELS)
        with_labels.tokenizer = task_pipeline.tokenizer
        return with_labels, examples

    def check(self, answer):
        assert {row["label"] for row in answer} == set(LABELS)
        assert abs(sum(row["score"] for row in answer) - 1) < 1e-2


class ImageClassificationTest(TaskTest):
    task = "image-classification"

    def check(self, answer):
        assert [row["label"] for row in sorted(answer, key=lambda row: row["label"])] == ["LABEL_0", "LABEL_1"]
        assert abs(sum(row["score"] for row in answer) - 1) < 1e-2


class FeaturesTest(TaskTest):
    def check(self, answer):
        assert torch.tensor(answer).isfinite().all() and torch.tensor(answer).shape[-1] == 16


class ImageFeaturesTest(FeaturesTest):
    task = "image-feature-extraction"


class TextFeaturesTest(FeaturesTest):
    task, examples = "feature-extraction", ["a cat", "a red heart", "two dogs"]


CLASSES = (AmorLIPModel, AmorLIPForImageClassification, AmorLIPVisionModelWithProjection)
TASKS = {
    "zero-shot-image-classification": (AmorLIPModel, ZeroShotTest),
    "image-classification": (AmorLIPForImageClassification, ImageClassificationTest),
    "image-feature-extraction": (AmorLIPModel, ImageFeaturesTest),
    "feature-extraction": (AmorLIPModel, TextFeaturesTest),
}


def write_models() -> Path:
    """Write the folder of tiny models that Transformers' tests read in place of its own on the Hub."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    model, processor = make_model()
    parts = {"tokenizer_classes": ["CLIPTokenizer"], "processor_classes": [type(processor.image_processor).__name__]}
    (root / "reports").mkdir()
    (root / "reports/tiny_model_summary.json").write_text(json.dumps({kind.__name__: parts for kind in CLASSES}))
    for kind in CLASSES:
        folder = root / "amorlip" / kind.__name__
        (model if kind is AmorLIPModel else kind(model.config)).save_pretrained(folder)
        processor.save_pretrained(folder)
    return root


os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(write_models())
mixin = mount.load("test_pipeline_mixin")
mixin.task_to_pipeline_and_spec_mapping.clear()  # compares docstrings of Transformers with the installed Hub client
for _task, (_, _test) in TASKS.items():
    mixin.pipeline_test_mapping[_task] = {"test": f"{__name__}.{_test.__name__}"}


class PipelineTest(mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {task: kind for task, (kind, _) in TASKS.items()}
