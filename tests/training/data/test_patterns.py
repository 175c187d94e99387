"""Patterns stand for the files that a shell would name."""

import os

import pytest

from modeling_amorlip.cli_amorlip import UserError
from training.data.patterns import expand, expand_braces


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Empty files, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("a_08.tar", "a_09.tar", "a_10.tar", "b.TAR", "odd[1].parquet"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a_{08..10}.tar", ["a_08.tar", "a_09.tar", "a_10.tar"]),
        ("a_{08..10..2}.tar", ["a_08.tar", "a_10.tar"]),
        ("a_{10..08}.tar", ["a_10.tar", "a_09.tar", "a_08.tar"]),
        ("{b.TAR,a_09.tar}", ["b.TAR", "a_09.tar"]),
        ("a_0?.tar", ["a_08.tar", "a_09.tar"]),
        ("a_[01][089].tar", ["a_08.tar", "a_09.tar", "a_10.tar"]),
        ("odd[1].parquet", ["odd[1].parquet"]),
        ("absent.parquet", ["absent.parquet"]),
    ],
)
def test_patterns_stand_for_files(files, pattern, names):
    assert expand(pattern) == names


def test_ranges_expand_as_in_a_shell():
    assert expand_braces("{3..0}") == ["3", "2", "1", "0"]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    assert expand_braces("{a..c}{1,}") == ["a1", "a", "b1", "b", "c1", "c"]
    with pytest.raises(UserError, match="stands for more than 1000000 names"):
        expand_braces("{0..99999999999}")


def test_folders_stand_for_their_tars(files):
    assert [os.path.basename(name) for name in expand(".")] == ["a_08.tar", "a_09.tar", "a_10.tar", "b.TAR"]
    nested = files / "data"
    for split in ("0", "1"):
        (nested / split).mkdir(parents=True)
        (nested / split / "x.tar").touch()
    assert expand("data") == ["data/0/x.tar", "data/1/x.tar"]
    (nested / "photo.jpg").touch()
    with pytest.raises(UserError, match="holds tars .* beside other data .*photo.jpg"):
        expand("data")


def test_home_folder_and_missing_files(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    assert expand("~/a_08.tar") == [str(files / "a_08.tar")]
    for pattern in ("a_{08..12}.tar", "c*.tar", "?.tar.gz"):
        with pytest.raises(UserError, match="there is no"):
            expand(pattern)
