"""Tables of images or videos with text: csv, tsv (also gzipped) or parquet, one clip per row.

For SBU, WIT and the output of img2dataset. `columns` of the source maps fields to the file's columns; by default they
have the same names. Paths are relative to the table's folder.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.sources.annotation_files import ClipCollector, MissingFileError
from frozen_fast.data.sources.clip import Clip
from frozen_fast.data.sources.data_set_layout import Layout
from frozen_fast.data.sources.media_files import VIDEO_SUFFIXES
from frozen_fast.errors import UserError, unknown_name

FIELDS = ("id", "path", "caption", "kind", "split", "label", "start_seconds", "end_seconds")
REQUIRED = ("path", "caption")
Row = dict[str, Any]


def read_csv(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of a csv or tsv file with a header (.csv, .tsv, both also .gz)."""
    path = _table_file(config, key)
    separator = "\t" if ".tsv" in path.suffixes else ","
    opened = (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8-sig", newline="")
    )
    try:
        with opened as file:
            reader = csv.DictReader(file, delimiter=separator)
            names = _columns(config, list(reader.fieldnames or ()), path, key)
            rows = ({name: row.get(column) for name, column in names.items()} for row in reader)
            yield from _clips(rows, config, path, collector, first_line=2)
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not a table of UTF-8 text ({error}); allowed: csv or tsv with a header") from None


def read_parquet(config: SourceConfig, key: str, collector: ClipCollector) -> Iterator[Clip]:
    """Clips of a parquet file, or of all *.parquet files of a folder in the order of their names."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(
            f"{key}.format: got 'parquet' without the package pyarrow; install it: pip install -e '.[parquet]'"
        ) from None
    path = Path(config.path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [_table_file(config, key)]
    if not files:
        raise MissingFileError(f"{key}.path: got {str(path)!r} without *.parquet; allowed: a file or a folder of them")
    for file in files:
        try:
            with parquet.ParquetFile(file) as table:
                names = _columns(config, table.schema_arrow.names, file, key)
                first = 1
                for batch in table.iter_batches(columns=list(dict.fromkeys(names.values()))):
                    rows = ({name: row[column] for name, column in names.items()} for row in batch.to_pylist())
                    yield from _clips(rows, config, file, collector, first_line=first)
                    first += batch.num_rows
        except (ArrowException, OSError) as error:
            raise UserError(f"{file}: not a parquet file ({str(error).splitlines()[0]})") from None


def _table_file(config: SourceConfig, key: str) -> Path:
    path = Path(config.path)
    if not path.is_file():
        raise MissingFileError(f"{key}.path: got {config.path!r}, which is not a file; allowed: a {config.format} file")
    return path


def _columns(config: SourceConfig, header: list[str], path: Path, key: str) -> dict[str, str]:
    """Field -> column, for the columns in the file.

    Raises:
        UserError: columns names an unknown field or a column that the file lacks, or a required field has none.
    """
    given = dict(config.columns)
    for name, column in given.items():
        if name not in FIELDS:
            raise unknown_name(f"{key}.columns", name, FIELDS)
        if column not in header:
            raise unknown_name(f"{key}.columns.{name}", column, header or ["(no header)"])
    names = {name: given.get(name, name) for name in FIELDS if given.get(name, name) in header}
    for name in REQUIRED:
        if name not in names:
            raise UserError(
                f"{path}: no column {name!r}; got: {', '.join(header) or 'no header'}; allowed: such a "
                f"column, or {key}.columns.{name} naming another"
            )
    return names


def _clips(
    rows: Iterator[Row], config: SourceConfig, path: Path, collector: ClipCollector, *, first_line: int
) -> Iterator[Clip]:
    """Convert rows to clips; skip rows of other splits, and count rows without a path."""
    for number, row in enumerate(rows, start=first_line):
        if "split" in row and config.split and str(row["split"] or "") != config.split:
            continue
        if not row["path"]:
            collector.drop("no path", f"{path}:{number}")
            continue
        where = f"{path}:{number}"
        file = str(row["path"])
        kind = str(row.get("kind") or ("video" if Path(file).suffix.lower() in VIDEO_SUFFIXES else "image"))
        if kind not in ("video", "image"):
            raise unknown_name(f"{where}: kind", kind, ("video", "image"))
        start, end = (_seconds(row.get(name), f"{where}: {name}") for name in ("start_seconds", "end_seconds"))
        if end is not None and end <= (start or 0.0):
            raise UserError(f"{where}: end_seconds: got {end:g}; allowed: above start_seconds ({start or 0.0:g})")
        caption = str(row["caption"] or "").strip()
        yield Clip(
            id=str(row.get("id") or file),
            path=str(path.parent / file),
            captions=(caption,) if caption else (),
            kind="image" if kind == "image" else "video",
            start_seconds=start,
            end_seconds=end,
            split=str(row.get("split") or ""),
            label=str(row["label"]) if row.get("label") else None,
        )


def _seconds(value: Any, where: str) -> float | None:
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{where}: got {value!r:.80}; allowed: seconds, from 0")
    return seconds


CSV = Layout(data_set="a csv table", read=read_csv)
PARQUET = Layout(data_set="a parquet table", read=read_parquet)
