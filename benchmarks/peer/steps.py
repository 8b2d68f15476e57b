# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Steps of transformers' Emu3 on a checkpoint of the released layout, in bfloat16; released.py starts it."""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

PROMPT, STEPS, ROWS = 40, 8, 2  # tokens; passes that are timed; with guidance a picture is two rows


def main(directory, threads):
    torch.set_num_threads(threads)
    released = json.loads((directory / "config.json").read_text())
    config = transformers.Emu3TextConfig(
        **{k: v for k, v in released.items() if k not in ("model_type", "torch_dtype")}
    )
    start = time.perf_counter()
    model = transformers.Emu3ForCausalLM.from_pretrained(directory, config=config, dtype=torch.bfloat16).eval()
    result, times = {"load_s": time.perf_counter() - start}, []
    with torch.no_grad():
        cache = model(torch.full([ROWS, PROMPT], 300), use_cache=True, logits_to_keep=1).past_key_values
        for token in range(STEPS):
            start = time.perf_counter()
            model(torch.full([ROWS, 1], token), past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**result, "pass_s": statistics.median(times), "peak_bytes": peak, "versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
