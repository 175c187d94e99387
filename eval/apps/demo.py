"""A page in the browser: upload an image, type labels, see their probabilities.

    python eval/apps/demo.py --model outputs/emoji_demo
    python eval/apps/demo.py --model USER/MODEL --template "an emoji of {}" --port 7861

For this computer alone (127.0.0.1), and without network: nothing is shared, reported or loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import torch
from PIL import Image

from eval.apps.classify import TEMPLATE, embed_labels, label_probabilities
from eval.models import load_model
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.embedder_amorlip import encode_images


def build_demo(model, processor, template: str = TEMPLATE):
    """The page as a `gradio.Interface`, not started."""
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
            # As it is: RGB would lay transparency on black.
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


def serve(demo, port: int) -> None:
    """Shows the page at http://127.0.0.1:PORT until it is interrupted; raises `UserError` when the port is taken."""
    import gradio

    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others are online
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
    print(f"Open {url} in a browser; Ctrl-C ends the demo.", flush=True)
    demo.block_thread()


@cli_entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub repository")
    parser.add_argument("--port", type=int, default=7860, help="of http://127.0.0.1:PORT")
    parser.add_argument("--template", default=TEMPLATE, help="what a label stands in; default: %(default)s")
    arguments = parser.parse_args()
    if find_spec("gradio") is None:
        raise UserError("The demo needs gradio: pip install -c constraints.txt -e '.[demo]'")
    model, processor = load_model(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as uploads:  # they go when the demo ends
        os.environ["GRADIO_TEMP_DIR"] = uploads
        serve(build_demo(model, processor, arguments.template), arguments.port)


if __name__ == "__main__":
    sys.exit(main())
