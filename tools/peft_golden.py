# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Write tests/golden/peft_adapter/ and peft_adapter.npz: an adapter that PEFT wrote, and what PyTorch computes with it.

Run it in the environment of benchmarks/peer/requirements.txt with `peft==0.21.2` installed into it. The model is
transformers' Emu3ForCausalLM with the golden language model's weights.

peft_adapter.npz:
    logits: float32 [2, vocabulary], of the last position of each row of language_model.npz's plain_ids, by PEFT.
    q_proj of layer 1: float32 [16, in], its first rows after PEFT has merged the adapter.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Emu3ForCausalLM, Emu3TextConfig

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))

import recipe

SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
MERGED, ROWS = "model.layers.1.self_attn.q_proj.weight", 16


def base_model():
    values = json.loads((GOLDEN / "language_model.json").read_text())
    rope = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    config = Emu3TextConfig(**{key: values[key] for key in SAME}, rope_parameters=rope, attention_dropout=0.0)
    model = Emu3ForCausalLM(config).float()
    layout = json.loads((GOLDEN / "language_model.layout.json").read_text())
    weights = {name: torch.from_numpy(recipe.tensor("public-lm", name, shape)) for name, shape in layout.items()}
    model.load_state_dict(weights)
    return model.eval()


def main():
    ids = torch.from_numpy(np.load(GOLDEN / "language_model.npz")["plain_ids"])
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base_model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which starts at 0
                parameter.copy_(torch.randn_like(parameter) * 0.05)
        logits = model(ids).logits[:, -1].numpy()
    model.save_pretrained(GOLDEN / "peft_adapter")
    (GOLDEN / "peft_adapter" / "README.md").unlink()
    (GOLDEN / "peft_adapter" / "adapter_model.safetensors").chmod(0o644)
    merged = model.merge_and_unload().state_dict()[MERGED].numpy()[:ROWS]
    np.savez_compressed(GOLDEN / "peft_adapter.npz", logits=logits, **{MERGED: merged})


if __name__ == "__main__":
    main()
