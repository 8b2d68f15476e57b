# Licensed under the Apache License, Version 2.0; see LICENSE.
"""`quality` on a trained text model: a GGUF file of the architecture "llama", whose graph is ours.

llama.cpp's Python unpacks the file and makes tokens of the documentation's text. Its logits show that the checkpoint
written here is the same model.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from machine import describe
from measure import LLAMA, ROOT, call, threads

TITLE = "Quality of quantized weights: a trained text model"
DTYPES = ("float32", "bfloat16", "int8", "int4")
ACTIVATIONS = {"": "", "avx512": ", float activations"}  # EMU3_OPS_SIMD -> a suffix of the columns
COLUMNS = ("same token", "divergence, nats", "perplexity")
HEADS = ["", "in memory", *(column + suffix for suffix in ACTIVATIONS.values() for column in COLUMNS)]
LEAST_CORRELATION = 0.99  # with llama.cpp's logits: its activations are rounded to 8 bits
PIECE = 500  # tokens that are read at once: more than few_rows_linear.FEW_ROWS, as a prompt's are
PARTS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def run(args, page):
    for path, hint in ((args.text_model, "--help names a source"), (args.llama_python, "give --llama_python")):
        if not path.exists():
            sys.exit(f"{path} is missing: {hint}")
    directory = args.directory / "text_model"
    directory.mkdir(exist_ok=True)
    piece, count = (80, 1) if args.small else (PIECE, None)
    given = {"file": args.text_model.absolute(), "directory": directory, "piece": piece, "count": count}
    unpacked = call(args, LLAMA, "text_model.unpack", **given)
    write_checkpoint(directory)
    found = [
        call(args, "ours", "text_model.measure", {"EMU3_OPS_SIMD": simd} if simd else {}, directory=directory)
        for simd in ACTIVATIONS
    ]
    rows = [[dtype, *found[0]["rows"][dtype], *found[1]["rows"][dtype][1:]] for dtype in DTYPES]
    is_equal, note = check(**found[1]["check"])
    page.put(TITLE, HEADS, rows, text(args.text_model.name, found[0]["tokens"], piece), {"text model": note})
    page.put_machine(["quality of a text model"], describe({**found[0]["versions"], **unpacked["versions"]}))
    yield "text model", is_equal, found


# --- in llama.cpp's Python -------------------------------------------------------------------------------


def unpack(side, file, directory, piece, count):
    """Write config.json, weights.npz (released names, float32), pieces.json (token ids), and logits.npy, which are
    llama.cpp's of the first piece."""
    import gguf
    import llama_cpp

    directory, reader = Path(directory), gguf.GGUFReader(file)
    config = config_of({name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")})
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        name, weight = renamed(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rotated = heads.get(name.split(".")[-2])
        weights[name] = in_halves(weight, rotated) if rotated else weight
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    np.savez(directory / "weights.npz", **weights)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    model = llama_cpp.Llama(file, n_ctx=piece, n_batch=piece, n_threads_batch=threads(), logits_all=True, verbose=False)
    pieces = [ids[:piece] for ids in (model.tokenize(text.encode(), add_bos=False) for text in texts())]
    pieces = [ids for ids in pieces if len(ids) == piece][:count]
    (directory / "pieces.json").write_text(json.dumps(pieces))
    model.eval(pieces[0])
    np.save(directory / "logits.npy", model.scores[:piece])


def config_of(metadata):
    """config.json from a GGUF file's metadata. The head is a matrix of its own, as int8 and int4 want it."""
    get = {name.removeprefix("llama."): value for name, value in metadata.items()}.__getitem__
    return {
        "model_type": "Emu3", "torch_dtype": "float32", "tie_word_embeddings": False,
        "vocab_size": get("vocab_size"), "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"), "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"), "num_key_value_heads": get("attention.head_count_kv"),
        "max_position_embeddings": get("context_length"), "rope_theta": get("rope.freq_base"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
    }  # fmt: skip


def renamed(name):
    """The released name of a GGUF tensor."""
    layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
    return f"model.layers.{layer}.{PARTS[part]}.weight" if layer else f"{PARTS[part]}.weight"


def in_halves(weight, heads):
    """A query's or key's rows in our order: two that are rotated together are half a head apart, not neighbours."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def texts():
    """The project's documentation, English but for README_zh.md."""
    return [prose(path.read_text()) for path in sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")])]


def prose(text):
    """Markdown without code blocks, tables, pictures and HTML."""
    text = re.sub(r"^```.*?^```\n", "", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("|", "!", "[!", "<")))


# --- ours ------------------------------------------------------------------------------------------------


def write_checkpoint(directory):
    """model.safetensors in place of weights.npz."""
    from paddlemix.models.emu3.safetensors_file import write_safetensors

    source = directory / "weights.npz"
    with np.load(source) as weights:
        layout = {name: ("float32", weights[name].shape) for name in weights}
        write_safetensors(directory / "model.safetensors", layout, weights.__getitem__)
    source.unlink()


def measure(side, directory):
    """{"rows": {dtype: cells of the table}, "tokens": how many were compared, "check": for `check`}"""
    import paddle
    from quality import size_of

    from paddlemix.models.emu3 import Emu3ForCausalLM

    directory = Path(directory)
    models = {dtype: Emu3ForCausalLM.from_pretrained(directory, dtype=dtype) for dtype in DTYPES}
    pieces = json.loads((directory / "pieces.json").read_text())
    found = {dtype: [] for dtype in DTYPES}
    for ids in pieces:
        logits = {}
        for dtype, model in models.items():
            with paddle.no_grad():
                logits[dtype] = model.lm_head(model.model(paddle.to_tensor([ids])))[0].numpy()
            found[dtype].append(compare(logits[dtype], logits["float32"], ids))
        if ids is pieces[0]:
            theirs = np.load(directory / "logits.npy")
            correlation = min(np.corrcoef(a, b)[0, 1] for a, b in zip(logits["float32"], theirs, strict=True))
            same, divergence, _ = compare(theirs, logits["float32"], ids)
    rows = {dtype: [size_of(models[dtype]), *cells(*np.mean(found[dtype], 0))] for dtype in DTYPES}
    checked = {"correlation": correlation, "same": same, "divergence": divergence}
    return {"rows": rows, "tokens": sum(map(len, pieces)), "check": checked}


def compare(logits, reference, ids):
    """Means over a piece: how often the likeliest token is the reference's, the divergence from it, and the negative
    logarithm of the probability of the token that comes next, in nats."""
    logs, expected = log_softmax(logits), log_softmax(reference)
    divergence = (np.exp(expected) * (expected - logs)).sum(-1)
    surprise = -logs[np.arange(len(ids) - 1), ids[1:]]
    return [float(x.mean()) for x in (logits.argmax(-1) == reference.argmax(-1), divergence, surprise)]


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cells(same, divergence, surprise):
    return f"{100 * same:.1f} %", f"{divergence:.5f}", f"{np.exp(surprise):.2f}"


def check(correlation, same, divergence):
    """(whether llama.cpp computes the same model, a line about it)"""
    is_equal = correlation >= LEAST_CORRELATION
    verdict = "equal" if is_equal else "**NOT EQUAL**"
    return is_equal, (
        f"{verdict}: llama.cpp's logits of the first piece correlate with those of float32 by {correlation:.4f} or "
        f"more; {100 * same:.1f} % same token, divergence {divergence:.5f}"
    )


def text(name, tokens, piece):
    return f"""\
`quality --text_model {name}`: {tokens} tokens of this project's documentation, in pieces of {piece}, each read as one
prompt. The file's weights in float32, then rounded to bfloat16, int8 and int4. Same token and divergence as above, over
the whole vocabulary. A long prompt's activations are rounded where the processor has products for it: to bfloat16
beside bfloat16, to 16 bits beside int8, to 8 bits beside int4; in the columns of float activations
(`EMU3_OPS_SIMD=avx512`) they are not.
"""
