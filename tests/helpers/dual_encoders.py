"""Small dual encoders of Transformers, and what compares two of them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel


# Hidden size, layers, heads of the images and of the texts, and the size of the embedding.
SIZES = [((32, 1, 2), (48, 2, 3), 24), ((64, 3, 4), (32, 2, 2), 32), ((96, 2, 6), (64, 4, 4), 80)]


def randomize_biases(model: nn.Module) -> nn.Module:
    """Move biases and gains away from the 0 and 1 of their initialization, where mistakes can hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder_config(size, layers, heads, **fields) -> dict:
    """Return the fields that most encoders' configurations share."""
    return {
        "hidden_size": size,
        "intermediate_size": 3 * size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **fields,
    }


def make_clip(sizes=SIZES[0], activation="quick_gelu", vocab_size=100, eos=99) -> CLIPModel:
    """Make a small CLIP of Transformers."""
    vision, text, width = sizes
    text = encoder_config(
        *text, vocab_size=vocab_size, max_position_embeddings=16, hidden_act=activation, pad_token_id=eos
    )
    text |= {"bos_token_id": 98, "eos_token_id": eos}
    vision = encoder_config(*vision, image_size=32, patch_size=8, hidden_act=activation)
    return randomize_biases(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)))


def padded_texts(padding: int):
    """Make four texts of lengths 3 to 16, ended by the highest token, and their mask."""
    torch.manual_seed(1)
    input_ids, mask = torch.full((4, 16), padding), torch.zeros(4, 16, dtype=torch.long)
    for row, attended, length in zip(input_ids, mask, (3, 8, 15, 16), strict=True):
        row[:length] = torch.tensor([98, *torch.randint(3, 98, (length - 2,)), 99])
        attended[:length] = 1
    return input_ids, mask


@torch.inference_mode()
def assert_same_logits(other, ours, **inputs):
    """Check that two dual encoders give the same embeddings and logits."""
    expected, outputs = other(**inputs), ours(**inputs)
    assert expected.logits_per_image.std() > 1e-3  # not all the same
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def assert_same_features(model, tensors):
    """Check a model's features against those that OpenCLIP computed."""
    images = model.get_image_features(tensors["pixels"] / 127.5 - 1).pooler_output
    texts = model.get_text_features(tensors["input_ids"]).pooler_output
    torch.testing.assert_close(images, tensors["image_features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(texts, tensors["text_features"], rtol=1e-5, atol=1e-5)
