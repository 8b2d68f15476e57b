# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`emu3 prepare`: images and texts of any format to rows of codes, on Emu3-Mini's vision tokenizer."""

import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import paddle
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import load_file, save_file

from paddlemix.jobs import formats, inputs, outputs
from paddlemix.jobs.workers import Encode, in_order, make_processor, pixels_of, run
from paddlemix.models.emu3 import Emu3VisionVQModel
from paddlemix.models.emu3.hub import MINI_DIRECTORY
from paddlemix.processors import Emu3VisionVQImageProcessor
from paddlemix.training.prepare_data import schema

ROOT = Path(__file__).resolve().parents[1]
AREA = 32 * 32
SIZES = [(64, 64), (96, 48), (48, 96), (70, 50)]  # width, height


def picture(number):
    """A picture of its own, in one of four shapes."""
    colours = np.random.default_rng(number).integers(0, 256, [5, 5, 3], dtype=np.uint8)
    return Image.fromarray(colours).resize(SIZES[number % 4])


def png(number):
    file = io.BytesIO()
    picture(number).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the pictures images/0.png to images/11.png."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for i in range(12):
        Path(f"images/{i}.png").write_bytes(png(i))
    return tmp_path


def arguments(*data, output="out", **options):
    options = {"vq_model_path": "emu3-mini", "image_area": AREA, **options}
    return ["prepare", "--data_path", *map(str, data), f"--output_path={output}",
            *(f"--{name}={value}" for name, value in options.items())]  # fmt: skip


