"""Time and memory that an attack may take, so that one which works ends as a failed test and not with the machine."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CPU_S = 20.0
MEMORY = 3 * 1024**3


@contextmanager
def bounded(cpu_s: float = CPU_S, memory: int = MEMORY) -> Iterator[None]:
    """The block takes at most so many seconds of this process's processors, and so many bytes of addresses more than there are already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])

    def late(*_: object) -> None:
        raise AssertionError(f"not done after {cpu_s:g} s of a processor")

    before = signal.signal(signal.SIGVTALRM, late)
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - began < cpu_s
