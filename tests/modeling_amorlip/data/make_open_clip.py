"""Makes the small OpenCLIP models beside this file: weights, inputs and the features that OpenCLIP gives for them.

    pip install torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0
    python tests/modeling_amorlip/data/make_open_clip.py

`open_clip_vit.safetensors` and `open_clip_resnet.safetensors` hold the state dict under `weights.`, `pixels` (uint8),
`input_ids`, `image_features` and `text_features`; the metadata's `open_clip_config` is the open_clip_config.json.
"""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file


TEXT = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
MODELS = {
    "vit": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [2, 1, 1, 1], "width": 4, "head_width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
}


def main() -> None:
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        size = config["vision_cfg"]["image_size"]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # initialisation leaves them at 0 or 1, where mistakes can hide
                    parameter.add_(0.2 * torch.randn_like(parameter))
            for _ in range(20):
                model.encode_image(torch.randn(16, 3, size, size))  # statistics of batch normalisation
        model.eval()
        pixels = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
        input_ids = torch.zeros(3, 12, dtype=torch.long)
        for row, length in zip(input_ids, (3, 7, 12), strict=True):
            row[:length] = torch.tensor([98, *torch.randint(1, 98, (length - 2,)), 99])
        with torch.inference_mode():
            features = {
                "image_features": model.encode_image(pixels / 127.5 - 1),
                "text_features": model.encode_text(input_ids),
            }
        tensors = {f"weights.{key}": value for key, value in model.state_dict().items()}
        path = Path(__file__).with_name(f"open_clip_{name}.safetensors")
        metadata = {"open_clip_config": json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3}})}
        tensors |= {"pixels": pixels, "input_ids": input_ids, **features}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
