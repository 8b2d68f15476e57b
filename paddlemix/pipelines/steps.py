# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the pipeline's step-wise methods give: pictures and answers in the making, and reconstructions."""

import time
from dataclasses import dataclass

from paddlemix.machine import require_memory
from paddlemix.processors.emu3_processing import largest_size
from paddlemix.processors.image_processing_emu3 import over_white, psnr, to_pil
from paddlemix.utils import InputError

LONGEST_ANSWER = 1024  # tokens, where a caller does not say
FARTHEST = 5  # times the model's positions: what is drawn beyond is noise, and takes hours


@dataclass
class Reconstruction:
    """A picture that went through the vision tokenizer.

    `original` is the PIL picture as it was encoded, `image` the decoded one, `codes` int64 [h, w] (of a video's frame
    [1, h, w], of its clip); seconds are of this frame alone.
    """

    original: object
    image: object
    codes: object
    encode_s: float
    decode_s: float

    @property
    def psnr(self):
        """Peak signal-to-noise ratio in dB."""
        return psnr(self.original, self.image)


class Generation:
    """Pictures that are being drawn. Iterating draws them; each step gives how many tokens were gained.

    `sizes` are (height, width) in pixels, `seed` and `settings` what decides the pictures, `tokens` how many there are
    in all, `notes` what a user should know, `forward_passes` how many the drawing took.
    """

    def __init__(
        self, pipeline, prompts, ratios, positive, negatives, negative_prompt, values, seed, decoding,
        batch=None,
    ):  # fmt: skip
        self.pipeline, self.decoding, self.seed, self.values = pipeline, decoding, seed, values
        self.prompts, self.ratios, self.negative_prompt = prompts, ratios, negative_prompt
        self.codes = [tuple(size) for size in positive["image_size"]]
        self.rows = positive["input_ids"], negatives
        self.factor = pipeline.processor.vision_tokenizer.spatial_scale_factor
        self.sizes = [(h * self.factor, w * self.factor) for h, w in self.codes]
        self._check_sizes(batch)
        self.notes = list(dict.fromkeys(filter(None, map(self._note, range(len(prompts))))))
        self.forward_passes = 0
        self.drawings = None
        self.resume()

    def resume(self, drawn=None, seed=None):
        """Begin, or go on with what `drawn` gave in an earlier process, of the same settings and this seed."""
        from paddlemix.models.emu3.generation_emu3 import make_drawings
        from paddlemix.models.emu3.sampling import Sampling

        self.seed = self.seed if seed is None else seed
        sampling = Sampling(**{k: v for k, v in self.values.items() if k != "guidance_scale"}, seed=self.seed)
        prompts, negatives = self.rows
        self.drawings = make_drawings(
            prompts, self.codes, self.pipeline.processor.grammar, negatives, self.values["guidance_scale"], sampling,
            drawn,
        )  # fmt: skip

    @property
    def settings(self):
        """What decides the pictures, as JSON has it, but for the checkpoint."""
        return {
            "prompt": self.prompts, "negative_prompt": self.negative_prompt, "size": [list(s) for s in self.codes],
            "seed": self.seed, **self.values, "dtype": self.pipeline.model.weight_dtype,
        }  # fmt: skip

    def metadata(self, i):
        """What belongs into the file of picture `i`: all that is needed to draw it again."""
        lora = {} if self.pipeline.lora_path is None else {"lora_path": str(self.pipeline.lora_path)}
        return {
            "prompt": self.prompts[i], "negative_prompt": self.negative_prompt, "ratio": self.ratios[i],
            "seed": self.seed, "image": i, "images": len(self.prompts), **self.values,
            "model_path": self.pipeline.model_path, **lora, "vq_model_path": self.pipeline.vq_model_path,
            "dtype": self.pipeline.model.weight_dtype,
        }  # fmt: skip

    @property
    def is_guided(self):
        return self.values["guidance_scale"] != 1

    @property
    def tokens(self):
        return sum(drawing.tokens for drawing in self.drawings)

    @property
    def gained(self):
        """Tokens that are drawn up to now."""
        return sum(drawing.gained for drawing in self.drawings)

    def drawn(self):
        """The tokens of each picture up to now: a list of int64 [positions], as `resume` takes them."""
        return [drawing.drawn() for drawing in self.drawings]

    @property
    def rows_drawn(self):
        """Rows of codes that are drawn, of all pictures."""
        return sum(drawing.rows for drawing in self.drawings)

    def __iter__(self):
        from paddlemix.models.emu3.shared_batch import make_batch

        self._require_memory_to_decode()  # once more: the weights are in memory by now
        batch = make_batch(self.pipeline.model, decoding=self.decoding)
        batch.join(*self.drawings)
        while batch:
            gained = sum(tokens for _, tokens in batch.step())
            self.forward_passes = batch.forward_passes
            yield gained

    def images(self):
        """The PIL pictures, grey where nothing is drawn yet."""
        return [self.image(i) for i in range(len(self.drawings))]

    def image(self, i):
        """The PIL picture `i`, grey where nothing is drawn yet."""
        from PIL import Image

        codes, (height, width) = self.drawings[i].codes(), self.sizes[i]
        image = self.pipeline.processor.decode_image(codes) if len(codes) else None
        if image is not None and image.height == height:
            return image
        whole = Image.new("RGB", (width, height), "grey")
        if image is not None:
            whole.paste(image, (0, 0))
        return whole

    def _check_sizes(self, batch):
        """InputError where the model or the memory cannot take what is asked for: before any work is done."""
        from paddlemix.models.emu3.cache import cache_bytes

        config, limit = self.pipeline.config, self.pipeline.config.max_position_embeddings
        tokens = [0] * len(self.codes)  # of each picture
        for i, (h, w) in enumerate(self.codes):
            for name, rows in zip(("prompt", "negative_prompt")[: 1 + self.is_guided], self.rows):
                length = len(rows[i])
                if length > limit:
                    raise InputError(f"the {name} has {length} tokens, the model has {limit} positions: shorten it")
                tokens[i] += length + h * (w + 1)
        self._require_memory_to_decode()
        if batch is not None:
            batch.require_memory(max(tokens))
        else:
            purpose = f"for the keys and values of {sum(tokens)} tokens, {len(self.codes)} pictures at once"
            size = cache_bytes(config, sum(tokens), self.pipeline.dtype, self.pipeline.ranks)
            require_memory(size, purpose)

    def _require_memory_to_decode(self):
        for h, w in set(self.codes):
            self.pipeline.vision_tokenizer.require_memory_to_decode(1, h, w)

    def _note(self, i):
        """Positions beyond those of the training give poor pictures: which size does not."""
        grammar, limit = self.pipeline.processor.grammar, self.pipeline.config.max_position_embeddings
        (h, w), length = self.codes[i], max(len(rows[i]) for rows in self.rows[: 1 + self.is_guided])
        needed = length + grammar.num_tokens(h, w)
        if needed <= limit:
            return None
        best = largest_size(self.ratios[i], limit - length, grammar, self.factor)
        advice = "no picture fits"
        if best:
            height, width = (side * self.factor for side in best)
            advice = f"the largest at {self.ratios[i]} that fits has height={height} width={width}"
        pixels = f"{w * self.factor} x {h * self.factor} pixels"
        text = f"{pixels} take {needed} tokens, the model has {limit} positions; {advice}"
        if needed > FARTHEST * limit:
            raise InputError(text)
        return text


