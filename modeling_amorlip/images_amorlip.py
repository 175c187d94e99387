"""The image decoder and resizer, the same for training, evaluation and inference."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def preprocess_images(image_processor, images: list[Image.Image]) -> Tensor:
    """What an image processor makes of images, float32 [N, 3, H, W]; sooner than it would itself."""
    images = [convert_to_rgb(image) for image in images]
    if not (image_processor.do_rescale and image_processor.do_normalize):
        return image_processor(images, return_tensors="pt")["pixel_values"]
    # It would scale image by image, and resize to the size that they have already: five times the work.
    if all(_has_final_size(image, image_processor) for image in images):
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    else:
        pixels = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    factor = image_processor.rescale_factor
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return pixels.sub(mean / factor).mul_(factor / std)


def _has_final_size(image: Image.Image, image_processor) -> bool:
    """Whether an image processor would leave an RGB image's pixels as they are."""
    resized = dict(image_processor.size) if image_processor.do_resize else {}
    cropped = dict(image_processor.crop_size) if getattr(image_processor, "do_center_crop", False) else {}
    known = {"shortest_edge": min(image.size), "height": image.height, "width": image.width}
    return all(known.get(name) == value for name, value in [*resized.items(), *cropped.items()])


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, with transparency laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


EXIF_ORIENTATION = 0x0112


def open_image(source: bytes | str, max_pixels: int) -> Image.Image:
    """An image that can be cropped and resized as it is; a JPEG is not decoded yet, so that a part of it may do.

    Transparency is laid on white, 16 bits a channel become 8, and the camera's orientation is applied.

    Raises:
        ValueError: the header says more than `max_pixels`, found before anything is decoded.
        Exception: whatever Pillow raises for data that is not an image.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow raises for twice as many while it opens
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than max_image_pixels {max_pixels}")
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64)
        image = Image.fromarray(np.clip(values / (256 if values.max() > 255 else 1), 0, 255).astype(np.uint8))
    elif image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "L", "CMYK"):
        return image
    return convert_to_rgb(image)
