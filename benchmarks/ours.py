# Licensed under the Apache License, Version 2.0; see LICENSE.
"""This project's side of the measurements: loads a checkpoint and calls the model, NumPy arrays in and out."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from measure import best_rate


def start(threads):
    """Versions of what computes. The environment gave OpenMP the same number of threads before any import."""
    import paddle
    import paddlenlp

    from paddlemix.external_ops import operators
    from paddlemix.paddle_private import set_num_threads

    set_num_threads(threads)
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


def load_generation(directory, inputs, dtype, decoding):
    from paddlemix.models.emu3 import Emu3ForCausalLM, ImageGrammar, Sampling, generate_images

    model = Emu3ForCausalLM.from_pretrained(directory, dtype=dtype)
    grammar = ImageGrammar.from_config(model.config)

    def generate():
        images = generate_images(
            model, [inputs["positive"]], [tuple(inputs["size"])], grammar, [inputs["negative"]],
            guidance_scale=inputs["guidance_scale"], sampling=Sampling(top_k=1), decoding=decoding,
        )  # fmt: skip
        return np.asarray(images.codes[0]), images.forward_passes

    return generate


def margins(work, inputs, codes):
    """Nothing: the peer's values show how clear the winners were."""
    return {}


def limits(threads):
    """Rates by NumPy and Paddle; the peer measures the same with PyTorch and the best counts."""
    import paddle

    numbers = np.ones(1 << 28, dtype=np.float32)  # 1 GiB
    a, b = (paddle.randn([2048, 2048]) for _ in range(2))
    rate = best_rate(2 * 2048**3, lambda: paddle.matmul(a, b).numpy())
    read = {"NumPy sum": read_rate(np.array_split(numbers, threads))}
    return {"read_bytes_per_s": read, "operations_per_s": {"Paddle matmul": rate}}


def read_rate(parts, read=np.sum, repeats=5):
    """Bytes a second at which `read` goes over arrays, a thread for each."""
    with ThreadPoolExecutor(len(parts)) as pool:
        return best_rate(sum(part.nbytes for part in parts), lambda: list(pool.map(read, parts)), repeats)
