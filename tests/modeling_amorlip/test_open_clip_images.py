"""OpenCLIP's preprocessing in and out, against the transform written out with Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessor, CLIPImageProcessor

from modeling_amorlip.images_amorlip import preprocess_images
from modeling_amorlip.open_clip_images_amorlip import image_processor_from_open_clip, open_clip_preprocess


SIZE, MEAN, STD = 32, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def open_clip_transform(image, mode, interpolation):
    """OpenCLIP's `image_transform` for evaluation: Resize or ResizeKeepRatio, CenterCrop or CenterCropOrPad."""
    if mode == "squash":
        image = image.resize((SIZE, SIZE), FILTERS[interpolation])
    else:
        edge = max(image.size) if mode == "longest" else min(image.size)
        image = image.resize([round(length * SIZE / edge) for length in image.size], FILTERS[interpolation])
        canvas = Image.new("RGB", (SIZE, SIZE))
        canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = canvas
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_every_mode_gives_the_pixels_of_open_clip(mode, interpolation, tmp_path):
    config = {"size": SIZE, "mode": "RGB", "mean": MEAN, "std": STD, "fill_color": 0}
    config |= {"resize_mode": mode, "interpolation": interpolation}
    image_processor = image_processor_from_open_clip(config, SIZE)
    image_processor.save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 255, shape, np.uint8)) for shape in ((64, 128, 3), (96, 48, 3))]
    expected = torch.stack([open_clip_transform(image, mode, interpolation) for image in images])
    for processor in (image_processor, AutoImageProcessor.from_pretrained(tmp_path)):
        torch.testing.assert_close(preprocess_images(processor, images), expected, rtol=0, atol=1e-4)
        assert open_clip_preprocess(processor, SIZE) == {key: config[key] for key in config if key != "size"}


def test_defaults_are_those_of_open_clip():
    written = open_clip_preprocess(image_processor_from_open_clip({}, 224), 224)
    assert (written["interpolation"], written["resize_mode"]) == ("bicubic", "shortest")
    assert written["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"resize_mode": "stretch"}, "resize_mode is 'stretch'; 'shortest', 'squash', 'longest'"),
        ({"interpolation": "random"}, "interpolation is 'random'"),
        ({"mode": "L"}, "mode is 'L'"),
        ({"resize_mode": "longest", "fill_color": 255}, "fill_color is 255"),
        ({"resize": "squash"}, "sets .'resize'"),
    ],
)
def test_what_cannot_be_converted_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        image_processor_from_open_clip(config, SIZE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": {"shortest_edge": 40}}, "resizes to .'shortest_edge': 40. and crops"),
        ({"do_center_crop": False}, "without a crop"),
        ({"crop_size": {"height": 48, "width": 48}}, "crops to .*encoder takes 32"),
        ({"resample": 1}, "resample is 1"),
        ({"rescale_factor": 1 / 127}, "does not rescale by 1 / 255"),
    ],
)
def test_what_open_clip_cannot_do_is_named(changes, message):
    square = {"height": SIZE, "width": SIZE}
    for processor_class in (CLIPImageProcessor, BitImageProcessor):
        image_processor = processor_class(**{"size": {"shortest_edge": SIZE}, "crop_size": square, **changes})
        with pytest.raises(ValueError, match=message):
            open_clip_preprocess(image_processor, SIZE)
