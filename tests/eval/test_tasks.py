"""Tasks by name, group and file, wrong task files, and aggregates."""

import numpy as np
import pytest

from eval.tasks import Aggregate, aggregate, known_tasks, load_task, select_tasks
from modeling_amorlip.cli_amorlip import UserError


def test_aggregates_are_means_and_name_what_is_missing():
    names = [name for name, task in known_tasks().items() if "datacomp" in task.groups]
    values = {name: i / 100 for i, name in enumerate(names)}
    means = aggregate(values)
    assert means["datacomp_38"] == Aggregate(pytest.approx(sum(range(38)) / 3800))
    shifts = ["imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet"]
    assert means["imagenet_shifts"].value == pytest.approx(np.mean([values[n] for n in shifts]))
    seven = np.mean([values[n] for n in ["imagenet1k", *shifts]])
    assert means["imagenet_and_shifts"].value == pytest.approx(seven)
    pair = [n for n in names if n.startswith("retrieval/")]
    assert means["flickr_coco"].value == pytest.approx(np.mean([values[n] for n in pair])) and len(pair) == 2
    assert means["retrieval_3"].value == pytest.approx(np.mean([values[n] for n in [*pair, "misc/winogavil"]]))
    assert len([n for n, t in known_tasks().items() if "vtab" in t.groups]) == 13
    partial = aggregate({**values, "cars": None})
    assert partial["datacomp_38"] == Aggregate(None, ("cars",)) and not partial["datacomp_38"].complete
    assert partial["imagenet"].complete
    assert aggregate({"emoji_openmoji": 0.5}) == {}


def write(tmp_path, text):
    (tmp_path / "t.yaml").write_text(text)
    return str(tmp_path / "t.yaml")


def test_selects_by_group_and_file(tmp_path):
    file = write(
        tmp_path, "a: {data: x, kind: retrieval}\n2: {repositories: [u/b], ignored_groups: [5], random_score: 0}"
    )
    assert [(task.name, task.main_metric) for task in select_tasks([file])] == [("a", "mean_recall@1"), ("2", "acc1")]
    assert load_task(f"{file}:2").ignored_groups == (5,)
    assert len(select_tasks(["datacomp", "imagenet1k"])) == 38
    with pytest.raises(UserError, match="is a group of 38 tasks"):
        load_task("datacomp")


@pytest.mark.parametrize(
    "text, message",
    [
        ("mine: {data: a, kind: guess}", "choose one of classification"),
        ("mine: {data: a, main_metric: accuracy}", "main_metric is 'accuracy'; a classification task has acc1, acc5"),
        ("mine: {data: a, kind: retrieval, main_metric: acc1}", "a retrieval task has mean_recall@1, text_"),
        ("mine: {dta: a}", r"did you mean data\?"),
        ("mine: {}", "needs either repositories or data"),
        ("[1, 2", "is not YAML"),
        ("[1, 2]", "must map the name of each task"),
        ("{}", "must map the name of each task"),
        ("mine: {repositories: u/b}", r"must be a list; write repositories: \[u/b\]"),
        ("mine: {data: a, groups: demo}", r"must be a list; write groups: \[demo\]"),
        ("mine: {data: a, ignored_groups: [x]}", "its items must be an integer"),
        ("mine: {data: a, title: 2024}", "title is 2024, but must be text"),
        ("mine: {data: a, size: many}", "size is 'many', but must be an integer"),
        ("mine: {data: a, class_retrieval: 1}", "must be true or false"),
    ],
)
def test_wrong_task_file_is_explained(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        select_tasks([write(tmp_path, text)])


def test_unknown_task_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean imagenet1k"):
        select_tasks(["imagenet1"])
    with pytest.raises(UserError, match="does not exist"):
        select_tasks(["nothing.yaml"])
