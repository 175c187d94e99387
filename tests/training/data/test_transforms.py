"""Crops keep the aspect ratios that they are allowed, and validation crops as inference does."""

import random

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from training.config import AugmentationConfig
from training.data.transforms import _draw_crop, augment


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (640, 480), (64, 64), (1, 500)])
@pytest.mark.parametrize("scale", [[0.9, 1.0], [0.08, 1.0], [1.0, 1.0]])
def test_crops_keep_their_ratio(size, scale):
    config, generator = AugmentationConfig(crop_scale=scale), random.Random(0)
    low, high = config.crop_ratio
    for _ in range(500):
        left, top, right, bottom = _draw_crop(size, config, generator)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert low - 1e-6 <= (right - left) / (bottom - top) <= high + 1e-6


def test_areas_and_places_are_spread_as_in_random_resized_crop():
    config, generator = AugmentationConfig(crop_scale=[0.25, 0.5]), random.Random(1)
    boxes = np.array([_draw_crop((200, 200), config, generator) for _ in range(4000)])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 200**2
    assert abs(area.mean() - 0.375) < 0.005 and area.min() >= 0.25 - 1e-9 and area.max() <= 0.5 + 1e-9
    room = 200 - (boxes[:, 2:] - boxes[:, :2])
    assert np.abs((boxes[:, :2] / room).mean(0) - 0.5).max() < 0.03


@pytest.mark.parametrize(
    "size, ratio, expected",
    [
        ((300, 100), [0.75, 4 / 3], (300 / 2 - 200 / 3, 0, 300 / 2 + 200 / 3, 100)),
        ((100, 300), [0.75, 4 / 3], (0, 300 / 2 - 200 / 3, 100, 300 / 2 + 200 / 3)),
        ((300, 100), [1, 1], (100, 0, 200, 100)),
        ((100, 100), [1, 1], (0, 0, 100, 100)),
    ],
)
def test_crops_that_never_fit_are_centered(size, ratio, expected):
    config = AugmentationConfig(crop_scale=[1.0, 1.0], crop_ratio=ratio)
    assert _draw_crop(size, config, random.Random(0)) == pytest.approx(expected)


@pytest.mark.parametrize("size", [(96, 32), (40, 70), (64, 64), (33, 47)])
def test_plain_crops_are_those_of_inference(size):
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    image = Image.fromarray((255 * np.stack([x, y, x * y], -1)).astype(np.uint8))
    plain = AugmentationConfig(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0])
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    inference = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    ours = np.asarray(augment(image, 24, plain, random.Random(0)), float).transpose(2, 0, 1)
    # Inference rounds the longer side and the crop to whole pixels of the result.
    assert np.abs(ours - inference).mean() < 255 / 24
    assert np.abs(ours - inference).max() < 2 * 255 / 24
