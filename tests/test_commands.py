# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The three scripts as a user runs them, on small checkpoints in the released layout and the real vocabulary.

Whole processes where the start matters; elsewhere the script is run in this process, to save Paddle's start.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import random_checkpoints
from conftest import EXAMPLES, relative_error
from PIL import Image

from paddlemix.utils import InputError, replacing

ROOT = Path(__file__).resolve().parents[1]

SEE = 'autoencode.py --model_path="BAAI/Emu3-VisionTokenizer" --image_path="paddlemix/demo_images/emu3_demo.png"'
DRAW = (
    'run_generation_inference.py --model_path="BAAI/Emu3-Gen" --vq_model_path="BAAI/Emu3-VisionTokenizer" '
    '--prompt="a portrait of young girl." --ratio="1:1" --height=720 --width=720 --dtype="bfloat16"'
)
ASK = (
    'run_understanding_inference.py --model_path="BAAI/Emu3-Chat" --vq_model_path="BAAI/Emu3-VisionTokenizer" '
    '--image_path="paddlemix/demo_images/emu3_demo.png" --question="Please describe the image breifly" '
    '--max_new_tokens=512 --dtype="bfloat16"'
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, vocabulary_dir):
    """BAAI/Emu3-VisionTokenizer, BAAI/Emu3-Gen and BAAI/Emu3-Chat, small."""
    directory = tmp_path_factory.mktemp("checkpoints")
    random_checkpoints.write_vision_tokenizer(directory / "Emu3-VisionTokenizer", max_pixels=96 * 96)
    random_checkpoints.write_language_model(directory / "Emu3-Gen")
    shutil.copytree(directory / "Emu3-Gen", directory / "Emu3-Chat")
    return directory


