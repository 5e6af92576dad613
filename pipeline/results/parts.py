"""The results of slides as they come: parts, Parquet files of up to some thousand rows, each whole or not there.

A run that was stopped goes on from them. One process appends, under the folder's lock: results come to it from all
workers, so these need no disk in common, and a worker that is lost leaves nothing half written.

How much waits in memory to become a part is bounded twice: it is at most an eighth of what is on the disk, so that
of few slides each is written as it ends, and at most `_SECONDS` of the work of each worker, so that of slides that
take longer each is, too. Small parts are joined, so that there are never many files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.files import make_folder, open_inside, replace_by

if TYPE_CHECKING:
    import pyarrow as pa

RECEIPT, BYTES = "receipt", 16  # the column that names a slide and all that its result depends on
_MOST_ROWS = 8192  # of a part
_WAITING = 8  # one row may wait for so many on the disk
_SECONDS = 5.0  # of work of each worker may wait
_SMALL, _MANY = 1024, 256  # parts of fewer rows are joined when there are so many
_PART = "part-{:06}.parquet"

Receipts = NDArray[np.bytes_]


class Parts:
    """The results in a folder; one process at a time may have them.

    Parameters
    ----------
    folder
        The folder of the parts, made where it is not there.
    schema
        The columns of results, without `RECEIPT`.
    workers
        How many workers make results.

    Raises
    ------
    UsageError
        The folder cannot be made, or something in it is no file.
    """

    def __init__(self, folder: Path, schema: pa.Schema, workers: int = 1) -> None:
        import pyarrow as pa

        self._folder, self._patience = make_folder(folder), _SECONDS * workers
        self._schema = schema.append(pa.field(RECEIPT, pa.binary(BYTES)))
        self._waiting: list[dict[str, Any]] = []
        self._work = 0.0
        self._parts: list[tuple[Path, Receipts]] = []
        self._number = 0  # of the last part
        self._rows = 0  # in them
        for path in part_files(folder):
            self._number = max(self._number, int(path.stem.partition("-")[2]))
            with suppress(DataError):  # by another version, or of a disk that loses what it has confirmed: done again
                self._enter(path, self._read(path, [RECEIPT]))

    def find(self, receipts: Receipts) -> NDArray[np.int64]:
        """Return the number of the row of each receipt, for `take`, -1 where it has none: (N,) to (N,)."""
        known = np.concatenate([np.empty(0, f"S{BYTES}"), *(each for _, each in self._parts)])
        if not len(known):
            return np.full(len(receipts), -1)
        order = np.argsort(known, kind="stable")
        place = np.searchsorted(known, receipts, side="right", sorter=order) - 1
        row = order[np.maximum(place, 0)]
        return np.where((place >= 0) & (known[row] == receipts), row, -1)

    def take(self, numbers: NDArray[np.int64]) -> pa.Table:
        """Read rows by their numbers, in this order; those of number -1 are all null."""
        import pyarrow as pa

        ends = np.cumsum([len(receipts) for _, receipts in self._parts])
        of_part = np.searchsorted(ends, numbers, side="right")
        of_part[numbers < 0] = -1
        pieces, places = [self._schema.empty_table()], []
        for part in np.unique(of_part[of_part >= 0]):
            rows = np.flatnonzero(of_part == part)
            path, receipts = self._parts[part]
            pieces.append(self._read(path).take(numbers[rows] - (ends[part] - len(receipts))))
            places.append(rows)
        order = np.full(len(numbers), -1)
        if places:
            order[np.concatenate(places)] = np.arange(sum(map(len, places)))
        table = pa.concat_tables(pieces).combine_chunks()
        return table.take(pa.array(order, mask=order < 0)).drop_columns([RECEIPT])

    def add(self, receipt: bytes, row: Mapping[str, Any], seconds: float) -> None:
        """Append the result of a slide, which took so many seconds of a worker.

        Raises
        ------
        UsageError
            It cannot be written; what was written before still is there.
        """
        self._waiting.append({**row, RECEIPT: receipt})
        self._work += seconds
        most = min(_MOST_ROWS, 1 + self._rows // _WAITING)
        if len(self._waiting) >= most or self._work >= self._patience:
            self.flush()

    def flush(self) -> None:
        """Write what waits; the errors are those of `add`."""
        import pyarrow as pa

        if not self._waiting:
            return
        self._write(pa.Table.from_pylist(self._waiting, schema=self._schema))
        self._waiting, self._work = [], 0.0
        small = [part for part in self._parts if len(part[1]) < _SMALL]
        if len(small) >= _MANY:
            self._join(small)

    def _join(self, small: Sequence[tuple[Path, Receipts]]) -> None:
        """Make one part of several; where this is stopped, some rows are there twice, and equal."""
        import pyarrow as pa

        self._write(pa.concat_tables([self._read(path) for path, _ in small]))
        for part in small:
            self._parts.remove(part)
            self._rows -= len(part[1])
            part[0].unlink(missing_ok=True)

    def _write(self, table: pa.Table) -> None:
        from pyarrow import parquet

        path = self._folder / _PART.format(self._number + 1)
        with replace_by(path) as file:
            parquet.write_table(table, file)
        self._number += 1
        self._enter(path, table)

    def _enter(self, path: Path, table: pa.Table) -> None:
        receipts = np.array(table.column(RECEIPT).to_pylist(), f"S{BYTES}")
        self._parts.append((path, receipts))
        self._rows += len(receipts)

    def _read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        import pyarrow as pa
        from pyarrow import parquet

        with open_inside(self._folder, path.name) as file:
            try:
                part = parquet.ParquetFile(file)
                table = part.read(columns)
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                raise DataError(f"{path}: damaged ({reason}); remove it, and its slides are done again") from error
        if part.schema_arrow != self._schema:
            raise DataError(f"{path}: has other columns than results have; remove it")
        return table


def part_files(folder: Path) -> list[Path]:
    """Return the files of the parts in a folder, in any order."""
    return [path for path in folder.glob("part-*.parquet") if re.fullmatch(r"part-\d+", path.stem)]
