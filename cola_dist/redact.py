"""What is a secret in a text, and the text without it: the one rule for all that is printed, written or sent.

A secret is known by its shape (credentials inside a URI, fields and headers that are called after passwords, keys of AWS and Hugging Face), or
because this process was given it: the value of an environment variable whose name ends like that of a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 6
"""Characters of the shortest value of an environment variable that is taken for a secret: shorter ones stand inside ordinary words."""
_VARIABLE = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|KEY|KEY_ID)$", re.IGNORECASE)
# An @ is an ordinary character in the paths of these; elsewhere what stands before one is a user.
_PATHS = {"s3", "file", "sqlite"}
_LONGEST_SCHEME, _LONGEST_HOST = 32, 512
_CALLED = r"[\w.-]{0,64}(?:password|passwd|secret|token|signature|credential"
# Bounded repetitions: a hostile text must not make the search slow.
_SHAPES = (
    re.compile(rf"(?i)([?&]{_CALLED}|key|sig)=)[^&\s\"']+"),
    re.compile(rf"(?i)(\b{_CALLED}|api[_-]?key|access[_-]?key(?:[_-]?id)?)[\"']?\s?[=:]\s?[\"']?)(?!\*\*\*)[^\s\"',;&]+"),
    re.compile(rf"(?i)(--{_CALLED}|[_-]key) )[^\s-]\S*"),
    re.compile(r"(?i)(\bauthorization[\"']?\s?[:=]\s?[\"']?(?:\w{1,16}\s)?)[^\s\"',;]+"),
    re.compile(r"(?i)(\bbearer\s)[\w.~+/=-]{8,}"),
    re.compile(r"(\b)(?:(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{20,})\b"),
)


def redact(text: str) -> str:
    """``text`` with ``***`` in place of every secret that is known by its shape or from this process's environment."""
    for value in _given():
        text = text.replace(value, HIDDEN)
    return without_credentials(text)


def without_credentials(text: str) -> str:
    """``text`` with ``***`` in place of what has the shape of a secret: the same on every machine, so that it may be stored and read again."""
    if "://" in text:
        text = re.sub(r"\S*://\S*", lambda word: _without_user(word.group()), text)
    for shape in _SHAPES:
        text = shape.sub(rf"\1{HIDDEN}", text)
    return text


def everywhere(value: Any, rule: Callable[[str], str]) -> Any:
    """``value`` with ``rule`` applied to each text in its nested mappings, their keys too, and lists."""
    if isinstance(value, Mapping):
        return {everywhere(name, rule): everywhere(item, rule) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [everywhere(item, rule) for item in value]
    return rule(value) if isinstance(value, str) else value


def _given() -> list[str]:
    """Values of the environment that are secrets, and as they stand inside a URI; longest first, as one may be the beginning of another."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and _VARIABLE.search(name)}
    return sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True)


def _without_user(word: str) -> str:
    """A word that holds a URI, without what stands before its last @ where that can be a user and a password."""
    last = word.rfind("@")
    start = word.find("://")
    while 0 <= start < last - 2:
        scheme = re.split(r"[^A-Za-z0-9+.]", word[max(0, start - _LONGEST_SCHEME) : start])[-1].lower()
        host = word[start + 3 : start + 3 + _LONGEST_HOST].partition("/")[0]
        if scheme not in _PATHS or "@" in host or ":" in host:
            return f"{word[: start + 3]}{HIDDEN}{word[last:]}"
        start = word.find("://", start + 3)
    return word
