"""`preprocess_images` against the image processors that it is faster than."""

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from modeling_amorlip.images_amorlip import preprocess_images


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "RGBA"])
@pytest.mark.parametrize("size", [(32, 32), (40, 33)])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pixels_are_the_image_processors(demo_rows, mode, size, kind):
    shape = {"height": 32, "width": 32}
    options = {"size": {"shortest_edge": 32}, "crop_size": shape} if kind == "clip" else {"size": shape}
    processor = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}[kind](**options)
    images = [demo_rows[i]["image"].convert("RGBA").resize(size) for i in range(5)]
    images = [image if mode == "RGBA" else image.convert("RGB").convert(mode) for image in images]
    white = [Image.new("RGBA", size, "white") for _ in images]
    plain = [
        Image.alpha_composite(w, i).convert("RGB") if mode == "RGBA" else i.convert("RGB")
        for w, i in zip(white, images, strict=True)
    ]
    expected = processor(plain, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess_images(processor, images), expected, rtol=1e-5, atol=1e-6)