@pytest.fixture
def folder(checkpoints, tmp_path, monkeypatch):
    """An empty folder to run in, with the checkpoints where the hub names say."""
    (tmp_path / "BAAI").symlink_to(checkpoints)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(line, folder, **env):
    """Run a command line of the README in a process of its own."""
    line = f"{sys.executable} {EXAMPLES}/{line}"
    (folder / "not_needed").mkdir(exist_ok=True)  # PaddleNLP takes three seconds to import
    (folder / "not_needed" / "paddlenlp.py").write_text("raise ImportError('no command needs it')")
    path = os.pathsep.join(filter(None, [str(folder / "not_needed"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, **env}
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, env=env, check=False)


def draw(command, *arguments, size=32):
    models = ["--model_path", "BAAI/Emu3-Gen", "--vq_model_path", "BAAI/Emu3-VisionTokenizer", "--dtype", "float32"]
    return command("run_generation_inference.py", *models, f"--height={size}", f"--width={size}", *arguments)


def ask(command, *arguments):
    models = ["--model_path", "BAAI/Emu3-Chat", "--vq_model_path", "BAAI/Emu3-VisionTokenizer", "--dtype", "float32"]
    return command("run_understanding_inference.py", *models, *arguments)


def see(command, *arguments):
    return command("autoencode.py", "--model_path", "BAAI/Emu3-VisionTokenizer", *arguments)


def last_line(out):
    return out.strip().splitlines()[-1]


# --- the three lines, in processes of their own, in a folder that is not the repository


def test_see(folder):
    done = shell(f"{SEE} --stats_json stats.json", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert last_line(done.stdout) == "wrote recon_image.png, recon_image_compare.png"
    assert re.search(r"PSNR -?\d+\.\d\d dB", done.stdout)
    picture, both = (Image.open(folder / f"recon_image{end}.png") for end in ("", "_compare"))
    assert picture.size[0] % 8 == 0 and both.size[0] > 2 * picture.size[0]
    stats = json.loads((folder / "stats.json").read_text())
    assert stats.keys() == {"encode_s", "decode_s", "seconds", "load_s", "peak_memory_mb"}
    assert stats["seconds"] == pytest.approx(stats["encode_s"] + stats["decode_s"], abs=1e-3)
    assert 100 < stats["peak_memory_mb"] < 4000


def test_draw(folder):
    line = DRAW.replace("720", "64") + " --seed=5 --decoding=step --stats_json stats.json"
    done = shell(line, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert last_line(done.stdout) == "wrote result_0.png"
    picture = Image.open(folder / "result_0.png")
    assert picture.size == (64, 64)
    assert picture.text["prompt"] == "a portrait of young girl." and picture.text["seed"] == "5"
    assert picture.text["guidance_scale"] == "3.0" and picture.text["top_k"] == "2048"
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["tokens"] == 8 * 9 + 3 and stats["forward_passes"] == 8 * 8
    assert stats["tokens_per_s"] == pytest.approx(stats["tokens"] / stats["seconds"], rel=1e-2)
    assert {"load_s", "decode_s", "peak_memory_mb"} <= stats.keys()


def test_ask(folder):
    done = shell(ASK.replace("512", "6") + " --stats_json stats.json", folder)
    [told] = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout.strip()
    assert re.fullmatch(r"6 tokens in \d+\.\d s, \d+\.\d a second", told)
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["tokens"] == stats["forward_passes"] == 6
    assert {"seconds", "tokens_per_s", "load_s", "encode_s", "peak_memory_mb"} <= stats.keys()


@pytest.mark.parametrize("script", ["autoencode.py", "run_generation_inference.py", "run_understanding_inference.py"])
def test_help_imports_nothing_large(script, tmp_path):
    """Which makes it quick: Paddle alone takes seconds."""
    done = shell(f"{script} --help", tmp_path)
    assert done.returncode == 0 and "--model_path" in done.stdout and "default: None" not in done.stdout
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", EXAMPLES / script, "--help"], capture_output=True, text=True, check=True
    ).stderr
    assert not re.search(r"\| +(paddle|numpy|PIL|paddlenlp|tqdm)$", imported, re.MULTILINE)


def test_the_three_lines_from_the_hub_cache(folder, checkpoints):
    """As after a download, without a network."""
    (folder / "BAAI").unlink()
    for name in random_checkpoints.CHECKPOINTS:
        home, commit = folder / "hf" / "hub" / f"models--BAAI--{name}", "0" * 40
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        (home / "snapshots").mkdir()
        (home / "snapshots" / commit).symlink_to(checkpoints / name)
    env = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    for line in (SEE, DRAW.replace("720", "16"), ASK.replace("512", "3")):
        done = shell(line, folder, **env)
        assert done.returncode == 0 and "Fetching" not in done.stderr, done.stderr


def test_nobody_reads_on(folder):
    """| head -1 costs no picture and gives no message of Python's."""
    done = shell(DRAW.replace("720", "16").replace("bfloat16", "float32") + " | head -1", folder, PYTHONUNBUFFERED="1")
    assert done.stdout.startswith("drawing 16 x 16 pixels") and done.stderr == ""
    assert Image.open(folder / "result_0.png").size == (16, 16)
    done = shell(ASK.replace("512", "40").replace("bfloat16", "float32") + " | true", folder)
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_a_terminal_that_is_not_utf_8(folder):
    done = shell(ASK.replace("512", "20").replace("bfloat16", "float32"), folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "?" in done.stdout


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0])
def test_ctrl_c_while_loading(folder, seconds):
    process = subprocess.Popen(
        f"exec {sys.executable} {EXAMPLES}/{ASK}", shell=True, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err


def test_drawings_in_one_folder_keep_their_own_tokens(tmp_path, capsys):
    from paddlemix.commands.unfinished import Unfinished

    def unfinished(prompt, resume=False):
        return Unfinished(argparse.Namespace(output_dir=str(tmp_path), resume=resume), {"prompt": [prompt], "seed": 1})

    first, second, gone = unfinished("a"), unfinished("b"), unfinished("c")
    first.save([np.array([1])])
    second.save([np.array([2])])
    assert unfinished("a", resume=True).drawn == [1] and unfinished("b", resume=True).drawn == [2]
    first.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["result_1.tokens.npz"]
    assert capsys.readouterr().err == ""
    gone.folder = tmp_path / "gone"
    for _ in range(2):
        gone.save([np.array([3])])
    gone.finish()
    assert gone.drawn is None and capsys.readouterr().err.count("drawing on") == 1


def test_commands_in_one_folder_take_names_of_their_own(tmp_path):
    """Many at once, each of several pictures: none overwrites another's."""
    from concurrent.futures import ThreadPoolExecutor

    from paddlemix.results import save_results

    def save(i):
        return save_results([Image.new("RGB", (8, 8), (i, j, 0)) for j in range(5)], tmp_path, [{"n": i}] * 5)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(save, range(12)))
    assert len({path for some in paths for path in some}) == 60 == len(list(tmp_path.iterdir()))
    for i, some in enumerate(paths):
        for j, path in enumerate(some):
            assert Image.open(path).getpixel((0, 0)) == (i, j, 0) and Image.open(path).text["n"] == str(i)


def test_a_result_that_cannot_be_written_leaves_no_empty_file(tmp_path, monkeypatch):
    from paddlemix.results import save_results

    save, calls = Image.Image.save, []

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space left"):
        save_results([Image.new("RGB", (8, 8))] * 3, tmp_path, [{}] * 3)
    assert [p.name for p in tmp_path.iterdir()] == ["result_0.png"]


def test_a_token_file_damaged_in_any_way_is_one_line(tmp_path):
    """Flipped bytes, cut files, other content: read as it was, or refused."""
    from paddlemix.commands.unfinished import Unfinished

    def unfinished(resume=False):
        args = argparse.Namespace(output_dir=str(tmp_path), resume=resume)
        return Unfinished(args, {"prompt": ["a", "b"], "seed": 1})

    first = unfinished()
    first.save([np.arange(40), np.arange(7)])
    path = tmp_path / "result_0.tokens.npz"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [whole[:n] for n in range(1, len(whole), 37)]
    for _ in range(300):
        at = rng.integers(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
    good = json.dumps({"prompt": ["a", "b"], "seed": 1})
    others = [
        {"drawn": np.arange(3), "settings": "{}"}, {"settings": json.dumps(["a"])}, {"settings": "[" * 100_000},
        {"settings": json.dumps({"prompt": 5})},
        {"settings": json.dumps({"prompt": {"a": 1}, "seed": 1}), "drawn_0": np.arange(3)},
        {"settings": good, "drawn_0": np.arange(3), "drawn_1": np.zeros([2, 2], int)},
        {"settings": good, "drawn_0": np.arange(3), "drawn_1": np.zeros(2)},
        {"settings": good, "drawn_0": np.array([object()])},
        {"settings": json.dumps({"prompt": ["a"]}), "drawn_0": np.arange(3)},  # no seed
        {"settings": json.dumps({"prompt": ["a"], "seed": None}), "drawn_0": np.arange(3)},
    ]  # fmt: skip
    for other in others:
        np.savez(path, **other)
        damaged.append(path.read_bytes())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:  # 300 MB of zeros in 300 kB
        bomb.writestr("settings.npy", bytes(300_000_000))
    damaged.append(path.read_bytes())
    np.save(tmp_path / "list.npy", np.arange(5))
    damaged += [(tmp_path / "list.npy").read_bytes(), b"", b"[1, 2]", b"\x80\x04N."]
    refused_ones = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            again = unfinished(resume=True)
            assert again.drawn is None or [d.tolist() for d in again.drawn] == [list(range(40)), list(range(7))]
        except InputError as error:
            refused_ones += 1
            assert "is damaged, or of another version: remove it" in str(error) or "of another drawing" in str(error)
    assert refused_ones > len(others) + 100


def test_being_ended_prints_nothing(folder):
    process = subprocess.Popen(
        f"exec {sys.executable} {EXAMPLES}/{DRAW} --seed=1", shell=True, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGTERM, "")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a core")
def test_all_cores_given_are_used(monkeypatch):
    from paddlemix import machine

    given = os.sched_getaffinity(0)
    assert 1 <= machine.available_cores() <= len(given)
    os.sched_setaffinity(0, {min(given)})
    try:
        assert machine.available_cores() == 1
    finally:
        os.sched_setaffinity(0, given)
    import paddle

    threads = []
    monkeypatch.setattr(paddle.base.core, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machine.start_paddle()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's own choice
    machine.start_paddle()
    assert threads == [machine.available_cores()]


def test_a_card_that_is_not_there_is_refused(monkeypatch):
    """Before Paddle is asked for it, which ends the process."""
    import paddle

    from paddlemix.machine import start_paddle
    from paddlemix.utils import InputError

    chosen = []
    monkeypatch.setattr(paddle, "set_device", chosen.append)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    for device in (None, "gpu", "gpu:1", "cpu"):
        start_paddle(device)
    start_paddle(None, quiet=False)  # a library leaves the device that Paddle is set to
    assert chosen == ["gpu", "gpu", "gpu:1", "cpu"]
    for device in ("gpu:2", "gpu:", "gpu:-1", "cuda", "GPU"):
        with pytest.raises(InputError, match=f"device '{device}': .*2 cards"):
            start_paddle(device, quiet=False)
    assert len(chosen) == 4


def drawing(folder, *arguments):
    """A drawing of 16 x 16 tokens in a process of its own, when it has kept its first row."""
    line = f"{DRAW.replace('720', '128').replace('bfloat16', 'float32')} --seed=1 {' '.join(arguments)}"
    process = subprocess.Popen(
        f"exec {sys.executable} {EXAMPLES}/{line}", shell=True, cwd=folder, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    kept = folder / "result_0.tokens.npz"
    while not (kept.exists() and kept.stat().st_size):  # an empty one is a name claimed
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    "ending", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL]
)
def test_an_interrupted_drawing_is_resumed(command, folder, ending):
    process = drawing(folder)
    process.send_signal(ending)
    _, err = process.communicate(timeout=60)
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {"BAAI", "result_0.tokens.npz"}
    if ending == signal.SIGINT:
        message = "interrupted: the same command with --resume goes on from result_0.tokens.npz"
        assert process.returncode == 130 and err.strip() == message
        for other, word in (["--seed=2"], "seed"), (["--prompt=x"], "prompt"), (["--top_k=3"], "its top_k is 2048"):
            refused(draw(command, "--prompt=a portrait of young girl.", *other, "--resume", size=128), folder, word)
        (folder / "result_7.tokens.npz").write_text("torn")
        refused(draw(command, "--resume", size=128), folder, "result_7.tokens.npz is damaged")
        (folder / "result_7.tokens.npz").unlink()
    else:
        assert process.returncode == -ending and err == ""
    code, out, _ = draw(command, "--resume", "--stats_json=stats.json", size=128)
    assert code == 0 and "with seed 1" in out and "going on after" in out
    assert json.loads((folder / "stats.json").read_text())["forward_passes"] < 16 * 16
    assert not (folder / "result_0.tokens.npz").exists()
    code, out, err = draw(command, "--resume", "--seed=1", size=128)
    assert code == 0 and err == "note: nothing to resume in .: starting\n" and "going on" not in out
    resumed, whole = (np.asarray(Image.open(folder / f"result_{i}.png")) for i in range(2))
    assert (resumed == whole).all()


def test_preview(command, folder, monkeypatch):
    """Rows that are not drawn yet are grey; at the end it holds the pictures."""
    code, _, _ = draw(command, "--ratio", "1:1", "2:1", "--prompt", "a", "b", "--preview=preview.png")
    both = np.asarray(Image.open(folder / "preview.png"))
    assert code == 0 and both.shape == (32, 32 + 48, 3)
    for i, part in enumerate((both[:, :32], both[:24, 32:])):
        assert (np.asarray(Image.open(folder / f"result_{i}.png")) == part).all()

    from paddlemix.commands.files import Preview

    shown = [Image.new("RGB", (16, 24), "red"), Image.new("RGB", (8, 8), "grey")]
    generation = type("", (), {"images": lambda self: shown})()
    preview = Preview(folder / "p.png")
    preview.update(generation)
    colours = np.asarray(Image.open(folder / "p.png"))[::8, ::8, 1]
    assert (colours == [[0, 0, 128], [0, 0, 255], [0, 0, 255]]).all()
    before = (folder / "p.png").stat().st_mtime_ns
    preview.update(generation)  # too soon
    assert (folder / "p.png").stat().st_mtime_ns == before


def test_a_preview_or_statistics_that_cannot_be_written_spoil_nothing(command, folder, monkeypatch):
    """What was drawn is reported first."""
    from paddlemix.commands import files

    save = files.save_picture

    def no_preview(image, path, text=None):
        if Path(path).name == "p.png":
            raise InputError("cannot write p.png")
        return save(image, path, text)

    monkeypatch.setattr(files, "save_picture", no_preview)
    code, out, err = draw(command, "--preview=p.png")
    assert code == 0 and last_line(out) == "wrote result_0.png" and "note: cannot write p.png" in err

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomically", full)
    for run, wrote in ((draw, "wrote result_1.png"), (see, "wrote recon_image.png, recon_image_compare.png")):
        code, out, err = run(command, "--stats_json=s.json")
        assert code == 2 and last_line(out) == wrote and "No space left on device" in err


def test_a_result_never_takes_the_place_of_its_input(command, folder):
    """The picture, by another name of it too, and a frame."""

    def is_refused(name, *arguments):
        code, _, err = see(command, *arguments)
        assert code == 2 and err.count("\n") == 1 and f"{name} would be overwritten" in err

    picture = picture_file(folder, "good").rename(folder / "recon_image.png")
    before = picture.read_bytes()
    is_refused("recon_image.png", f"--image_path={picture}")
    (folder / "link.png").symlink_to("recon_image.png")
    is_refused("link.png", "--image_path=link.png")
    frames = folder / "frames"
    frames.mkdir()
    (frames / "recon_video_0_compare.png").write_bytes(before)
    is_refused("recon_video_0_compare.png", "--video_path", frames, "--output_dir", frames)
    assert picture.read_bytes() == before


def test_output_through_a_link(command, folder):
    """The file that it leads to is written, and the link stays."""
    (folder / "elsewhere").mkdir()
    (folder / "link.json").symlink_to("elsewhere/stats.json")
    (folder / "recon_image.png").symlink_to("elsewhere/picture.png")
    assert see(command, "--stats_json=link.json")[0] == 0
    for link, target in (("link.json", "stats.json"), ("recon_image.png", "picture.png")):
        assert (folder / link).is_symlink() and (folder / "elsewhere" / target).is_file()
    for name in ("stats.json", "out.txt"):  # a pipe, and where the command prints to
        line = f"--stats_json {'/dev/stdout' if name == 'out.txt' else '/dev/stderr'}"
        done = shell(f"{SEE} {line} > {name}", folder)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "error: --stats_json /dev/std" in done.stderr
    (folder / "lost.json").symlink_to("nowhere/stats.json")
    code, out, err = see(command, "--stats_json=lost.json")
    assert code == 2 and not out and "nowhere: give a folder that exists" in err
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        replacing(folder / "pipe.png")


def test_jacobi_draws_what_step_draws(command, folder):
    passes = []
    for decoding in ("step", "jacobi"):
        code, _, _ = draw(
            command,
            "--seed=4",
            "--temperature=100",
            "--top_k=0",
            f"--decoding={decoding}",
            "--stats_json=s.json",
            size=48,
        )
        assert code == 0
        passes.append(json.loads((folder / "s.json").read_text())["forward_passes"])
    step, jacobi = (np.asarray(Image.open(folder / f"result_{i}.png")) for i in range(2))
    assert (step == jacobi).all() and passes[0] == 36 and passes[1] < 12


# --- more of what each can do


def test_a_video(command, folder):
    (folder / "frames").mkdir()
    for i in range(8):  # frame 10 comes after frame 9
        Image.new("RGB", (64, 64), (i * 30, 0, 0)).save(folder / "frames" / f"f{i + 3}.png")
    (folder / "frames" / "notes.txt").write_text("")
    code, out, _ = see(command, "--video_path", "frames", "--output_dir", "out")
    assert code == 0 and len(list((folder / "out").iterdir())) == 16
    first = np.asarray(Image.open(folder / "out" / "recon_video_0_compare.png"))[40:, :64]
    last = np.asarray(Image.open(folder / "out" / "recon_video_7_compare.png"))[40:, :64]
    assert first.mean() < 1 and last[..., 0].mean() == pytest.approx(210, abs=1)
    (folder / "frames" / "f9.png").unlink()
    code, _, err = see(command, "--video_path", "frames")
    assert code == 2 and "7 frames" in err and "add 1" in err


def test_frames_of_odd_names_come_in_the_order_of_their_numbers(tmp_path):
    from paddlemix.commands.files import frame_paths

    names = ["12.png", "a².png", "a2.png", "a10.png", "a٣.png", "a²4.png", "é1.png"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert {p.name for p in frame_paths(tmp_path)} == set(names)
    numbered = [p.name for p in frame_paths(tmp_path) if p.name in ("12.png", "a2.png", "a٣.png", "a10.png")]
    assert numbered == ["12.png", "a2.png", "a٣.png", "a10.png"]


@pytest.mark.parametrize("caller", [see, ask])
def test_a_transparent_picture_is_a_note(command, folder, caller):
    logo = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (20, 20, 44, 44))
    logo.save(folder / "logo.png")
    code, _, err = caller(command, "--image_path", "logo.png", *(["--max_new_tokens=2"] if caller is ask else []))
    assert code == 0 and err.splitlines()[0] == "note: logo.png: its transparency is laid over white"
    assert err.count("white") == 1
    if caller is see:
        assert Image.open(folder / "recon_image_compare.png").getpixel((2, 30)) == (255, 255, 255)


def test_several_pictures_of_several_ratios(command, folder):
    code, out, _ = draw(command, "--prompt", "a", "b", "--ratio", "1:1", "2:1", "--num_images=2", "--seed=3")
    assert code == 0 and last_line(out) == "wrote " + ", ".join(f"result_{i}.png" for i in range(4))
    pictures = [Image.open(folder / f"result_{i}.png") for i in range(4)]
    assert [p.size for p in pictures] == [(32, 32), (32, 32), (48, 24), (48, 24)]
    assert [p.text["prompt"] for p in pictures] == ["a", "a", "b", "b"]
    assert (np.asarray(pictures[0]) != np.asarray(pictures[1])).any()


def test_a_seed_repeats_a_picture_and_no_result_is_overwritten(command, folder):
    for arguments in (["--seed=7"], ["--seed=7"], ["--seed=8"], []):
        assert draw(command, *arguments)[0] == 0
    first, again, other, fresh = (np.asarray(Image.open(folder / f"result_{i}.png")) for i in range(4))
    assert (first == again).all() and (first != other).any() and (first != fresh).any()


def test_sampling_settings_count(command, folder):
    settings = (
        [],
        ["--guidance_scale=1"],
        ["--negative_prompt=x"],
        ["--top_k=1"],
        ["--top_p=0.5"],
        ["--temperature=9"],
    )
    pictures = []
    for i, arguments in enumerate(settings):
        assert draw(command, "--seed=7", *arguments)[0] == 0
        pictures.append(np.asarray(Image.open(folder / f"result_{i}.png")).tobytes())
    assert len(set(pictures)) == len(pictures)


def test_height_and_width_alone_give_the_ratio(command, folder):
    assert draw(command, "--height=24", "--width=48")[0] == 0
    assert Image.open(folder / "result_0.png").size == (48, 24)


def test_without_height_or_width_the_checkpoint_says_how_large(command, folder, checkpoints):
    shutil.copytree(checkpoints / "Emu3-Gen", folder / "small")
    config = json.loads((folder / "small" / "config.json").read_text())
    (folder / "small" / "config.json").write_text(json.dumps({**config, "image_area": 32 * 32}))
    for arguments in ([], ["--height=16"], ["--ratio=2:1"]):
        models = ["--model_path=small", "--vq_model_path=BAAI/Emu3-VisionTokenizer", "--dtype=float32"]
        assert command("run_generation_inference.py", *models, *arguments)[0] == 0
    assert [Image.open(folder / f"result_{i}.png").size for i in range(3)] == [(32, 32), (32, 16), (48, 24)]


def test_more_tokens_than_positions_is_a_note_that_names_what_fits(command, folder, checkpoints):
    shutil.copytree(checkpoints / "Emu3-Gen", folder / "short")
    config = json.loads((folder / "short" / "config.json").read_text())
    (folder / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    code, _, err = draw(command, "--model_path=short", "--prompt=x", size=64)
    notes = [line for line in err.splitlines() if re.search(r"64 x 64 pixels take 1\d\d tokens", line)]
    assert code == 0 and len(notes) == 1
    height, width = map(int, re.search(r"height=(\d+) width=(\d+)", notes[0]).groups())
    assert draw(command, "--model_path=short", "--prompt=x", f"--height={height}", f"--width={width}")[2] == ""


def test_questions_in_a_batch_are_those_alone(command, folder):
    rng = np.random.default_rng(0)  # other noise may have one answer by chance
    for name, shape in (("a.png", (64, 64)), ("b.png", (64, 72))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
    code, out, _ = ask(command, "--image_path", "a.png", "b.png", "--question", "what?", "why?", "--max_new_tokens=5")
    assert code == 0
    alone = []
    for picture, question in (("a.png", "what?"), ("b.png", "why?")):
        alone.append(ask(command, "--image_path", picture, "--question", question, "--max_new_tokens=5")[1])
    assert alone[0] != alone[1]
    assert out == f"a.png: what?\n{alone[0]}b.png: why?\n{alone[1]}"


def test_the_longest_answer_is_what_there_are_positions_for(command, folder, checkpoints):
    shutil.copytree(checkpoints / "Emu3-Chat", folder / "short")
    config = json.loads((folder / "short" / "config.json").read_text())
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 130}))
    code, _, err = ask(command, "--model_path=short", "--image_path=a.png", "--stats_json=stats.json")
    tokens = json.loads((folder / "stats.json").read_text())["tokens"]
    assert code == 0 and "note" not in err and 0 < tokens < 130 - 8 * 9
    code, _, err = ask(command, "--model_path=short", "--image_path=a.png", f"--max_new_tokens={tokens + 1}")
    assert code == 0 and "the model has 130 positions" in err


def test_chat_template(command, folder):
    plain = ask(command, "--max_new_tokens=4")[1]
    code, stage1, _ = ask(command, "--max_new_tokens=4", "--chat_template={image_prompt}{text_prompt}")
    assert code == 0 and stage1 != plain


def test_answers_stream_in_their_order(capsys):
    """The second waits for the first to end."""
    from paddlemix.commands.understand import show

    printed = []

    class Answers:
        ended = [False, False]

        def __iter__(self):
            for texts, self.ended in [
                (["", "o"], [False, False]), (["é", "k"], [False, True]), ([" x", ""], [True, True]),
            ]:  # fmt: skip
                printed.append(capsys.readouterr().out)
                yield texts

    show(Answers(), ["A\n", "B\n"])
    printed.append(capsys.readouterr().out)
    assert printed == ["A\n", "", "é", " x\nB\nok\n"]


# --- bad input: one line, exit code 2, nothing written


def refused(result, folder, *words):
    code, _, err = result
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, err)
    for word in words:
        assert word in lines[0], lines[0]
    assert len(lines[0]) < 1000
    assert not list(folder.glob("*result*.png")) and not list(folder.glob("*recon*"))


def picture_file(folder, kind):
    path = folder / "picture.png"
    Image.effect_noise((64, 64), 50).save(path)
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "narrow":
        Image.new("RGB", (100, 501)).save(path)
    elif kind == "small":
        Image.new("RGB", (64, 7)).save(path)
    elif kind == "missing":
        path.unlink()
    elif kind == "bomb":
        Image.new("1", (20_000, 10_000)).save(path)
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    return path


@pytest.mark.parametrize("caller", [see, ask])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"), ("text", "not a picture"), ("truncated", "cut short"),
        ("narrow", "5 times"), ("small", "at least 8 pixels"), ("bomb", "too large"), ("pipe", "a pipe or a device"),
    ],
)  # fmt: skip
def test_bad_pictures(command, folder, caller, kind, words):
    refused(caller(command, "--image_path", picture_file(folder, kind)), folder, words, "picture.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ratio=0:1"], "'0:1'"),
        (["--ratio=abc"], "'abc'"),
        (["--height=4", "--width=4"], "at least 8 pixels"),
        (["--height=0"], "positive"),
        (["--ratio", "1:1", "1:2", "1:3"], "one ratio for all prompts or one each"),
        (["--num_images=0"], "num_images must be 1 or more"),
        (["--temperature=0"], "temperature"),
        (["--temperature=inf"], "above 0 and finite, got inf"),
        (["--model_path=~nosuchuser/x"], "no checkpoint at '~nosuchuser/x'"),
        (["--num_images=1000000000"], "at most 10000 pictures"),
        (["--height=100000", "--width=100000"], "GB of memory"),
        (["--height=100000"], "the model has 9216 positions; the largest at"),
        (["--ratio=" + "x" * 5000], "ratio must be width:height"),
        (["--top_p=2"], "top_p"),
        (["--top_k=-1"], "top_k"),
        (["--seed=-1"], "seed"),
        (["--guidance_scale=nan"], "guidance_scale"),
        (["--guidance_scale=inf"], "guidance_scale"),
        (["--prompt=bad \udcff byte"], "not UTF-8"),
        (["--stats_json=."], "is not a file"),
        (["--stats_json=/dev/null"], "is not a file"),
        (["--preview=."], "--preview . is not a file"),
        (["--model_path=a/b--c"], "not a name that the hub can have"),
        (["--model_path=nowhere/at/all"], "directory that exists"),
        (["--model_path=BAAI/Emu3-VisionTokenizer"], "is of a 'Emu3VisionVQ' model"),
        (["--vq_model_path=BAAI/Emu3-Gen"], "preprocessor_config.json"),
        (["--device=tpu"], "device 'tpu'"),
        (["--device=gpu:7"], "device 'gpu:7'"),
        (["--device=gpu:x"], "device 'gpu:x'"),
        (["--height=tall"], "--height: 'tall' is not a whole number"),
        (["--temperature=warm"], "--temperature: 'warm' is not a number"),
        (["--dtype=int3"], "--dtype: invalid choice: 'int3' (choose from 'float32'"),
        (["--seed"], "--seed: a value is missing"),
        (["--ratio"], "--ratio: at least one value is missing"),
        (["--heigth=64"], "'--heigth=64': did you mean --height?"),
        (["a red circle"], "'a red circle': --help"),
        (["--stats_json=nowhere/stats.json"], "nowhere: give a folder that exists"),
        (["--stats_json=same.png", "--preview=./same.png"], "are one file, ./same.png: give two"),
    ],
)
def test_bad_arguments(command, folder, arguments, words):
    refused(draw(command, *arguments), folder, words)


