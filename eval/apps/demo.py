"""Classify images on a page in the browser: upload an image, type labels, see their probabilities.

    python eval/apps/demo.py --model outputs/emoji_demo
    python eval/apps/demo.py --model USER/MODEL --template "an emoji of {}" --port 7861

Only this computer can open the page (127.0.0.1). It works without a network: nothing is shared, reported or loaded
from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import socket
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
from eval.apps.image_files import describe_error, read_image
from eval.apps.texts import describe_indistinguishable, find_indistinguishable, split_labels
from eval.models import load_model
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.embedder_amorlip import encode_images


HOST = "127.0.0.1"


def build_demo(model: Any, processor: Any, template: str = TEMPLATE) -> Any:
    """Return the page as a `gradio.Interface` that has not been launched."""
    import gradio

    def classify(file: str | None, labels: str | None) -> dict[str, float]:
        names = split_labels(labels or "")
        try:
            image = _read_upload(file)
            label_embeds = embed_labels(model, processor, names, template)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        if groups := find_indistinguishable(names, label_embeds):
            gradio.Warning(describe_indistinguishable(groups))
        probabilities = label_probabilities(model, encode_images(model, processor, [image]), label_embeds)
        return dict(zip(names, probabilities[0].tolist(), strict=True))

    picture: Any = gradio.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=320)
    picture.preprocess = _upload_path
    return gradio.Interface(
        classify,
        [
            picture,
            gradio.Textbox(
                label="Labels",
                info="Separated by commas, or one per line",
                lines=3,
                placeholder="red heart, airplane, cat face",
            ),
        ],
        gradio.Label(label="Probabilities", num_top_classes=10),
        title="What is in the picture?",
        flagging_mode="never",
        api_name="classify",
        analytics_enabled=False,
    )


def _upload_path(upload: Any) -> str | None:
    """Return the path of an uploaded file; gradio itself would decode it, and fail before `classify` can say why."""
    return None if upload is None else upload.path


def _read_upload(file: str | None) -> Image.Image:
    if file is None:
        raise UserError("Upload an image first.")
    try:
        return read_image(Path(file))
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"The image cannot be read: {describe_error(error)}.") from None


def bypass_proxy() -> None:
    """Keep requests to this computer away from proxies; gradio asks its own page whether it is up."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*hosts, HOST])


def check_port(port: int) -> None:
    """Raise `UserError` when a port does not exist, is taken or may not be used."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port must be between 1 and 65535, got {port}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port} cannot be used: {error.strerror}; name another port.") from None


def serve(demo: Any, port: int) -> None:
    """Serve the page at http://127.0.0.1:PORT until it is interrupted; raises `UserError` when the port is taken."""
    import gradio

    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others load web fonts
    try:
        _, url, _ = demo.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            theme=theme,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError:
        raise UserError(f"--port {port} is taken; name another port.") from None
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
    if find_spec("gradio") is None:
        raise UserError("The page needs gradio: pip install -c constraints.txt -e '.[apps]'")
    check_template(arguments.template)
    check_port(arguments.port)
    return arguments


@cli_entry_point
def main() -> None:
    arguments = parse_arguments()
    bypass_proxy()
    model, processor = load_model(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with _upload_folder() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        serve(build_demo(model, processor, arguments.template), arguments.port)


def _upload_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for uploaded images, which is deleted when the demo ends."""
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise UserError(f"Uploads need a temporary folder; name a writable one in TMPDIR: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
