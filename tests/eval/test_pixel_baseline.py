"""The pixel baseline that tasks.yaml notes for the demo's task, recomputed."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from eval.tasks import load_task
from modeling_amorlip.images_amorlip import convert_to_rgb
from tests.helpers.checkout import DEMO


def thumbnails(images):
    """RGB values of images shrunk to 16 x 16: [I, 768], in 0 to 1."""
    shrunk = [np.asarray(convert_to_rgb(image).resize((16, 16), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(shrunk)).flatten(1).float() / 255


def test_pixel_baseline_of_demo_task(demo_rows):
    """The fraction of images whose nearest training image, pixel by pixel, has their name."""
    rows = datasets.load_dataset("parquet", data_files=str(DEMO / "openmoji.parquet"), split="train")
    classes = json.loads((DEMO / "openmoji.json").read_text())["classes"]
    nearest = torch.cdist(thumbnails(rows["image"]), thumbnails(demo_rows["image"])).argmin(1)
    captions = list(demo_rows["caption"])
    hits = [classes[label] == captions[i] for label, i in zip(rows["label"], nearest.tolist(), strict=True)]
    assert np.mean(hits) == pytest.approx(load_task("emoji_openmoji").pixel_baseline, abs=5e-4)
