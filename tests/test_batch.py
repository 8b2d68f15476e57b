# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`emu3 batch` on Emu3-Mini: every task, bad rows, kills, and two workers of a real Ray (skipped where Ray is not
installed)."""

import io
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from paddlemix.jobs import pictures
from paddlemix.jobs.inputs import open_sources, read_rows
from paddlemix.jobs.outputs import Shards
from paddlemix.jobs.workers import schema
from paddlemix.pipelines import Emu3Pipeline
from paddlemix.utils import InputError

ROOT = Path(__file__).resolve().parents[1]
SCENE = ROOT / "paddlemix" / "demo_images" / "emu3_scene.png"
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def emu3():
    pipeline = Emu3Pipeline.from_pretrained("emu3-mini", device="cpu")
    pipeline.load()
    return pipeline


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batch(task, *files, output="out", **options):
    name = "model_path" if task in ("generate", "understand") else "vq_model_path"
    return ["batch", task, "--input", *files, f"--output={output}", f"--{name}=emu3-mini",
            *(f"--{key}={value}" if value is not None else f"--{key}" for key, value in options.items())]  # fmt: skip


def rows_in(output="out"):
    return [row for path in sorted(Path(output).glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def codes_in(output="out"):
    """{id: codes [h, w]} of the rows that have them."""
    rows = [row for row in rows_in(output) if row["codes"] is not None]
    return {row["id"]: np.reshape(row["codes"], [row["height"], row["width"]]) for row in rows}


def write_lines(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def prompts(count):
    """Of sizes that end at different times, so that rows join as others leave."""
    return [{"id": f"row {i}", "prompt": f"a {('red', 'blue')[i % 2]} ring", "height": 8 * (1 + i % 5), "width": 24}
            for i in range(count)]  # fmt: skip


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: "), (code, out, err)
    assert all(word in err for word in words), err


def drawn_by(emu3, prompt, **options):
    generation = emu3.generate_steps(prompt, **options)
    for _ in generation:
        pass
    return generation.drawings[0].codes(), generation.images()[0]


# --- every task gives what the pipeline gives


def test_generate(command, folder, emu3):
    """A row's values come before the command line's, and nothing of a row is another's."""
    rows = [
        {"id": "a/1", "prompt": "a red ring", "seed": 5},
        {"id": 2, "prompt": "a red ring", "seed": 5, "ratio": "2:1", "guidance_scale": 1, "other": [1]},
        {"id": "c", "prompt": None, "text": "a blue ring", "seed": 7, "height": 32, "temperature": 2.0, "top_k": 0,
         "top_p": 0.9},
        {"id": "d", "prompt": "a blue ring", "seed": 8, "negative_prompt": "red", "guidance_scale": None},
    ]
    write_lines("rows.jsonl", rows)
    code, out, err = command(*batch("generate", "rows.jsonl", images=None, temperature=0.7, height=16, width=16))
    assert (code, out, err) == (0, "wrote 4 rows to out\n", "")
    given = {"temperature": 0.7, "height": 16, "width": 16}
    for row, found in zip(rows, rows_in(), strict=True):
        own = {name: value for name, value in row.items() if name not in ("id", "prompt", "text", "other")}
        codes, image = drawn_by(emu3, row["prompt"] or row["text"], **{**given, **own})
        assert found["id"] == str(row["id"]) and found["seed"] == row["seed"] and found["error"] is None
        assert (codes_in()[found["id"]] == codes).all() and found["source"] == f"rows.jsonl:{rows.index(row) + 1}"
        with Image.open(f"out/images/{found['id'].replace('/', '%2F')}.png") as png:
            assert (np.asarray(png) == np.asarray(image)).all() and png.text["seed"] == str(row["seed"])


