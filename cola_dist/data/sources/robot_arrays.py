"""Arrays in HDF5 and npz files, read a few rows at a time: memory stays bounded whatever a file declares, and a file gives only what lies in it.

A damaged file raises Unusable. What remains: the HDF5 library itself may end the process on a file damaged in certain places (seen once in a few
thousand files with random bytes overwritten).
"""

from __future__ import annotations

import lzma
import math
import re
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cola_dist.data.sources import Unusable

BLOCK = 8 * 1024**2
"""Bytes that one read asks for, at least one row."""
LARGEST_ROW, LARGEST_CHUNK, LARGEST_ARRAY = 2**28, 2**30, 2**37
"""Bytes that an array may declare: in a picture, in what HDF5 compresses as one, and in all (an hour of 640 x 480 at 30 Hz is 2**36.5)."""
_BROKEN = (
    *(OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, EOFError, OverflowError, MemoryError),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, struct.error, tokenize.TokenError, SyntaxError),
)
"""What h5py, zipfile and numpy were seen to raise, or document, for damaged files."""


@contextmanager
def reading() -> Iterator[None]:
    """What the libraries raise for a damaged file becomes Unusable."""
    try:
        yield
    except _BROKEN as error:
        raise Unusable("damaged file") from error


class Array(ABC):
    """An array of known ``shape`` and ``dtype``, whose first axis is time."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype

    @abstractmethod
    def blocks(self) -> Iterator[NDArray[Any]]:
        """All rows in order, some at a time: ``[n, *shape[1:]]``. Raises Unusable."""

    def _rows_at_a_time(self) -> int:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if row > LARGEST_ROW or row * self.shape[0] > LARGEST_ARRAY:
            raise Unusable("declared size beyond reason")
        return max(1, BLOCK // max(1, row))


class _Hdf5Array(Array):
    def __init__(self, dataset: Any) -> None:
        super().__init__(tuple(dataset.shape or ()), dataset.dtype)
        self._dataset = dataset

    def blocks(self) -> Iterator[NDArray[Any]]:
        rows = self._rows_at_a_time()
        with reading():
            chunk = self._dataset.chunks
            if chunk and math.prod(chunk) * self.dtype.itemsize > LARGEST_CHUNK:
                raise Unusable("declared size beyond reason")
            # Whole chunks: else each would be decompressed again and again.
            if chunk and chunk[0] * math.prod(self.shape[1:]) * self.dtype.itemsize <= LARGEST_ROW:
                rows = max(chunk[0], rows // chunk[0] * chunk[0])
            for start in range(0, self.shape[0], rows):
                yield np.asarray(self._dataset[start : start + rows])


class _NpyArray(Array):
    def __init__(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        self._archive, self._member = archive, member
        with archive.open(member) as stream:
            # Version 1.0 is all that numpy writes for plain arrays; the others allow headers of gigabytes.
            if npy.read_magic(stream) != (1, 0):
                raise Unusable("damaged file")
            shape, self._columns_first, dtype = npy.read_array_header_1_0(stream)
            self._start = stream.tell()
        super().__init__(shape, dtype)
        declared = self._start + math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and (min(shape, default=0) < 0 or declared != member.file_size):
            raise Unusable("damaged file")

    def blocks(self) -> Iterator[NDArray[Any]]:
        rows = self.shape[0] if self._columns_first else self._rows_at_a_time()
        if math.prod(self.shape) * self.dtype.itemsize > LARGEST_ROW and self._columns_first:
            raise Unusable("declared size beyond reason")
        with reading(), self._archive.open(self._member) as stream:
            _exactly(stream, self._start)
            for start in range(0, self.shape[0], rows):
                shape = min(rows, self.shape[0] - start), *self.shape[1:]
                flat = np.frombuffer(_exactly(stream, math.prod(shape) * self.dtype.itemsize), self.dtype)
                yield flat.reshape(shape, order="F" if self._columns_first else "C")


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise Unusable("damaged file")
    return data


@contextmanager
def open_npz(path: Path) -> Iterator[dict[str, Array]]:
    """The arrays of an npz file by name. Nothing is unpickled: an array of Python objects has the dtype object and is never read."""
    if not zipfile.is_zipfile(path):
        raise Unusable("no npz file, or its end is missing")
    with reading():
        archive = zipfile.ZipFile(path)
    with archive:
        with reading():
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            arrays: dict[str, Array] = {member.filename.removesuffix(".npy"): _NpyArray(archive, member) for member in members}
        yield arrays


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """An HDF5 file, a group, to read from. Locks are not asked for: network file systems and read-only ones refuse them."""
    with reading():
        if not h5py.is_hdf5(path):
            raise Unusable("no HDF5 file")
        file = h5py.File(path, "r", locking=False, rdcc_nbytes=8 * BLOCK)
    with file:
        yield file


def group_in(group: Any, name: str) -> Any:
    """The group of that name in an HDF5 group, or none."""
    found = _member(group, name)
    return found if isinstance(found, h5py.Group) else None


def arrays_in(group: Any) -> dict[str, Array]:
    """The arrays of an HDF5 group by name. Raises Unusable, also where one is not in this file."""
    with reading():
        members = {name: _member(group, name) for name in names_in(group)}
        return {name: _Hdf5Array(member) for name, member in members.items() if isinstance(member, h5py.Dataset)}


def names_in(group: Any) -> list[str]:
    """Names in an HDF5 group, numbers in their order: demo_2 before demo_10."""
    with reading():
        return sorted(group, key=lambda name: [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))])


def attribute(group: Any, name: str) -> str:
    """A text attribute of an HDF5 group; empty where there is none."""
    with reading():
        value = group.attrs.get(name, "")
        return value.decode(errors="replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _member(group: Any, name: str) -> Any:
    """A group or dataset that lies in the file itself; what leads elsewhere is not opened: it could be any file of this machine."""
    with reading():
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink | h5py.SoftLink):  # a soft link may lead on to an external one
            raise Unusable("link to another file")
        member = group[name] if link is not None else None
        if isinstance(member, h5py.Dataset) and (member.is_virtual or member.external):
            raise Unusable("link to another file")
        return member
