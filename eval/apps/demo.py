"""Classify images on a page in the browser: upload an image, type labels, see their probabilities.

    python eval/apps/demo.py --model outputs/emoji_demo
    python eval/apps/demo.py --model USER/MODEL --template "an emoji of {}" --port 7861

Only this computer can open the page (127.0.0.1). It works without a network: nothing is shared, reported or loaded
from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import torch
from PIL import Image

from eval.apps.classify import TEMPLATE, check_template, embed_labels, label_probabilities
from eval.models import load_model
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.embedder_amorlip import encode_images


def build_demo(model: Any, processor: Any, template: str = TEMPLATE) -> Any:
    """Return the page as a `gradio.Interface` that has not been launched."""
    import gradio

    def classify(image: Image.Image | None, labels: str) -> dict[str, float]:
        names = list(dict.fromkeys(name.strip() for name in labels.split(",") if name.strip()))
        try:
            if image is None:
                raise UserError("Upload an image first.")
            label_embeds = embed_labels(model, processor, names, template)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        probabilities = label_probabilities(model, encode_images(model, processor, [image]), label_embeds)
        return dict(zip(names, probabilities[0].tolist(), strict=True))

    return gradio.Interface(
        classify,
        [
            # Without a mode: converting to RGB would put transparent pixels on black.
            gradio.Image(type="pil", image_mode=None, sources=["upload", "clipboard"], label="Image", height=320),
            gradio.Textbox(
                label="Labels", info="Separated by commas", lines=2, placeholder="red heart, airplane, cat face"
            ),
        ],
        gradio.Label(label="Probabilities", num_top_classes=10),
        title="What is in the picture?",
        flagging_mode="never",
        api_name="classify",
        analytics_enabled=False,
    )


def serve(demo: Any, port: int) -> None:
    """Serve the page at http://127.0.0.1:PORT until it is interrupted; raises `UserError` when the port is taken."""
    import gradio

    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others load web fonts
    try:
        _, url, _ = demo.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            theme=theme,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError:
        raise UserError(f"Port {port} is taken; name another with --port.") from None
    print(f"Open {url} in a browser; press Ctrl-C to end the demo.", flush=True)
    demo.block_thread()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; raises `UserError` for values that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub repository of a dual encoder")
    add("--port", type=int, default=7860, help="port of http://127.0.0.1:PORT (default: %(default)s)")
    add("--template", default=TEMPLATE, help="text with {} where the label goes (default: %(default)s)")
    arguments = parser.parse_args()
    if not 1 <= arguments.port <= 65535:
        raise UserError(f"--port must be between 1 and 65535, got {arguments.port}.")
    check_template(arguments.template)
    if find_spec("gradio") is None:
        raise UserError("The demo needs gradio: pip install -c constraints.txt -e '.[demo]'")
    return arguments


@cli_entry_point
def main() -> None:
    arguments = parse_arguments()
    model, processor = load_model(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as uploads:  # uploaded images are deleted when the demo ends
        os.environ["GRADIO_TEMP_DIR"] = uploads
        serve(build_demo(model, processor, arguments.template), arguments.port)


if __name__ == "__main__":
    sys.exit(main())
