# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Accepted drawings as files, until they are finished: a server that starts again finds what was left."""

import fcntl
import json
import os
import re
from pathlib import Path

from paddlemix.utils import InputError, read_json


class Records:
    """request_ID.json of each job in a folder. A file is locked by the process that draws it, and so by no dead one."""

    def __init__(self, folder):
        self.folder, self.files = Path(folder), {}

    def put(self, number, values):
        """Write a record. OSError where it cannot be."""
        path = self.folder / f"request_{number}.json"
        temporary = path.with_name(f".{path.name}")
        file = temporary.open("x", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            json.dump(values, file)
            file.flush()
            temporary.rename(path)  # whole and locked, or not there
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        self.files[number] = file

    def remove(self, number):
        """The job is finished, failed or cancelled."""
        file = self.files.pop(number, None)
        if file is not None:
            (self.folder / f"request_{number}.json").unlink(missing_ok=True)
            file.close()

    def release(self):
        """Leave the records to the next process."""
        while self.files:
            self.files.popitem()[1].close()

    def left(self):
        """(ID, values) of each record that no process has, the oldest first; values are None where it is damaged."""
        paths = [p for p in self.folder.glob("request_*.json") if re.fullmatch(r"request_[0-9a-f]{16}\.json", p.name)]
        for path in sorted(paths, key=lambda p: p.lstat().st_mtime):
            number = path.stem.removeprefix("request_")
            try:
                file = path.open("r+", encoding="utf-8")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another server draws it
                continue
            if not os.fstat(file.fileno()).st_nlink:  # and has finished it by now
                file.close()
                continue
            self.files[number] = file
            try:
                yield number, read_json(path)
            except InputError:
                yield number, None