def test_questions_and_pictures_must_pair(command, folder):
    refused(ask(command, "--image_path", "a", "b", "--question", "1", "2", "3"), folder, "2 and 3")
    refused(ask(command, "--chat_template", "no slots"), folder, "chat template must hold")
    refused(ask(command, "--max_new_tokens=0"), folder, "--max_new_tokens")


def test_small_mistakes_are_told_before_anything_is_loaded(command, folder):
    (folder / "BAAI").unlink()
    refused(draw(command, "--ratio=0:1"), folder, "'0:1'")
    refused(draw(command, "--guidance_scale=nan"), folder, "guidance_scale")
    refused(ask(command, "--chat_template=x"), folder, "chat template")


def test_frames_of_different_sizes(command, folder):
    (folder / "frames").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64 + 8 * (i == 2))).save(folder / "frames" / f"{i}.png")
    refused(see(command, "--video_path", "frames"), folder, "64x64, 64x72")
    Image.new("RGB", (64, 4)).save(folder / "frames" / "2.png")
    refused(see(command, "--video_path", "frames"), folder, "2.png", "too small")


def test_a_picture_that_memory_does_not_hold(command, folder, checkpoints, monkeypatch):
    shutil.copytree(checkpoints / "Emu3-VisionTokenizer", folder / "large")
    path = folder / "large" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_pixels": 4096**2, "max_pixels": 5000**2}))
    free = 10**9
    monkeypatch.setattr("paddlemix.machine.available_memory", lambda: free)
    refused(command("autoencode.py", "--model_path=large"), folder, "GB of memory for", "pixels at once")


