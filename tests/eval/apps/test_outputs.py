"""eval/apps/outputs.py: checks before the work, and tables of any file name."""

import argparse
import csv
import errno
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from eval.apps.outputs import check_writable, printable, replacing, user_path, write_table
from modeling_amorlip.cli_amorlip import UserError


@dataclass
class Row:
    image: str
    value: float


ROWS = [Row("日本 é.png", 0.5), Row(os.fsdecode(b"caf\xe9.png"), 1e-9), Row('a "b",\nc.png', 1.0)]


def test_printable_keeps_letters_and_escapes_control_characters():
    assert printable("日本 é 👩‍🚀 a\u202fb") == "日本 é 👩‍🚀 a\u202fb"
    assert printable("a\nb\x1b[31m\x7f\u2028") == "a\\nb\\x1b[31m\\x7f\\u2028"
    assert printable(Path(os.fsdecode(b"caf\xe9"))) == "caf\\udce9"


def test_write_table_keeps_bytes_of_file_names_in_csv(tmp_path):
    write_table(tmp_path / "a.csv", "--output", ROWS)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        read = [Row(row["image"], float(row["value"])) for row in csv.DictReader(file)]
    assert read == ROWS and b"caf\xe9.png" in (tmp_path / "a.csv").read_bytes()


def test_write_table_writes_json(tmp_path):
    write_table(tmp_path / "a.json", "--output", ROWS)
    assert [Row(**row) for row in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))] == ROWS


def test_write_table_keeps_the_old_file_and_the_link_on_failure(tmp_path):
    (tmp_path / "old.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("old.csv")

    def fail(file, rows):
        file.write("new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.apps.outputs._write_csv", fail)
        with pytest.raises(UserError, match="--output .* cannot be written: No space left"):
            write_table(tmp_path / "link.csv", "--output", ROWS)
    assert (tmp_path / "old.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    write_table(tmp_path / "link.csv", "--output", ROWS)
    assert (tmp_path / "link.csv").is_symlink() and b"0.5" in (tmp_path / "old.csv").read_bytes()


def test_write_table_reports_full_device():
    with pytest.raises(UserError, match="--output /dev/full cannot be written: No space left"):
        write_table(Path("/dev/full"), "--output", ROWS)
    assert Path("/dev/full").is_char_device()


def test_replacing_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_check_writable_names_reason(tmp_path):
    check_writable(tmp_path / "new.csv", "--output", [".csv"])
    check_writable(Path("/dev/null"), "--output", [".csv"])
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "a.txt", "--output .*a.txt: name a file that ends in .csv or .json"),
        (tmp_path, "name a file that ends in .csv"),
        (tmp_path / "no/such/a.csv", "the folder .*no/such does not exist"),
        (tmp_path / "file/a.csv", "the folder .*file does not exist"),
        (Path("/proc/a.csv"), "/proc/a.csv cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            check_writable(path, "--output", [".csv", ".json"])
    with pytest.raises(UserError, match="is a folder; name a file"):
        check_writable(tmp_path, "--index")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_check_writable_finds_full_and_read_only_disks(tmp_path, monkeypatch, number):
    def refuse(**options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"--sheet .*a.png cannot be written: {os.strerror(number)}"):
        check_writable(tmp_path / "a.png", "--sheet")


def test_user_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert user_path("~/a") == Path("/home/someone/a") and user_path("a/~") == Path("a/~")
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        user_path("")
