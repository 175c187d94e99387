"""Values that a sample cannot have: named with the sample, and never taken for something else."""

import dataclasses

import datasets
import pytest
from PIL import Image, UnidentifiedImageError

from eval.data import find_data
from eval.runner import evaluate_task
from eval.samples import describe_image_error, sample_of_row
from eval.tables import fill_template
from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.images_amorlip import open_image
from tests.helpers.models import make_model
from tests.helpers.tasks import encoded, write_classification


RETRIEVAL = Task("pairs", kind="retrieval", main_metric="mean_recall@1", data="pairs.parquet")
INSTANCE = {"candidates": ["a", "b"], "candidates_images": [b"1", b"2"], "associations": ["b"], "cue": "Egg"}


@pytest.mark.parametrize(
    "value, expected",
    [("a cat", ["a cat"]), (["a", " ", None, "b"], ["a", "b"]), (None, []), ("", []), ([], [])],
)
def test_captions_are_texts(value, expected):
    assert sample_of_row(RETRIEVAL, "row 0", {"image": b"", "caption": value}, None).captions == expected


@pytest.mark.parametrize("value", [1, {"raw": "a cat"}, [{"raw": "a cat"}], [["a cat"]]])
def test_other_captions_are_refused(value):
    with pytest.raises(UserError, match="pairs: row 7: its caption is .*; captions must be a text or a list of texts"):
        sample_of_row(RETRIEVAL, "row 7", {"image": b"", "caption": value}, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"associations": ["c"]}, r"associations \['c'\] must be some of its candidates \['a', 'b'\]"),
        ({"associations": []}, "must be some of its candidates"),
        ({"associations": "ab"}, "must be some of its candidates"),
        ({"candidates_images": [b"1"]}, "it has 1 images for its candidates"),
        ({"cue": ""}, "its cue is '', not a text"),
        ({"cue": None}, "its cue is None, not a text"),
    ],
)
def test_wrong_instance_is_named(change, message):
    task = Task("cues", kind="winogavil", main_metric="jaccard_score", data="cues.parquet")
    sample = sample_of_row(task, "row 0", INSTANCE, None)
    assert sample.associations == [1] and sample.captions == ["An egg"]
    with pytest.raises(UserError, match=f"cues: row 3: .*{message}"):
        sample_of_row(task, "row 3", INSTANCE | change, None)


def test_missing_label_is_named():
    with pytest.raises(UserError, match="mine: row 2: its label is None, not a class number"):
        sample_of_row(Task("mine", data="mine.parquet"), "row 2", {"image": b"", "label": None}, None)


def test_image_without_caption_is_no_query(tmp_path):
    """Its own captions cannot be found, so it would count as a miss."""
    images = [{"bytes": encoded(Image.new("RGB", (32, 32), (50 * i, 0, 0)))} for i in range(4)]
    rows = datasets.Dataset.from_dict({"image": images, "caption": ["a", None, "b", "c"]})
    rows.to_parquet(tmp_path / "pairs.parquet")
    result = evaluate_task(*make_model(), RETRIEVAL, tmp_path, resamples=0)
    assert (result.status, result.num_samples, result.unreadable) == ("partial", 3, ["row 1 (it has no caption)"])
    assert result.metrics["text_retrieval_recall@5"].value == 1


def test_reason_is_the_same_in_every_process():
    with pytest.raises(UnidentifiedImageError) as caught:
        open_image(b"nothing")
    assert "0x" in str(caught.value) and "0x" not in describe_image_error(caught.value)
    assert len(describe_image_error(OSError(f"File name too long: {'iVBOR' * 1000}"))) < 300


@pytest.fixture
def task(tmp_path):
    """Return a task of four images in two shards, and its folder."""
    folder = tmp_path / "wds_mine"
    write_classification(folder, [Image.new("RGB", (32, 32))] * 4, [0, 1, 0, 1], ["café", "cat"])
    return Task("mine", repositories=("x/wds_mine",)), folder


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("classnames.txt", b"caf\xe9\ncat", "classnames.txt is not UTF-8"),
        ("classnames.txt", b"cat\n\ndog", "the name of class 1 is blank"),
        ("classnames.txt", b" \ndog", "the name of class 0 is blank"),
        ("test/nshards.txt", b"two", "nshards.txt says 'two', and there are 2 shards"),
        ("test/nshards.txt", b"1", "nshards.txt says '1', and there are 2 shards"),
        ("test/nshards.txt", b"", "nshards.txt says ''"),
    ],
)
def test_wrong_files_are_named(task, file, content, message):
    (task[1] / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        find_data(task[0], task[1].parent)


def test_files_of_other_editors_are_read(task):
    (task[1] / "classnames.txt").write_bytes("\ufeffcafé\r\ncat\r\n\r\n".encode())
    assert find_data(task[0], task[1].parent).classes == ["café", "cat"]


@pytest.mark.parametrize("metadata", [[[1, 2], [1, 2], [1], [1, 2]], [["a"], ["b"], ["a"], ["b"]]])
def test_metadata_that_does_not_fit_is_named(metadata, tmp_path):
    images = [Image.new("RGB", (32, 32))] * 4
    write_classification(tmp_path / "wds_mine", images, [0, 1, 0, 1], ["a", "b"], metadata=metadata)
    with pytest.raises(UserError, match="s[01]_0000[01]: (its metadata is not of 2 numbers|.*cannot be read)"):
        evaluate_task(*make_model(), Task("mine", repositories=("x/wds_mine",)), tmp_path, resamples=0)


def test_name_with_braces_is_filled_in_once():
    assert [fill_template(template, "C{}") for template in ("a {c}.", "a {}.")] == ["a C{}."] * 2


@pytest.mark.parametrize("prior", [(1.0,), (0.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_wrong_class_prior_is_named(task, prior):
    wrong = dataclasses.replace(task[0], class_prior=prior)
    with pytest.raises(UserError, match="class_prior has .* for 2 classes; give one value above 0 per class"):
        evaluate_task(*make_model(), wrong, task[1].parent, scorings=("sinkhorn",), resamples=0)