def test_output_folders_that_cannot_be(command, folder):
    (folder / "file").write_text("")
    refused(see(command, "--output_dir", "file/sub"), folder, "--output_dir")
    refused(see(command, "--video_path", "missing"), folder, "--video_path missing is not there", "folder of frames")
    (folder / "empty").mkdir()
    refused(see(command, "--video_path", "empty"), folder, "holds no picture")


def test_no_network_and_nothing_cached(folder):
    (folder / "BAAI").unlink()
    done = shell(SEE, folder, HF_HUB_OFFLINE="1", HF_HOME=str(folder / "cache"))
    refused((done.returncode, done.stdout, done.stderr), folder, "BAAI/Emu3-VisionTokenizer", "not in the local cache")


def test_a_damaged_checkpoint(command, folder, checkpoints):
    shutil.copytree(checkpoints / "Emu3-VisionTokenizer", folder / "damaged")
    path = folder / "damaged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(command("autoencode.py", "--model_path=damaged"), folder, "truncated")


def test_not_enough_memory(command, folder, monkeypatch):
    monkeypatch.setattr("paddlemix.machine.available_memory", lambda: 10**6)
    refused(see(command), folder, "GB of memory", "free")


def test_a_full_disk(command, folder, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(see(command), folder, "cannot write recon_image.png", "No space left on device", "--output_dir")
    assert [p.name for p in folder.iterdir()] == ["BAAI"]


def test_results_equal_the_library(command, folder, checkpoints):
    """What the command saves is what the model decodes."""
    import paddle

    from paddlemix.models.emu3 import Emu3VisionVQModel
    from paddlemix.processors import Emu3VisionVQImageProcessor

    assert see(command)[0] == 0
    model = Emu3VisionVQModel.from_pretrained(checkpoints / "Emu3-VisionTokenizer")
    processor = Emu3VisionVQImageProcessor.from_pretrained(checkpoints / "Emu3-VisionTokenizer")
    picture = Image.open(ROOT / "paddlemix/demo_images/emu3_demo.png")
    with paddle.no_grad():
        pixels = model.decode(model.encode(processor(picture, return_tensors="pd").pixel_values))
    [expected] = processor.postprocess(pixels)["pixel_values"]
    assert relative_error(np.asarray(Image.open(folder / "recon_image.png")), np.asarray(expected)) == 0
