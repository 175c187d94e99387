"""Models of open_clip, where it is installed, with the interface of a Transformers dual encoder.

python eval/run.py --model open_clip:ViT-B-32/laion2b_s34b_b79k --tasks datacomp --data_dir data
python eval/run.py --model open_clip:local-dir:exported/model --tasks emoji_openmoji
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from modeling_amorlip.cli_amorlip import UserError


class OpenCLIPModel(nn.Module):
    """The part of a Transformers dual encoder that the evaluation uses."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model
        self.logit_scale: Tensor = model.logit_scale
        self.logit_bias: Tensor | None = getattr(model, "logit_bias", None)  # SigLIP's
        text_config = SimpleNamespace(max_position_embeddings=model.context_length)
        self.config = SimpleNamespace(model_type="open_clip", text_config=text_config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return image embeddings [I, d] of pixels [I, 3, H, W], not normalized."""
        return self.model.encode_image(pixel_values)

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        """Return text embeddings [T, d] of tokens [T, context], not normalized."""
        return self.model.encode_text(input_ids)


class ImageTransform:
    """A torchvision transform with the interface of an image processor."""

    do_rescale = do_normalize = False  # the transform does both

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self.transform(image) for image in images])}


def load_open_clip(name: str) -> tuple[OpenCLIPModel, SimpleNamespace]:
    """Return (model, processor) of `ARCHITECTURE/TAG`, `hf-hub:REPOSITORY` or `local-dir:FOLDER`; random without a tag.

    Raises:
        UserError: open_clip is not installed, or does not know the name.
    """
    try:
        import open_clip
    except ImportError:
        raise UserError("--model open_clip:... needs open_clip: pip install open_clip_torch.") from None
    architecture, pretrained = name, None
    if ":" not in name:
        architecture, _, tag = name.partition("/")
        pretrained = tag or None
    try:
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # open_clip raises many types
        raise UserError(f"--model open_clip:{name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None

    def tokenize(texts: list[str], **options: Any) -> dict[str, Tensor]:
        return {"input_ids": tokenizer(texts)}

    return OpenCLIPModel(model).eval(), SimpleNamespace(image_processor=ImageTransform(transform), tokenizer=tokenize)
