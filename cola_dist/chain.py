"""Jobs called one after another, each as a user would, and not again what has been done."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.redact import redact

_DONE = ("done", "finished")


class Chain:
    """Steps whose results are kept below ``output`` (path or URI); ``jobs`` is the folder of the jobs' scripts."""

    def __init__(self, output: str, jobs: Path) -> None:
        self._output, self._jobs = output, jobs
        self.seconds: dict[str, float] = {}
        """How long each step took, when it was run."""

    def step(self, name: str, *options: str, of: str = "") -> dict[str, Any]:
        """What the job ``of`` (``name``, if not given) said in its last line, if need be after running it.

        Raises ``UserError`` where it fails, and where it was run with other options before.
        """
        kept = storage.join(self._output, "steps", f"{name}.json")
        if not storage.exists(kept):
            began = time.monotonic()
            said = self._run(f"{of or name}.py", options)
            if not said or said.get("status", "done") not in _DONE:
                remedy = f"mend that and give the same command; what is done is kept in {self._output}"
                raise UserError(f"{name} did not finish (above it says why): {remedy}")
            storage.write_bytes(
                kept, json.dumps({"options": options, "said": said, "seconds": round(time.monotonic() - began, 1)}).encode()
            )
        found = storage.read_json(kept)
        if found["options"] != list(options):
            before = redact(shlex.join(found["options"]))
            raise UserError(f"{kept}: {name} was run with other options ({before}): give those, or another --output for new ones")
        self.seconds[name] = found["seconds"]
        return dict(found["said"])

    def _run(self, script: str, options: tuple[str, ...]) -> dict[str, Any]:
        """Show what the job prints, but for its last line, which is returned; empty if the job failed."""
        print(redact(f"\n== python jobs/{shlex.join([script, *options])}"), flush=True)
        last = ""
        with subprocess.Popen([sys.executable, self._jobs / script, *options], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                print(last, end="", flush=True)
                last = line
        found: dict[str, Any] = json.loads(last) if process.returncode == 0 else {}
        return found
