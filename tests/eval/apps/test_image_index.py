"""eval/apps/image_index.py: what is encoded again, and what happens when the index cannot be read or written."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from eval.apps import image_index
from eval.apps.image_index import FORMAT, default_index, index_images
from modeling_amorlip.cli_amorlip import UserError


@pytest.fixture
def loaded(tiny_model):
    return AutoModel.from_pretrained(tiny_model).eval(), AutoProcessor.from_pretrained(tiny_model)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "index.safetensors"


@pytest.fixture
def update(loaded, emoji_files, file):
    """Updates the index; returns paths, embeddings and the number of images encoded."""
    model, processor = loaded
    encoded = []
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )

    def run(revision="one", file=file, exclude=()):
        encoded.clear()
        return (*index_images(model, processor, emoji_files, file, revision, exclude=exclude), sum(encoded))

    return run


def add_image(folder):
    """Adds a copy of an image, under another name."""
    image = next(iter(sorted(folder.rglob("*.png"))))
    new = folder / "new.png"
    new.write_bytes(image.read_bytes())
    return new, image


def test_index_encodes_only_new_and_changed_images(update, emoji_files, tmp_path):
    file = tmp_path / "deep/er/index.safetensors"
    paths, embeds, number = update(file=file)
    assert number == len(paths) == 40
    again, same, number = update(file=file)
    assert number == 0 and again == paths and torch.equal(same, embeds)

    new, copied = add_image(emoji_files)
    changed, touched, gone, moved = *paths[10:12], paths[1], emoji_files / "moved.png"
    changed.write_bytes(paths[5].read_bytes())
    os.utime(touched, ns=(1, 1))
    gone.rename(moved)
    after, embeds_after, number = update(file=file)
    assert number == 4 and set(after) == {*paths, new, moved} - {gone}
    place, before = dict(zip(after, embeds_after, strict=True)), dict(zip(paths, embeds, strict=True))
    for path in set(paths) - {changed, gone}:
        torch.testing.assert_close(place[path], before[path])
    torch.testing.assert_close(place[new], before[copied])
    torch.testing.assert_close(place[changed], before[paths[5]])
    torch.testing.assert_close(place[moved], before[gone])
    assert not list(tmp_path.rglob(".*"))  # nothing left aside


def test_index_belongs_to_model_and_image_processor(update, loaded, capsys):
    assert update("one")[2] == 40 and update("one")[2] == 0
    assert update("two")[2] == 40 and "made by another model" in capsys.readouterr().err
    loaded[1].image_processor.image_mean = [0.1, 0.1, 0.1]
    assert update("two")[2] == 40
    assert update(None)[2] == update(None)[2] == 40  # nothing says whether it is the same model


def test_interrupted_indexing_continues(update, monkeypatch):
    monkeypatch.setattr(image_index, "SAVE_EVERY", 16)
    calls, encode_files = [], image_index.encode_files

    def stop_at_the_third(model, processor, paths, batch_size):
        calls.append(len(paths))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_files(model, processor, paths, batch_size)

    monkeypatch.setattr(image_index, "encode_files", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        update()
    update()
    assert calls == [16, 16, 8, 8]


def test_excluded_folders_stay_in_the_index(update, emoji_files):
    assert update()[2] == 40
    assert len(update(exclude=["odd"])[0]) == 20
    for folder in ("even", "odd"):
        next((emoji_files / folder).iterdir()).unlink()
    add_image(emoji_files)
    paths, _, number = update(exclude=["even"])
    assert len(paths) == 20 and number == 1  # the index is written without the deleted images
    paths, _, number = update()
    assert len(paths) == 39 and number == 0


def test_file_names_of_any_bytes_are_indexed(update, emoji_files):
    os.rename(next(emoji_files.rglob("*.png")), os.fsencode(emoji_files) + b"/caf\xe9\n.png")
    paths, embeds, number = update()
    assert number == 40 and os.fsencode(paths[0]).endswith(b"/caf\xe9\n.png")
    again, same, number = update()
    assert number == 0 and again == paths and torch.equal(same, embeds)


def test_index_of_former_format_is_encoded_again(update, file, capsys):
    save_file({"image_embeds": torch.zeros(1, 32)}, file, metadata={"format": FORMAT, "images": "[]"})
    assert update()[2] == 40 and "encoding all images again" in capsys.readouterr().err
    assert update()[2] == 0


@pytest.mark.parametrize("place", ["file/index.safetensors", "", "/proc/index.safetensors"])
def test_unwritable_index_is_found_before_encoding(update, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(image_index, "encode_files", None)
    with pytest.raises(UserError, match="--index"):
        update(file=tmp_path / place)


def test_complete_index_need_not_be_writable(update, monkeypatch):
    update()
    monkeypatch.setattr(image_index, "check_writable", None)
    assert update()[2] == 0


def test_full_disk_keeps_the_old_index(update, emoji_files, file, monkeypatch):
    update()
    before = file.read_bytes()
    add_image(emoji_files)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(image_index, "save_file", fail)
    with pytest.raises(UserError, match="No space left on device"):
        update()
    assert file.read_bytes() == before and not list(file.parent.glob(".*"))


def test_default_index_lies_beside_the_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for folder in (".", "../a", "../a/"):
        assert default_index(Path(folder)) == tmp_path / "a.index.safetensors"
