# Licensed under the Apache License, Version 2.0; see LICENSE.
"""List what there is to compute with, and whether a checkpoint fits: versions, device, operators, memory, dtypes."""

import json
import platform
from importlib import metadata

import paddlemix
from paddlemix.machine import available_cores, free_memory
from paddlemix.models.emu3.needs import parameters, picture_tokens, vision_bytes, weight_bytes
from paddlemix.paddle_private import num_threads

from .console import DEVICE_HELP, bare_parser, print_result


def parser(prog=None):
    parser = bare_parser(__doc__, prog)
    parser.add_argument("--model_path", help="what does this checkpoint need? A directory, a hub name, or emu3-mini")
    parser.add_argument("--vq_model_path", help="its vision tokenizer (default: the released one, or emu3-mini's own)")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--json", action="store_true", help="print the same as JSON, memory in bytes")
    return parser


def main(args):
    info = {"versions": versions(), "machine": machine()}
    if args.model_path:
        info["checkpoint"] = checkpoint(args, info["machine"])
    print_result(json.dumps(info, indent=2) if args.json else "\n".join(lines(info)))


def versions():
    import paddle

    paddlenlp = next((found.version for found in metadata.distributions(name="paddlenlp")), None)
    return {
        "paddlemix-emu3": paddlemix.__version__, "python": platform.python_version(), "paddle": paddle.__version__,
        "paddle_build": "CUDA" if paddle.is_compiled_with_cuda() else "CPU", "paddlenlp": paddlenlp,
    }  # fmt: skip


def machine():
    """The device, the memory that is free on it in bytes, and how it computes."""
    import paddle

    device = paddle.get_device()
    on_cpu = device == "cpu"
    operators = compiled_operators()
    if on_cpu:
        name = cpu_name()
        new = "compiled" if operators["compiled"] else "matrix products"
        attention = f"new tokens {new}, prompts matrix products"
        dtypes = ["float32", "bfloat16", "int8", "int4"]
    else:
        name = paddle.device.cuda.get_device_name()
        is_new = paddle.device.cuda.get_device_capability()[0] >= 8
        attention = f"new tokens matrix products, prompts {'flash attention in 16 bits' if is_new else 'the same'}"
        dtypes = ["float32", "float16", *["bfloat16"] * is_new, "int8", "int4"]
    return {
        "device": device, "name": name, "cores": available_cores(), "threads": num_threads(),
        "free_memory": free_memory(), "operators": operators, "attention": attention, "dtypes": dtypes,
    }  # fmt: skip


def compiled_operators():
    from paddlemix import external_ops

    module, reason = external_ops.status()
    build = None if module else external_ops.build_command()
    return {"compiled": module is not None, "reason": reason, "vectors": external_ops.vectors(), "build": build}


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), None)
    except OSError:
        return platform.processor() or None


def checkpoint(args, machine):
    """What a checkpoint is, and the bytes that it needs in each dtype to draw a picture of its own size."""
    from paddlemix.models.emu3 import Emu3Config, Emu3VisionVQConfig
    from paddlemix.models.emu3.cache import cache_bytes
    from paddlemix.models.emu3.hub import MINI

    config = Emu3Config.from_pretrained(args.model_path)
    is_named = args.vq_model_path != "BAAI/Emu3-VisionTokenizer" or args.model_path == MINI
    # the released tokenizer's numbers are the defaults: nothing is fetched for them
    vision = Emu3VisionVQConfig.from_pretrained(args.vq_model_path) if is_named else Emu3VisionVQConfig()
    side, tokens = picture_tokens(config, vision.spatial_downsample_factor)
    weights, features = vision_bytes(vision, side * side)
    quantized, needs = config.quantized_dtype, {}
    for dtype in [quantized] if quantized else machine["dtypes"]:
        if config.tie_word_embeddings and dtype in ("int8", "int4"):
            continue  # a head that is the embedding is not quantized
        need = {"weights": weight_bytes(config, dtype), "keys_and_values": cache_bytes(config, 2 * tokens, dtype)}
        need |= {"vision_tokenizer": weights + features}
        total = sum(need.values())
        needs[dtype] = {**need, "total": total, "fits": total <= machine["free_memory"]}
    return {
        "name": str(args.model_path), "parameters": parameters(config), "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size, "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads, "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings, "dtype": quantized or getattr(config, "torch_dtype", None),
        "picture": {"side": side, "rows": 2, "tokens": tokens}, "memory": needs,
    }  # fmt: skip


def lines(info):
    v, m = info["versions"], info["machine"]
    paddle = f"Paddle {v['paddle']} ({v['paddle_build']} build), PaddleNLP {v['paddlenlp'] or 'is missing'}"
    yield f"versions    paddlemix-emu3 {v['paddlemix-emu3']}, Python {v['python']}, {paddle}"
    name = f": {m['name']}" if m["name"] else ""
    yield f"device      {m['device']}{name}; {m['cores']} cores, {m['threads'] or 'an unknown number of'} threads"
    yield f"memory      {in_bytes(m['free_memory'])} free"
    ops = m["operators"]
    if ops["compiled"]:
        yield f"operators   compiled{', ' + ops['vectors'] if ops['vectors'] else ''}"
    else:
        yield f"operators   {ops['reason'] or 'not compiled'}; `{ops['build']}` compiles them"
    yield f"attention   {m['attention']}"
    yield f"dtypes      {', '.join(m['dtypes'])}"
    if "checkpoint" not in info:
        return
    c = info["checkpoint"]
    picture = c["picture"]
    yield ""
    dtype = f" in {c['dtype']}" if c["dtype"] else ""
    yield f"{c['name']}: {in_words(c['parameters'])} parameters{dtype}"
    yield f"{c['layers']} layers of {c['hidden_size']}, {c['heads']} heads, {c['key_heads']} of keys and values"
    yield f"{c['vocabulary']:,} tokens in the vocabulary, {c['positions']:,} positions"
    side = f"{picture['side']} x {picture['side']} pixels"
    yield f"memory to draw {side} with guidance, {picture['rows']} rows of {picture['tokens']:,} tokens:"
    yield f"{'':<10}{'weights':>12}{'keys, values':>14}{'vision tokenizer':>18}{'in all':>12}"
    for dtype, need in c["memory"].items():
        cells = [in_bytes(need[k]) for k in ("weights", "keys_and_values", "vision_tokenizer", "total")]
        fits = "fits" if need["fits"] else "does not fit"
        yield f"{dtype:<10}{cells[0]:>12}{cells[1]:>14}{cells[2]:>18}{cells[3]:>12}  {fits}"


def in_bytes(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def in_words(count):
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
