"""How far one gets without a model: the nearest training image, pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling_amorlip.images_amorlip import convert_to_rgb


def thumbnails(images: Iterable[Image.Image], size: int = 16) -> Tensor:
    """RGB values of images shrunk to size x size: [I, 3 * size * size], float32 in 0 to 1."""
    shrunk = [np.asarray(convert_to_rgb(image).resize((size, size), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(shrunk)).flatten(1).float() / 255


def pixel_baseline_accuracy(images, names: list[str], reference_images, reference_captions: list[str]) -> float:
    """Return the share of images whose nearest reference (Euclidean, 16 x 16 pixels) is named like the image."""
    test, reference = thumbnails(images), thumbnails(reference_images)
    nearest = torch.cat([torch.cdist(tile, reference).argmin(1) for tile in test.split(1024)])
    return sum(names[i] == reference_captions[j] for i, j in enumerate(nearest.tolist())) / len(names)
