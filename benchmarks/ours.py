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


def load_training(directory, recompute, dropout):
    """One step of training in float32, as a function of ids and labels, int64 [rows, length]: it returns the loss."""
    import paddle

    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.models.emu3.parallel import Ranks
    from paddlemix.training.loss import next_token_loss
    from paddlemix.training.optimizer import AdamW

    model = Emu3ForCausalLM.from_pretrained(directory, dtype="float32", attention_dropout=dropout).train()
    if recompute:
        model.recompute_enable()
    optimizer = AdamW(dict(model.named_parameters()), 0.1, Ranks())

    def step(ids, labels):
        count = int((labels[:, 1:] >= 0).sum())
        loss = next_token_loss(model, paddle.to_tensor(ids), paddle.to_tensor(labels)) / count
        loss.backward()
        optimizer.step(1e-5, 5.0)
        return float(loss)

    return step


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


class LanguageModel:
    """The model as decoding.Batch runs it; what its functions are stands in prompts.measure."""

    modes = ("",)

    def __init__(self, directory, dtype):
        from paddlemix.models.emu3 import Emu3ForCausalLM

        self.model = Emu3ForCausalLM.from_pretrained(directory, dtype=dtype, progress=False)

    def reader(self, mode, length):
        cache = self._cache(1, length)
        return lambda ids: self._read(ids, 0, cache)

    def _read(self, ids, slot, cache):
        """Its last token is read by a step, as Batch does it."""
        import paddle

        from paddlemix.models.emu3.decoding import PROMPT_CHUNK

        last = len(ids) - 1
        for past in range(0, last, PROMPT_CHUNK["cpu"]):
            part = paddle.to_tensor([ids[past : min(past + PROMPT_CHUNK["cpu"], last)]])
            with paddle.no_grad():
                self.model.model.read_prompt(part, past, len(ids), slot, cache)
        return self._step([ids[last]], [last], [slot], cache)[0]

    def stepper(self, mode, prompt, length, rows):
        cache = self._cache(rows, length)
        for slot in range(rows):
            self._read(prompt, slot, cache)
        past = len(prompt)

        def step(ids):
            nonlocal past
            past += 1
            return self._step(ids, [past - 1] * rows, range(rows), cache)

        return step

    def _cache(self, rows, length):
        cache = self.model.make_cache(rows, length)
        cache.reserve(length)
        return cache

    def _step(self, ids, past, slots, cache):
        """Logits [rows, vocab_size]"""
        import paddle

        ids, past, slots = (paddle.to_tensor(np.array(x, np.int64)) for x in (ids, past, slots))
        with paddle.no_grad():
            return self.model.lm_head(self.model.model.step(ids.unsqueeze(-1), past, slots, cache)[:, 0]).numpy()
