# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Two replicas behind Ray Serve. Skipped where Ray is not installed: pip install -c constraints.txt -e ".[ray]"."""

import base64
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from paddlemix.pipelines import Emu3Pipeline

pytest.importorskip("ray", reason="Ray is not installed")


def serve(*arguments):
    command = [sys.executable, "-m", "paddlemix.commands", "serve", "--model_path=emu3-mini", "--ray", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def replicas():
    """Their process numbers."""
    found = subprocess.run(["pgrep", "-f", "ServeReplica:emu3"], capture_output=True, text=True).stdout
    return set(map(int, found.split()))


def test_two_replicas_give_the_pictures_of_the_pipeline():
    server = serve("--replicas=2", "--port=0")
    try:
        line = server.stdout.readline()
        if not line.startswith("listening on http://127.0.0.1:"):
            pytest.fail(f"{line}{server.communicate(timeout=60)}")
        assert line.endswith(", 2 replicas\n")
        url = line.split()[2].rstrip(",")
        assert [psutil.Process(number).nice() for number in replicas()] == [os.nice(0)] * 2

        def ask(seed):
            body = {"prompt": "a red circle", "seed": seed}
            return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).json()["data"][0]["b64_json"]

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
        emu3 = Emu3Pipeline.from_pretrained("emu3-mini")
        for seed, data in enumerate(answers):
            [expected] = emu3.generate("a red circle", seed=seed)
            found = Image.open(io.BytesIO(base64.b64decode(data)))
            assert (np.asarray(found) == np.asarray(expected)).all()
        body = {"prompt": "a red circle", "seed": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=60) as stream:
            assert "event: image_generation.completed" in stream.read().decode()
    finally:
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    assert server.returncode == 0 and replicas() == set()
    assert "finishing what runs" in err and "Traceback" not in err


def test_too_many_replicas_are_one_line():
    server = serve(f"--replicas={100 * os.cpu_count()}", "--port=0")
    out, err = server.communicate(timeout=60)
    assert server.returncode == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "take fewer --replicas" in err
