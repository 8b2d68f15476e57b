# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The pictures and videos of a job's rows, beside its Parquet files. `Shards` calls them: a picture is written before
its row, so that a kill between the two only makes it again, with the same bytes."""

import hashlib
import io
import json
import re
import tarfile

from paddlemix.utils import InputError, write_atomically

ENDINGS = "png", "mp4"  # names of a row's values that are a file's bytes


def file_name(name, plain=False):
    """An id as the name of a file, another for each id; `plain` without dots. Most ids stay as they are."""
    special = r"[/%\x00-\x1f.]" if plain else r"[/%\x00-\x1f]|^\."
    safe = re.sub(special, lambda found: f"%{ord(found[0]):02X}", name)
    return safe if len(safe.encode()) <= 200 else hashlib.sha256(name.encode()).hexdigest()


class Folder:
    """images/ID.png of each row, or ID.mp4."""

    def __init__(self, folder):
        self.folder = folder / "images"

    def open(self, number, count):
        self.folder.mkdir(exist_ok=True)
        for ending in ENDINGS:
            for path in self.folder.glob(f".*.{ending}"):  # what a kill has left
                path.unlink()

    def add(self, row, ending, data):
        write_atomically(self.folder / f"{file_name(row['id'])}.{ending}", data)

    def close(self):
        pass


class Tars:
    """WebDataset: part-00000.tar beside part-00000.parquet, with ID.png (or .mp4) and ID.json of each that has one."""

    def __init__(self, folder):
        self.folder, self.tar = folder, None

    def open(self, number, count):
        """Go on behind `count` pictures of a part. Where there is none its tar is made with the first one: readers
        refuse an empty one. InputError: the tar has fewer."""
        self.close()
        self.path = path = self.folder / f"part-{number:05d}.tar"
        if not count:
            path.unlink(missing_ok=True)  # what a kill has left
            return
        try:
            with tarfile.open(path, "r:") as tar:
                for _ in range(2 * count):
                    member = tar.next()
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        except (tarfile.TarError, OSError, AttributeError):  # tar.next() is None at its end
            raise InputError(f"{path} is damaged, or has fewer pictures than its Parquet file has rows: remove "
                             "both and all parts after them, and they are made again") from None  # fmt: skip
        self._append("r+b", end)

    def _append(self, mode, end):
        self.file = self.path.open(mode)
        self.file.truncate(end)
        self.file.seek(end)
        self.tar = tarfile.open(fileobj=self.file, mode="w")  # noqa: SIM115

    def add(self, row, ending, data):
        if self.tar is None:
            self._append("wb", 0)
        name = file_name(row["id"], plain=True)
        values = {name: row[name] for name in ("id", "height", "width", "seed") if row.get(name) is not None}
        for kind, content in ((ending, data), ("json", json.dumps(values).encode())):
            member = tarfile.TarInfo(f"{name}.{kind}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.tar.members.clear()  # else each of millions stays in memory
        self.file.flush()

    def close(self):
        if self.tar:
            self.tar.close()
            self.file.close()
            self.tar = None


KINDS = {"png": Folder, "webdataset": Tars}
