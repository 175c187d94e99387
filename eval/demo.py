"""A page in the browser: upload an image, type labels, see their probabilities.

    python eval/demo.py --model outputs/emoji_demo
    python eval/demo.py --model USER/MODEL --template "a photo of a {}" --port 7861

For this computer alone (127.0.0.1), and without network: nothing is shared, reported or loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, without installation

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from eval.classify import embed_labels, label_probabilities  # noqa: E402
from eval.encode import encode_images  # noqa: E402
from eval.errors import UserError  # noqa: E402
from eval.run import load_model  # noqa: E402


def build_demo(model, processor, template: str = "{}"):
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
            gradio.Image(type="pil", image_mode=None, sources=["upload", "clipboard"], label="Image"),
            gradio.Textbox(label="Labels", info="Separated by commas", placeholder="red heart, airplane, cat face"),
        ],
        gradio.Label(label="Probabilities", num_top_classes=10),
        title="What is in the picture?",
        flagging_mode="never",
        api_name="classify",
        analytics_enabled=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub repository")
    parser.add_argument("--port", type=int, default=7860, help="of http://127.0.0.1:PORT")
    parser.add_argument("--template", default="{}", help="what a label stands in; default: the label by itself")
    arguments = parser.parse_args()
    try:
        try:
            import gradio
        except ImportError:
            raise UserError("The demo needs gradio: install the extra, see the README.") from None
        model, processor = load_model(arguments.model)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        fonts = dict(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others come from the network
        build_demo(model, processor, arguments.template).launch(
            server_name="127.0.0.1", server_port=arguments.port, share=False, theme=gradio.themes.Default(**fonts)
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
