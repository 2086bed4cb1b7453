# SPDX-License-Identifier: Apache-2.0
"""The committed results: a folder a device, in it JSON files of ``benchmarks.run`` and of the other measurements."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.others import KINDS
from benchmarks.reasons import KEYS, said
from benchmarks.record import Row, Run
from benchmarks.tables import HEADER, cells, markdown

NO_TABLE = ("gpu-check",)  # what was done, not what came out


@dataclass(frozen=True)
class File:
    """A JSON file: where and when, its rows, its table in Markdown."""

    path: Path
    run: Run
    table: str
    found: list[dict[str, Any]]  # as written, of the other measurements


@dataclass(frozen=True)
class Device:
    name: str
    files: tuple[File, ...]

    @property
    def rows(self) -> list[Row]:
        return [row for file in self.files for row in file.run.rows]

    @property
    def date(self) -> str:
        return max(file.run.date for file in self.files)


def read(path: Path) -> File:
    if path.stem not in KINDS:
        run = record.load(path)
        return File(path, run, markdown(HEADER, map(cells, run.rows), 4), [])
    data = json.loads(path.read_text())
    rows = data.pop("rows")
    found = data.pop("models", rows)
    kind = KINDS[path.stem]
    return File(path, Run(**data, rows=list(kind.rows(found))), kind.table(found), found)


def devices(results: Path) -> list[Device]:
    """The one measured last comes first."""
    found = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        paths = sorted(p for p in folder.glob("*.json") if p.stem not in NO_TABLE)
        if paths:
            found.append(Device(folder.name, tuple(map(read, paths))))
    return sorted(found, key=lambda d: d.date, reverse=True)


def chosen(
    found: list[Device], wanted: Callable[[Run, Row], bool]
) -> dict[tuple[str, ...], tuple[Row, File]]:
    """The newest row of each kind among those wanted, and where it is from."""
    newest: dict[tuple[str, ...], tuple[Row, File]] = {}
    for row, file in _by_date(found):
        if wanted(file.run, row):
            newest[row.op, row.case, row.dtype, row.direction, row.frozen] = row, file
    return newest


def reasons(found: list[Device]) -> dict[tuple[str, ...], str]:
    """What ``benchmarks.reasons`` found, the newest of each row, with the machine."""
    files = [(f.run.date, d.name, f) for d in found for f in d.files if f.path.stem == "reasons"]
    return {
        tuple(row[k] for k in KEYS): f"{said(row)} ({name})"
        for _, name, file in sorted(files, key=lambda each: each[:2])
        for row in file.found
    }


def _by_date(found: list[Device]) -> Iterator[tuple[Row, File]]:
    files = [file for device in found for file in device.files]
    for file in sorted(files, key=lambda f: (f.run.date, f.path.name)):
        for row in file.run.rows:
            yield row, file


def on_amx(run: Run, row: Row) -> bool:
    """On a CPU with AMX, on a machine without a GPU: what the README shows and CPU goals are judged by."""
    return row.device == "cpu" and run.machine["isa"]["amx_bf16"] and not run.machine["gpu"]


def on_h200(run: Run, row: Row) -> bool:
    return row.device == "cuda" and "H200" in (run.machine["gpu"] or "")
