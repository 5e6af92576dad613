"""Read tables as people hand them in: Parquet, and CSV as spreadsheets of any country write it.

Notable: every cell is a text. pyarrow reads a table column by column, because manifests may have a million rows.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

_DELIMITERS = ",;\t"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks
_KINDS = {b"PK\x03\x04": "a workbook of Excel or LibreOffice", b"\xd0\xcf\x11\xe0": "a workbook of old Excel"}
_LONGEST_ROW = 2**24  # bytes


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read the names of the columns, and the cells of each without blanks around them; a missing value is empty.

    Raises
    ------
    UsageError
        The file cannot be read, is not a table, or has rows of other lengths than the first.
    """
    try:
        names, columns = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; give the manifest's path") from error
    names, columns = [name.strip() for name in names], [[cell.strip() for cell in column] for column in columns]
    named = [i for i, name in enumerate(names) if name or any(columns[i])]  # spreadsheets add empty columns
    return [names[i] for i in named], [columns[i] for i in named]


def _read_parquet(path: Path) -> tuple[list[str], list[list[str]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pa.ArrowException as error:
        raise UsageError(f"{path}: not a Parquet file: {error}") from error
    columns = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
    return list(table.column_names), columns


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    import pyarrow as pa

    text = _decode(path, path.read_bytes()).lstrip("\r\n")
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
        if not names:
            raise UsageError(f"{path}: empty; the first row names the columns, as in slide_id,path,label")
        return names, _parse(path, text, delimiter, len(names))
    except (csv.Error, pa.ArrowException) as error:
        raise UsageError(f"{path}: not a CSV file: {' '.join(str(error).split())}") from error


def _decode(path: Path, data: bytes) -> str:
    kind = next((kind for magic, kind in _KINDS.items() if data.startswith(magic)), None)
    if kind:
        raise UsageError(f"{path}: {kind}, not a CSV file; save it there as CSV UTF-8")
    try:
        return data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a CSV file in UTF-8 ({error}); save it as CSV UTF-8") from error


def _parse(path: Path, text: str, delimiter: str, width: int) -> list[list[str]]:
    """Read the columns of the rows below the first."""
    import pyarrow as pa
    from pyarrow import csv as reader

    uneven: list[int] = []

    def skip(row: Any) -> str:
        uneven.append(row.number)
        return "skip"

    names = [str(i) for i in range(width)]
    table = reader.read_csv(
        pa.BufferReader(text.encode()),
        # There is one thread, as uneven rows would have no numbers with several.
        read_options=reader.ReadOptions(column_names=names, use_threads=False, block_size=_LONGEST_ROW),
        parse_options=reader.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip, ignore_empty_lines=True
        ),
        convert_options=reader.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    if uneven:
        rows = ", ".join(map(str, uneven[:5]))
        raise UsageError(f"{path}: row {rows}: not {width} fields, as the first row has")
    return [column.to_pylist()[1:] for column in table.columns]
