"""How every command line ends: its exit status, and what it prints."""

import io
import os
import sys

import pytest

from modeling_amorlip.cli_amorlip import UserError, as_user_error, cli_entry_point


def test_exit_status_is_what_main_returns():
    assert cli_entry_point(lambda: None)() == 0
    assert cli_entry_point(lambda: 3)() == 3


def test_user_errors_are_one_line_on_stderr(capsys):
    @cli_entry_point
    def main():
        raise UserError("--batch_size is 0; give at least 1.")

    assert main() == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: --batch_size is 0; give at least 1.\n")


def test_interrupts_end_without_a_word(capsys):
    @cli_entry_point
    def main():
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr() == ("", "")


def test_bugs_keep_their_traceback():
    @cli_entry_point
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_a_pipe_that_breaks_elsewhere_is_a_bug():
    @cli_entry_point
    def main():
        raise BrokenPipeError("of a worker process")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        main()


def test_messages_of_given_errors_are_for_users():
    with pytest.raises(UserError, match="no such model"), as_user_error(ValueError, OSError):
        raise ValueError("no such model")
    with pytest.raises(KeyError), as_user_error(ValueError):
        raise KeyError("name")


def test_what_stdout_cannot_encode_is_escaped(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))

    @cli_entry_point
    def main():
        print("caf\u00e9 \udcff")

    assert main() == 0
    assert buffer.getvalue() == b"caf\\xe9 \\udcff\n"


def test_a_closed_pipe_ends_without_a_word(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    stdout = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stdout)

    @cli_entry_point
    def main():
        for number in range(100_000):
            print(number)

    assert main() == 141
    stdout.close()  # which the interpreter does at its end, and which prints nothing either
    monkeypatch.undo()
    assert capsys.readouterr().err == ""
