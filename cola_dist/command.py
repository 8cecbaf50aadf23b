"""What every job does around its work: one line for an error that the user can mend, exit codes, and one JSON object last on stdout."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cola_dist import logs
from cola_dist.errors import RunError, UserError
from cola_dist.redact import redact

DONE, FAILED, BAD_INPUT = 0, 1, 2


def run_command(work: Callable[[Sequence[str]], Mapping[str, Any]], argv: Sequence[str]) -> int:
    """Call ``work(argv)`` and print what it returns as the last line of stdout. Returns the process's exit code.

    A ``UserError`` becomes its message on stderr and exit code 2, a ``RunError`` its message and exit code 1, anything else that is raised its last
    line and exit code 1. ``--debug`` shows the stack trace.
    A result whose ``status`` is ``failed`` is exit code 1 too.
    """
    debug = "--debug" in argv
    try:
        logs.set_up(logs.chosen())
        result = work(argv)
    except UserError as error:
        _complain(traceback.format_exc() if debug else f"error: {error}")
        return BAD_INPUT
    except RunError as error:
        _complain(traceback.format_exc() if debug else f"error: {error}")
        return FAILED
    except Exception as error:
        _complain(traceback.format_exc() if debug else f"error: {_last_line(error)} (--debug shows where)")
        return FAILED
    if result.get("status") == "failed":
        _complain(f"error: {result.get('error')}")
    print(json.dumps(_plain(result), allow_nan=False), flush=True)
    return FAILED if result.get("status") == "failed" else DONE


def _complain(text: str) -> None:
    """Print to stderr, without secrets, and without what would make a terminal do more than show it: messages hold names of files."""
    print("".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in redact(text).rstrip()), file=sys.stderr)


def _plain(value: Any) -> Any:
    """The value with null for numbers that JSON has no word for: a run that diverged reports NaN."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"
