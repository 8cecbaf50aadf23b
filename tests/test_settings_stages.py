"""Stages of the mixture in the settings: how they are written, what is refused, and what may change on resume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cola_dist.errors import UserError
from cola_dist.recipes import tiny
from cola_dist.settings import changes, differences
from tests.test_settings import changed, parse

STAGES = {4000: {"s3://bucket/b": 0.3, "embedded:hand": 0.7}, 200: {"/a ä": 1e-3}}


def test_stages_are_one_yaml_word_in_a_file_and_as_an_option(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('data:\n  stages:\n    4000: {"s3://bucket/b": 0.3, embedded:hand: 0.7}\n    200:\n      /a ä: 1e-3\n')
    word = "{4000: {s3://bucket/b: 0.3, embedded:hand: 0.7}, 200: {/a ä: 0.001}}"
    for argv in (("--config", str(path)), ("--data.stages", word), (f"--data.stages={word}",)):
        assert parse(*argv).config == changed(tiny(), data={"stages": STAGES})
        assert list(parse(*argv).config.data.stages[4000]) == ["s3://bucket/b", "embedded:hand"]
    assert parse("--config", str(path), "--data.stages", "{5: {c: 1}}").config.data.stages == {5: {"c": 1.0}}, "the option replaces all"
    for nothing in (("--data.stages", "{}"), ("--data.stages",)):
        assert parse("--config", str(path), *nothing).config == tiny()
    path.write_text("data: {stages: {}}")
    assert parse("--config", str(path)).config == tiny()


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("{4000: {a: much}}", "cannot be read: write it as '{4000: {FOLDER: 0.3, FOLDER: 0.7}}'"),
        ("{4000: 0.5}", "cannot be read"),
        ("{4000: {a: 0.5}", "cannot be read"),
        ("{4000: }", "cannot be read"),
        ("4000", "cannot be read"),
        ("[4000]", "cannot be read"),
        ("{soon: {a: 1}}", "'soon' is no step: it must be a whole number"),
        ("{40.5: {a: 1}}", "40.5 is no step"),
        ("{true: {a: 1}}", "True is no step"),
    ],
)
def test_stages_that_are_none_are_refused(word: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f'data: {{stages: "{word}"}}')
    for argv in (("--data.stages", word), ("--config", str(tmp_path / "run.yaml"))):
        with pytest.raises(UserError, match=re.escape(complaint)) as refusal:
            parse(*argv)
        assert str(refusal.value).startswith("data.stages")
        assert "\n" not in str(refusal.value)


def test_stages_may_change_from_the_checkpoint_on() -> None:
    saved = changed(tiny(), data={"stages": {50: {"a": 1.0, "b": 2.0}, 100: {"c": 1.0}}})

    def refused(stages: dict[int, dict[str, float]], step: int) -> list[str]:
        return differences(saved, changed(saved, data={"stages": stages}), step)

    for stages in ({50: {"a": 1.0, "b": 2.0}}, {150: {"d": 1.0}, 50: {"a": 1.0, "b": 2.0}, 100: {"c": 9.0}}):
        assert refused(stages, step=100) == []
        (line,) = refused(stages, step=101)
        assert line.startswith("data.stages before step 101, where the newest checkpoint stands: {50: {'a': 1.0, 'b': 2.0}, 100: ")
    assert refused({99: {"c": 1.0}, 50: {"a": 1.0, "b": 2.0}}, step=100) != []
    assert refused({50: {"b": 2.0, "a": 1.0}}, step=100) != [], "the order of sources is part of the order of clips"


def test_changes_name_every_field_that_differs() -> None:
    new = changed(tiny(), data={"stages": {100: {"a": 1.0}}}, train={"workers": 4})
    assert changes(tiny(), new) == {
        "data.stages": {"from": {}, "to": {100: {"a": 1.0}}},
        "train.workers": {"from": 2, "to": 4},
    }
    assert changes(new, new) == {}
