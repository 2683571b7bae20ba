"""Tables of text: comma- or tab-separated files, column by column."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from lamina.data._files import read
from lamina.errors import LaminaError, nearest


def read_rows(path: Path, delimiter: str = ",") -> list[list[str]]:
    """Read the lines of a table that are not empty; a .tsv file is split at tabs and knows no quotes."""
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise LaminaError(f"delimiter must be one character between columns, such as ',' or ';', got {delimiter!r}")
    try:
        file = io.StringIO(read(path).decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise LaminaError(f"the table {str(path)!r} is not UTF-8 text: {error}") from error
    if ".tsv" in path.suffixes:
        return [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    return [row for row in csv.reader(file, delimiter=delimiter) if row]


def read_columns(path: Path, delimiter: str = ",") -> dict[str, list[str]]:
    """Read a table with a header line.

    Raises:
        LaminaError: it has no row, a row of another length than the header, or two columns of one name.
    """
    lines = read_rows(path, delimiter)
    if len(lines) < 2:
        raise LaminaError(f"the table {str(path)!r} has no row below its header line")
    header = lines[0]
    if len(set(header)) != len(header):
        raise LaminaError(f"the table {str(path)!r} has two columns of one name: {header}")
    for number, row in enumerate(lines[1:], start=1):
        if len(row) != len(header):
            raise LaminaError(f"row {number} of {str(path)!r} has {len(row)} values, the header {len(header)}")
    return dict(zip(header, (list(c) for c in zip(*lines[1:], strict=True)), strict=True))


def check_known(columns: Mapping[str, Sequence[str]], names: Sequence[str], path: Path) -> None:
    """Refuse a column name that the table does not have."""
    for name in names:
        if name not in columns:
            raise LaminaError(f"{str(path)!r} has no column {name!r}, only {list(columns)}{nearest(name, columns)}")


def check_complete(name: str, values: Sequence[str], path: Path) -> None:
    """Refuse a column with missing values."""
    missing = [i for i, value in enumerate(values) if value.strip().lower() in ("", "nan", "na", "null", "?")]
    if missing:
        raise LaminaError(
            f"the column {name!r} of {path.name!r} misses {len(missing)} values (first in row {missing[0] + 1}): "
            "fill them in, or leave the column out"
        )
