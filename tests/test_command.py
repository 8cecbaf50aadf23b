"""Exit codes, one line for a user's mistake, one JSON object for a result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from cola_dist.command import run_command
from cola_dist.errors import RunError, UserError


def test_a_result_is_one_json_object_last_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def work(argv: Sequence[str]) -> Mapping[str, Any]:
        print("something before")
        return {"status": "finished", "argv": list(argv)}

    assert run_command(work, ["small", "--train.seed", "1"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1]) == {"status": "finished", "argv": ["small", "--train.seed", "1"]}
    assert output.err == ""


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"status": "finished", "loss": float("nan"), "windows": {"robot": [1.5, float("inf"), 3]}}
    assert run_command(lambda _: result, []) == 0
    line = capsys.readouterr().out

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(line, parse_constant=refuse) == {"status": "finished", "loss": None, "windows": {"robot": [1.5, None, 3]}}


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("interrupted", 0), ("dry run", 0), ("failed", 1)])
def test_exit_code_follows_the_status(status: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda _: {"status": status}, []) == code
    assert json.loads(capsys.readouterr().out) == {"status": status}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("data.frames is 1: give 2"), 2, "error: data.frames is 1: give 2\n"),
        (RunError("worker 1 was lost: --resume it"), 1, "error: worker 1 was lost: --resume it\n"),
        (RuntimeError("first\n  last one "), 1, "error: RuntimeError: last one (--debug shows where)\n"),
        (KeyError(), 1, "error: KeyError: no message (--debug shows where)\n"),
    ],
)
def test_an_error_is_one_line_and_debug_shows_the_stack(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work(argv: Sequence[str]) -> Mapping[str, Any]:
        raise error

    assert run_command(work, []) == code
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", line)
    assert run_command(work, ["--debug"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert "raise error" in shown
    assert type(error).__name__ in shown.splitlines()[-1 - str(error).count("\n")]
