"""What the lines of the ``cola_dist.*`` loggers look like, and which run, rank, attempt and step they belong to.

``COLA_LOG_FORMAT=text`` (the default) leaves a line as it is and puts what it belongs to behind it, ``json`` makes each line one JSON object.
Credentials are redacted in either. What is not a logger's line stays as it is: progress, tables, and the one error at a job's end.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from cola_dist.errors import UserError
from cola_dist.redact import redact

VARIABLE = "COLA_LOG_FORMAT"

_context: dict[str, Any] = {}
"""Of the whole process and not of a thread: lines about checkpoints and MLflow come from threads of their own."""


def bind(**known: Any) -> None:
    """From now on the lines of this process carry these as well, or instead of earlier ones: ``run``, ``rank``, ``attempt``, ``step``."""
    _context.update(known)


def chosen() -> str:
    """The format that the environment asks for. Raises ``UserError`` for one that there is not."""
    name = os.environ.get(VARIABLE, "") or "text"
    if name not in _FORMATS:
        raise UserError(f"{VARIABLE}: no format {name!r}; write {' or '.join(_FORMATS)}")
    return name


def set_up(form: str, alone: bool = False) -> None:
    """Write the lines of all ``cola_dist.*`` loggers to stderr in the format ``form``, from warnings on. A second call replaces the first.

    ``alone`` keeps them from the handlers of the root logger: Ray Train gives its workers one that writes every line once more.
    """
    logger = logging.getLogger("cola_dist")
    for old in [handler for handler in logger.handlers if isinstance(handler, _ToStderr)]:
        logger.removeHandler(old)
    handler = _ToStderr(logging.WARNING)
    handler.setFormatter(_Formatter(_FORMATS[form]))
    logger.addHandler(handler)
    logger.propagate = not alone


def _text(record: logging.LogRecord, message: str, error: str, context: Mapping[str, Any]) -> str:
    about = " ".join(f"{name}={value}" for name, value in context.items())
    return message + (f" [{about}]" if about else "") + (f"\n{error}" if error else "")


def _json(record: logging.LogRecord, message: str, error: str, context: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    line = {"time": when, "level": record.levelname, "logger": record.name, "message": message, **context}
    return json.dumps(line | ({"error": error} if error else {}), default=str)


_FORMATS: Mapping[str, Callable[[logging.LogRecord, str, str, Mapping[str, Any]], str]] = {"text": _text, "json": _json}


class _Formatter(logging.Formatter):
    """One line per record, in one of the formats."""

    def __init__(self, form: Callable[[logging.LogRecord, str, str, Mapping[str, Any]], str]) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        error = self.formatException(record.exc_info) if record.exc_info else ""
        return self._form(record, redact(record.getMessage()), redact(error), dict(_context))


class _ToStderr(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at the time: a progress bar puts one of its own there while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # a line that cannot be written is no reason to end what wrote it
            self.handleError(record)
