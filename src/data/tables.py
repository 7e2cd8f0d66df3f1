"""JSONL and CSV tables of a data set: one row per image, columns by name."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from src.data.captions import decode_text
from src.data.set_checks import first_twins
from src.types import UserError


def read_table(file: Path, key: str) -> tuple[list[str], list[dict[str, Any]]]:
    """(columns in the order in which they appear, rows). Raises UserError with the line that cannot be read.

    key: of the configuration, as messages call the file. A row need not have every column of a JSONL file.
    """
    where = f"{key}={str(file)!r}"
    if not file.is_file():
        raise UserError(f"{where} is not a file")
    suffix = file.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise UserError(f"{where} ends in {suffix!r}; write the table as .jsonl or .csv")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"{where} cannot be opened ({error.strerror}); check its permissions") from error
    text = decode_text(raw, str(file))
    rows = _jsonl(text, where) if suffix == ".jsonl" else _csv(text, where)
    if not rows:
        raise UserError(f"{where} holds no row")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _jsonl(text: str, where: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: line {number} is not JSON ({error}); mend it") from error
        except RecursionError as error:
            raise UserError(f"{where}: line {number} has too many brackets within brackets; mend or remove it") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number} is a {type(row).__name__}; write one object per line, {{...}}")
        rows.append(row)
    return rows


def _csv(text: str, where: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    names, rows = reader.fieldnames or [], []
    if twins := first_twins(names):
        raise UserError(f"{where}: the columns {', '.join(twins)} stand twice in its first line; rename one of each")
    try:
        for row in reader:
            if None in row or None in row.values():
                fix = "put a value with commas in double quotes"
                raise UserError(f"{where}: line {reader.line_num} has not the {len(names)} fields of the first line; {fix}")
            rows.append(dict(row))
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num} cannot be read ({error}); mend it") from error
    return rows
