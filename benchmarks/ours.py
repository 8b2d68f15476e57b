# Licensed under the Apache License, Version 2.0; see LICENSE.
"""This project's side of the benchmark, and the random checkpoints that both sides read."""

import inspect
import json
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from measure import best_rate

LANGUAGE_CONFIG = {
    "model_type": "Emu3", "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "torch_dtype": "float32",
}  # fmt: skip
VISION_CONFIG = {"model_type": "Emu3VisionVQ", "torch_dtype": "float32"}  # the released sizes
LATENT_MEAN = np.float32([-0.07, -0.05, -0.05, -0.15])  # of what these random weights make of a picture
SPARE_BYTES = 2 << 30  # left free on the disk


def start(threads):
    """Versions of what computes. The environment has told OpenMP the same number before any import."""
    import paddle
    import paddlenlp

    from paddlemix.external_ops import operators

    paddle.base.core.set_num_threads(threads)
    paddle.set_device("cpu")
    compiled = "compiled" if operators() else "not there"
    return {"paddlepaddle": paddle.__version__, "paddlenlp": paddlenlp.__version__, "custom operators": compiled}


def load_vision(directory):
    import paddle

    from paddlemix.models.emu3 import Emu3VisionVQModel

    model = Emu3VisionVQModel.from_pretrained(directory)

    @paddle.no_grad()
    def encode(pixels):
        return model.encode(paddle.to_tensor(pixels)).numpy()

    @paddle.no_grad()
    def decode(codes):
        return model.decode(paddle.to_tensor(codes)).numpy()

    return encode, decode


def load_drawing(directory, inputs, decoding, dtype):
    from paddlemix.models.emu3 import Emu3ForCausalLM, ImageGrammar, generate_images
    from paddlemix.models.emu3.generation_emu3 import Sampling

    options = {"decoding": decoding} if "decoding" in inspect.signature(generate_images).parameters else {}
    if decoding != "step" and not options:
        raise SystemExit(f"generate_images knows no decoding {decoding!r}")
    model = Emu3ForCausalLM.from_pretrained(directory, dtype=dtype)
    config = model.config
    grammar = ImageGrammar(
        img=config.img_token_id, boi=config.boi_token_id, eoi=config.eoi_token_id, eol=config.eol_token_id,
        eof=config.eof_token_id, eos=config.eos_token_id, pad=config.pad_token_id,
        first_visual=inputs["first_visual"], codebook_size=inputs["codebook_size"],
    )  # fmt: skip

    def draw():
        pictures = generate_images(
            model, [inputs["positive"]], [tuple(inputs["size"])], grammar, [inputs["negative"]],
            guidance_scale=inputs["guidance_scale"], sampling=Sampling(top_k=1), **options,
        )  # fmt: skip
        return np.asarray(pictures.codes[0]), pictures.forward_passes

    return draw


def limits(threads):
    """Rates by NumPy and Paddle; the peer measures the same with PyTorch and the best counts."""
    import paddle

    numbers = np.ones(1 << 28, dtype=np.float32)  # 1 GiB
    parts = np.array_split(numbers, threads)
    a, b = (paddle.randn([2048, 2048]) for _ in range(2))
    with ThreadPoolExecutor(threads) as pool:
        read = best_rate(numbers.nbytes, lambda: list(pool.map(np.sum, parts)))
    rate = best_rate(2 * 2048**3, lambda: paddle.matmul(a, b).numpy())
    return {"read_bytes_per_s": {"NumPy sum": read}, "operations_per_s": {"Paddle matmul": rate}}


def write(directory):
    """Both checkpoints, once: random weights, a function of the tensors' names and shapes alone."""
    import paddle

    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM, Emu3VisionVQConfig, Emu3VisionVQModel
    from paddlemix.processors import Emu3VisionVQImageProcessor

    with paddle.LazyGuard():  # shapes, no weights
        vision = Emu3VisionVQModel(Emu3VisionVQConfig(**VISION_CONFIG))
        language = Emu3ForCausalLM(Emu3Config(**LANGUAGE_CONFIG))
    written = [
        write_checkpoint(directory / name, model) for name, model in (("vision", vision), ("language", language))
    ]
    Emu3VisionVQImageProcessor(min_pixels=32 * 32, max_pixels=1024 * 1024).save_pretrained(directory / "vision")
    return {"written": [str(d) for d in written if d]}


def write_checkpoint(directory, model):
    """`directory` where it was written, None where it was there."""
    from safetensors.numpy import save_file

    if (directory / "config.json").exists():  # comes last: with it all is there
        return None
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < size + SPARE_BYTES:
        raise SystemExit(f"{directory} needs {size / 1e9:.1f} GB and 2 GB to spare, {free / 1e9:.1f} GB are free")
    tensors = {name: random_tensor(name, shape) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2, sort_keys=True) + "\n")
    return directory


def random_tensor(name, shape):
    """float32, scaled so that signals keep their size from layer to layer and every layer has a say in the result.

    Otherwise greedy decoding would echo its last token, and equal tokens would show little.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.array(1, dtype=np.int64)
    if name.endswith("running_var"):
        return 0.5 + rng.random(shape, dtype=np.float32)
    x = rng.standard_normal(shape, dtype=np.float32)
    if name == "quantize.embedding.weight":  # around the latents, so that a picture has many codes
        x = LATENT_MEAN + np.float32(0.1) * x
    elif len(shape) > 1 and "embed_tokens" not in name:  # kernels
        x /= np.float32(np.sqrt(np.prod(shape[1:])))
    elif len(shape) == 1:
        x *= np.float32(0.1)
        if name.endswith("weight"):  # of a norm
            x += 1
    return x
