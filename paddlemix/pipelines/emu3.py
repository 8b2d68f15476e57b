# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Emu3 in one object: text-to-image, image question answering, and the vision tokenizer, each whole or step by step."""

import logging
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from math import gcd, isqrt

from paddlemix import machine
from paddlemix.models.emu3.adapter import LoraConfig
from paddlemix.models.emu3.configuration_emu3 import (
    CONFIG_NAME,
    GENERATION_CONFIG,
    Emu3Config,
    Emu3VisionVQConfig,
)
from paddlemix.models.emu3.hub import fetch, matching_vision_tokenizer
from paddlemix.processors.emu3_processing import Emu3Processor, generate_size
from paddlemix.processors.image_processing_emu3 import Emu3VisionVQImageProcessor
from paddlemix.processors.prompts import CHAT_TEMPLATE, NEGATIVE_PROMPT, POSITIVE_PROMPT, check_chat_template
from paddlemix.utils import InputError, check_utf_8, read_json, shown, whole_number

from .steps import Generation, Reconstruction, Understanding

# the original's values, where neither the caller nor the checkpoint's generation_config.json has others
DEFAULTS = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 2048, "top_p": 1.0}

MOST_PICTURES = 10_000


class Emu3Pipeline:
    """A language model, a vision tokenizer and their processor. Each is loaded when it is first needed, and once.

    Args:
        model_path: the language model: a directory, a hub name or "emu3-mini". None where only `autoencode` is used.
        vq_model_path: the vision tokenizer, likewise; None is BAAI/Emu3-VisionTokenizer, and with "emu3-mini" its own.
        dtype: of the language model, "float32", "float16", "bfloat16", "int8" or "int4"; None is bfloat16 (float16 on
            a card without it), and of a quantized checkpoint what it holds. A CPU takes float32 in place of float16.
        chat_template: of questions, with {image_prompt} and {text_prompt} once each.
        progress: show a progress bar while weights are read (on a terminal).
        lora_path: a LoRA adapter of the language model in PEFT's layout, a directory or a hub name.
        ranks: models.emu3.parallel.TensorParallel: this is the first of the processes that share the language model,
            and the others follow its batches (models/emu3/shared_batch.py).
    """

    def __init__(
        self, model_path=None, vq_model_path=None, dtype=None, chat_template=CHAT_TEMPLATE, progress=False,
        lora_path=None, ranks=None,
    ):  # fmt: skip
        check_chat_template(chat_template)
        self.ranks = ranks
        self.model_path, self.chat_template, self.progress = model_path, chat_template, progress
        self.lora_path = lora_path
        self.vq_model_path = vq_model_path or matching_vision_tokenizer(model_path)
        self.asked_dtype = dtype

    @classmethod
    def from_pretrained(cls, model_path=None, *, vq_model_path=None, dtype=None, device=None, **options):
        """A pipeline on a device: "cpu", "gpu" or "gpu:N"; None is the card where Paddle finds one.

        The other arguments are the class's. No weights are read yet.

        Raises:
            InputError: no such device or checkpoint.
        """
        machine.start_paddle(device, quiet=False)
        pipeline = cls(model_path, vq_model_path, dtype, **options)
        if model_path is not None:
            _ = pipeline.config  # a mistyped name is told here, not after the vision tokenizer was fetched
        return pipeline

    # --- the parts

    @cached_property
    def config(self):
        """The language model's Emu3Config."""
        if self.model_path is None:
            raise InputError("this pipeline has no language model: give model_path")
        config = Emu3Config.from_pretrained(self.model_path)
        if self.lora_path is not None:
            LoraConfig.from_pretrained(self.lora_path)  # a mistake in its name is told as early
        return config

    @cached_property
    def defaults(self):
        """What is taken where a caller gives no guidance_scale, temperature, top_k or top_p."""
        _ = self.config  # of a mistyped name its message is the better one
        path = fetch(self.model_path, [CONFIG_NAME]) / GENERATION_CONFIG
        given = read_json(path) if os.path.lexists(path) else {}
        values = {name: value if given.get(name) is None else given[name] for name, value in DEFAULTS.items()}
        try:
            checked = check_values(**values)
        except InputError as error:
            raise InputError(f"{path}: {error}: mend or remove it") from None
        return {name: checked[name] for name in DEFAULTS}

    @cached_property
    def dtype(self):
        """Of the language model's weights."""
        import paddle

        dtype = self.asked_dtype or self.config.quantized_dtype or "bfloat16"
        if dtype == "bfloat16":
            return machine.half_dtype()
        return "float32" if dtype == "float16" and paddle.get_device() == "cpu" else dtype

    @cached_property
    def image_processor(self):
        return Emu3VisionVQImageProcessor.from_pretrained(self.vq_model_path)

    @cached_property
    def vision_tokenizer(self):
        from paddlemix.models.emu3 import Emu3VisionVQModel

        return Emu3VisionVQModel.from_pretrained(self.vq_model_path, progress=self.progress)

    @cached_property
    def processor(self):
        from paddlemix.models.emu3 import Emu3Tokenizer

        tokenizer = Emu3Tokenizer.from_pretrained(self.model_path)
        try:
            self.config.check_tokenizer(tokenizer)
        except InputError as error:
            raise InputError(f"{self.model_path}: {error}") from None
        return Emu3Processor(self.image_processor, self.vision_tokenizer, tokenizer, self.chat_template)

    @cached_property
    def model(self):
        from paddlemix.models.emu3 import Emu3ForCausalLM

        return Emu3ForCausalLM.from_pretrained(
            self.model_path, dtype=self.dtype, progress=self.progress, lora_path=self.lora_path, ranks=self.ranks
        )

    @contextmanager
    def loading_model(self, beside=0):
        """Read the language model, where it is not read yet, in a thread of its own while the block runs.

        It is there when the block has ended, and its errors come then. An error in the block ends the reading.

        InputError, before the block begins: files missing or of another model, or no memory for the weights and for
        `beside` bytes that the block needs.
        """
        if "model" in vars(self):
            yield
            return
        import paddle

        from paddlemix.models.emu3 import Emu3ForCausalLM

        checkpoint = Emu3ForCausalLM.open_pretrained(
            self.model_path, dtype=self.dtype, lora_path=self.lora_path, ranks=self.ranks
        )
        purpose = f"for {self.model_path} in {self.dtype} and for pictures that are encoded beside it"
        machine.require_memory(checkpoint.size + beside, purpose)
        device = paddle.get_device()

        def read():
            paddle.set_device(device)  # a card is chosen for each thread
            return checkpoint.read(self.progress)

        with ThreadPoolExecutor(1, "emu3-loading") as thread:
            reading = thread.submit(read)
            try:
                yield
                self.model = reading.result()
            finally:
                checkpoint.stop()

    def load(self):
        """Read all the weights now, not when they are first needed."""
        _ = self.processor, self.model

    # --- text to image

    def generate(self, prompt, **options):
        """Draw pictures of prompts. Arguments as `generate_steps` takes them -> a list of PIL pictures."""
        generation = self.generate_steps(prompt, **options)
        for _ in generation:
            pass
        return generation.images()

    def generate_steps(
        self,
        prompt,
        *,
        negative_prompt=None,
        ratio=None,
        height=None,
        width=None,
        num_images=1,
        guidance_scale=None,
        temperature=None,
        top_k=None,
        top_p=None,
        seed=None,
        decoding="auto",
        batch=None,
    ):
        """A Generation: iterate over it to draw, ask it for previews and pictures.

        Args:
            prompt: a text or a list of them.
            negative_prompt: what guidance leads away from; None is the original's.
            ratio: "width:height", one for all prompts or a list; None is that of width and height.
            height, width: together how many pixels a picture has; None is the checkpoint's image_area.
            num_images: pictures of each prompt.
            guidance_scale: 1 is no guidance, and half the work.
            temperature, top_k, top_p: as Sampling takes them. What is None comes from the checkpoint.
            seed: the same seed gives the same pictures; None is a new one, which the Generation tells.
            decoding: as decoding.Batch takes it.
            batch: the Batch that the caller lets its `drawings` join one by one, whose memory counts as free.

        Raises:
            InputError: values that cannot be, before anything is loaded; then what loading raises.
        """
        prompts, ratios, area, given, seed = self.check_generate(
            prompt, negative_prompt=negative_prompt, ratio=ratio, height=height, width=width, num_images=num_images,
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip
        values = {**self.defaults, **given}
        seed = secrets.randbits(32) if seed is None else seed
        negative = NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
        how = {"ratio": ratios, "image_area": area}
        positive = self.processor([text + POSITIVE_PROMPT for text in prompts], **how)
        negatives = self.processor([negative] * len(prompts), **how)["input_ids"]
        return Generation(self, prompts, ratios, positive, negatives, negative, values, seed, decoding, batch)

    def check_generate(
        self, prompt, *, negative_prompt=None, ratio=None, height=None, width=None, num_images=1, seed=None, **values
    ):  # fmt: skip
        """What `generate_steps` does first: InputError for values that cannot be. Nothing is loaded.

        Returns:
            of each picture the prompt and the ratio, two lists; how many pixels they have; the values that are not
            None, a dict, and the seed or None, as Python's own numbers.
        """
        given = {name: value for name, value in values.items() if value is not None}
        checked = check_values(**given, seed=0 if seed is None else seed)
        if not isinstance(negative_prompt, (str, type(None))):
            raise InputError(f"negative_prompt must be a text, got {shown(negative_prompt)}")
        check_utf_8("negative_prompt", negative_prompt or "")
        pictures = self._pictures(prompt, ratio, height, width, num_images)
        return *pictures, {name: checked[name] for name in given}, None if seed is None else checked["seed"]

    def _pictures(self, prompt, ratio, height, width, num_images):
        """A prompt and a ratio for each picture, and how many pixels they have."""
        prompts, ratios = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (prompt, ratio))
        ratios = [] if ratio is None else ratios
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise InputError("prompt must be a text or a list of texts, at least one")
        for text in prompts:
            check_utf_8("prompt", text)
        num_images = whole_number("num_images", num_images, "1 or more, a whole number", 1)
        if len(prompts) * num_images > MOST_PICTURES:
            raise InputError(f"at most {MOST_PICTURES} pictures are drawn together, got {len(prompts) * num_images}")
        height, width = (
            None if side is None else whole_number("height and width", side, "positive whole numbers", 1)
            for side in (height, width)
        )
        for one in ratios:
            generate_size(one, (height or 720) * (width or 720))  # a mistake is told before anything is loaded
        side = None if height and width else isqrt(self.config.image_area)
        height, width = height or side, width or side
        common = gcd(width, height)
        ratios = ratios or [f"{width // common}:{height // common}"]
        if len(ratios) not in (1, len(prompts)):
            raise InputError(
                f"give one ratio for all prompts or one each: {len(prompts)} prompts, {len(ratios)} ratios"
            )
        ratios = ratios * (len(prompts) // len(ratios))
        repeated = [[x for x in values for _ in range(num_images)] for values in (prompts, ratios)]
        return *repeated, height * width

    # --- image question answering

    def understand(self, image, question, **options):
        """Answer questions about pictures. Arguments as `understand_steps` takes them; its notes are logged.

        Returns:
            str for one picture and one question, else a list of str.
        """
        answers = self.understand_steps(image, question, **options)
        for note in answers.notes:
            logging.getLogger(__name__).warning(note)
        for _ in answers:
            pass
        is_list = isinstance(image, (list, tuple)) or isinstance(question, (list, tuple))
        return answers.texts if is_list else answers.texts[0]

    def understand_steps(
        self, image, question, *, max_new_tokens=None, temperature=None, top_k=None, top_p=None, seed=0
    ):
        """An Understanding: iterate over it, and it gives the answers' texts as they come.

        Args:
            image: a PIL picture or a list of them; one serves all questions. One that is larger than the checkpoint
                takes in a question is scaled, and transparency is laid over white, each with a note.
            question: a text or a list of them; one serves all pictures.
            max_new_tokens: the longest answer; None is 1,024, or what the model has positions for.
            temperature, top_k, top_p, seed: as Sampling takes them. An answer is greedy unless one of the first three
                is given; a temperature of 0 is greedy as well.

        Raises:
            InputError: values that cannot be, before anything is loaded; then what loading raises.
        """
        if max_new_tokens is not None:
            max_new_tokens = whole_number("max_new_tokens", max_new_tokens, "1 or more, a whole number", 1)
        sampling = answer_sampling(temperature, top_k, top_p, seed)
        images, questions = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (image, question))
        if not images or not questions or not all(isinstance(text, str) for text in questions):
            raise InputError("give at least one picture, and at least one question, each a text")
        if len(images) != len(questions) and 1 not in (len(images), len(questions)):
            raise InputError(f"give a question for each picture, or one for all: {len(images)} and {len(questions)}")
        count = max(len(images), len(questions))
        images, questions = images * (count // len(images)), questions * (count // len(questions))
        return Understanding(self, images, questions, max_new_tokens, sampling)

    # --- the vision tokenizer

    def autoencode(self, image=None, *, video=None):
        """Encode pictures to codes and decode them again.

        Args:
            image: a PIL picture or a list of them, each by itself.
            video: in its place the frames of a video, PIL pictures of one size, a multiple of 4 in number; or an
                iterator over any number of them, such as processors.video.read_frames(path), of which 4 are in memory.

        Returns:
            a PIL picture for one, else a list of them.
        """
        images = [step.image for step in self.autoencode_steps(image, video=video)]
        return images if video is not None or isinstance(image, (list, tuple)) else images[0]

    def autoencode_steps(self, image=None, *, video=None):
        """An iterator over the Reconstruction of each picture or frame. Arguments as `autoencode` takes them."""
        if (image is None) == (video is None):
            raise InputError("give image or video, one of the two")
        if video is not None:
            clips = self.video_clips(video)
        else:
            images = list(image) if isinstance(image, (list, tuple)) else [image]
            clips = ((self.image_processor(one)["pixel_values"], 1) for one in images)
        return (step for pixels, count in clips for step in self._reconstruct(pixels, count))

    def video_clips(self, frames):
        """An iterator over (pixels float32 [1, T, 3, H, W], how many frames they are) of the clips of a video, each
        coded by itself as in the original. `frames`: as `video` of `autoencode`. The last clip of an iterator is filled
        with its last frame. InputError for a list at once, for an iterator when its turn comes.
        """
        factor = Emu3VisionVQConfig.from_pretrained(self.vq_model_path).temporal_downsample_factor
        if not isinstance(frames, (list, tuple)):
            return self._clips(frames, factor)
        sizes = sorted({f"{frame.width}x{frame.height}" for frame in frames})
        if len(sizes) > 1:
            raise InputError(f"the video has frames of different sizes, {', '.join(sizes[:4])}: give one size")
        if not frames:
            raise InputError(f"the video has no frames: give a multiple of {factor}")
        if len(frames) % factor:
            raise InputError(
                f"the video has {len(frames)} frames and the model takes multiples of {factor}: "
                f"remove {len(frames) % factor} or add {-len(frames) % factor}"
            )
        self.image_processor.resized(frames[0].height, frames[0].width)
        return self._clips(iter(frames), factor)

    def _clips(self, frames, factor):
        size = None
        while clip := list(islice(frames, factor)):
            size = size or clip[0].size
            if other := next((frame.size for frame in clip if frame.size != size), None):
                sizes = f"{size[0]}x{size[1]}, {other[0]}x{other[1]}"
                raise InputError(f"the video has frames of different sizes, {sizes}: give one size")
            filled = clip + [clip[-1]] * (factor - len(clip))
            yield self.image_processor(filled)["pixel_values"][None], len(clip)
        if size is None:
            raise InputError("the video has no frames")

    def _reconstruct(self, pixels, count):
        """Pixels [1, 3, H, W] or [1, T, 3, H, W] -> Reconstructions of the first `count`"""
        import paddle

        with paddle.no_grad():
            start = time.perf_counter()
            codes = self.vision_tokenizer.encode(paddle.to_tensor(pixels)).numpy()  # which waits for the device
            encoded = time.perf_counter()
            decoded = self.vision_tokenizer.decode(paddle.to_tensor(codes)).numpy()
            seconds = encoded - start, time.perf_counter() - encoded
        originals, images = (
            self.image_processor.postprocess(x.reshape(-1, *x.shape[-3:]))["pixel_values"] for x in (pixels, decoded)
        )
        for original, image in zip(originals[:count], images, strict=False):
            yield Reconstruction(original, image, codes[0], *(s / count for s in seconds))


def check_values(guidance_scale=1, **sampling):
    """The values, as Python's own numbers. InputError where one cannot be."""
    from paddlemix.models.emu3.sampling import Sampling, check_guidance_scale

    return {"guidance_scale": check_guidance_scale(guidance_scale), **asdict(Sampling(**sampling))}


def answer_sampling(temperature=None, top_k=None, top_p=None, seed=0):
    """The Sampling of an answer: greedy unless one of the first three is given, and at a temperature of 0."""
    from paddlemix.models.emu3.sampling import GREEDY, Sampling

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in given.items() if value is not None}
    is_greedy = not given or temperature == 0
    given = {"top_k": 0, **given, **({"temperature": 1.0} if is_greedy else {})}
    sampling = Sampling(**given, seed=seed)
    return GREEDY if is_greedy else sampling