def test_seeds_of_rows_without_one(command, folder):
    """They follow from --seed and the id: neither the order nor the other rows matter."""
    rows = [{"id": f"{i}", "prompt": "a ring", "temperature": 3.0} for i in range(12)]
    write_lines("rows.jsonl", rows)
    write_lines("mixed.jsonl", random.Random(1).sample(rows[:9], 9))
    small = {"height": 16, "width": 16}
    assert command(*batch("generate", "rows.jsonl", **small))[0] == 0
    assert command(*batch("generate", "mixed.jsonl", output="mixed", batch_size=1, **small))[0] == 0
    assert command(*batch("generate", "rows.jsonl", output="s1", seed=1, **small))[0] == 0
    all_codes, mixed, others = codes_in(), codes_in("mixed"), codes_in("s1")
    assert len({codes.tobytes() for codes in all_codes.values()}) > 6
    assert all((all_codes[name] == codes).all() for name, codes in mixed.items()) and len(mixed) == 9
    assert any((all_codes[name] != codes).any() for name, codes in others.items())
    assert len({row["seed"] for row in rows_in() + rows_in("s1")}) == 24


def test_understand(command, folder, emu3):
    scene = Image.open(SCENE)
    questions = ["How many objects are there?", None, "What is it?", "Please describe the image"]
    data = [SCENE.read_bytes(), SCENE.read_bytes(), b"no picture", SCENE.read_bytes()]
    table = {"id": list("abcd"), "image": data, "question": questions, "temperature": [None, None, None, 3.0],
             "seed": [None, None, None, 4.0]}  # fmt: skip
    parquet.write_table(pa.table(table), "rows.parquet")
    code, out, err = command(*batch("understand", "rows.parquet", max_new_tokens=9, question="What colour is it?"))
    assert code == 0 and out == "wrote 3 rows, and 1 rows with errors to out\n" and "rows.parquet:3: " in err
    a, b, c, d = rows_in()
    assert a["answer"] == "two" and a["seed"] is None
    assert b["answer"] == emu3.understand(scene, "What colour is it?", max_new_tokens=9)
    assert c["answer"] is None and "not a picture" in c["error"]
    assert d["answer"] == emu3.understand(scene, "Please describe the image", max_new_tokens=9, temperature=3.0, seed=4)
    assert d["seed"] == 4


def test_encode_and_decode(command, folder, emu3):
    """From a WebDataset to codes, and from these to a WebDataset."""
    sizes, image = [(64, 64), (96, 48), (64, 64)], {}
    with tarfile.open("in.tar", "w") as tar:
        for i, size in enumerate(sizes):
            colours = np.random.default_rng(i).integers(0, 256, [5, 5, 3], dtype=np.uint8)
            file, member = io.BytesIO(), tarfile.TarInfo(f"x/p{i}.png")
            image[f"x/p{i}"] = Image.fromarray(colours).resize(size)
            image[f"x/p{i}"].save(file, "PNG")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    assert command(*batch("encode", "in.tar", batch_size=2))[:2] == (0, "wrote 3 rows to out\n")
    found = codes_in()
    for name, one in image.items():
        [step] = emu3.autoencode_steps(one)
        assert (found[name] == step.codes).all()
    assert command(*batch("encode", "in.tar", output="small", image_area=32 * 32))[0] == 0
    assert [codes.shape for codes in codes_in("small").values()] == [(4, 4), (3, 6), (4, 4)]
    code, out, err = command(*batch("decode", "out/part-00000.parquet", output="back", images="webdataset"))
    assert (code, out, err) == (0, "wrote 3 rows to back\n", "")
    assert [(row["codes"], row["height"]) for row in rows_in("back")] == [(None, 8), (None, 6), (None, 8)]
    with tarfile.open("back/part-00000.tar") as tar:
        assert tar.getnames() == [f"x%2Fp{i}.{ending}" for i in range(3) for ending in ("png", "json")]
        for name, one in image.items():
            png = Image.open(tar.extractfile(f"{name.replace('/', '%2F')}.png"))
            assert (np.asarray(png) == np.asarray(emu3.autoencode(one))).all()
        assert json.load(tar.extractfile("x%2Fp1.json")) == {"id": "x/p1", "height": 6, "width": 12}


