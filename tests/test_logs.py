"""Lines of the package's loggers: readable as before, JSON where asked for, with what they belong to, and without credentials."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from cola_dist import logs
from cola_dist.command import BAD_INPUT, run_command
from cola_dist.errors import UserError


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logs, "_context", {})
    logger = logging.getLogger("cola_dist")
    kept = (list(logger.handlers), logger.propagate)
    yield
    logger.handlers[:], logger.propagate = kept


def warn(text: str, *values: object) -> None:
    logging.getLogger("cola_dist.data").warning(text, *values)


def test_text_is_the_line_and_what_it_belongs_to(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("text")
    warn("skipped %s", "checksum")
    logs.bind(run="tiny-1", rank=0, attempt="ab12")
    logs.bind(step=7)
    warn("skipped %s", "checksum")
    logging.getLogger("cola_dist.train").info("not shown")
    assert capsys.readouterr().err == "skipped checksum\nskipped checksum [run=tiny-1 rank=0 attempt=ab12 step=7]\n"


def test_json_is_one_object_per_line_from_any_thread(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json")
    logs.bind(run="tiny-1", rank=1, step=7)
    thread = threading.Thread(target=warn, args=("two\nlines",))
    thread.start()
    thread.join()
    try:
        raise OSError("s3://key:secret@host/bucket is away")
    except OSError:
        logging.getLogger("cola_dist.storage").exception("no answer")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    when = datetime.fromisoformat(first.pop("time"))
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60
    assert first == {"level": "WARNING", "logger": "cola_dist.data", "message": "two\nlines", "run": "tiny-1", "rank": 1, "step": 7}
    assert (second["level"], second["message"]) == ("ERROR", "no answer")
    assert "Traceback" in second["error"]
    assert "secret" not in second["error"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_credentials_are_redacted(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(form)
    warn("MLflow at %s is away", "http://me:hunter2@host:5000/?access_token=hunter3")
    line = capsys.readouterr().err
    assert "hunter" not in line
    assert "http://***@host:5000" in line


def test_a_second_set_up_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json")
    logs.set_up("text")
    warn("once")
    assert capsys.readouterr().err == "once\n"


def test_alone_keeps_lines_from_the_root_loggers_handlers() -> None:
    # In a process of its own: pytest's capture hangs on the root logger.
    program = (
        "import logging; from cola_dist import logs; logging.basicConfig(format='again: %(message)s'); logs.set_up('text', alone={});"
        "logging.getLogger('cola_dist.data').warning('line')"
    )
    said = [
        subprocess.run([sys.executable, "-c", program.format(alone)], capture_output=True, text=True, check=True).stderr
        for alone in (True, False)
    ]
    assert said == ["line\n", "line\nagain: line\n"]


def test_jobs_take_the_format_from_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work(_: object) -> dict[str, str]:
        warn("by the way")
        raise UserError("a user's mistake stays a line for people")

    monkeypatch.setenv(logs.VARIABLE, "json")
    assert run_command(work, []) == BAD_INPUT
    line, error = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "by the way"
    assert error == "error: a user's mistake stays a line for people"

    monkeypatch.setenv(logs.VARIABLE, "xml")
    assert run_command(work, []) == BAD_INPUT
    assert capsys.readouterr().err == "error: COLA_LOG_FORMAT: no format 'xml'; write text or json\n"
