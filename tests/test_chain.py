"""Jobs called one after another: what is shown, what is kept, what is not done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cola_dist.chain import Chain
from cola_dist.errors import UserError

JOB = """
import json, pathlib, sys
pathlib.Path(sys.argv[1]).open("a").write("x")
print("a table")
if "fails" in sys.argv:
    sys.exit("error: no such thing")
print(json.dumps({"status": sys.argv[2], "given": sys.argv[2:]}))
"""


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    (tmp_path / "work.py").write_text(JOB)
    return Chain(str(tmp_path / "out"), tmp_path)


def test_a_step_says_what_its_job_said_and_is_not_done_again(chain: Chain, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    count = tmp_path / "count"
    first = chain.step("one", str(count), "done", "a b", of="work")
    assert first == {"status": "done", "given": ["done", "a b"]}
    out = capfd.readouterr().out
    assert f"== python jobs/work.py {count} done 'a b'\na table\n" in out
    assert "given" not in out, "the last line is the caller's to tell"
    again = Chain(str(tmp_path / "out"), tmp_path)
    assert again.step("one", str(count), "done", "a b", of="work") == first
    assert again.seconds == chain.seconds
    assert count.read_text() == "x"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("how", ["fails", "interrupted", "failed"])
def test_a_step_that_does_not_finish_is_done_again(chain: Chain, tmp_path: Path, how: str) -> None:
    count = tmp_path / "count"
    with pytest.raises(UserError, match=r"work did not finish \(above it says why\)"):
        chain.step("work", str(count), how)
    assert chain.step("work", str(count), "finished")["status"] == "finished"
    assert count.read_text() == "xx"


def test_what_was_done_with_other_options_is_not_taken_for_an_answer(chain: Chain, tmp_path: Path) -> None:
    chain.step("work", str(tmp_path / "count"), "done", "10")
    with pytest.raises(UserError, match=r"work was run with other options \(.*count done 10\): give those, or another --output"):
        chain.step("work", str(tmp_path / "count"), "done", "20")
