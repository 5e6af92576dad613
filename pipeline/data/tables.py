"""Read tables as people hand them in: Parquet, workbooks of Excel, DataFrames, and CSV as any spreadsheet writes it.

Notable: every cell is a text. pyarrow reads a table column by column, because manifests may have a million rows.
Workbooks are read by pandas and openpyxl, which are the extra ``tables``.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pandas import DataFrame

WORKBOOK = ".xlsx"
_DELIMITERS = ",;\t"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks
_KINDS = {b"PK\x03\x04": "a workbook of Excel or LibreOffice", b"\xd0\xcf\x11\xe0": "a workbook of old Excel"}
_LONGEST_ROW = 2**24  # bytes
_LONGEST_HEAD = 2**20  # letters of the first row


def read_table(source: Path | DataFrame) -> tuple[list[str], list[list[str]]]:
    """Read the names of the columns, and the cells of each without blanks around them; a missing value is empty.

    Parameters
    ----------
    source
        A CSV, Parquet or Excel (.xlsx, its first sheet) file, or a pandas DataFrame.

    Raises
    ------
    UsageError
        The file cannot be read, is not a table, or has rows of other lengths than the first; or what reads workbooks
        is not installed.
    """
    try:
        names, columns = _read(source)
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror}; give the table's path") from error
    names, columns = [name.strip() for name in names], [[cell.strip() for cell in column] for column in columns]
    named = [i for i, name in enumerate(names) if name or any(columns[i])]  # spreadsheets add empty columns
    return [names[i] for i in named], [columns[i] for i in named]


def table_name(source: Path | DataFrame) -> str:
    """Name a table in messages."""
    return str(source) if isinstance(source, Path) else "table"


def _read(source: Path | DataFrame) -> tuple[list[str], list[list[str]]]:
    if not isinstance(source, Path):
        return _read_frame(source)
    match source.suffix.lower():
        case ".parquet":
            return _read_parquet(source)
        case suffix if suffix == WORKBOOK:
            return _read_workbook(source)
        case _:
            return _read_csv(source)


def _read_frame(frame: DataFrame) -> tuple[list[str], list[list[str]]]:
    """Take the cells of a DataFrame; its index counts as a column where it has a name."""
    if frame.index.name is not None:
        frame = frame.reset_index()
    present = frame.notna()
    columns = [
        [_text(value) if there else "" for value, there in zip(frame.iloc[:, i], present.iloc[:, i], strict=True)]
        for i in range(frame.shape[1])
    ]
    return [str(name) for name in frame.columns], columns


def _text(value: Any) -> str:
    """Write a cell; whole numbers that became fractions, as where others of a column are missing, are whole again."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read_workbook(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        import openpyxl  # noqa: F401 - pandas imports it later, and says less
        import pandas as pd
    except ImportError as error:
        raise UsageError(
            f"{path}: workbooks need pandas and openpyxl: pip install 'nested-ats[tables]', or save it as CSV UTF-8"
        ) from error
    try:
        frame = pd.read_excel(path, dtype=object, keep_default_na=False, na_values=[""])
    except OSError:
        raise
    except Exception as error:  # openpyxl raises whatever the file leads it to
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not a workbook of Excel ({reason}); save it as CSV UTF-8") from error
    return _read_frame(frame)


def _read_parquet(path: Path) -> tuple[list[str], list[list[str]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns: list[list[str]] = [[] for _ in names]
            # Row group by row group, so that there is one copy of a large table.
            for batch in map(file.read_row_group, range(file.num_row_groups)):
                for cells, column in zip(columns, batch.columns, strict=True):
                    cells += ["" if value is None else str(value) for value in column.to_pylist()]
    except pa.ArrowException as error:
        raise UsageError(f"{path}: not a Parquet file: {error}") from error
    return names, columns


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    import pyarrow as pa

    text = _decode(path, path.read_bytes()).lstrip("\r\n")
    head = text[:_LONGEST_HEAD]
    delimiter = max(_DELIMITERS, key=head.partition("\n")[0].count)
    data = text.encode()
    del text  # a table may fill much of the memory
    try:
        names = next(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, strict=True), [])
        if not names:
            raise UsageError(f"{path}: empty; the first row names the columns, as in slide_id,path,label")
        return names, _parse(path, data, delimiter, len(names))
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


def _parse(path: Path, data: bytes, delimiter: str, width: int) -> list[list[str]]:
    """Read the columns of the rows below the first."""
    import pyarrow as pa
    from pyarrow import csv as reader

    uneven: list[int] = []

    def skip(row: Any) -> str:
        uneven.append(row.number)
        return "skip"

    names = [str(i) for i in range(width)]
    table = reader.read_csv(
        pa.BufferReader(data),
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
    # By way of numpy, in half of the time of to_pylist.
    return [column.slice(1).to_numpy(zero_copy_only=False).tolist() for column in table.columns]