def rows_in(output="out"):
    """All rows that a folder holds, as training reads them."""
    return [row for path in sorted(Path(output).glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def write_lines(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def captions(count=12):
    return [{"id": f"row {i}", "text": f"caption {i}", "image": f"images/{i % 12}.png"} for i in range(count)]


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: "), (code, out, err)
    assert all(word in err for word in words), err


# --- sizes and pixels


def recipe(image, area, least, most):
    """What the original's prepare_data.py and its vision processor do, step by step, with PIL and NumPy."""
    width, height = image.size
    scale = (area / (width * height)) ** 0.5
    image = image.resize((int(round(width * scale)), int(round(height * scale))))
    sides = [round(side / 8) * 8 for side in image.size]
    if sides[0] * sides[1] > most:
        sides = [math.floor(side / math.sqrt(image.width * image.height / most) / 8) * 8 for side in image.size]
    elif sides[0] * sides[1] < least:
        sides = [math.ceil(side * math.sqrt(least / (image.width * image.height)) / 8) * 8 for side in image.size]
    pixels = np.asarray(image.resize(sides, Image.Resampling.BICUBIC)) / 255
    return (pixels.transpose(2, 0, 1) - 0.5) / 0.5


@pytest.mark.parametrize("size", [(640, 424), (300, 1200), (64, 64), (801, 799), (1000, 731)])
@pytest.mark.parametrize("area", [518400, 262144, 1048576])
def test_pixels_are_the_originals(monkeypatch, size, area):
    image = picture(1).resize(size)
    pixels = pixels_of(image, of_released_bounds(monkeypatch, area), area)
    expected = recipe(image, area, 512 * 512, 1024 * 1024)
    assert pixels.shape == expected.shape and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)


def of_released_bounds(monkeypatch, area):
    released = Emu3VisionVQImageProcessor()
    monkeypatch.setattr(Emu3VisionVQImageProcessor, "from_pretrained", lambda name: released)
    return make_processor("released", area)


@pytest.mark.parametrize(("area", "side"), [(147456, 384), (1104 * 1104, 1104)])
def test_an_area_beyond_the_processors_bounds(monkeypatch, area, side):
    """No enlarging to what the processor takes at least, no shrinking."""
    processor = of_released_bounds(monkeypatch, area)
    assert pixels_of(picture(0), processor, area).shape == (3, side, side)
    pixels = pixels_of(picture(1), processor, area)
    assert pixels[0].size == pytest.approx(area, rel=0.03)
    np.testing.assert_allclose(pixels, recipe(picture(1), area, 1, 10**9), rtol=0, atol=1e-6)


# --- formats


@pytest.fixture(scope="module")
def expected_codes():
    """Of the first pictures, by the recipe and a model of its own: [h, w]."""
    model = Emu3VisionVQModel.from_pretrained("emu3-mini")
    with paddle.no_grad():
        return [model.encode(paddle.to_tensor(recipe(picture(i), AREA, 1, 1 << 30)[None].astype("float32")))[0].numpy()
                for i in range(4)]  # fmt: skip


def as_json(rows):
    Path("train.json").write_text(json.dumps(rows))
    return "train.json"


def as_lines(rows):
    write_lines("train.jsonl", rows)
    return "train.jsonl"


def as_parquet(rows):
    parquet.write_table(pa.Table.from_pylist(rows), "train.parquet")
    return "train.parquet"


def as_tar(files):
    with tarfile.open("train.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return "train.tar"


def as_folder(files):
    for name, data in files.items():
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).write_bytes(data)
    return "photos"


N = range(4)
FORMATS = {  # name: (a function that writes the data and returns its path, the ids, whether it has answers)
    "the original's list": (
        lambda: as_json([{"name": f"n{i}", "text": f"text {i}", "image": f"images/{i}.png"} for i in N]), "n{}", False,
    ),
    "lines": (
        lambda: as_lines([{"id": i, "text": f"text {i}", "image": f"images/{i}.png", "response": None} for i in N]),
        "{}", False,
    ),
    "lines with answers, without ids": (
        lambda: as_lines([{"text": f"text {i}", "image": f"images/{i}.png", "response": f"answer {i}"} for i in N]),
        "train-{1}", True,
    ),
    "messages": (
        lambda: as_json([
            {"messages": [{"role": "user", "content": f"<image>\ntext {i}"},
                          {"role": "assistant", "content": f"answer {i}"}], "images": [f"images/{i}.png"]} for i in N
        ]), "train-{1}", True,
    ),
    "Parquet with paths": (
        lambda: as_parquet([{"id": f"p{i}", "text": f"text {i}", "image": f"images/{i}.png"} for i in N]), "p{}", False,
    ),
    "Parquet with bytes": (
        lambda: as_parquet([{"text": f"text {i}", "image": png(i), "response": f"answer {i}"} for i in N]),
        "train-{1}", True,
    ),
    "Hugging Face's Parquet": (
        lambda: as_parquet([
            {"text": f"text {i}", "image": {"bytes": png(i) if i else None, "path": f"images/{i}.png"}} for i in N
        ]), "train-{1}", False,
    ),
    "WebDataset with .txt": (
        lambda: as_tar({f"a/{i}.{end}": data for i in N for end, data in
                        (("PNG", png(i)), ("txt", b"text %d\n" % i), ("json", b'{"width": 3, "key": "x"}'))}),
        "a/{}", False,
    ),
    "WebDataset with .json": (
        lambda: as_tar({f"{i}.{end}": data for i in N for end, data in
                        (("json", b'{"text": "text %d", "response": "answer %d"}' % (i, i)), ("png", png(i)))}),
        "{}", True,
    ),
    "a folder": (
        lambda: as_folder({f"{i}/x.y{end}": data for i in N for end, data in
                           ((".PNG", png(i)), (".txt", b"\xef\xbb\xbftext %d\n" % i))}),
        "{}/x.y", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(command, folder, expected_codes, form):
    write, name, answers = FORMATS[form]
    path = write()
    code, out, err = command(*arguments(path))
    assert (code, out, err) == (0, "wrote 4 rows to out\n", "")
    rows = rows_in()
    assert [row["id"] for row in rows] == [name.format(i, i + 1) for i in N]
    assert [row["text"] for row in rows] == [f"text {i}" for i in N]
    assert [row["response"] for row in rows] == [f"answer {i}" if answers else None for i in N]
    assert all(row["turns"] is None and row["error"] is None and row["source"].startswith(path) for row in rows)
    for row, codes in zip(rows, expected_codes, strict=True):
        assert [row["height"], row["width"]] == list(codes.shape) and row["codes"] == codes.ravel().tolist()


def test_a_conversation(command, folder):
    texts = ["<image> one", "two", "three", "four <image>", "five", "six"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    llava = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    lines = [
        {"id": "x", "messages": messages, "images": ["images/0.png"]},
        {"id": "y", "conversations": llava, "image": "images/0.png"},
        {"id": "z", "text": "a ring", "image": "images/0.png"},
    ]
    names = {name for line in lines for name in line}
    lines += [dict.fromkeys(names) | line | {"id": line["id"] * 2} for line in lines]  # as Parquet has them
    write_lines("talk.jsonl", lines)
    assert command(*arguments("talk.jsonl"))[0] == 0
    rows = rows_in()
    for row in rows[:2] + rows[3:5]:
        assert (row["text"], row["response"]) == ("one", "two")
        assert row["turns"] == [{"text": "three", "response": "four"}, {"text": "five", "response": "six"}]
    for row in (rows[2], rows[5]):
        assert (row["text"], row["response"], row["turns"], row["error"]) == ("a ring", None, None, None)


def test_an_image_of_several_rows_is_encoded_once(command, folder, monkeypatch):
    encoded, encode = [], Emu3VisionVQModel.encode

    def counted(self, pixels):
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Emu3VisionVQModel, "encode", counted)
    write_lines("train.jsonl", [{"text": f"text {i}", "image": f"images/{i // 3 * 4}.png"} for i in range(9)])
    for size, calls in ((1, [1, 1, 1]), (2, [2, 1])):
        assert command(*arguments("train.jsonl", output=f"out{size}", batch_size=size))[0] == 0
        assert encoded == calls
        encoded.clear()
    rows = rows_in("out1")
    assert [row["text"] for row in rows] == [f"text {i}" for i in range(9)] and rows_in("out2") == rows
    assert [row["codes"] for row in rows] == [rows[i - i % 3]["codes"] for i in range(9)]
    assert rows[0]["codes"] != rows[3]["codes"]


def test_the_area_is_the_checkpoints_own(command, folder):
    write_lines("train.jsonl", captions(1))
    assert command("prepare", "--data_path=train.jsonl", "--output_path=out", "--vq_model_path=emu3-mini")[0] == 0
    assert [(row["height"], row["width"]) for row in rows_in()] == [(8, 8)]


def test_several_files_at_once(command, folder):
    """Files of one name give ids that differ; a folder of tars is all of them."""
    for name in "ab":
        Path(name).mkdir()
        Path(f"{name}/train.jsonl").write_text('\ufeff{"text": "x", "image": "../images/0.png"}\n\n \n')
    Path("c").mkdir()
    shutil.move(as_tar({"k.png": png(0), "k.txt": b"x"}), "c/2.tar")
    shutil.move(as_tar({"j.png": png(0), "j.txt": b"x"}), "c/1.tar")
    Path("images/0.txt").write_text("x")
    assert command(*arguments("a/train.jsonl", "b/train.jsonl", "c", "images"))[0] == 0
    ids = [row["id"] for row in rows_in()]
    assert ids[:5] == ["a/train-1", "b/train-1", "j", "k", "images/0"] and len(ids) == 16


def test_a_list_is_read_in_parts(folder, monkeypatch):
    rows = [{"id": "\u00e9\U0001f600", "n": [1, {"a": "]"}]}, 12345, "x,]", None, {}, -1.5e3]
    for text in (json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False), "[]", " [ ] "):
        Path("list.json").write_text(text, encoding="utf-8")
        for part in (1, 2, 3, 7, 1000):
            monkeypatch.setattr(formats, "PART", part)
            try:
                found = list(inputs.read_rows(inputs.open_sources(["list.json"])))
            except inputs.InputError as error:
                assert "holds no row" in str(error) and len(text) < 9
                continue
            assert [row.values for row in found if row.error is None] == [rows[0], {}]
            assert [row.error for row in found][1] == "a row must be a JSON object, got 12345"


# --- mistakes


BAD = [  # a line, words of its error
    ('{"id": "a", "image": "images/0.png"}', "text is missing"),
    ('{"id": "b", "text": " ", "image": "images/0.png"}', "text is empty"),
    ('{"id": "c", "text": 7, "image": "images/0.png"}', "text must be a text, got 7"),
    ('{"id": "d", "text": "\\ud800", "image": "images/0.png"}', "text is not UTF-8"),
    ('{"id": "good", "text": "x", "image": "images/0.png"}', "id 'good' is doubled"),
    ('{"id": ["e"], "text": "x", "image": "images/0.png"}', "id must be a text"),
    ('{"id": "", "text": "x", "image": "images/0.png"}', "id is empty"),
    ('{"id": "f", "text": "x", "image": "images/none.png"}', "images/none.png: there is no such file"),
    ('{"id": "g", "text": "x", "image": "bad.png"}', "bad.png: not a picture that Pillow can read"),
    ('{"id": "h", "text": "x", "image": "cut.png"}', "cut.png: cannot be read"),
    ('{"id": "i", "text": "x", "image": "narrow.png"}', "is too narrow"),
    ('{"id": "i2", "text": "x", "image": "line.png"}', "is too small"),
    ('{"id": "j", "text": "x", "image": ["images/0.png"]}', "image must be a path"),
    ('{"id": "k", "text": "x"}', "image must be a path"),
    ('{"id": "l", "text": "x", "image": "images/0.png", "response": ""}', "response is empty"),
    ('{"id": "m", "text": "x", "image": "\\ud800\\u0000/etc"}', "there is no such file"),
    ('{"id": "n", "messages": [], "images": ["images/0.png"]}', "messages must be questions and answers"),
    ('{"id": "o", "messages": [{"role": "system", "content": "x"}, {}], "images": ["images/0.png"]}', "role user"),
    ('{"id": "p", "messages": [1, 2], "images": []}', "images must be a list of one image"),
    ('{"id": "s", "conversations": [{"from": "human"}, 3], "image": "x"}', "the content of message 1 is missing"),
    ('{"id": "q", "text": "x", "image": "images/0.png"', "not valid JSON"),
    ('{"id": "r", "text": "x", "image": "images"}', "images: this is a directory"),
    ("[" * 100000, "not valid JSON"),
    ("\udcff", "not valid JSON"),
]


def test_bad_rows(command, folder):
    Path("bad.png").write_text("no picture")
    Path("cut.png").write_bytes(png(0)[:500])
    Image.new("RGB", (500, 50)).save("narrow.png")
    Image.new("RGB", (3000, 1)).save("line.png")
    good = '{"id": "%s", "text": "x", "image": "images/1.png"}'
    lines = [good % "good", *(line for line, _ in BAD), good % "last"]
    Path("rows.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    code, out, err = command(*arguments("rows.jsonl", batch_size=2, stats_json="stats.json"))
    assert (code, out) == (0, f"wrote 2 rows, and {len(BAD)} rows with errors to out\n")
    assert err.startswith("note: rows.jsonl:2: text is missing\n") and err.count("\n") == 6
    assert err.endswith(f"note: and {len(BAD) - 5} more: their column `error` says why\n")
    first, *bad, last = rows_in()
    assert first["codes"] == last["codes"] and first["error"] is last["error"] is None
    for number, (row, (line, words)) in enumerate(zip(bad, BAD, strict=True), 2):
        assert words in row["error"] and row["source"] == f"rows.jsonl:{number}", (row, line)
        assert row["codes"] is row["height"] is row["width"] is None and len(row["error"]) < 1001
    stats = json.loads(Path("stats.json").read_text())
    assert (stats["rows"], stats["errors"]) == (len(BAD) + 2, len(BAD))


def test_bad_rows_of_other_formats(command, folder):
    as_folder({"a.png": png(0), "a.txt": b"x", "a.jpg": png(1), "b.png": png(2), "c.png": png(3), "c.txt": b"\xff",
               os.fsdecode(b"d\xff.png"): png(4), os.fsdecode(b"d\xff.txt"): b"x"})  # fmt: skip
    as_parquet([{"id": "v", "text": "x", "image": b"no picture"}, {"id": None, "text": None, "image": b""}])
    as_tar({"s.png": png(0)[:90], "s.txt": b"x", "t.txt": b"x", "u.json": b"[]", "u.png": png(0)})
    code, _, _ = command(*arguments("photos", "train.parquet", "train.tar"))
    found = {row["source"]: row["error"] or "" for row in rows_in()}
    words = {
        "photos/a.jpg": "", "photos/a.png": "id 'photos/a' is doubled", "photos/b.png": "b.txt: there is no such file",
        "photos/c.png": "c.txt is not UTF-8", "photos/d\\udcff.png": "id is not UTF-8",
        "train.parquet:1": "not a picture", "train.parquet:2": "text is missing", "train.tar:s": "cannot be read",
        "train.tar:t": "image must be", "train.tar:u": "the .json must hold an object",
    }  # fmt: skip
    assert code == 0 and list(found) == list(words)
    assert all(words[source] in error and bool(error) == bool(words[source]) for source, error in found.items()), found


def test_a_parquet_file_that_is_damaged_inside(command, folder):
    rows = [{"id": f"{i}", "text": "x", "image": png(i % 12) + bytes(np.random.default_rng(i).bytes(90_000))}
            for i in range(64)]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), "train.parquet", row_group_size=16, compression="gzip")
    data = bytearray(Path("train.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50_000] = bytes(50_000)
    Path("train.parquet").write_bytes(data)
    assert command(*arguments("train.parquet"))[0] == 0
    errors = [row["error"] for row in rows_in()]
    assert len(errors) == 64 and errors[:16] == [None] * 16 and "damaged here" in errors[-1]


def test_a_folder_that_cannot_be_made(command, folder, monkeypatch):
    """Neither by a job nor by `emu3 batch`: one line, before a model is read."""
    monkeypatch.setattr(Emu3VisionVQModel, "from_pretrained", None)
    write_lines("rows.jsonl", captions())
    Path("file").touch()
    for output in ("file", "file/out"):
        words = f" {output} cannot be made (there is a file): give the name of a folder"
        refused(command(*arguments("rows.jsonl", output=output)), "--output_path" + words)
        job = ["batch", "encode", "--input=rows.jsonl", "--output", output, "--vq_model_path=emu3-mini"]
        refused(command(*job), "--output" + words)


def test_none_of_the_rows_is_good(command, folder):
    write_lines("rows.jsonl", [{"text": "x", "image": "none.png"}] * 2)
    code, out, err = command(*arguments("rows.jsonl"))
    assert (code, out) == (2, "") and err.endswith("none of the 2 rows could be prepared; out has their errors\n")


def test_files_of_no_such_format(command, folder):
    def bad(name, data, *words):
        Path(name).write_bytes(data)
        refused(command(*arguments(name)), name, *words)

    refused(command(*arguments("none.json")), "none.json: there is no such file")
    Path("empty").mkdir()
    refused(command(*arguments("empty")), "empty holds no image")
    Path("empty/train.jsonl").write_text("{}")
    refused(command(*arguments("empty")), "give the name of the list, such as empty/train.jsonl")
    bad("x.csv", b"a,b", "accepted are .json, .jsonl, .parquet, .tar")
    bad("x.json", b"hello", "neither a JSON list nor lines")
    bad("y.json", b"", "holds no row")
    bad("z.json", b'[{"text": "x"}, {"te', "cut short")
    bad("w.json", b'[{"text": "x"} {"text": "y"}]', "no comma before '{")
    bad("v.json", b'[{"text": "\xff"}]', "not UTF-8")
    bad("x.parquet", b"PAR1 and more", "not a Parquet file")
    bad("x.tar", b"no tar" * 1000, "not a tar")
    whole = Path(as_tar({f"{i}.txt": b"x" for i in range(4)})).read_bytes()  # a header and a block for each
    bad("cut.tar", whole[:1500], "cut short")
    bad("header.tar", whole[:1024] + b"\1" * 512 + whole[1536:], "no header at byte 1024")
    refused(command(*arguments("images", "./images")), "given twice")
    refused(command(*arguments("images", image_area=0)), "image_area must be")
    refused(command(*arguments("images", batch_size=0)), "--batch_size must be")
    assert not Path("out").exists()


# --- in batches, and in order


def test_groups_and_their_order():
    """Images of one size are encoded together, none waits for long, and each row comes back once, in its place."""
    sizes = [random.Random(i).choice([8, 8, 16]) if i % 9 else None for i in range(200)]  # None: a bad row

    class Model:
        def encode(self, pixels):
            calls.append([int(number) for number in pixels.numpy()[:, 0, 0, 0]])
            return pixels[:, 0, ::8, ::8]

    def read(row, values):
        if sizes[row] is None:
            raise inputs.InputError("bad")
        started.append(row)
        return np.full([3, 8, sizes[row]], row, np.float32)

    class Begun(int):
        id = source = error = None

    for size, threads in ((1, 1), (4, 3), (50, 2)):
        calls, started = [], []
        found = list(run(Encode(Model(), read, size, threads), enumerate(map(Begun, range(200)))))
        assert all(len({sizes[row] for row in call}) == 1 and len(call) <= size for call in calls)
        assert sorted(sum(calls, [])) == sorted(started) == [row for row in range(200) if sizes[row]]
        places = {number: place for place, (number, _) in enumerate(found)}
        assert all(place <= number + 9 * size for number, place in places.items())  # so that few wait to be written
        whole = list(in_order(found))
        assert [values["error"] for values in whole] == [None if one else "bad" for one in sizes]
        assert all(values["codes"].tolist() == [row] * (sizes[row] // 8)
                   for row, values in enumerate(whole) if sizes[row])  # fmt: skip


@pytest.mark.parametrize("engine", [True, False])
def test_batches_do_not_change_a_row(command, folder, monkeypatch, engine):
    """By the vision engine and by Paddle's layers."""
    if not engine:
        monkeypatch.setattr("paddlemix.models.emu3.vision_engine.can_run", lambda *args: False)
    write_lines("rows.jsonl", [*captions(17), {"id": "bad"}])
    found = []
    for size in (1, 3, 4):
        assert command(*arguments("rows.jsonl", output=f"out{size}", batch_size=size))[0] == 0
        found.append(rows_in(f"out{size}"))
    assert found[0] == found[1] == found[2] and len(found[0]) == 18


# --- killed, interrupted, refused


def start(*more):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen([sys.executable, "-m", "paddlemix.commands", *more], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for(process, pattern, count):
    while process.poll() is None and len(list(Path("out").glob(pattern))) < count:
        time.sleep(1e-4)


@pytest.mark.long
def test_killed_and_gone_on(command, folder):
    """At moments of every kind; the rows are those of a run that nobody killed."""
    write_lines("rows.jsonl", [{"id": "row 3"}, *captions(90)])
    line = arguments("rows.jsonl", shard_rows=4, batch_size=2)
    counts = []
    for pattern, count in (("part-*", 3), (".part-*", 1)):
        process = start(*line)
        wait_for(process, pattern, count)
        process.kill()
        process.communicate()
        rows = rows_in()
        counts.append(len(rows))
        assert [row["source"] for row in rows] == [f"rows.jsonl:{i + 1}" for i in range(len(rows))]
    assert 12 <= counts[0] <= counts[1] < 91
    code, out, _ = command(*line)
    assert code == 0 and out.startswith(f"going on behind {counts[-1]} of 91 rows\n")
    assert command(*arguments("rows.jsonl", output="whole"))[0] == 0
    assert rows_in() == rows_in("whole") and [row["error"] for row in rows_in()].count(None) == 89
    assert not list(Path("out").glob(".part*"))
    assert json.loads(Path("out/job.json").read_text())["rows"] == 91
    code, out, _ = command(*line)
    assert code == 0 and out == "going on behind 91 of 91 rows\nwrote 89 rows, and 2 rows with errors to out\n"


@pytest.mark.long
@pytest.mark.parametrize(("how", "code", "word"), [(signal.SIGTERM, -15, "ended"), (signal.SIGINT, 130, "interrupted")])
def test_what_is_encoded_is_kept(command, folder, how, code, word):
    write_lines("rows.jsonl", captions(1500))
    process = start(*arguments("rows.jsonl", shard_rows=20))
    wait_for(process, "part-*", 1)
    process.send_signal(how)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert err == f"\n{word}: what is encoded is in out, and the same command goes on from there\n"
    kept = rows_in()
    assert 20 <= len(kept) < 1500 and [row["id"] for row in kept] == [f"row {i}" for i in range(len(kept))]


def test_a_file_that_is_not_full_is_written_too(folder, monkeypatch):
    """When the block ends, however it does, and after a while; the next run fills it up."""

    def add(count):
        for i in range(shards.count, shards.count + count):
            shards.add({**dict.fromkeys(schema().names), "id": f"{i}", "codes": np.arange(i, dtype=np.int32)})

    for there, error in ((0, KeyboardInterrupt), (3, ValueError)):
        with pytest.raises(error), outputs.Shards("out", schema(), 5, {}) as shards:
            assert shards.count == there and shards.ids == {f"{i}" for i in range(there)}
            add(3)
            raise error
    monkeypatch.setattr(outputs, "KEEP_EVERY", 0)
    with outputs.Shards("out", schema(), 5, {}) as shards:
        shards.next = 0
        add(1)
        assert [row["id"] for row in rows_in()] == [f"{i}" for i in range(7)]
    assert [row["codes"] for row in rows_in()] == [list(range(i)) for i in range(7)]
    assert [len(parquet.read_table(path)) for path in sorted(Path("out").glob("part-*"))] == [5, 2]


def test_two_at_once(command, folder):
    job = {"a": 1}
    with outputs.Shards("out", schema(), 10, job):
        refused(command(*arguments("images")), "another process writes into out")
        shutil.rmtree("out/none", ignore_errors=True)
    with outputs.Shards("out", schema(), 10, job) as shards:  # which is free again
        assert shards.count == 0


def test_another_jobs_folder(command, folder):
    write_lines("rows.jsonl", captions())
    assert command(*arguments("rows.jsonl"))[0] == 0
    before = rows_in()
    refused(command(*arguments("rows.jsonl", image_area=4096)), "its image_area is 1024, and asked for is 4096")
    write_lines("rows.jsonl", captions(13))
    refused(command(*arguments("rows.jsonl")), "its data is rows.jsonl: ", "12 rows", "13 rows")
    shutil.copytree(MINI_DIRECTORY / "vision_tokenizer", "other")
    weights = load_file("other/model.safetensors")
    weights["encoder.conv_in.bias"] += 1
    save_file(weights, "other/model.safetensors", {"format": "pt"})
    write_lines("rows.jsonl", captions())
    refused(command(*arguments("rows.jsonl", vq_model_path="other")), "its vq_model is emu3-mini ", "other ")
    refused(command(*arguments("rows.jsonl", output="images")), "no job.json")
    assert rows_in() == before


def test_files_that_are_gone(command, folder):
    write_lines("rows.jsonl", captions())
    line = arguments("rows.jsonl", shard_rows=5)
    assert command(*line)[0] == 0
    whole = rows_in()
    Path("out/part-00001.parquet").write_bytes(b"PAR1")
    refused(command(*line), "part-00001.parquet cannot be read")
    Path("out/part-00001.parquet").unlink()
    refused(command(*line), "part-00002.parquet cannot be read (part-00001.parquet is missing before it): remove it")
    Path("out/part-00002.parquet").unlink()
    assert command(*line)[0] == 0 and rows_in() == whole


def test_a_full_disk(command, folder):
    """A limit on the size of a file stands in for it: two files fit, the third does not."""
    rows = captions()
    rows[7]["text"] = random.Random(1).randbytes(100_000).hex()
    write_lines("rows.jsonl", rows)
    line, before = arguments("rows.jsonl", shard_rows=3), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        refused(command(*line), "cannot write", "part-00002.parquet: File too large. The 6 rows that were written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(rows_in()) == 6 and not list(Path("out").glob(".part*"))
    assert command(*line)[0] == 0 and [row["text"] for row in rows_in()] == [row["text"] for row in rows]