# --- bad rows, bad arguments

BAD = {  # task: [(a row, words of its error)]
    "generate": [
        ({}, "prompt is missing"), ({"prompt": 7}, "prompt must be a text"), ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "x", "seed": -1}, "seed must be"), ({"prompt": "x", "seed": "1"}, "seed must be"),
        ({"prompt": "x", "ratio": "0:1"}, "ratio must be"), ({"prompt": "x", "top_p": 2}, "top_p must be"),
        ({"prompt": "x", "height": 1}, "a side takes at least"),
        ({"prompt": "x", "ratio": 1.5}, "ratio must be"), ({"prompt": "x", "ratio": 0}, "ratio must be"),
        ({"prompt": "x", "negative_prompt": 1}, "negative_prompt must be a text"),
        ({"prompt": "x", "negative_prompt": "\ud800"}, "negative_prompt is not UTF-8"),
        ({"prompt": "x", "height": 10**6, "width": 10**6}, "memory"), ({"prompt": "x" * 90_000}, "positions"),
        ({"prompt": ["x"], "guidance_scale": {}}, "prompt must be a text"),
    ],
    "understand": [
        ({"question": "x"}, "image must be"), ({"image": "none.png"}, "no such file"),
        ({"image": "scene.png", "question": 3}, "question must be a text"),
        ({"image": "scene.png", "max_new_tokens": 0}, "max_new_tokens must be"),
    ],
    "encode": [({"image": ""}, "image must be"), ({"image": "rows.jsonl"}, "not a picture")],
    "decode": [
        ({}, "codes are missing"), ({"codes": [1, 2, 3], "height": 2, "width": 2}, "3 codes cannot be 2 x 2"),
        ({"codes": [1, 2]}, "height must be"), ({"codes": [[1, -1]]}, "codes must be"),
        ({"codes": "abc"}, "codes must be"), ({"codes": [[1, 10**6]]}, "codes must be 0 to"),
        ({"codes": [[[1]]]}, "rows of whole numbers"),
        ({"codes": [1, 2, 3], "frames": 2, "height": 1, "width": 1}, "3 codes cannot be 2 x 1 x 1"),
        ({"codes": [1, 2], "frames": 2, "height": 1}, "width must be"),
    ],
}  # fmt: skip
GOOD = {
    "generate": {"prompt": "a ring", "seed": 1}, "understand": {"image": "scene.png"}, "encode": {"image": "scene.png"},
    "decode": {"codes": [[1, 2], [3, 4]]},
}  # fmt: skip


@pytest.mark.parametrize("task", BAD)
def test_bad_rows(command, folder, task):
    Path("scene.png").write_bytes(SCENE.read_bytes())
    write_lines("rows.jsonl", [GOOD[task], *(row for row, _ in BAD[task]), GOOD[task]])
    small = {"height": 16, "width": 16} if task == "generate" else {}
    assert command(*batch(task, "rows.jsonl", **small))[0] == 0
    first, *bad, last = rows_in()
    assert first["error"] is last["error"] is None
    assert first["codes"] == last["codes"] and first["answer"] == last["answer"]
    for found, (row, words) in zip(bad, BAD[task], strict=True):
        assert words in (found["error"] or ""), (row, found["error"])
        assert found["codes"] is found["answer"] is None


