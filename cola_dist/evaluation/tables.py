"""Rows of figures as a file, and back."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cola_dist.data.parquet import read_parquet


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as a Parquet file, columns in order of first appearance; null where a row has no such entry."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def rows_of(raw: bytes, where: str) -> list[dict[str, Any]]:
    """The rows of a Parquet file. Raises UserError for one that is too large, and what pyarrow raises for damaged bytes."""
    rows: list[dict[str, Any]] = read_parquet(raw, where).to_pylist()
    return rows
