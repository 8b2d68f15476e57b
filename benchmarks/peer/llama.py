# Licensed under the Apache License, Version 2.0; see LICENSE.
"""llama.cpp's side of the benchmark `prompts`, through the C functions that llama-cpp-python passes on.

The same weights as GGUF: F16 written here from the checkpoint, of it Q8_0 and Q4_0 by llama.cpp's own quantization.
Every matrix is of the one type, the head included, as ours are. Nothing of Paddle is imported.
"""

import ctypes
import functools
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from measure import threads

from paddlemix.models.emu3.configuration_emu3 import Emu3Config

FILES = {"bfloat16": "F16.gguf", "int8": "Q8_0.gguf", "int4": "Q4_0.gguf"}
ERROR = 4  # the level of its messages that are shown
callbacks = []  # that must outlive the calls to them
BATCH = 512  # tokens of a prompt that are read at once: llama.cpp's default of n_ubatch
ROWS = 4096  # of a matrix that are in float32 at once
# the released names -> those of the architecture "llama"
RENAMINGS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def start(threads):
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level, text, data):
        if level == ERROR:
            sys.stderr.write(text.decode())

    callbacks.append(log)
    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    return {"llama-cpp-python": version("llama-cpp-python")}


def write(side, directory):
    """The GGUF files of a checkpoint in bfloat16, unless they are there already."""
    import llama_cpp

    directory = Path(directory)
    f16 = directory / FILES["bfloat16"]
    make(f16, functools.partial(write_f16, directory))
    for dtype, file_type in (("int8", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0), ("int4", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)):
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.pure = threads(), file_type, True
        make(directory / FILES[dtype], lambda path, params=params: quantize(f16, path, params))


def make(path, write):
    """Call `write` with another name, so that a file under its own name is whole."""
    if not path.exists():
        part = path.with_suffix(".part")
        write(part)
        part.rename(path)


def quantize(source, path, params):
    import llama_cpp

    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp did not quantize {source}")


def write_f16(directory, path):
    """A tensor at a time. The norms are float32, as llama.cpp wants them."""
    import gguf

    config = Emu3Config.from_pretrained(directory)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_theta)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("no_vocab")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tensors = {name: bits for file in sorted(directory.glob("*.safetensors")) for name, bits in read_bfloat16(file)}
    types = {name: np.dtype(np.float16 if bits.ndim == 2 else np.float32) for name, bits in tensors.items()}
    for name, bits in tensors.items():
        out.add_tensor_info(renamed(name), bits.shape, types[name], bits.size * types[name].itemsize)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for name, bits in tensors.items():
        tensor = np.empty(bits.shape, types[name])
        for start in range(0, len(bits), ROWS):
            tensor[start : start + ROWS] = (bits[start : start + ROWS].astype(np.uint32) << 16).view(np.float32)
        count = heads.get(name.split(".")[-2])
        out.write_tensor_data(interleaved(tensor, count) if count else tensor)
    out.close()


def read_bfloat16(path):
    """(name, uint16 array that maps the file) of the tensors of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        yield name, np.memmap(path, np.uint16, "r", 8 + size + tensor["data_offsets"][0], tuple(tensor["shape"]))


def renamed(name):
    for theirs, ours in RENAMINGS.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", name)
    return name


def interleaved(weight, heads):
    """Of each head the rows in the order in which llama.cpp rotates them: neighbours, not halves, are a pair."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


class LanguageModel:
    """A GGUF file. Of `modes` the benchmark takes the fastest for each length."""

    modes = {"flash attention": True, "no flash attention": False}

    def __init__(self, directory, dtype):
        import llama_cpp as c

        self.c, self.context = c, None
        path = str(directory / FILES[dtype]).encode()
        self.model = c.llama_model_load_from_file(path, c.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {path.decode()}")
        self.vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.batch = c.llama_batch_init(BATCH, 0, 1)

    def _start(self, mode, length, rows):
        """A context for so many rows in place of the one before."""
        c = self.c
        if self.context:
            c.llama_free(self.context)
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = length * rows, rows, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads()
        params.flash_attn_type = int(self.modes[mode])
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")

    def reader(self, mode, length):
        self._start(mode, length, 1)

        def read(ids):
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)
            return self._read(ids, 0)

        return read

    def _read(self, ids, row):
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            is_last = start + len(part) == len(ids)
            self._decode([(token, start + i, row) for i, token in enumerate(part)], [len(part) - 1] if is_last else [])
        return self._logits(len(part) - 1)

    def stepper(self, mode, prompt, length, rows):
        self._start(mode, length, rows)
        for row in range(rows):
            self._read(prompt, row)
        past = len(prompt)

        def step(tokens):
            nonlocal past
            self._decode([(token, past, row) for row, token in enumerate(tokens)], range(rows))
            past += 1
            return np.stack([self._logits(row) for row in range(rows)])

        return step

    def _decode(self, tokens, wanted):
        """tokens: [(id, position, row)]; wanted: of which of them logits are computed."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
            batch.logits[i] = i in wanted
        if self.c.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _logits(self, i):
        """float32 [vocab_size], after the token i of the last call."""
        return np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, i), [self.vocab_size]).copy()
