# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The rows of a job in Parquet files: always the first so many of them, whenever it is killed."""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

from paddlemix.utils import InputError, alone_in, read_json, replacing, write_atomically

from .pictures import ENDINGS, KINDS

JOB = "job.json"
ROWS_A_GROUP = 32  # that are read together: training reads them in an order of its own
KEEP_EVERY = 30  # seconds: what a kill can cost


class Shards:
    """`with Shards(...) as shards:` a folder of part-00000.parquet and so on, whose rows stand in the order in which
    they are added. Whoever opens it next goes on behind them.

    Each file is written whole. The last one is written again, with more rows, about every KEEP_EVERY seconds and when
    the block ends, however it does.

    Args:
        folder: made where there is none.
        schema: pyarrow's; the names id, error and source are among its columns.
        rows_a_shard: of each file.
        job: a dict that JSON can hold, what the rows depend on. It is kept as job.json.
        images: one of pictures.KINDS: how the `png` or `mp4` of rows that have one is written beside them.

    Then `count` is how many rows are there, `ids` their ids (a set), `failed` how many have an error, and `errors` of
    the first of these (source, error).

    InputError: the folder is another job's, or another process's now, or holds something else or damaged files, or
    cannot be written.
    """

    def __init__(self, folder, schema, rows_a_shard, job, images=None):
        self.folder, self.schema, self.rows_a_shard, self.job = Path(folder), schema, rows_a_shard, job
        self.rows, self.count, self.failed, self.ids, self.errors = [], 0, 0, set(), []
        self.pictures = KINDS[images](self.folder) if images else None

    def __enter__(self):
        with ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(alone_in(self.folder))
                self._check_job()
            except OSError as error:
                raise InputError(f"cannot write into {self.folder}: {error.strerror}; give another folder") from None
            for path in (*self.folder.glob(".part-*"), *self.folder.glob(".job-*")):  # what a kill has left
                path.unlink()
            self._read()
            self.held = held.pop_all()
        self.next = time.monotonic() + KEEP_EVERY
        return self

    def _check_job(self):
        path = self.folder / JOB
        if not path.exists():
            found = next((p for p in self.folder.iterdir() if p.name[0] != "."), None)
            if found:
                raise InputError(f"{found} is there, and no {JOB} of a job to go on with: give a new folder")
            write_atomically(path, json.dumps(self.job, indent=2) + "\n")
        there, asked = read_json(path), json.loads(json.dumps(self.job))
        for name, value in asked.items():
            if there.get(name) != value:
                raise InputError(
                    f"{self.folder} is of another job: its {name} is {_other(there.get(name), value)}, and asked for "
                    f"is {_other(value, there.get(name))}; give another folder, or repeat its command"
                )

    def _read(self):
        """What is in the files that are there."""
        import pyarrow
        from pyarrow import parquet

        paths, self.table = sorted(self.folder.glob("part-*.parquet")), self.schema.empty_table()
        for self.number, path in enumerate(paths):
            try:
                if path != self._path():
                    raise InputError(f"{self._path().name} is missing before it")
                table = parquet.read_table(path, columns=["id", "source", "error"], partitioning=None)
                if path == paths[-1]:
                    self.table = parquet.read_table(path, partitioning=None).cast(self.schema)
            except (pyarrow.ArrowException, OSError, InputError) as error:
                raise InputError(
                    f"{path} cannot be read ({error}): remove it and all files after it, and they are made again"
                ) from None
            self.count += len(table)
            self.ids.update(filter(None, table["id"].to_pylist()))
            for row in table.filter(table["error"].is_valid()).to_pylist():
                self._count_error(row)
        self.number = max(len(paths) - 1, 0)
        self._next_file(is_first=True)

    def _path(self):
        return self.folder / f"part-{self.number:05d}.parquet"

    def _next_file(self, is_first=False):
        is_full = len(self.table) >= self.rows_a_shard
        if is_full:
            self.number, self.table = self.number + 1, self.schema.empty_table()
        if self.pictures and (is_full or is_first):
            self.pictures.open(self.number, self.table["error"].null_count)

    def _count_error(self, row):
        self.failed += 1
        if len(self.errors) < 5:
            self.errors.append((row["source"], row["error"]))

    def add(self, row):
        """A dict of the schema's columns, and perhaps `png` or `mp4`, bytes."""
        for ending in row.keys() & ENDINGS:
            self._written(self.pictures.add, row, ending, row.pop(ending))
        self.rows.append(row)
        self.count += 1
        if row["error"] is not None:
            self._count_error(row)
        if len(self.table) + len(self.rows) >= self.rows_a_shard or time.monotonic() >= self.next:
            self.keep()

    def keep(self):
        """Write what is not in a file yet. InputError where it cannot be; what was written before is there."""
        import pyarrow

        if not self.rows:
            return
        started = time.monotonic()
        table = pyarrow.concat_tables([self.table, pyarrow.Table.from_pylist(self.rows, self.schema)])
        if self.pictures and len(table) >= self.rows_a_shard:
            self._written(self.pictures.close)  # before the rows: whoever finds them finds it whole
        self._written(self._write, table)
        self.rows = []  # before the table: an interrupt between the two must not double rows
        self.table = table
        self._next_file()
        now = time.monotonic()
        self.next = now + max(KEEP_EVERY, 20 * (now - started))  # a twentieth of the time at most

    def _write(self, table):
        from pyarrow import parquet

        with replacing(self._path()) as temporary:
            parquet.write_table(table, temporary, compression="zstd", row_group_size=ROWS_A_GROUP)

    def _written(self, write, *what):
        try:
            write(*what)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise InputError(
                f"cannot write {self._path()}: {reason}. The {self.count - len(self.rows)} rows that were written are "
                "whole, and the same command goes on behind them"
            ) from None

    def finish(self):
        """All rows are there: job.json has their number then."""
        self.keep()
        write_atomically(self.folder / JOB, json.dumps({**self.job, "rows": self.count}, indent=2) + "\n")

    def __exit__(self, *exception):
        with self.held:
            try:
                self.keep()
            finally:
                if self.pictures:
                    self._written(self.pictures.close)


def _other(value, beside):
    """A value as an error shows it; of two lists the first element that differs."""
    if isinstance(value, list) and isinstance(beside, list):
        return next((v for v in value if v not in beside), f"{len(value)} files")
    return value
