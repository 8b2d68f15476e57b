# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The peer's side of the benchmark: Hugging Face transformers at its best ordinary use.

Eager float32 on all cores, scaled_dot_product_attention, the library's own `generate` with its KV cache, its
processor for classifier-free guidance and the rule of its model card for the tokens allowed, here with the visual
tokens as a tensor, which is quicker than the card's list. It reads the same checkpoints: the language model's names
are its own, the vision tokenizer's are mapped.
"""

import functools
import json
import re
import statistics
from pathlib import Path

import numpy as np
import torch
import transformers
from measure import best_rate, timed
from safetensors.torch import load_file

from paddlemix.machine import peak_host_memory

# the released names -> transformers': the attention's norm moves out of it, its 1x1 convolutions become Linear
RENAMINGS = (
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
    (r"\.mid\.attn_1\.norm\.", ".middle_block.attn_norm."),
    (r"\.mid\.", ".middle_block."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"(\.attn\.\d+|\.attn_1)\.([qkv])\.", r"\1.\2_proj."),
    (r"(\.attn\.\d+|\.attn_1)\.proj_out\.", r"\1.out_proj."),
)
loaded = {}  # the model of this process, for `margins`


def start(threads):
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def load_vision(directory):
    names = {"ch": "base_channels", "ch_mult": "channel_multiplier", "z_channels": "latent_channels"}
    config = transformers.Emu3VQVAEConfig(**{names.get(k, k): v for k, v in config_of(directory).items()})
    config.hidden_size = config.base_channels * config.channel_multiplier[-1]
    state = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        for pattern, replacement in RENAMINGS:
            name = re.sub(pattern, replacement, name)
        is_linear = name.endswith("_proj.weight")
        state[name] = tensor[:, :, 0, 0] if is_linear else tensor
    with torch.device("meta"):
        model = transformers.Emu3VQVAE._from_config(config, attn_implementation="sdpa")
    model.load_state_dict(state, assign=True)  # strict: every weight has its place, and no copy stays
    loaded["model"] = model.eval()

    def encode(pixels):
        pixels = torch.from_numpy(pixels)
        return torch.stack(model.encode(pixels, torch.tensor([pixels.shape[-2:]] * len(pixels))).image_tokens).numpy()

    return encode, lambda codes: model.decode(torch.from_numpy(codes)).numpy()


def language_model(directory, dtype):
    config = transformers.Emu3TextConfig(**config_of(directory))
    return transformers.Emu3ForCausalLM.from_pretrained(
        directory, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()


def config_of(directory):
    config = json.loads((directory / "config.json").read_text())
    return {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype", "architectures")}


def load_generation(directory, inputs, dtype, decoding):
    loaded["model"] = model = language_model(directory, dtype)
    height, width = inputs["size"]
    first, body = inputs["first_visual"], height * (width + 1)
    visual = torch.arange(first, first + inputs["codebook_size"])
    closing = [inputs["eof"], inputs["eoi"], inputs["eos"]]
    positive, negative = (torch.tensor([inputs[name]]) for name in ("positive", "negative"))

    def allowed(batch_id, ids):
        position = len(ids) - positive.shape[1]
        if position >= body:
            return [closing[position - body]]
        return [inputs["eol"]] if position % (width + 1) == width else visual

    def generate():
        ids = model.generate(
            input_ids=positive, attention_mask=torch.ones_like(positive), negative_prompt_ids=negative,
            negative_prompt_attention_mask=torch.ones_like(negative), guidance_scale=inputs["guidance_scale"],
            prefix_allowed_tokens_fn=allowed, max_new_tokens=body + 3, do_sample=False, use_cache=True,
            eos_token_id=inputs["eos"], pad_token_id=inputs["pad"],
        )  # fmt: skip
        rows = ids[0, positive.shape[1] :][:body].reshape(height, width + 1)
        return (rows[:, :-1] - first).numpy(), 2 * (body + 3)

    return generate


def load_training(directory, recompute, dropout):
    """One step of training in float32, as a function of ids and labels, int64 [rows, length]: it returns the loss."""
    model = language_model(directory, "float32").train()
    for layer in model.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = dropout
        if isinstance(layer, torch.nn.Dropout):
            layer.p = dropout
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, (0.9, 0.95), 1e-6, weight_decay=0.1, fused=True)

    @torch.enable_grad()
    def step(ids, labels):
        loss = model(torch.from_numpy(ids), labels=torch.from_numpy(labels), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def steps(side, directory, prompt=40, count=8, rows=2):
    """Forward passes of a new token in bfloat16; with guidance an image is two rows."""
    load_s, model = timed(language_model, Path(directory), "bfloat16")
    cache = model(torch.full([rows, prompt], 300), use_cache=True, logits_to_keep=1).past_key_values
    step = functools.partial(model, torch.full([rows, 1], 7), past_key_values=cache, use_cache=True)
    pass_s = statistics.median(timed(step)[0] for _ in range(count))
    return {"load_s": load_s, "pass_s": pass_s, "peak_bytes": peak_host_memory()}


def limits(threads):
    numbers = torch.ones(1 << 28)  # 1 GiB
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x, kernel = torch.randn(1, 256, 128, 128), torch.randn(256, 256, 3, 3)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, kernel)]
    conv = 2 * x.numel() * kernel[0].numel()
    conv2d = torch.nn.functional.conv2d
    return {
        "read_bytes_per_s": {"torch sum": best_rate(4 * numbers.numel(), numbers.sum)},
        "operations_per_s": {
            "torch matmul": best_rate(2 * 2048**3, lambda: a @ b),
            "torch conv2d": best_rate(conv, lambda: conv2d(x, kernel, padding=1)),
            "torch conv2d, channels last": best_rate(conv, lambda: conv2d(*last, padding=1)),
        },
    }


def margins(work, inputs, codes):
    """The values that the winners were chosen from, in one more pass that nothing measures.

    vision: "latents", float32 [h * w, embed_dim], before quantization.
    generate: "top_logits" and "top_codes", [h * w, 8], the largest guided logits at each visual token.
    """
    return vision_margins(inputs["pixels"]) if work == "vision" else generation_margins(inputs, codes)


def vision_margins(pixels):
    caught = []
    model = loaded["model"]
    model.quant_conv.register_forward_hook(lambda module, arguments, output: caught.append(output))
    pixels = torch.from_numpy(pixels)
    model.encode(pixels, torch.tensor([pixels.shape[-2:]] * len(pixels)))
    return {"latents": caught[0].movedim(1, -1).flatten(0, -2).numpy()}


def generation_margins(inputs, codes):
    model, first = loaded["model"], int(inputs["first_visual"])
    rows = np.concatenate([codes + first, np.full([len(codes), 1], inputs["eol"])], axis=1)
    image, head = rows.ravel(), model.lm_head.weight[first : first + int(inputs["codebook_size"])]
    logits = []
    for name in ("positive", "negative"):
        ids = torch.from_numpy(np.concatenate([inputs[name], image]))[None]
        hidden = model.model(ids).last_hidden_state[0, len(inputs[name]) - 1 : -1]
        logits.append(hidden[image != int(inputs["eol"])] @ head.T)
    guided = logits[1] + float(inputs["guidance_scale"]) * (logits[0] - logits[1])
    top = guided.topk(8)
    return {"top_logits": top.values.numpy(), "top_codes": top.indices.numpy()}
