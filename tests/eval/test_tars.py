"""Tars as samples, and damaged ones."""

import gzip
import io
import tarfile

import pytest

from eval.tars import read_tar
from modeling_amorlip.cli_amorlip import UserError
from tests.helpers.tasks import add


@pytest.fixture
def tar(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        for key in range(5):
            add(file, f"{key}.png", bytes([key]) * 600)
            add(file, f"{key}.cls", str(key).encode())
    return tmp_path / "0.tar"


def test_reads_samples_and_skips_others(tar):
    samples = list(read_tar(tar))
    assert [(index, key) for index, key, _ in samples] == [(i, str(i)) for i in range(5)]
    assert samples[3][2] == {"png": bytes([3]) * 600, "cls": b"3"}
    assert [index for index, *_ in read_tar(tar, lambda index: index % 2 == 1)] == [1, 3]


def test_truncated_tar_is_refused(tar):
    tar.write_bytes(tar.read_bytes()[:4000])
    with pytest.raises(UserError, match="is cut off"):
        list(read_tar(tar))


def test_compressed_tar_is_refused(tar):
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(UserError, match="compressed with gzip"):
        list(read_tar(tar))


def test_damaged_header_is_refused(tar):
    """`tarfile` itself ends there without an error."""
    content = bytearray(tar.read_bytes())
    content[2 * (512 + 1024 + 512 + 512) + 148] ^= 1  # the checksum of the third sample's first header
    tar.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        list(read_tar(tar))


def test_equal_keys_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        for name in ("a.png", "a.cls", "a.png", "a.cls"):
            add(file, name, b"0")
    with pytest.raises(UserError, match="two members of sample a are called .png"):
        list(read_tar(tmp_path / "0.tar"))


def test_links_are_no_members(tmp_path):
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        add(file, "a.png", b"0")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("a.txt")
            link.type, link.linkname = kind, str(tmp_path / "secret")
            file.addfile(link, io.BytesIO())
    assert [members for *_, members in read_tar(tmp_path / "0.tar")] == [{"png": b"0"}]
