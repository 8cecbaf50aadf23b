"""What a report leaves beside its page: figures as PNG."""

from __future__ import annotations

from collections.abc import Sequence

from cola_dist import storage
from cola_dist.report.drawing import Plate


def write_figures(folder: str, plates: Sequence[Plate]) -> list[str]:
    """Each plate as ``NAME.png`` below ``folder`` (path or URI). Returns the names."""
    names: list[str] = []
    for plate in plates:
        # Names of arms that differ in signs alone come out alike.
        same = sum(name.startswith(f"{plate.name}.") or name.startswith(f"{plate.name}~") for name in names)
        names.append(f"{plate.name}~{same + 1}.png" if same else f"{plate.name}.png")
        storage.write_bytes(storage.join(folder, names[-1]), plate.png())
    return names
