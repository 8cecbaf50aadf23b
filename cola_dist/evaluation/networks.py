"""Networks of perceptual metrics, from a file that the user has. Nothing is downloaded, and no other network stands in for one that is missing.

A file is TorchScript, which is code: loading it runs what its author wrote. Give a file that you made or trust.

- FVD: I3D as it is commonly passed around (``i3d_torchscript.pt``):
  ``net(video [B, 3, T, 224, 224] in [-1, 1], rescale=False, resize=False, return_features=True) -> [B, 400]``.
- LPIPS: ``net(frames [B, 3, H, W], truth [B, 3, H, W])``, both in [-1, 1], to B numbers. From the authors' package ``lpips``:
  ``torch.jit.trace(lpips.LPIPS(net="alex").eval(), (x, x)).save("lpips_alex.pt")`` with ``x`` of the shape of your frames.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cola_dist import storage
from cola_dist.errors import UserError


@dataclass(frozen=True)
class NetworkFile:
    """A network's file, as a protocol names it."""

    metric: Literal["LPIPS", "FVD"]
    name: str
    """File name, without its folder."""
    sha256: str
    """Of the file's bytes: what makes two figures comparable."""


def identify(metric: Literal["LPIPS", "FVD"], uri: str, expected: str) -> NetworkFile:
    """What the file at ``uri`` is. Raises ``UserError`` if it is missing, or has another SHA-256 than ``expected`` (empty = any)."""
    found = hashlib.sha256(_read(metric, uri)).hexdigest()
    if expected and found != expected.strip().lower():
        raise UserError(f"{metric} network {uri} has sha256 {found}, not {expected}: give the file that is meant, or its hash")
    return NetworkFile(metric, storage.name(uri), found)


class MetricNetwork:
    """A loaded network, in fp32."""

    def __init__(self, file: NetworkFile, uri: str, device: torch.device) -> None:
        """Load ``file`` from ``uri``. Raises ``UserError`` if it is no TorchScript, or no longer the file that it was."""
        self.file, self.uri = file, uri
        data = _read(file.metric, uri)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise UserError(
                f"{file.metric} network {uri} is another file here than where the job was started: copy the same one to all nodes"
            )
        try:
            with warnings.catch_warnings():
                # That torch means to drop TorchScript one day does not help who has this file today.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._network = torch.jit.load(io.BytesIO(data), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{file.metric} network {uri} is no TorchScript file ({_first_line(error)}): save it by torch.jit") from None

    @torch.no_grad()
    def __call__(self, *tensors: Tensor, **options: bool) -> Tensor:
        """What the network makes of ``tensors``. Raises ``UserError`` where it takes no such tensors or options."""
        try:
            result: Tensor = self._network(*tensors, **options)
        except RuntimeError as error:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{self.file.metric} network {self.uri} refuses {shapes} ({reason}): give another network or clips") from None
        return result

    def check(self, values: Tensor, shape: tuple[int, ...]) -> None:
        """Raises ``UserError`` unless the network's answer has ``shape`` and is finite."""
        if values.shape != shape:
            wrong = f"gave {list(values.shape)} where {list(shape)} is expected"
            raise UserError(f"{self.file.metric} network {self.uri} {wrong}: it is another network than this metric's")
        if not values.isfinite().all():
            raise UserError(f"{self.file.metric} network {self.uri} gave numbers that are not finite: its file is damaged")


def _read(metric: str, uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        raise UserError(
            f"{metric} network {uri} is missing: give the file's path, or leave the option out to go without {metric}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
