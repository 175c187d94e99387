"""What a run's folder holds of its training images, in any place and form, stays there when the run is published."""

import base64
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.publish import publish
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.images_amorlip import convert_to_rgb, preprocess_images
from tests.helpers.models import save_model
from tests.helpers.runs import train


class Traces:
    """Pieces of images that no other file has: of their files, of these in base64, and of rows of their pixels."""

    def __init__(self, rows, image_processor):
        encoded = [row["bytes"] for row in rows.cast_column("image", datasets.Image(decode=False))["image"]]
        images = [convert_to_rgb(image) for image in rows["image"]]
        batch = preprocess_images(image_processor, images).numpy()
        sizes = [np.asarray(image.resize(size)) for image in images for size in (image.size, (32, 32))]
        rows_of_pixels = [row for pixels in [*sizes, *batch.reshape(-1, 32, 32)] for row in pixels]
        self.pieces = {content[len(content) // 2 :][:48] for content in encoded}
        self.pieces |= {base64.b64encode(content)[80:140] for content in encoded}
        self.pieces |= {row.tobytes() for row in rows_of_pixels if len(np.unique(row, axis=0)) > 8}

    def in_file(self, content: bytes) -> bool:
        """Return whether a file holds a piece, as it is or, in a picture, decoded."""
        contents = [content]
        if content.startswith((b"\x89PNG", b"\xff\xd8")):
            contents.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).tobytes())
        return any(piece in content for content in contents for piece in self.pieces)


@pytest.fixture
def run_with_pictures(recipe, demo_rows, tmp_path):
    """Return the folder of a run of three steps that holds training images wherever one may lie, and their traces."""
    trainer = train(recipe(max_steps=3, ema_decay=0.5, debug_pixels=True))
    folder, rows = tmp_path / "run", demo_rows.select(range(4))
    traces = Traces(rows, trainer.processor.image_processor)
    pixels = preprocess_images(trainer.processor.image_processor, [convert_to_rgb(image) for image in rows["image"]])
    trainer.nonfinite._save({"pixel_values": pixels, "input_ids": torch.ones(4, 3)})
    buffer = io.BytesIO()
    rows[0]["image"].convert("RGB").save(buffer, "PNG")
    (folder / "README.md").write_text(f"![a]({base64.b64encode(_encoded(rows)).decode()})")
    for name in ("training_curves.png", "ema/preview.png", "emoji_openmoji.png", "images/card.png", "thumbnail.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(buffer.getvalue())
    (folder / "notes_amorlip.py").write_bytes(base64.b64encode(_encoded(rows)))
    for name in ("model-00001-of-00002", "model_debug", "ema/batch", "not_finite_0"):
        save_file({"pixel_values": pixels}, folder / f"{name}.safetensors")
    return folder, traces


def _encoded(rows) -> bytes:
    return rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]


@pytest.mark.e2e
def test_no_training_pixel_is_published(hub, run_with_pictures):
    folder, traces = run_with_pictures
    inside = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    leaks = {name for name, content in inside.items() if traces.in_file(content)}
    assert leaks == {
        *("README.md", "training_curves.png", "ema/preview.png", "emoji_openmoji.png", "images/card.png"),
        *("thumbnail.png", "notes_amorlip.py", "model-00001-of-00002.safetensors", "model_debug.safetensors"),
        *("ema/batch.safetensors", "not_finite_0.safetensors", "debug/not_finite_0.safetensors"),
    }
    publish(folder, "user/tiny")
    files = hub.repositories["user/tiny"].at("main")[1]
    assert {"model.safetensors", "metrics.jsonl", "training_curves.png", "README.md"} <= set(files)
    assert not {name for name, content in files.items() if traces.in_file(content)}
    weights = load_file(folder / "model.safetensors")
    number = sum(weight.numel() for weight in weights.values())
    assert f"has {number / 1e6:.1f} million parameters" in files["README.md"].decode()
    publish(folder / "ema", "user/average")
    files = hub.repositories["user/average"].at("main")[1]
    assert "model.safetensors" in files and not {name for name, content in files.items() if traces.in_file(content)}


def test_weights_that_hold_a_batch_are_refused(hub, tmp_path):
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "pixel_values": torch.rand(2, 3, 32, 32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="holds pixel_values, which is no part of a model"):
        publish(folder, "user/tiny")
    assert not hub.repositories
