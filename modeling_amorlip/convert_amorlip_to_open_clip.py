"""
An AmorLIP model as OpenCLIP reads it: a folder with `open_clip_config.json` and `open_clip_model.safetensors`.

    python -m modeling_amorlip.convert_amorlip_to_open_clip --source outputs/emoji_clip --output outputs/open_clip

    open_clip.create_model("local-dir:outputs/open_clip")  # the same embeddings; OpenCLIP has no place for the heads
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_amorlip import AmorLIPModel
from modeling_amorlip.open_clip_amorlip import open_clip_config, to_open_clip_names


def export_open_clip(model: AmorLIPModel, folder: str | os.PathLike, processor=None) -> None:
    """
    Writes config, weights and, of `processor`, the tokenizer and the normalisation of images.

    Raises:
        ValueError: OpenCLIP has no such encoders; CLIP's ViT or ResNet and CLIP's text encoder can be exported.
    """
    config = open_clip_config(model, processor)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(to_open_clip_names(model), folder / "open_clip_model.safetensors")
    if processor is not None:
        processor.tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder or name on the Hub of an AmorLIP model")
    parser.add_argument("--output", required=True, help="folder to write")
    arguments = parser.parse_args()
    try:
        model = AutoModel.from_pretrained(arguments.source, dtype=torch.float32)
        if not isinstance(model, AmorLIPModel):
            raise ValueError(f"{arguments.source} is a {type(model).__name__}; an AmorLIPModel is needed.")
        try:
            processor = AutoProcessor.from_pretrained(arguments.source)
        except (OSError, ValueError):
            processor = None
        export_open_clip(model, arguments.output, processor)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f'open_clip.create_model("local-dir:{arguments.output}")')
    return 0


if __name__ == "__main__":
    sys.exit(main())
