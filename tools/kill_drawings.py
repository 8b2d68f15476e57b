# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Kill drawings at random moments, resume them, and compare their pictures with those of uninterrupted runs.

    .venv/bin/python tools/kill_drawings.py --kills 100 --seed 1

Each drawing is killed up to 4 times, and runs with --resume after each. A picture must be the uninterrupted run's, byte
for byte; no run may print a traceback.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16", "int8", "int4")
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
MOMENTS = ("loading", "rows", "token file", "pictures")
FORMS = (  # one picture is drawn with guesses (jacobi), several are drawn together (step)
    ("a large red circle on a white background.", "--height=128", "--width=128"),
    ("a blue square and a green circle.", "--num_images=3", "--ratio=1:1", "--preview=preview.png"),
)
LOADING_S, DRAWING_S = 3.5, 1.5  # about so long


def arguments(dtype, form):
    return ["generate", *form, "--model_path=emu3-mini", "--seed=1", f"--dtype={dtype}"]


def start(folder, dtype, form, *more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    if "paddle" in sys.modules:  # whose import sets it to 1; without the operators a picture depends on the threads
        env.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "paddlemix.commands", *arguments(dtype, form), *more], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
    )  # fmt: skip


def kill(process, folder, moment, how, rng):
    """Send the signal `how` at a moment. Returns the signal, None where the process ended before.

    AssertionError: it ends as no killed command may.
    """
    if moment == "loading":
        time.sleep(rng.uniform(0.2, LOADING_S))  # before that Python itself starts
    else:
        process.stdout.readline()  # "drawing ..."
    if moment in ("rows", "token file"):
        time.sleep(rng.uniform(0, DRAWING_S))
    if moment in ("token file", "pictures"):
        suffix, temporary = {"token file": (".npz", True), "pictures": (".png", False)}[moment]
        while process.poll() is None and not any(_is_result(n, suffix, temporary) for n in os.listdir(folder)):
            time.sleep(1e-4)
        time.sleep(rng.choice([0, rng.uniform(0, 0.01)]))
    process.send_signal(how)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise AssertionError(f"{moment}, {how.name}: it does not end; {process.communicate()[1]}") from None
    if process.returncode == 0:
        return None
    # -SIGINT: before Python or the command takes the signal, and when both are done
    expected = {-how, 130} if how == signal.SIGINT else {-how}
    assert "Traceback" not in err and process.returncode in expected, (moment, how.name, process.returncode, err)
    return how


def _is_result(name, suffix, temporary):
    return name.startswith(".result" if temporary else "result") and name.endswith(suffix)


def pictures(folder):
    """{number in its drawing: bytes of the file}, of all that are written; AssertionError where two differ."""
    from PIL import Image

    found = {}
    for path in Path(folder).glob("result_*.png"):
        content = path.read_bytes()
        if content:  # an empty one is a name claimed
            number = int(Image.open(path).text["image"])
            assert found.setdefault(number, content) == content, f"{path} is another picture"
    return found


def resumed(folder, dtype, form):
    """Run to the end what was killed."""
    process = start(folder, dtype, form, "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def chain(dtype, form, kills, rng, expected, counts):
    """A drawing that is killed so many times, and its comparison. Returns the number of kills."""
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        while done < kills:
            moment, how = rng.choice(MOMENTS), rng.choice(SIGNALS)
            process = start(folder, dtype, form, *(["--resume"] if done else []))
            try:
                if not kill(process, folder, moment, how, rng):
                    counts["ended before"] += 1
                    break
            finally:
                process.kill()
                process.communicate()
            done += 1
            counts.update([moment, how.name, dtype])
            names = os.listdir(folder)
            counts["temporary token file left"] += any(_is_result(n, ".npz", True) for n in names)
            counts["temporary picture left"] += any(_is_result(n, ".png", True) for n in names)
            found = pictures(folder)
            assert found.items() <= expected.items(), (dtype, form, "a picture differs after a kill")
        else:
            resumed(folder, dtype, form)
        assert pictures(folder) == expected, (dtype, form, "the pictures differ")
        counts["pictures compared"] += len(expected)
        counts["names claimed and left empty"] += sum(not p.stat().st_size for p in Path(folder).glob("result_*.png"))
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments; printed")
    args = parser.parse_args()
    print(f"{args.kills} kills, seed {args.seed}", flush=True)
    expected, counts, done, failed = {}, Counter(), 0, 0
    for dtype in DTYPES:
        for form in FORMS:
            with tempfile.TemporaryDirectory() as folder:
                resumed(folder, dtype, form)
                expected[dtype, form] = pictures(folder)
    number = 0
    while done < args.kills and failed < 5:
        rng = random.Random(f"{args.seed}/{number}")
        dtype, form = list(expected)[number % len(expected)]
        try:
            done += chain(dtype, form, min(args.kills - done, rng.randint(1, 4)), rng, expected[dtype, form], counts)
        except AssertionError as error:
            failed, done = failed + 1, done + 1
            print(f"drawing {number} of seed {args.seed}: {error}", flush=True)
        number += 1
        print(f"drawing {number}, {dtype}: {done} kills, {failed} failed", flush=True)
    print(f"{done} kills of {number} drawings, {failed} failed")
    for name, count in counts.items():
        print(f"  {name}: {count}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