def test_bad_arguments(command, folder):
    write_lines("rows.jsonl", prompts(2))
    refused(command("batch"), "required: TASK")
    refused(command("batch", "draw"), "invalid choice: 'draw'")
    refused(command("batch", "generate"), "required: --input, --output")
    refused(command(*batch("encode", "rows.jsonl", ratio="1:1")), "unknown argument '--ratio=1:1'")
    refused(command(*batch("generate", "rows.jsonl", rato="1:1")), "did you mean --ratio?")
    refused(command(*batch("generate", "rows.jsonl", workers=2)), "--workers is for --ray")
    refused(command(*batch("generate", "rows.jsonl", batch_size=0)), "--batch_size must be 1 or more")
    refused(command(*batch("generate", "none.jsonl")), "none.jsonl: there is no such file")
    refused(command(*batch("generate", "rows.jsonl", top_p=3)), "top_p must be")
    refused(command(*batch("generate", "rows.jsonl", ratio="3")), "ratio must be")
    refused(command(*batch("understand", "rows.jsonl", max_new_tokens=0)), "max_new_tokens must be")
    assert not Path("out").exists()
    refused(command(*batch("generate", "rows.jsonl", output="rows.jsonl")), "--output rows.jsonl cannot be made")
    assert command(*batch("generate", "rows.jsonl", seed=1))[0] == 0
    refused(command(*batch("generate", "rows.jsonl", seed=2)), "its options is", "'seed': 1", "'seed': 2")
    refused(command(*batch("generate", "rows.jsonl", seed=1, images=None)), "its images is None, and asked for is png")
    write_lines("rows.jsonl", prompts(3))
    refused(command(*batch("generate", "rows.jsonl", seed=1)), "its data is")


# --- killed, and gone on


