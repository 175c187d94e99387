"""Splits among parquet files, labels of any type, templates."""

import datasets
import pytest

from eval.tables import check_templates, label_values, number_classes, select_split
from eval.tasks import Task
from modeling_amorlip.cli_amorlip import UserError


TASK = Task("mine", data="mine")


@pytest.mark.parametrize(
    "files",
    [
        ["data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["test.parquet", "train.parquet", "training_2.parquet"],
        ["test/0.parquet", "train/0.parquet", "train/1.parquet"],
        ["evaluation.parquet", "trainset/train0.parquet", "x/train_b.parquet"],
    ],
)
def test_split_is_read_from_names(files):
    assert select_split(files, "test", TASK) == files[:1]
    assert select_split(files, "train", TASK) == files[1:]
    with pytest.raises(UserError, match="no validation split among its parquet files, which hold test, train"):
        select_split(files, "validation", TASK)


def test_nameless_files_are_the_evaluated_split():
    files = ["0.parquet", "contest.parquet"]
    assert select_split(files, "test", TASK) == files
    with pytest.raises(UserError, match="no train split"):
        select_split(files, "train", TASK)


def test_custom_split():
    files = ["test_a.parquet", "test_b.parquet"]
    assert select_split(files, "test_b", Task("mine", data="mine", split="test_b")) == files[1:]


@pytest.mark.parametrize(
    "values, names, numbers",
    [
        (["dog", "cat", "dog"], ["cat", "dog"], {"cat": 0, "dog": 1}),
        ([7, 3, 7], ["3", "7"], {3: 0, 7: 1}),
    ],
)
def test_labels_of_text_and_integers(values, names, numbers):
    rows = datasets.Dataset.from_dict({"label": values})
    assert label_values(rows, TASK) == (names, numbers)


def test_class_labels_know_their_names():
    features = datasets.Features({"label": datasets.ClassLabel(names=["a_cat", "a-dog"])})
    assert label_values(datasets.Dataset.from_dict({"label": [1]}, features), TASK) == (["a cat", "a dog"], None)


@pytest.mark.parametrize("values", [[0.5, 1.5], ["cat", None], [["cat"], ["dog"]]])
def test_other_labels_are_refused(values):
    with pytest.raises(UserError, match="labels must be text, integers or a ClassLabel"):
        label_values(datasets.Dataset.from_dict({"label": values}), TASK)


@pytest.mark.parametrize("template", ["a {label}", "a %s", "a {0}", "a cat", "a {c} or {c}", "a {} of {c}", "{c}, %s"])
def test_template_without_exactly_one_known_placeholder_is_refused(template):
    with pytest.raises(UserError, match=r"write \{c\} where the class name goes"):
        check_templates(["a {c}", template], "file")


def test_templates_must_be_a_list():
    assert check_templates(["a {c}", "{}"], "file") == ["a {c}", "{}"]
    for templates in ("a {c}", [], [1], None):
        with pytest.raises(UserError, match="must be a list of texts"):
            check_templates(templates, "file")


def test_classes_with_one_name_are_refused_where_labels_are_names():
    assert number_classes(["a", "b"], "texts.json") == {"a": 0, "b": 1}
    with pytest.raises(UserError, match="texts.json: two classes are called 'a'"):
        number_classes(["a", "b", "a"], "texts.json")
