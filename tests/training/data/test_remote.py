"""Patterns stand for files."""

from pathlib import Path

from training.data.remote import expand


def names(source) -> list[str]:
    return [Path(path).name for path in expand(str(source))]


def test_patterns(tmp_path):
    for name in ("a_08.tar", "a_09.tar", "a_10.tar", "b.tar"):
        (tmp_path / name).touch()
    assert names(f"{tmp_path}/a_{{08..10}}.tar") == ["a_08.tar", "a_09.tar", "a_10.tar"]
    assert names(f"{tmp_path}/{{b,a_09}}.tar") == ["b.tar", "a_09.tar"]
    assert len(expand(str(tmp_path))) == len(expand(f"{tmp_path}/*.tar")) == 4
