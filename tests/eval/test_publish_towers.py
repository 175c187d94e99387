"""Published models of all kinds of towers, loaded elsewhere: a fresh process, an empty cache, none of our packages."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from huggingface_hub import HfApi
from transformers import (
    AutoModel,
    AutoProcessor,
    BertTokenizer,
    BitImageProcessor,
    CLIPProcessor,
    SiglipImageProcessor,
    SiglipProcessor,
    SiglipTokenizer,
    pipeline,
)

from eval.publish import publish
from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from modeling_amorlip.convert_amorlip_to_clip import convert_to_transformers
from modeling_amorlip.loading_amorlip import load_amorlip
from tests.helpers.checkout import DEMO, ROOT
from tests.helpers.dual_encoders import randomize_biases
from tests.helpers.hub_server import environment
from tests.helpers.models import TOWER, save_model, save_siglip


LABELS = ["a red heart", "cat", "two dogs"]
RESNET = {"model_type": "amorlip_resnet", "width": 8, "depths": [1, 1, 1, 1], "num_attention_heads": 4}


def save_resnet(folder):
    return save_model(folder, vision_config={**RESNET, "image_size": 32, "output_dim": 24})


def save_slow_siglip(folder):
    """SigLIP's towers with a SentencePiece tokenizer, which has no tokenizer.json."""
    save_siglip(folder)
    (folder / "tokenizer.json").unlink()
    model_file = io.BytesIO()
    names = [
        name for name in json.loads((DEMO / "openmoji.json").read_text())["classes"] if re.fullmatch("[a-z ]+", name)
    ]
    tokens = {"vocab_size": 60, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(names), model_writer=model_file, minloglevel=2, **tokens
    )
    (folder / "spiece.model").write_bytes(model_file.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"])
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def save_bert(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "heart", "cat", "two", "dogs", "this", "photo"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=32)
    text = {**TOWER, "model_type": "bert", "vocab_size": len(words), "max_position_embeddings": 32}
    vision = {**TOWER, "model_type": "dinov2", "image_size": 32, "patch_size": 16}
    AmorLIPModel(AmorLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPProcessor(BitImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


MODELS = {"clip": save_model, "siglip": save_slow_siglip, "resnet": save_resnet, "bert": save_bert}
CLIP_FORMS = ("clip", "siglip")
STRANGER = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_amorlip", "training", "eval"):
            raise ImportError(f"{{name}} is not installed here")
sys.meta_path.insert(0, Absent())

import numpy, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

image, results = Image.open("picture.png"), {{}}

def look(name, **options):
    model = AutoModel.from_pretrained(name, **options).eval()
    processor = AutoProcessor.from_pretrained(name, **options)
    texts = processor.tokenizer({LABELS}, padding="max_length", max_length=32, return_tensors="pt")
    pixels = processor.image_processor([image], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**texts, **pixels)
    classify = pipeline("zero-shot-image-classification", model=name, **options)
    scores = {{answer["label"]: answer["score"] for answer in classify(image, candidate_labels={LABELS})}}
    key = name.split("/")[1]
    results.update({{f"{{key}}.image": outputs.image_embeds.numpy(), f"{{key}}.text": outputs.text_embeds.numpy()}})
    results[f"{{key}}.scores"] = numpy.array([scores[label] for label in {LABELS}])
"""


def assert_no_paths(hub, tmp_path):
    """Check every published file for this machine's folders."""
    home = str(ROOT.parent)
    for name, repository in hub.repositories.items():
        for file, content in repository.at("main")[1].items():
            for path in (str(tmp_path), str(ROOT), home if len(home) > 5 else str(ROOT)):
                assert path.encode() not in content, (name, file)


def expected_results(folder, image):
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    texts = processor.tokenizer(LABELS, padding="max_length", max_length=32, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**texts, **processor.image_processor([image], return_tensors="pt"))
    answers = pipeline("zero-shot-image-classification", model=str(folder))(image, candidate_labels=LABELS)
    scores = {answer["label"]: answer["score"] for answer in answers}
    return outputs.image_embeds.numpy(), outputs.text_embeds.numpy(), np.array([scores[label] for label in LABELS])


@pytest.mark.e2e
def test_published_models_load_without_package(hub, tmp_path, demo_rows):
    """Equal embeddings and scores of every pair of towers, and of the CLIP form without `trust_remote_code`."""
    folders, calls = {}, []
    image = demo_rows[0]["image"].convert("RGB")
    for name, save in MODELS.items():
        folder = folders[name] = save(tmp_path / name)
        randomize_biases(AmorLIPModel.from_pretrained(folder)).save_pretrained(folder)
        publish(folder, f"user/{name}")
        calls.append(f'look("user/{name}", trust_remote_code=True)')
    for name in CLIP_FORMS:
        model, processor = load_amorlip("--source", folders[name])
        convert_to_transformers(model).save_pretrained(tmp_path / f"{name}_form")
        processor.save_pretrained(tmp_path / f"{name}_form")
        HfApi(endpoint=hub.endpoint).create_repo(f"user/{name}_form")
        HfApi(endpoint=hub.endpoint).upload_folder(repo_id=f"user/{name}_form", folder_path=tmp_path / f"{name}_form")
        calls.append(f'look("user/{name}_form")')
    files = {name: set(repository.at("main")[1]) for name, repository in hub.repositories.items()}
    assert "spiece.model" in files["user/siglip"] and "tokenizer.json" not in files["user/siglip"]
    assert not [name for name in files["user/clip_form"] if name.endswith(".py")]
    assert_no_paths(hub, tmp_path)
    card = hub.repositories["user/clip"].at("main")[1]["README.md"].decode()
    calls.append(re.search(r"```python\n(.*?)```", card, re.S).group(1))
    home = tmp_path / "stranger"
    home.mkdir()
    image.save(home / "picture.png")
    (home / "script.py").write_text("\n".join([STRANGER, *calls, 'numpy.savez("results.npz", **results)']))
    env = environment(hub, home, token="hf_other")
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tensor") == 2  # the card's snippet
    theirs = np.load(home / "results.npz")
    for name, folder in folders.items():
        expected = expected_results(folder, image)
        for form in (name, f"{name}_form"):
            if f"{form}.image" in theirs:
                close = {"rtol": 1e-5, "atol": 1e-6} if form != name else {"rtol": 0, "atol": 0}
                for part, values in zip(("image", "text", "scores"), expected, strict=True):
                    np.testing.assert_allclose(theirs[f"{form}.{part}"], values, **close, err_msg=f"{form}.{part}")
    assert sum(key.endswith("_form.scores") for key in theirs) == len(CLIP_FORMS)
