# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Text and pictures to prompts of token ids, and ids back to text and pictures."""

import math
import re
from functools import cache

import numpy as np

from paddlemix.models.emu3.image_grammar import ImageGrammar
from paddlemix.utils import BatchFeature, InputError, real_number, shown, whole_number, whole_numbers

from .image_processing_emu3 import to_pil
from .prompts import CHAT_TEMPLATE, Prompts

LARGEST_AREA = 1e15  # in pixels: more than any memory holds


def generate_size(ratio, image_area, factor=8):
    """Codes (h, w) of the picture of an aspect ratio "width:height" nearest to `image_area` pixels.

    InputError: a ratio that is not two positive integers, or an area of less than one code a side.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", ratio) if isinstance(ratio, str) else None
    width, height = map(int, match.groups()) if match else (0, 0)
    if not width or not height:
        raise InputError(f"ratio must be width:height, two positive integers such as 1:1 or 16:9, got {shown(ratio)}")
    area = real_number("image_area", image_area, "a number of pixels", -LARGEST_AREA, LARGEST_AREA)
    scale = (area / (height * width)) ** 0.5 if area > 0 else 0
    size = round(height * scale / factor), round(width * scale / factor)
    if 0 in size:
        raise InputError(
            f"an area of {image_area} pixels at ratio {ratio} leaves a picture of {size[0]} x {size[1]} tokens: "
            f"a side takes at least {factor} pixels; give a larger height and width"
        )
    return size


def largest_size(ratio, tokens, grammar, factor=8):
    """Codes (h, w) of the largest picture of a ratio that takes at most so many tokens, None if there is none."""
    for area in range(tokens * factor**2, factor**2 - 1, -(factor**2)):
        try:
            size = generate_size(ratio, area, factor)
            # of its own area, too: that is how it will be asked for
            sizes = size, generate_size(ratio, size[0] * size[1] * factor**2, factor)
        except InputError:
            return None
        if max(grammar.num_tokens(*s) for s in sizes) <= tokens:
            return size
    return None


class Emu3Processor(Prompts):
    """Prompts from text and pictures, text and pictures from ids.

    Args:
        image_processor: Emu3VisionVQImageProcessor.
        vision_tokenizer: Emu3VisionVQModel.
        tokenizer: Emu3Tokenizer.
        chat_template: of mode "U", as Prompts takes it.
    """

    def __init__(self, image_processor, vision_tokenizer, tokenizer, chat_template=CHAT_TEMPLATE):
        grammar = ImageGrammar.from_tokenizer(tokenizer, vision_tokenizer.config.codebook_size)
        super().__init__(tokenizer, grammar, chat_template)
        self.image_processor, self.vision_tokenizer = image_processor, vision_tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path, vq_name_or_path=None, **options):
        """The processor of a language model's checkpoint and a vision tokenizer's, which is loaded.

        Args:
            name_or_path: a directory, a hub name or "emu3-mini".
            vq_name_or_path: the same; None is BAAI/Emu3-VisionTokenizer, and with "emu3-mini" its own.
            options: chat_template.

        Raises:
            InputError: files missing or damaged, or two checkpoints that do not belong together.
        """
        from paddlemix.models.emu3 import Emu3Tokenizer, Emu3VisionVQModel
        from paddlemix.models.emu3.hub import matching_vision_tokenizer

        from .image_processing_emu3 import Emu3VisionVQImageProcessor

        vq_name_or_path = vq_name_or_path or matching_vision_tokenizer(name_or_path)
        return cls(
            Emu3VisionVQImageProcessor.from_pretrained(vq_name_or_path),
            Emu3VisionVQModel.from_pretrained(vq_name_or_path),
            Emu3Tokenizer.from_pretrained(name_or_path),
            **options,
        )

    def __call__(
        self,
        text,
        image=None,
        *,
        mode="G",
        ratio="1:1",
        image_area=518400,
        padding_image=False,
        positions=None,
        padding=False,
        padding_side=None,
        return_tensors=None,
    ):
        """Prompts for the language model.

        Args:
            text: a string or a list of them.
            image: mode "U": a PIL picture a text.
            mode: "G", draw: BOS text BOI "h*w" IMG. "U", understand: BOS, then the chat template with a picture.
            ratio: mode "G": "width:height", one for all texts or a list.
            image_area: mode "G": pixels of the picture to draw.
            padding_image: mode "U": encode pictures of different sizes in one batch, padded with grey; faster on
                a card, but codes near the edges are then not those of the picture alone.
            positions: mode "U": how many the model has; a picture that leaves none for an answer is made smaller.
            padding, padding_side, return_tensors: as Emu3Tokenizer takes them.

        Returns:
            BatchFeature of input_ids and attention_mask, int64 [batch, length], and image_size, int64 [batch, 2],
            codes (h, w) of each picture. Lists where return_tensors is None.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise InputError("text must be a string or a list of strings, at least one")
        if mode == "G":
            if image is not None:
                raise InputError('mode "G" draws a picture from text and takes none: leave image out, or mode="U"')
            rows, sizes = self._drawing_prompts(texts, ratio, image_area)
        elif mode == "U":
            rows, sizes = self._chat_prompts(texts, image, padding_image, positions)
        else:
            raise InputError(f'mode must be "G" (draw) or "U" (understand), got {mode!r}')
        return self._batch(rows, sizes, padding, padding_side, return_tensors)

    def _drawing_prompts(self, texts, ratio, image_area):
        ratios = [ratio] * len(texts) if isinstance(ratio, str) else list(ratio)
        if len(ratios) != len(texts):
            raise InputError(f"give one ratio for all texts or one each: {len(texts)} texts, {len(ratios)} ratios")
        sizes = [generate_size(r, image_area, self.vision_tokenizer.spatial_scale_factor) for r in ratios]

        @cache  # of many pictures of one text
        def row(text, size):
            return [*self.drawing_prompt(text), *self.grammar.head(*size)]

        return [row(text, tuple(size)) for text, size in zip(texts, sizes, strict=True)], sizes

    def _chat_prompts(self, texts, image, padding_image, positions):
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if len(images) != len(texts) or any(i is None for i in images):
            raise InputError(f'mode "U" takes a picture a text: {len(texts)} texts, {len(images)} pictures')
        longest = {}  # a picture of several questions is encoded once, beside the longest of them
        for one, text in zip(images, texts, strict=True):
            longest[id(one)] = max(longest.get(id(one), 0), len(self.chat_prompt([("user", [text])])))
        unique = {id(one): to_pil(one) for one in images}
        sizes = [self.question_size(one.height, one.width, longest[i], positions) for i, one in unique.items()]
        encoded = self.tokenize_image(list(unique.values()), padding_image=padding_image, sizes=sizes)
        by_picture = dict(zip(unique, encoded, strict=True))
        codes = [by_picture[id(one)] for one in images]
        rows = [self.chat_prompt([("user", [c, t])]) for t, c in zip(texts, codes, strict=True)]
        return rows, [c.shape for c in codes]

    def chat_sizes(self, turns, positions=None):
        """The (height, width) in pixels of each picture of a conversation, as `question_size` gives it of one.

        `turns`: as `chat_prompt` takes them, with PIL pictures in place of codes. Where several leave none of the
        `positions`, each gets an equal share of them.
        """
        pictures = [part for _, parts in turns for part in parts if not isinstance(part, str)]
        texts = [(role, [part for part in parts if isinstance(part, str)] or [""]) for role, parts in turns]
        tokens = len(self.chat_prompt(texts))
        sizes = [self.question_size(picture.height, picture.width) for picture in pictures]
        if positions is None or tokens + sum(map(self._picture_tokens, sizes)) < positions:
            return sizes
        others = max(0, positions - tokens) * (len(pictures) - 1) // max(1, len(pictures))
        return [self.question_size(picture.height, picture.width, tokens, positions, others) for picture in pictures]

    def question_size(self, height, width, tokens=0, positions=None, others=0):
        """The (height, width) in pixels that a picture of a question gets.

        It is what the image processor gives, within its `question_max_pixels`. A picture that leaves none of the
        model's `positions` beside the `tokens` of the question, and those that `others` of its pictures take, is made
        smaller, and leaves an eighth of them.

        InputError: a picture that the image processor refuses, or a question that leaves no picture room.
        """
        settings, factor = self.image_processor, self.vision_tokenizer.spatial_scale_factor
        size = settings.resized(height, width, settings.question_max_pixels)
        room = math.inf if positions is None else positions - tokens - others - 1
        if self._picture_tokens(size) <= room:
            return size
        room -= positions // 8
        for codes in range(min(math.prod(size) // factor**2, room), 0, -1):
            try:
                size = settings.resized(height, width, codes * factor**2)
            except InputError:  # a side of less than one code
                break
            if self._picture_tokens(size) <= room:
                return size
        several = " beside the others" if others else ""
        raise InputError(
            f"the question has {tokens} tokens, the model has {positions} positions: there is no room for the picture"
            f"{several}; shorten the question"
        )

    def _picture_tokens(self, size):
        """Of a picture of (height, width) pixels in a prompt."""
        h, w = (side // self.vision_tokenizer.spatial_scale_factor for side in size)
        return len(self.grammar.head(h, w)) + self.grammar.num_tokens(h, w) - 1  # it has no EOS

    def _batch(self, rows, sizes, padding, padding_side, return_tensors):
        if return_tensors and not padding and len({len(row) for row in rows}) > 1:
            raise InputError('prompts of different lengths make no tensor: pass padding="longest"')
        if padding or return_tensors:
            batch = self.tokenizer.pad(rows, padding_side, return_tensors=return_tensors)
        else:
            batch = BatchFeature(input_ids=rows, attention_mask=[[1] * len(row) for row in rows])
        image_size = np.array(sizes, dtype=np.int64)
        if return_tensors == "pd":
            import paddle

            image_size = paddle.to_tensor(image_size)
        batch["image_size"] = image_size if return_tensors else image_size.tolist()
        return batch

    def tokenize_image(self, images, *, padding_image=False, sizes=None):
        """Codes of PIL pictures: a list of int64 arrays [h, w]. Pictures of one size are encoded together.

        `sizes`: (height, width) in pixels of each, in place of what the image processor gives.
        """
        sizes = sizes or [None] * len(images)
        pixels = [
            self.image_processor(image, size=size)["pixel_values"][0] for image, size in zip(images, sizes, strict=True)
        ]
        shapes = [p.shape[1:] for p in pixels]
        if len(set(shapes)) == 1 or padding_image:
            height, width = (max(sides) for sides in zip(*shapes, strict=True))
            padded = [np.pad(p, [(0, 0), (0, height - p.shape[1]), (0, width - p.shape[2])]) for p in pixels]
            codes = self._encode(np.stack(padded))
        else:
            codes = [self._encode(p[None])[0] for p in pixels]
        factor = self.vision_tokenizer.spatial_scale_factor
        return [c[: h // factor, : w // factor] for c, (h, w) in zip(codes, shapes, strict=True)]

    def memory_to_encode(self, images):
        """Bytes that `tokenize_image` takes at most for PIL pictures of questions.

        InputError: one of a shape that cannot be encoded.
        """
        settings = self.image_processor
        sizes = [settings.resized(one.height, one.width, settings.question_max_pixels) for one in images]
        together = len(sizes) if len(set(sizes)) == 1 else 1
        return self.vision_tokenizer.memory_to_encode(together, max(map(math.prod, sizes)))

    def _encode(self, pixels):
        import paddle

        pixels = paddle.to_tensor(pixels).astype(self.vision_tokenizer.dtype)
        with paddle.no_grad():
            return self.vision_tokenizer.encode(pixels).numpy()

    def decode_image(self, codes):
        """The PIL picture of codes, an integer array [h, w]."""
        import paddle

        codes = whole_numbers("codes", codes)
        if codes.ndim != 2:
            raise InputError(f"a picture's codes must be [h, w], got {list(codes.shape)}")
        with paddle.no_grad():
            pixels = self.vision_tokenizer.decode(paddle.to_tensor(codes[None]))
        return self.image_processor.postprocess(pixels)["pixel_values"][0]

    def vision_encode(self, pixel_values):
        """The vision tokenizer's `encode`, without gradients: pixels [B, 3, H, W] in [-1, 1] -> int64 [B, h, w]."""
        import paddle

        with paddle.no_grad():
            return self.vision_tokenizer.encode(pixel_values)

    def vision_decode(self, codes):
        """The vision tokenizer's `decode`, without gradients: integers [B, h, w] -> float pixels [B, 3, H, W]."""
        import paddle

        with paddle.no_grad():
            return self.vision_tokenizer.decode(codes)

    def to_imgstr(self, image_tokens):
        """Codes [h, w] as the text of their visual tokens, rows joined by the text of the row end."""
        codes = whole_numbers("image_tokens", image_tokens, 0, self.grammar.codebook_size - 1)
        if codes.ndim != 2:
            raise InputError(f"image_tokens must be codes [h, w], got {list(codes.shape)}")
        rows = ("".join(f"<|visual token {code:06d}|>" for code in row) for row in codes.tolist())
        return self.tokenizer.eol_token.join(rows)

    def calculate_generate_size(self, ratio, image_area, spatial_scale_factor):
        """Codes (h, w) of the picture of an aspect ratio "width:height" nearest to `image_area` pixels."""
        factor = whole_number("spatial_scale_factor", spatial_scale_factor, "1 or more, a whole number", 1)
        return generate_size(ratio, image_area, factor)

    def decode(self, ids, skip_special_tokens=False):
        """Ids to text and pictures: a string or PIL picture where there is one piece, else a list of them.

        A BOI ... EOI that does not hold a whole picture stays text. `skip_special_tokens` concerns the text.
        """
        ids = np.atleast_1d(whole_numbers("ids", ids)).tolist()
        pieces = []
        for kind, piece in self.grammar.split(ids):
            piece = self.decode_image(piece) if kind == "picture" else self.tokenizer.decode(piece, skip_special_tokens)
            if not (isinstance(piece, str) and not piece):
                pieces.append(piece)
        return pieces if len(pieces) > 1 else pieces[0] if pieces else ""

    def batch_decode(self, rows, skip_special_tokens=False):
        """`decode` of each row: lists, an array or a tensor [batch, length]."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def multimodal_decode(self, document):
        """`decode` for the text form, where a visual token is spelled <|visual token 000123|>."""
        return self.decode(self.tokenizer.encode(document))

    def build_prefix_constrained_fn(self, height, width):
        """What PaddleNLP's PrefixConstrainedLogitsProcessor asks; height and width: int64 [batch] or [1]."""
        from paddlemix.models.emu3.utils_emu3 import Emu3PrefixConstrainedLogitsHelper

        g = self.grammar
        return Emu3PrefixConstrainedLogitsHelper(
            height, width, g.img, g.eoi, g.eos, g.eol, g.eof, g.pad,
            list(range(g.first_visual, g.first_visual + g.codebook_size)),
        )  # fmt: skip
