"""What is taken for a secret, and what is not."""

from __future__ import annotations

import pytest

from cola_dist.redact import redact, without_credentials
from tests.security.limits import bounded


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pw@host:5000/x", "http://***@host:5000/x"),
        ("http://user:pa/ss@host", "http://***@host"),
        ("cannot reach https://token@host for a reason", "cannot reach https://***@host for a reason"),
        ("postgresql://u:p@ss/w@rd@db/mlflow", "postgresql://***@db/mlflow"),
        ("mysql://db/mlflow?user=a&password=secret&x=1", "mysql://db/mlflow?user=a&password=***&x=1"),
        ("https://host?access_token=abc", "https://host?access_token=***"),
        ("s3://ID:SEC/RET@bucket/x refused", "s3://***@bucket/x refused"),
        ("s3://b/k@1?endpoint=http://u:p@h:9000", "s3://b/k@1?endpoint=http://***@h:9000"),
        ("https://h/x?X-Amz-Credential=q/w&X-Amz-Signature=0af&y=1", "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***&y=1"),
        ("401 for Authorization: Bearer ab.cd-ef", "401 for Authorization: Bearer ***"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic ***'}"),
        ("sent bearer abcdefghij", "sent bearer ***"),
        ("job --hf-token abcdef --steps 4", "job --hf-token *** --steps 4"),
        ('{"api_key": "abcdef", "a": 1}', '{"api_key": "***", "a": 1}'),
        ("the key AKIAABCDEFGHIJKLMNOP does not exist", "the key *** does not exist"),
        ("hf_abcdefghijklmnopqrstuv", "***"),
    ],
)
def test_what_has_the_shape_of_a_secret_is_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000",
        "sqlite:////tmp/mlflow.db",
        "sqlite:////home/me@lab/mlflow.db",
        "s3://bucket/clips@v2/a.tar: not found",
        "file:///data/me@lab/x",
        "s3://bucket/x?endpoint=http://host:9000&profile=lab",
        "robot/clip-3@17",
        "lam.tokens: 2, unknown key 'width'",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_PASSWORD",
        "the bearer token expired",
    ],
)
def test_what_is_none_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_the_environments_secrets_are_hidden_whatever_they_look_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "plain words/1")
    monkeypatch.setenv("SOME_TOKEN", "plain words/1 and more")
    monkeypatch.setenv("SHORT_KEY", "a")
    monkeypatch.setenv("EDITOR", "visible")
    assert redact("a plain words/1 and more, plain words/1, plain%20words%2F1, visible") == "a ***, ***, ***, visible"
    assert without_credentials("plain words/1") == "plain words/1", "what is stored does not depend on where it was stored"


@pytest.mark.parametrize("part", ["://", "s3://a/", "a-", "token", "password=", "bearer ", "authorization", "http://@/"])
def test_no_text_makes_it_slow(part: str) -> None:
    with bounded(cpu_s=10):
        redact(part * (200_000 // len(part)) + "@")
