"""The table of predictions: written bit by bit, as CSV and Parquet, and read column by column.

Notable: a million rows as dictionaries are three gigabytes. `Rows` are views of columns, each of which is read when
it is first asked for.
"""

from __future__ import annotations

import csv
import io
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from pipeline.errors import UsageError
from pipeline.files import open_inside, replace_by

if TYPE_CHECKING:
    import pyarrow as pa

TABLE = "predictions"
LAST = ("model", "status", "error")


class Row(Mapping[str, Any]):
    """One row of a table, whose cells are looked up in its columns."""

    __slots__ = ("_number", "_rows")

    def __init__(self, rows: Rows, number: int) -> None:
        self._rows, self._number = rows, number

    def __getitem__(self, name: str) -> Any:
        return self._rows.column(name)[self._number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows.names)

    def __len__(self) -> int:
        return len(self._rows.names)

    def __repr__(self) -> str:
        return repr(dict(self))


class Rows(Sequence[Row]):
    """The rows of the table in a folder, also where it is replaced meanwhile.

    Parameters
    ----------
    folder
        The folder of the predictions.

    Raises
    ------
    FileNotFoundError
        There is none.
    UsageError
        It is not a Parquet file, here or where a column is first read, or no file at all.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self._path = path = folder / f"{TABLE}.parquet"
        try:
            with open_inside(folder, path.name) as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # nothing is in it
            raise self._damaged(error) from error
        try:
            self._file = parquet.ParquetFile(pa.BufferReader(pa.py_buffer(pages)))
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        self.names: list[str] = list(self._file.schema_arrow.names)
        self._columns: dict[str, list[Any]] = {}

    def column(self, name: str) -> list[Any]:
        """Return the cells of a column; those of equal texts are one where few differ.

        Raises
        ------
        KeyError
            There is no such column.
        """
        if name not in self._columns:
            if name not in self.names:
                raise KeyError(name)
            self._columns[name] = self._read(name)
        return self._columns[name]

    def _read(self, name: str) -> list[Any]:
        import pyarrow as pa

        cells: list[Any] = []
        known: dict[Any, Any] = {}
        try:
            for batch in self._file.iter_batches(columns=[name]):
                found = batch.column(0).to_pylist()
                few = isinstance(found[0], str) and len(set(found)) < len(found) / 2
                cells += [known.setdefault(cell, cell) for cell in found] if few else found
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        return cells

    def _damaged(self, error: Exception) -> UsageError:
        reason = " ".join(str(error).split())
        return UsageError(f"{self._path}: not a Parquet file ({reason}); run nested-ats predict again")

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [Row(self, each) for each in range(len(self))[number]]
        return Row(self, range(len(self))[number])

    def __iter__(self) -> Iterator[Row]:
        return (Row(self, number) for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self._path}: {len(self)} rows of {', '.join(self.names)}"


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write predictions.csv and predictions.parquet of rows."""
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    # The identity comes first and the status last, whatever the first row has.
    names.sort(key=lambda name: LAST.index(name) if name in LAST else -1)
    write_pieces(folder, [pa.table({name: [row.get(name) for row in rows] for name in names})])


def write_pieces(folder: Path, pieces: Iterable[pa.Table]) -> None:
    """Write predictions.csv and predictions.parquet of tables that follow each other, with the same columns.

    Raises
    ------
    UsageError
        They cannot be written; what was there before still is.
    """
    from pyarrow import parquet

    with ExitStack() as stack:
        plain, packed = (stack.enter_context(replace_by(folder / f"{TABLE}.{kind}")) for kind in ("csv", "parquet"))
        writer = None
        for piece in pieces:
            text = io.StringIO()
            lines = csv.writer(text, lineterminator="\n")
            if writer is None:
                lines.writerow(piece.column_names)
                writer = stack.enter_context(parquet.ParquetWriter(packed, piece.schema))
            lines.writerows(zip(*(column.to_pylist() for column in piece.columns), strict=True))
            plain.write(text.getvalue().encode())
            writer.write_table(piece)
