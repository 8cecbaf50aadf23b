"""Tables in Parquet files whose writer is not trusted: what they unfold to is bounded before it is in memory.

A Parquet file of a few kilobytes may stand for any number of rows, and for any number of copies of a long text.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cola_dist.errors import UserError

MOST_ROWS = 10_000_000
"""Of one file."""
LARGEST_TABLE = 4 * 1024**3
"""Bytes of a table in memory."""
_ROWS_AT_ONCE = 65536


def read_parquet(raw: bytes, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in the bytes of a Parquet file, or those of its ``columns`` that it has.

    Raises UserError, naming ``where``, for more than ``MOST_ROWS`` and ``LARGEST_TABLE``, and what pyarrow raises for bytes that are damaged.
    """
    about = pq.ParquetFile(io.BytesIO(raw), pre_buffer=False)
    if about.metadata.num_rows > MOST_ROWS:
        raise UserError(f"{where}: holds {about.metadata.num_rows} rows, more than the {MOST_ROWS} that one file may; split it")
    wanted = [name for name in about.schema_arrow.names if columns is None or name in columns]
    leaves = [about.schema.column(index) for index in range(len(about.schema))]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path.partition(".")[0] in wanted]
    # As dictionaries texts stay as small as they are stored until it is known what they unfold to. Arrow cannot read those inside of lists and
    # structures so: of these each row may hold the longest, whose length is at most that of them all.
    file = pq.ParquetFile(io.BytesIO(raw), pre_buffer=False, read_dictionary=[path for path in texts if "." not in path])
    longest = max((_stored(about.metadata, leaves, path) for path in texts if "." in path), default=1)
    step = min(_ROWS_AT_ONCE, max(1, LARGEST_TABLE // max(1, longest)))
    batches, rows, held = [], 0, 0
    for batch in file.iter_batches(step, columns=wanted, use_threads=False):
        rows, held = rows + batch.num_rows, held + sum(_unfolded(column) for column in batch.columns)
        if rows > MOST_ROWS or held > LARGEST_TABLE:
            raise UserError(f"{where}: unfolds to more than {MOST_ROWS} rows or {LARGEST_TABLE} bytes, which one file may not; split it")
        batches.append(batch)
    # In the order of the file: that is what iter_batches gives.
    schema = pa.schema([about.schema_arrow.field(name) for name in wanted], about.schema_arrow.metadata)
    found = pa.Table.from_batches(batches) if batches else schema.empty_table()
    return found.cast(schema)


def _stored(metadata: Any, leaves: Sequence[Any], path: str) -> int:
    """Bytes of a leaf, not compressed, in the row group that has most of it."""
    place = next(number for number, leaf in enumerate(leaves) if leaf.path == path)
    return max((metadata.row_group(group).column(place).total_uncompressed_size for group in range(metadata.num_row_groups)), default=1)


def _unfolded(array: Any) -> int:
    """Bytes of an array once each value stands for itself."""
    kind, own = array.type, int(array.nbytes)
    if pa.types.is_dictionary(kind) and len(array.dictionary):
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return own + int(pc.sum(pc.cast(lengths, pa.int64())).as_py() or 0)
    if pa.types.is_map(kind):
        return own + _unfolded(array.keys) + _unfolded(array.items)
    if pa.types.is_struct(kind):
        return sum(map(_unfolded, array.flatten()))
    return own + _unfolded(array.flatten()) if pa.types.is_nested(kind) else own
