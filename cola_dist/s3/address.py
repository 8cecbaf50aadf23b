"""Where an object lies and as whom to ask for it: ``s3://`` URIs with options."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from cola_dist.errors import UserError

_OPTIONS: Mapping[str, tuple[str, str]] = {
    "endpoint": (r"https?://([\w.-]+|\[[0-9A-Fa-f:]+\])(:\d{1,5})?(/[^\s@?#]*)?", "http://HOST:PORT"),
    "region": (r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", "a region's name"),
    "profile": (r".+", "a name from the AWS configuration file"),
    "anonymous": (r"true|false", "true or false"),
}


@dataclass(frozen=True)
class Account:
    """Where and as whom; what is empty comes from the environment."""

    endpoint: str = ""
    region: str = ""
    profile: str = ""
    anonymous: bool = False


@dataclass(frozen=True)
class Place:
    """A taken-apart URI; ``key`` has no slash at its ends and is empty for the bucket itself."""

    uri: str
    bucket: str
    key: str
    account: Account


def split(uri: str) -> tuple[str, str]:
    """An ``s3://`` URI without its options, and the options with the ``?`` before them ("" when there are none)."""
    path, mark, options = uri.rpartition("?")
    return (path, mark + options) if mark else (uri, "")


def place(uri: str) -> Place:
    """Take an ``s3://`` URI apart. Raises UserError for a missing bucket and for options that are unknown or ill-formed."""
    path, options = split(uri)
    bucket, _, key = path.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise UserError("s3://…@…: keys do not belong into a URI; write s3://BUCKET/FOLDER and set AWS_ACCESS_KEY_ID or the option profile")
    if not bucket:
        raise UserError(f"{path}: no bucket; write s3://BUCKET/FOLDER")
    given: dict[str, str] = {}
    for option in options[1:].split("&") if options[1:] else ():
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{path}: options are written NAME=VALUE after the ?; where the name itself holds a ?, put one at its end")
        if name not in _OPTIONS:
            close = difflib.get_close_matches(name, _OPTIONS, 1)
            raise UserError(f"{path}: unknown option {name}; {f'did you mean {close[0]}?' if close else 'known: ' + ', '.join(_OPTIONS)}")
        pattern, form = _OPTIONS[name]
        given[name], twice = unquote(value), name in given
        # The value is not shown: it may hold a password.
        if twice or not re.fullmatch(pattern, given[name]) or (name == "endpoint" and not _is_url(given[name])):
            raise UserError(f"{path}: option {name} must be {form}, once")
    if "profile" in given and given.get("anonymous") == "true":
        raise UserError(f"{path}: options profile and anonymous=true exclude each other; remove one")
    account = Account(given.get("endpoint", ""), given.get("region", ""), given.get("profile", ""), given.get("anonymous") == "true")
    return Place(uri, bucket, key.strip("/"), account)


def _is_url(text: str) -> bool:
    try:
        return urlsplit(text).port != 0
    except ValueError:
        return False
