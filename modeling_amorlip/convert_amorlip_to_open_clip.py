"""
Write an AmorLIP model as OpenCLIP reads it: `open_clip_config.json` and `open_clip_model.safetensors` in a folder.

    python -m modeling_amorlip.convert_amorlip_to_open_clip --source outputs/emoji_clip --output outputs/open_clip

`open_clip.create_model("local-dir:outputs/open_clip")` then gives the same embeddings. The heads are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from .cli_amorlip import as_user_error, cli_entry_point
from .loading_amorlip import load_amorlip
from .modeling_amorlip import AmorLIPModel
from .open_clip_amorlip import open_clip_config, to_open_clip_names


def export_open_clip(model: AmorLIPModel, folder: str | os.PathLike, processor=None) -> None:
    """
    Write config, weights and the processor's tokenizer and image normalization into a folder.

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


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="AmorLIP model: a folder or a name on the Hub")
    parser.add_argument("--output", required=True, help="folder to write")
    arguments = parser.parse_args()
    with as_user_error(ValueError, OSError, ImportError):
        model, processor = load_amorlip("--source", arguments.source)
        export_open_clip(model, arguments.output, processor)
    print(f'open_clip.create_model("local-dir:{arguments.output}")')


if __name__ == "__main__":
    sys.exit(main())
