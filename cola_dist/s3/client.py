"""One client for each endpoint and account, its patience, and its errors in one line."""

from __future__ import annotations

import functools
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.exceptions import Boto3Error, RetriesExceededError
from botocore import UNSIGNED
from botocore import exceptions as failures
from botocore.config import Config
from botocore.parsers import ResponseParserError

from cola_dist.errors import UserError
from cola_dist.s3.address import Account, Place

_PATIENCE = "COLA_STORAGE_PATIENCE_S"
_PATIENCE_S, _FIRST_CONTACT_S, _WORTH_SAYING_S, _LONGEST_PAUSE_S = 60.0, 5.0, 5.0, 5.0
# Two lost packets of a handshake cost 3 s. A busy server may be silent for long, but a hung one must leave time for other tries.
_CONNECT_S, _READ_S = 5.0, 20.0
_NOT_FOUND = {"NoSuchKey", "404", "NotFound"}
_DENIED = {"403", "401", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_DENIED |= {"UnsupportedAlgorithm"}  # rclone's answer to requests without a signature
_ELSEWHERE = {"301", "PermanentRedirect", "AuthorizationHeaderMalformed"}
_BUSY_STATUS = {429, 500, 502, 503, 504}
_BUSY = {"SlowDown", "RequestTimeout", "IncompleteBody", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_AWAY = (failures.ConnectionError, failures.HTTPClientError)
T = TypeVar("T")
_log = logging.getLogger("cola_dist.storage")
_building = threading.Lock()
_answered: set[str] = set()
_known_by_others = False
# The process's own random numbers belong to training, and are the same on every rank.
_random = random.SystemRandom()


class Broken(Exception):
    """An answer that is not what its header promised."""


_BREAKS = (
    failures.ResponseStreamingError,
    failures.IncompleteReadError,
    failures.ReadTimeoutError,
    ResponseParserError,
    RetriesExceededError,
    Broken,
)


def trust_endpoints() -> None:
    """Have full patience from here on in this process even with servers that it has not heard yet."""
    global _known_by_others
    _known_by_others = True


class Trying:
    """One operation's attempts: how long they have failed, and the pauses between them."""

    def __init__(self, host: str, what: str, patience_s: float) -> None:
        self._host, self._what, self._patience_s = host, what, patience_s
        self._since, self._failures, self._told = time.monotonic(), 0, False

    def moved(self, _bytes: int = 0) -> None:
        """Bytes came or went. After a failure they no longer count: an operation that breaks off again and again comes to an end."""
        if not self._failures:
            self._since = time.monotonic()

    def pause(self, reason: str) -> float | None:
        """Seconds to wait before the next attempt after one that failed for ``reason``; none when patience is used up."""
        waited = time.monotonic() - self._since
        known = _known_by_others or self._host in _answered
        patience_s = self._patience_s if known else min(self._patience_s, _FIRST_CONTACT_S)
        if waited >= patience_s:
            return None
        if waited > _WORTH_SAYING_S and not self._told:
            self._told = True
            words = "%s: object storage at %s fails for %.0f s now (%s); trying for up to %.0f s"
            _log.warning(words, self._what, self._host, waited, reason, patience_s)
        self._failures += 1
        return min(patience_s - waited, _random.uniform(0, min(_LONGEST_PAUSE_S, 0.1 * 2 ** min(self._failures, 10))))


def patiently(where: Place, attempt: Callable[[Trying], T]) -> T:
    """Repeat an operation whose answer breaks off: the client repeats requests, not the bodies of their answers."""
    with _errors(where):
        trying = Trying(server(where), where.uri, _patience_s())
        while True:
            try:
                return attempt(trying)
            except _BREAKS as error:
                pause = trying.pause(type(error).__name__)
                if pause is None:
                    raise
                time.sleep(pause)


def _patience_s() -> float:
    text = os.environ.get(_PATIENCE, "") or str(_PATIENCE_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{_PATIENCE}: not a number of seconds; write 60, not {text!r}")
    return seconds


def _be_patient(made: Any, patience_s: float) -> None:
    """Make a client repeat its requests, those of large transfers too, for as long as the patience lasts."""
    host = _host(made.meta.endpoint_url)

    def begin(model: Any, params: Any, context: dict[str, Any], **_: object) -> None:
        # Taking back an upload whose server is away would wait a second time.
        seconds = 0.0 if model.name == "AbortMultipartUpload" else patience_s
        context["cola_trying"] = Trying(host, f"{model.name} {urlsplit(params['url']).path}", seconds)

    def again(response: Any, caught_exception: Exception | None, request_dict: dict[str, Any], **_: object) -> float | None:
        if response is not None:
            _answered.add(host)
        reason = _passing(response, caught_exception)
        trying: Trying = request_dict["context"]["cola_trying"]
        return trying.pause(reason) if reason else None

    made.meta.events.register("before-call.s3", begin)
    made.meta.events.register("needs-retry.s3", again)


def _passing(response: Any, error: Exception | None) -> str | None:
    """Why a request may succeed the next time; none when it did, or never will."""
    if error is not None:
        return type(error).__name__ if isinstance(error, _AWAY) and "CERTIFICATE_VERIFY_FAILED" not in str(error) else None
    status, code = response[0].status_code, str(response[1].get("Error", {}).get("Code", ""))
    return code or str(status) if status in _BUSY_STATUS or code in _BUSY else None


def client(where: Place) -> Any:
    """The client for this process, the environment as it is now and the URI's options."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    patience_s = _patience_s()
    try:
        with _building:  # boto3 makes one client at a time; a client may be used by many threads
            return _client_for(os.getpid(), settings, patience_s, where.account)
    except failures.ProfileNotFound as error:
        raise UserError(f"{where.uri}: {error}; add it to ~/.aws/config or correct the name") from error
    except failures.ConfigParseError as error:
        raise UserError(f"{where.uri}: the AWS configuration file cannot be read; correct ~/.aws/config") from error
    except failures.InvalidRegionError as error:
        raise UserError(f"{where.uri}: AWS_REGION is not a region's name; correct it") from error
    except ValueError as error:
        raise UserError(f"{where.uri}: AWS_ENDPOINT_URL is not a URL; write http://HOST:PORT") from error


@functools.lru_cache(maxsize=16)
def _client_for(_process: int, _settings: tuple[tuple[str, str], ...], patience_s: float, account: Account) -> Any:
    # S3-compatible servers refuse or corrupt the newer default checksums.
    names = ("request_checksum_calculation", "response_checksum_validation")
    checksums: Any = {name: os.environ.get(f"AWS_{name.upper()}", "when_required") for name in names}
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=min(_READ_S, max(1.0, patience_s / 3)),
        signature_version=UNSIGNED if account.anonymous else None,
        **checksums,
    )
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        config = config.merge(Config(retries={"mode": "standard", "total_max_attempts": 1}))
    core = botocore.session.Session(profile=account.profile or None)
    if "AWS_METADATA_SERVICE_NUM_ATTEMPTS" not in os.environ:
        # Many workers that start at once on one machine overrun the service that knows its role.
        core.set_config_variable("metadata_service_num_attempts", 3)
    session = boto3.session.Session(botocore_session=core, region_name=account.region or os.environ.get("AWS_REGION"))
    made = session.client("s3", endpoint_url=account.endpoint or None, config=config)
    if ".amazonaws.com" not in made.meta.endpoint_url:
        # Other servers seldom have a host name for each bucket.
        made = session.client("s3", endpoint_url=account.endpoint or None, config=config.merge(Config(s3={"addressing_style": "path"})))
    _be_patient(made, patience_s)
    return made


@contextmanager
def _errors(where: Place) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    except failures.ClientError as error:
        raise _translated(error, where) from error
    except (failures.NoCredentialsError, failures.PartialCredentialsError, failures.CredentialRetrievalError, failures.SSOError) as error:
        raise UserError(f"{where.uri}: no credentials; {_keys(where, 'set')}") from error
    except failures.ParamValidationError as error:
        raise UserError(f"{where.uri}: not a valid bucket or key name") from error
    except (ResponseParserError, failures.ResponseStreamingError, failures.IncompleteReadError, Boto3Error, Broken) as error:
        raise OSError(
            f"{where.uri}: object storage at {server(where)} breaks off its answers ({type(error).__name__.lstrip('_')})"
        ) from error
    except _AWAY as error:
        setting = "the option endpoint" if where.account.endpoint else "AWS_ENDPOINT_URL"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(f"{where.uri}: the certificate of {server(where)} is not trusted; check {setting} and AWS_CA_BUNDLE") from error
        tried = f"tried for {time.monotonic() - began:.0f} s"
        raise UserError(
            f"{where.uri}: object storage at {server(where)} does not answer; check {setting} and the network ({tried})"
        ) from error


def _translated(error: Any, where: Place) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    no_bucket = UserError(f"{where.uri}: bucket {where.bucket} does not exist at {server(where)}; create it or correct the name")
    if code == "NoSuchBucket":
        return no_bucket
    if code in _NOT_FOUND:
        # A HEAD answer has no body: it does not say whether the bucket or the key is missing.
        return FileNotFoundError(where.uri) if error.operation_name != "HeadObject" or _bucket_exists(where) else no_bucket
    if code in _DENIED:
        return UserError(f"{where.uri}: access to bucket {where.bucket} at {server(where)} denied ({code}); {_keys(where, 'check')}")
    if code in _ELSEWHERE:
        return UserError(f"{where.uri}: bucket {where.bucket} is in another region ({code}); set AWS_REGION or the option region")
    return OSError(f"{where.uri}: object storage at {server(where)} failed at {error.operation_name}: {code}")


def _keys(where: Place, verb: str) -> str:
    if where.account.anonymous:
        return "it is not open to all: remove anonymous=true"
    return f"{verb} {f'the keys of profile {where.account.profile}' if where.account.profile else 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY'}"


def _bucket_exists(where: Place) -> bool:
    with _errors(where):
        try:
            client(where).head_bucket(Bucket=where.bucket)
        except failures.ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in _BUSY_STATUS:
                raise
            return status != 404
    return True


def server(where: Place) -> str:
    """Host and port of the place's endpoint, for messages."""
    return _host(client(where).meta.endpoint_url)


def _host(url: str) -> str:
    """Host and port only: an endpoint's URL may carry a password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
