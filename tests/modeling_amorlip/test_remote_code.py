"""Saved folders where our package does not exist: their code travels with them and needs but Transformers and torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertTokenizer, BitImageProcessor, CLIPProcessor

from modeling_amorlip import (
    AmorLIPConfig,
    AmorLIPForImageClassification,
    AmorLIPModel,
    AmorLIPVisionModelWithProjection,
)
from tests.helpers.checkout import ROOT, TINY, environment_with_threads
from training.model.tokenizer import train_tokenizer


# A fresh interpreter with no path but its own (-I) still finds an installed checkout; here the names do not exist.
PRELUDE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_amorlip", "training", "eval"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
try:
    import modeling_amorlip
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("our package can be imported")
"""
SCRIPT = """
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline
from transformers import AutoModelForZeroShotImageClassification

root, trust = Path(sys.argv[1]), {"trust_remote_code": True}
image, labels = Image.open(root / "image.png"), ["red heart", "cat face"]
found = {}
for name in ("clip", "resnet"):
    folder = str(root / name)
    assert AutoConfig.from_pretrained(folder, **trust).model_type == "amorlip"
    processor = AutoProcessor.from_pretrained(folder, **trust)
    inputs = processor(images=image, text=labels, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, **trust)
    with torch.inference_mode():
        outputs = model(**inputs)
    found[f"{name}.logits_per_image"] = outputs.logits_per_image.contiguous()
    found[f"{name}.log_prob_per_image"] = model.log_prob_per_image(outputs).contiguous()
    zero_shot = AutoModelForZeroShotImageClassification.from_pretrained(folder, **trust)
    assert type(zero_shot) is type(model)
    classify = pipeline("zero-shot-image-classification", model=folder, **trust)
    scores = {a["label"]: a["score"] for a in classify(image, candidate_labels=labels, hypothesis_template="{}")}
    found[f"{name}.scores"] = torch.tensor([scores[label] for label in labels])
    extract = pipeline("image-feature-extraction", model=folder, **trust)
    found[f"{name}.image_embeds"] = extract(image, return_tensors=True)
    extract = pipeline("feature-extraction", model=folder, **trust)
    found[f"{name}.text_embeds"] = extract(labels[0], return_tensors=True)
    classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=7, **trust)
    assert torch.equal(classifier.vision_model.state_dict().popitem()[1], model.vision_model.state_dict().popitem()[1])
    assert classifier(inputs["pixel_values"]).logits.shape == (1, 7)

fine_tuned = AutoModelForImageClassification.from_pretrained(root / "classifier", **trust)
found["classifier.logits"] = fine_tuned(inputs["pixel_values"]).logits.detach()
best = pipeline("image-classification", model=str(root / "classifier"), **trust)(image)[0]
assert best["label"] == fine_tuned.config.id2label[int(found["classifier.logits"].argmax())]

tower = AutoModel.from_pretrained(root / "tower", **trust)
assert type(tower).__name__ == "AmorLIPResNetModel"
found["tower.pooler_output"] = tower(inputs["pixel_values"]).pooler_output.detach()
vision = AutoModel.from_pretrained(root / "vision", **trust)
assert type(vision).__name__ == "AmorLIPVisionModelWithProjection"
found["vision.image_embeds"] = vision(inputs["pixel_values"]).image_embeds.detach()

model.save_pretrained(root / "again")  # by the code that came with the folder
again = AutoModel.from_pretrained(root / "again", **trust)
assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
save_file(found, root / "found.safetensors")

ours = [name for name in sys.modules if "amorlip" in name and not name.startswith("__editable__")]
assert ours and all(name.startswith("transformers_modules.") for name in ours), ours
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory, demo_rows):
    """Folders of models, and the models themselves; what a fresh interpreter finds goes beside them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(demo_rows["caption"], 700)
    clip = {
        "vision_config": TINY["vision_config"],
        "text_config": {**TINY["text_config"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    }
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    resnet = {
        "vision_config": {
            "model_type": "amorlip_resnet",
            "width": 8,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": 4,
            "image_size": 32,
            "output_dim": 32,
        },
        "text_config": {**sizes, "model_type": "bert", "vocab_size": 50},
    }
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "heart", "cat", "face"]
    bert_tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    models = {
        "clip": AmorLIPModel(AmorLIPConfig(**clip, projection_dim=32)),
        "resnet": AmorLIPModel(AmorLIPConfig(**resnet, projection_dim=32)),
        "classifier": AmorLIPForImageClassification(AmorLIPConfig(**clip, num_labels=3)),
        "vision": AmorLIPVisionModelWithProjection(AmorLIPConfig(**clip)),
    }
    models["tower"] = models["resnet"].vision_model
    size = {"height": 32, "width": 32}
    images = BitImageProcessor(size={"shortest_edge": 32}, crop_size=size, do_convert_rgb=True)
    for name, model in models.items():
        model.eval().save_pretrained(root / name)
        CLIPProcessor(images, bert_tokenizer if name == "resnet" else tokenizer).save_pretrained(root / name)
    demo_rows[0]["image"].save(root / "image.png")
    return root, models


@pytest.mark.e2e
def test_folders_load_without_the_package(models, demo_rows, tmp_path):
    root, models = models
    environment = {**environment_with_threads(1), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-I", "-c", PRELUDE + SCRIPT, root]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = load_file(root / "found.safetensors")
    for name in ("clip", "resnet"):
        processor = CLIPProcessor.from_pretrained(root / name)
        image, labels = demo_rows[0]["image"], ["red heart", "cat face"]
        inputs = processor(images=image, text=labels, padding=True, return_tensors="pt")
        with torch.inference_mode():
            outputs = models[name](**inputs)
        expected = {
            "logits_per_image": outputs.logits_per_image,
            "log_prob_per_image": AmorLIPModel.log_prob_per_image(outputs),
            "scores": outputs.logits_per_image[0].softmax(-1),
            "image_embeds": outputs.image_embeds,
            "text_embeds": outputs.text_embeds[:1],
        }
        for key, value in expected.items():
            torch.testing.assert_close(found[f"{name}.{key}"], value, rtol=1e-4, atol=1e-4)
    expected = models["classifier"](inputs["pixel_values"]).logits
    torch.testing.assert_close(found["classifier.logits"], expected, rtol=1e-4, atol=1e-4)
    expected = models["tower"](inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(found["tower.pooler_output"], expected, rtol=1e-4, atol=1e-6)
    expected = models["vision"](inputs["pixel_values"]).image_embeds
    torch.testing.assert_close(found["vision.image_embeds"], expected, rtol=1e-4, atol=1e-4)


def test_the_code_in_a_folder_needs_nothing_else(models):
    root, _ = models
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)
    sources = sorted((root / "clip").glob("*.py"))
    names = {path.stem for path in sources}
    towers = {"encoders_amorlip", "resnet_amorlip", "amortizer_amorlip"}
    assert names == {"modeling_amorlip", "configuration_amorlip", "pipeline_amorlip"} | towers
    texts = [path.read_text() for path in sources]
    assert sum(len(text.splitlines()) for text in texts) <= 1250
    assert not [path for path, text in zip(sources, texts, strict=True) if "triton" in text.lower()]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path}: an uploaded folder is flat"
                assert {node.module} <= names if node.module else {alias.name for alias in node.names} <= names, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] in allowed, path


@pytest.mark.parametrize("package", ["modeling_amorlip", "training", "eval"])
def test_remote_code_is_never_trusted_by_us(package):
    """Whether to run code from a model's folder is for who runs it to say, not for our code."""
    sources = sorted(Path(ROOT / package).rglob("*.py"))
    assert sources
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path}:{node.value.lineno}"
            # nor by way of a dictionary or an environment variable
            assert not (isinstance(node, ast.Constant) and node.value == "trust_remote_code"), f"{path}:{node.lineno}"
