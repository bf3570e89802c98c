"""Predictions on disk: JSON-lines files, one per shard of a task's records, which a killed run continues record by
record.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

PredictionRow = dict[str, Any]  # the line of one record
SKIPPED = "skipped"  # key of a line that says why its record has no answer


class Shard:
    """A file with a header line and one line per record of a shard, written as the answers come and sorted when none is
    missing.

    The header says what the lines were made from (task, data, checkpoint, settings). Opening a file with another header
    is a ValueError, so that lines of two checkpoints never mix. A last line that was cut off by a kill is dropped.
    """

    def __init__(self, path: str | os.PathLike, header: PredictionRow, records: Sequence[int]):
        self.path = Path(path)
        lines = _whole_lines(self.path, repair=True)
        _check_header(self.path, lines, header)
        self._order = [line["record"] for line in lines[1:]]
        self._missing = set(records) - set(self._order)
        if not lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append([header])
        self._finish()

    @property
    def missing(self) -> set[int]:
        """Records without a line."""
        return set(self._missing)

    def add(self, row: PredictionRow) -> None:
        """Writes the line of a record (its index stands under "record"), at once."""
        if row["record"] not in self._missing:
            raise ValueError(f"{self.path}: record {row['record']} has a line or is not of this shard")
        self._append([row])
        self._order.append(row["record"])
        self._missing.remove(row["record"])
        self._finish()

    def _append(self, lines: Iterable[PredictionRow]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(_line(line) for line in lines)

    def _finish(self) -> None:
        """Sorts a file that is complete, so that its bytes do not depend on the order in which the answers came."""
        if self._missing or self._order == sorted(self._order):
            return
        header, *rows = _whole_lines(self.path)
        rows.sort(key=lambda row: row["record"])
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(map(_line, (header, *rows)))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        self._order = [row["record"] for row in rows]


def read_lines(path: str | os.PathLike, header: PredictionRow | None = None) -> list[PredictionRow]:
    """The lines of a file of predictions but for its header, by record; those of skipped records have the key
    "skipped".

    Empty where there is no file, ValueError for one with another header than the given one.
    """
    lines = _whole_lines(Path(path))
    if header is not None:
        _check_header(path, lines, header)
    return sorted(lines[1:], key=lambda line: line["record"])


def read_rows(*paths: str | os.PathLike, fields: Sequence[str] = ()) -> list[PredictionRow]:
    """The answered records in a cell's files of predictions, by record, with these `fields` alone if any are given. A
    record's scores may stand in several files (SPICE in one of its own).

    Raises ValueError for a line that cannot be read.
    """
    rows: dict[int, PredictionRow] = {}
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                row = _parse(line, f"{path}, line {number}")
                if row.get("record") in rows:
                    rows[row["record"]]["scores"] |= row["scores"]
                elif "record" in row and SKIPPED not in row:
                    rows[row["record"]] = {name: row.get(name) for name in fields} if fields else row
    return [rows[record] for record in sorted(rows)]


def count_cut_off(rows: Sequence[PredictionRow]) -> int | None:
    """How many answers took all of `max_new_tokens`. None, unknown, where a line does not say: earlier versions did
    not write it.
    """
    said = [row["cut_off"] for row in rows if row.get("cut_off") is not None]
    return sum(said) if len(said) == len(rows) else None


def _parse(line: bytes, place: str) -> PredictionRow:
    try:
        return orjson.loads(line)  # a sweep has a million lines, and json takes three times as long
    except ValueError:
        try:
            return json.loads(line)  # NaN is not JSON, but Python writes it
        except ValueError as error:
            raise ValueError(f"{place}: not JSON ({error})") from error


def _check_header(path: str | os.PathLike, lines: Sequence[PredictionRow], header: PredictionRow) -> None:
    header = json.loads(json.dumps(header))
    if lines and lines[0] != header:
        differing = ", ".join(sorted(key for key in {*lines[0], *header} if lines[0].get(key) != header.get(key)))
        raise ValueError(
            f"{path}: predictions of another run (different {differing}); to ask again, remove the file or take "
            f"another workdir; expected {header}, found {lines[0]}"
        )


def _line(row: PredictionRow) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _whole_lines(path: Path, repair: bool = False) -> list[PredictionRow]:
    """The parsed lines, but for a half one at the end, which `repair` cuts off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if repair and len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]