def start(*line, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen([sys.executable, "-m", "paddlemix.commands", *line], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for(process, pattern, count, seconds=300):
    end = time.monotonic() + seconds
    while process.poll() is None and len(list(Path("out").glob(pattern))) < count and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("images", ["png", "webdataset"])
def test_killed_and_gone_on(command, folder, images):
    """At moments of every kind; the files are those of a run that nobody killed, to the last byte."""
    write_lines("rows.jsonl", [*prompts(13), {"id": "bad"}, *prompts(30)[14:]])
    options = {"shard_rows": 4, "images": images}
    line, counts = batch("generate", "rows.jsonl", **options), []
    for pattern, count in (("part-*.parquet", 2), ("images/*" if images == "png" else "*.tar", 5)):
        process = start(*line)
        wait_for(process, pattern, count)
        process.kill()
        process.communicate()
        counts.append(len(rows_in()))
    assert 8 <= counts[0] <= counts[1] < 30
    assert command(*line)[0] == 0
    assert command(*batch("generate", "rows.jsonl", output="whole", **options))[0] == 0
    assert [row["source"] for row in rows_in()] == [f"rows.jsonl:{i + 1}" for i in range(30)]
    assert rows_in() == rows_in("whole")
    files = [sorted(p.relative_to(top) for p in Path(top).rglob("*.*") if p.suffix in (".png", ".tar"))
             for top in ("out", "whole")]  # fmt: skip
    assert files[0] == files[1] and len(files[0]) == (29 if images == "png" else 8)
    for path in files[0]:
        assert ("out" / path).read_bytes() == ("whole" / path).read_bytes()


def test_names_of_files():
    names = ["a", "a b", "a/b", "a%2Fb", "..", ".a", "a.b", "图", "x" * 300, "y" * 300, "\n"]
    for plain in (False, True):
        files = [pictures.file_name(name, plain) for name in names]
        assert len(set(files)) == len(files) and files[:2] == names[:2] and files[7] == "图"
        assert all("/" not in f and f[0] != "." and len(f.encode()) <= 200 and f.isprintable() for f in files)


def test_a_tar_that_is_gone(command, folder):
    write_lines("rows.jsonl", prompts(3))
    line = batch("generate", "rows.jsonl", images="webdataset")
    assert command(*line)[0] == 0
    whole = Path("out/part-00000.tar").read_bytes()
    Path("out/part-00000.tar").write_bytes(whole[:3000])
    refused(command(*line), "part-00000.tar is damaged, or has fewer pictures")
    Path("out/part-00000.tar").write_bytes(whole + b"more")
    assert command(*line)[0] == 0 and Path("out/part-00000.tar").read_bytes() == whole


def test_a_full_disk(folder):
    """What was whole before it stays, also in the tar, which is closed while nothing can be written."""
    row = dict.fromkeys(schema().names)
    try:
        with (
            pytest.raises(InputError, match="cannot write out/part-00000.parquet: File too large"),
            Shards("out", schema(), 4, {}, "webdataset") as shards,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (18_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            for i in range(4):
                shards.add({**row, "id": f"{i}", "png": b"x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    with Shards("out", schema(), 4, {}, "webdataset") as shards:
        assert shards.count == 2
        for i in range(2, 4):
            shards.add({**row, "id": f"{i}", "png": b"x" * 5000})
    assert [row["id"] for row in rows_in()] == list("0123")
    assert [path.name for path in Path("out").glob("*.tar")] == ["part-00000.tar"]  # none that is empty
    with tarfile.open("out/part-00000.tar") as tar:
        assert tar.getnames() == [f"{i}.{ending}" for i in range(4) for ending in ("png", "json")]


def test_null_is_not_given(folder):
    write_lines("rows.jsonl", [{"id": None, "name": "a"}, {"id": None}])
    assert [row.id for row in read_rows(open_sources(["rows.jsonl"]))] == ["a", "rows-2"]


def test_progress_without_a_terminal(command, folder, monkeypatch):
    """A line now and then; after a resume the rate and the time left are those of this run."""
    monkeypatch.setattr("paddlemix.commands.batch.SAY_EVERY", 0)
    write_lines("rows.jsonl", prompts(4))
    code, out, _ = command(*batch("generate", "rows.jsonl", batch_size=1))
    lines = out.splitlines()
    assert code == 0 and [line.split()[:4] for line in lines[:4]] == [[str(i), "of", "4", "rows,"] for i in range(1, 5)]
    assert lines[3].endswith(" a second, 00:00 left")


# --- by Ray


def actors(process):
    """The processes of a job's workers."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.name().startswith("ray::Actor")]


@needs_ray
def test_workers_that_are_killed(command, folder):
    """First both workers, then the job; it goes on without Ray, and the rows are those of a run that nobody killed."""
    write_lines("rows.jsonl", [*prompts(100), {"id": "bad"}, *prompts(200)[101:]])
    line = batch("generate", "rows.jsonl", shard_rows=10)
    process = start(*line, "--ray", "--workers=2")
    wait_for(process, "part-*.parquet", 2)
    first = actors(process)
    assert len(first) == 2
    for actor in first:
        actor.kill()
    here = len(rows_in())
    wait_for(process, "part-*.parquet", here // 10 + 3)
    second = actors(process)
    assert process.poll() is None and here < len(rows_in()) < 200 and not set(first) & set(second)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(second, timeout=120)[1] == []
    here = len(rows_in())
    code, out, _ = command(*line)
    assert code == 0 and out.startswith(f"going on behind {here} of 200 rows\n")
    assert command(*batch("generate", "rows.jsonl", output="whole", shard_rows=100))[0] == 0
    assert rows_in() == rows_in("whole") and len(rows_in()) == 200


@pytest.mark.long
@needs_ray
def test_two_workers_to_the_end(command, folder):
    Path("scene.png").write_bytes(SCENE.read_bytes())
    write_lines("rows.jsonl", [{"id": f"{i}", "image": "scene.png" if i % 5 else "none.png"} for i in range(30)])
    process = start(*batch("encode", "rows.jsonl", output="ray", batch_size=4), "--ray", "--workers=2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "wrote 24 rows, and 6 rows with errors to ray\n", err
    assert command(*batch("encode", "rows.jsonl"))[0] == 0
    assert rows_in() == rows_in("ray")


@pytest.mark.long
@needs_ray
def test_workers_are_spread_over_the_nodes():
    """Two nodes on this machine, with room for both workers on each: one worker on each, and each gets rows."""
    from ray import get_runtime_context
    from ray.cluster_utils import Cluster

    from paddlemix.jobs.actors import Actors

    class Where:  # a worker whose rows become the node that it is on
        def __init__(self):
            self.job, self.rows, self.has_room = {}, [], True

        def __bool__(self):
            return bool(self.rows)

        def add(self, number, row):
            self.rows.append(number)

        def step(self):
            rows, self.rows = self.rows, []
            return [(number, get_runtime_context().get_node_id()) for number in rows]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=4)
        with Actors(Where, address=cluster.address) as actors:
            found = dict(actors.run(enumerate("x" * 100)))
    finally:
        cluster.shutdown()
    assert sorted(found) == list(range(100)) and len(set(found.values())) == 2


@needs_ray
def test_too_few_processors_are_one_line(folder):
    """Of this machine: a cluster that the environment names is not what --ray alone means."""
    write_lines("rows.jsonl", prompts(1))
    workers = f"--workers={100 * os.cpu_count()}"
    process = start(*batch("generate", "rows.jsonl"), "--ray", workers, RAY_ADDRESS="127.0.0.1:1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and err.count("\n") == 1 and "take fewer --workers" in err


@needs_ray
@pytest.mark.parametrize("address, environment", [("127.0.0.1:1", {}), ("auto", {"RAY_ADDRESS": "127.0.0.1:1"})])
def test_a_cluster_that_is_gone_is_one_line(folder, address, environment):
    write_lines("rows.jsonl", prompts(1))
    process = start(*batch("generate", "rows.jsonl"), f"--ray={address}", **environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and err.count("\n") == 1 and ":1': give its head" in err


@needs_ray
def test_a_cluster_without_a_token_is_one_line(folder):
    write_lines("rows.jsonl", prompts(1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"--ray=127.0.0.1:{server.getsockname()[1]}"
        process = start(*batch("generate", "rows.jsonl"), address, RAY_AUTH_MODE="token", HOME=str(folder))
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and err.count("\n") == 1 and "authentication token" in err


# --- video


@pytest.fixture
def clip(folder):
    """clip.mp4, 10 frames of 64 x 48, and a folder of them with the last one three times."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from paddlemix.processors.video import VideoFile, read_frames

    with VideoFile("clip.mp4", 12) as video:
        for i in range(10):
            colours = np.random.default_rng(i).integers(0, 256, [3, 4, 3], dtype=np.uint8)
            video.add(Image.fromarray(colours).resize((64, 48)))
    frames = list(read_frames("clip.mp4"))
    assert [frame.size for frame in frames] == [(64, 48)] * 10
    Path("twelve").mkdir()
    for i, frame in enumerate(frames + frames[-1:] * 2):
        frame.save(f"twelve/{i}.png")
    return "clip.mp4"


def test_equal_frames_make_equal_files(clip):
    """Whatever the memory held before."""
    from paddlemix.processors.video import VideoFile

    frames = [Image.open(f"twelve/{i}.png") for i in range(12)]
    files = set()
    generator = np.random.default_rng(0)
    for _ in range(30):
        sizes = generator.integers(100, 200_000, 60)
        junk = [np.full(size, generator.integers(256), np.uint8) for size in sizes]
        with VideoFile("again.mp4", 12) as video:
            del junk
            for frame in frames:
                video.add(frame)
        files.add(Path("again.mp4").read_bytes())
    assert len(files) == 1


def test_a_clip_is_its_frames(command, clip):
    from paddlemix.processors.video import frame_rate

    for path in (clip, "twelve"):
        line = ["autoencode", "--model_path=emu3-mini", f"--video_path={path}", f"--output_dir=out/{path}"]
        code, out, err = command(*line)
        assert (code, err) == (0, "")
    names = sorted(path.name for path in Path("out/clip.mp4").glob("*.png"))
    assert len(names) == 20
    for name in names:
        assert (np.asarray(Image.open(f"out/twelve/{name}")) == np.asarray(Image.open(f"out/clip.mp4/{name}"))).all()
    assert frame_rate("out/clip.mp4/recon_video.mp4") == (12, 10)


def test_transparent_frames_are_over_white(folder):
    """As the pictures of a folder are."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    from paddlemix.processors.video import read_frames

    colours = np.full([48, 64, 4], [200, 40, 0, 255], np.uint8)
    colours[:, :32, 3] = 0
    with av.open("alpha.mov", "w") as file:
        stream = file.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgba"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(colours, format="rgba")))
        file.mux(stream.encode(None))
    [frame] = read_frames("alpha.mov")
    assert frame.mode == "RGB" and frame.getcolors() == [(48 * 32, (255, 255, 255)), (48 * 32, (200, 40, 0))]


def test_encode_video(command, clip, emu3):
    Path("cut.mp4").write_bytes(Path(clip).read_bytes()[:900])
    rows = [{"id": "a", "video": clip}, {"id": "b", "image": "twelve/0.png"}, {"video": "cut.mp4"}, {"video": "twelve"}]
    write_lines("rows.jsonl", rows)
    assert command(*batch("encode", "rows.jsonl"))[0] == 0
    video, image, *bad = rows_in()
    frames = [Image.open(f"twelve/{i}.png") for i in range(12)]
    expected = [step.codes for step in emu3.autoencode_steps(video=frames)][::4]
    assert (video["frames"], video["height"], video["width"]) == (3, *expected[0].shape[1:])
    assert video["codes"] == np.ravel(expected).tolist()
    assert image["frames"] is None and len(image["codes"]) == expected[0].size
    assert "cut.mp4" in bad[0]["error"] and "no such file" in bad[1]["error"]


@pytest.mark.parametrize("images", ["png", "webdataset"])
def test_decode_video(command, clip, emu3, images):
    """An mp4 of each video's codes, as autoencode's frames make it."""
    from paddlemix.processors.video import VideoFile, frame_rate

    write_lines("rows.jsonl", [{"id": "a", "video": clip}, {"id": "b", "image": "twelve/0.png"}])
    assert command(*batch("encode", "rows.jsonl"))[0] == 0
    line = batch("decode", "out/part-00000.parquet", output="back", images=images, frame_rate=29.97)
    assert command(*line)[::2] == (0, "")
    video, image = rows_in("back")
    assert [video[name] for name in ("frames", "codes", "error")] == [3, None, None]
    assert image["frames"] is None and image["error"] is None
    if images == "png":
        written = "back/images/a.mp4"
    else:
        with tarfile.open("back/part-00000.tar") as tar:
            assert tar.getnames() == ["a.mp4", "a.json", "b.png", "b.json"]
            tar.extract("a.mp4", "tar", filter="data")
        written = "tar/a.mp4"
    with VideoFile("expected.mp4", Fraction("29.97")) as file:
        for frame in emu3.autoencode(video=[Image.open(f"twelve/{i}.png") for i in range(12)]):
            file.add(frame)
    assert frame_rate(written) == (Fraction("29.97"), 12)
    assert Path(written).read_bytes() == Path("expected.mp4").read_bytes()


def test_one_clip_of_a_video_is_in_memory(emu3):
    """Frames are asked for as they are encoded."""
    asked = []

    def frames():
        for i in range(12):
            asked.append(i)
            yield Image.new("RGB", (16, 16), (20 * i, 0, 0))

    for i, _ in enumerate(emu3.autoencode_steps(video=frames())):
        assert len(asked) == 4 * (i // 4 + 1)
    assert len(asked) == 12


def test_video_without_pyav(command, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    Path("clip.gif").write_bytes(b"")  # any file is a video
    line = "autoencode", "--model_path=emu3-mini", "--video_path=clip.gif"
    refused(command(*line), "clip.gif: to read and write video needs PyAV: pip install av==17.1.0")