class Understanding:
    """Answers that are being written. Iterating writes them; each step gives a list of new texts, one an answer.

    A text holds whole characters. `texts` are the answers up to now, `tokens` how many they have, `ended` which are
    complete, `notes` what a user should know, `encode_s` the seconds that the pictures took, while the language model
    was read where it was not before.
    """

    def __init__(self, pipeline, images, questions, max_new_tokens, sampling):
        from paddlemix.models.emu3.sequences import Answer

        self.pipeline, self.notes, self.forward_passes = pipeline, [], 0
        processor, limit = pipeline.processor, pipeline.config.max_position_embeddings
        flat = {id(one): self._flat(one) for one in images}
        images = [flat[id(one)] for one in images]
        # the disk reads the language model while the cores encode
        with pipeline.loading_model(processor.memory_to_encode(flat.values())):
            start = time.perf_counter()
            batch = processor(questions, images, mode="U", positions=limit)
            self.encode_s = time.perf_counter() - start
        for image, size in zip(images, batch["image_size"], strict=True):
            self._note_scaled(image, size)
        prompts = batch["input_ids"]
        length = max(map(len, prompts))
        if max_new_tokens is None:
            max_new_tokens = min(LONGEST_ANSWER, max(1, limit - length))
        if length + max_new_tokens > limit:
            self.notes.append(
                f"prompt and answer take up to {length + max_new_tokens} tokens, the model has {limit} positions: "
                "lower max_new_tokens"
            )
        self.answers = [
            Answer(prompt, max_new_tokens, pipeline.config, sampling, i) for i, prompt in enumerate(prompts)
        ]
        self.texts = [""] * len(prompts)

    def _flat(self, image):
        image, transparent = over_white(to_pil(image))
        if transparent:
            self._note("a picture's transparency is laid over white")
        return image

    def _note_scaled(self, image, codes):
        """A note on a picture that has fewer pixels than the vision tokenizer takes."""
        processor = self.pipeline.processor
        size = [side * processor.vision_tokenizer.spatial_scale_factor for side in codes]
        if size != list(processor.image_processor.resized(image.height, image.width)):
            width, height = image.info.get("full_size", image.size)
            self._note(
                f"a picture of {width} x {height} pixels is scaled to {size[1]} x {size[0]}: "
                "the checkpoint takes no larger one in a question"
            )

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    @property
    def tokens(self):
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def ended(self):
        return [answer.is_done for answer in self.answers]

    def __iter__(self):
        from paddlemix.models.emu3.shared_batch import make_batch

        batch = make_batch(self.pipeline.model)
        batch.join(*self.answers)
        while batch:
            batch.step()
            self.forward_passes = batch.forward_passes
            yield [self._new_text(i) for i in range(len(self.answers))]

    def _new_text(self, i):
        text = answer_text(self.pipeline.processor.tokenizer, self.answers[i])
        new, self.texts[i] = text[len(self.texts[i]) :], text
        return new


def answer_text(tokenizer, answer):
    """The text of an Answer up to now, in whole characters."""
    text = tokenizer.decode(answer.ids, skip_special_tokens=True)
    return text if answer.is_done else text.rstrip("\ufffd")  # a character's other bytes may come yet
