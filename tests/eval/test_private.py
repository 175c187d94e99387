"""Folders and credentials are taken out of what is published, and nothing else is."""

import pytest

from eval.private import hide_private


@pytest.mark.parametrize(
    "text, expected",
    [
        ("/home/me/my data/pairs.tar", "pairs.tar"),
        ("/home/o'brien/a, b/pairs.tar", "pairs.tar"),
        ("/data", "data"),
        ("/data/me/", "me"),
        ("~/data/x.tar", "x.tar"),
        ("~me/data/x.tar", "x.tar"),
        ("file:///home/me/x.tar", "x.tar"),
        ("/home/me/{000..123}.tar::/home/me/*/b.tar::hf://datasets/u/x", "{000..123}.tar::b.tar::hf://datasets/u/x"),
        ("{/home/me/a.tar,/home/me/b.tar}", "{a.tar,b.tar}"),
        ("C:/Users/me/x.tar", "x.tar"),
        ("the first is C:\\Users\\me\\x.tar (cut off)", "the first is x.tar (cut off)"),
        ("the first is \\\\server\\me\\x.tar (cut off)", "the first is x.tar (cut off)"),
        ("the first is /home/some one/a.png (cut off)", "the first is a.png (cut off)"),
        ("0.tar:/home/me/a.png", "0.tar:a.png"),
        ("in /home/me/data/ there", "in data/ there"),
        ("https://me:password@host/x.tar", "https://host/x.tar"),
        ("https://host/{0..9}.tar?X-Amz-Signature=1&b=2::/home/me/x", "https://host/{0..9}.tar::x"),
        ("s3://key@bucket/00?.tar", "s3://bucket/00?.tar"),
    ],
)
def test_folders_and_credentials_are_hidden(text, expected):
    assert hide_private(text) == expected
    assert hide_private({text: [text]}) == {expected: [expected]}


@pytest.mark.parametrize(
    "text",
    [
        "user/model",
        "recall / precision / F1",
        "and/or",
        "../data/x.tar",
        "https://host/docs/x.md",
        "hf://datasets/user/x@main/a.tar",
        "within <tools></tools> tags:\\n<tools>\\n</tools>\\n\\nFor each",
        "</think></answer>",
    ],
)
def test_other_texts_stay(text):
    assert hide_private(text) == text


def test_tokens_and_labels_stay():
    fields = {"added_tokens_decoder": {"7": {"content": "/n"}}, "label2id": {"/m/01/g3": 0}, "chat_template": "/a/b"}
    assert hide_private(fields) == fields
