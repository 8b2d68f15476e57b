# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How a picture is written as token ids: the one place that knows.

A picture of h x w codes is BOI "h*w" IMG, then h rows of w visual tokens each closed by EOL, then EOF EOI; when
it is being drawn an EOS follows, then padding. A visual token's id is the first visual token's id plus the code.
"""

from dataclasses import dataclass

import numpy as np

from paddlemix.utils import InputError, shown, whole_numbers

VISUAL_TOKEN = "<|visual token "
FIRST_VISUAL_TOKEN = VISUAL_TOKEN + "000000|>"


@dataclass(frozen=True)
class ImageGrammar:
    """The ids that pictures are written with.

    `encode_text` turns the size's text into ids; it is asked for nothing else.
    """

    img: int
    boi: int
    eoi: int
    eol: int
    eof: int
    eos: int
    pad: int
    first_visual: int
    codebook_size: int
    encode_text: callable = None

    @classmethod
    def from_tokenizer(cls, tokenizer, codebook_size=32768):
        """The grammar of an Emu3Tokenizer.

        InputError where it does not have one visual token for each codeword, in their order, or where two of the
        tokens that pictures are written with are one.
        """
        first = tokenizer.convert_tokens_to_ids(FIRST_VISUAL_TOKEN)
        after = tokenizer.convert_ids_to_tokens(range(first, len(tokenizer)))
        visual = [token for token in after if isinstance(token, str) and token.startswith(VISUAL_TOKEN)]
        if len(visual) != codebook_size:
            raise InputError(
                f"the tokenizer has {len(visual)} visual tokens and the vision tokenizer {codebook_size} "
                "codewords: take the two from checkpoints that belong together"
            )
        expected = [f"{VISUAL_TOKEN}{code:06d}|>" for code in range(codebook_size)]
        if after[:codebook_size] != expected:
            raise InputError(
                f"the tokenizer's visual tokens must be <|visual token 000000|> to {expected[-1]} in this order, one "
                "id after the other: download its files again"
            )
        names = ["img_token", "boi_token", "eoi_token", "eol_token", "eof_token", "eos_token"]
        tokens = [getattr(tokenizer, name) for name in names]
        if len(set(tokens)) < len(tokens) or set(tokens) & set(visual):
            given = ", ".join(f"{name}={token}" for name, token in zip(names, tokens, strict=True))
            raise InputError(f"{given}: each must be a token of its own, and not a visual one")
        return cls(
            img=tokenizer.img_token_id, boi=tokenizer.boi_token_id, eoi=tokenizer.eoi_token_id,
            eol=tokenizer.eol_token_id, eof=tokenizer.eof_token_id, eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id, first_visual=first, codebook_size=codebook_size,
            encode_text=tokenizer.encode,
        )  # fmt: skip

    @classmethod
    def from_config(cls, config, encode_text=None):
        """The grammar of an Emu3Config: its visual tokens are those after the end of a picture, to the last token."""
        first = config.eoi_token_id + 1
        return cls(
            img=config.img_token_id, boi=config.boi_token_id, eoi=config.eoi_token_id, eol=config.eol_token_id,
            eof=config.eof_token_id, eos=config.eos_token_ids[0], pad=config.pad_token_id, first_visual=first,
            codebook_size=config.vocab_size - first, encode_text=encode_text,
        )  # fmt: skip

    @staticmethod
    def num_tokens(height, width):
        """Tokens of a picture from its first visual token to EOS."""
        return height * (width + 1) + 3

    def head(self, height, width):
        """The ids that announce a picture: BOI "h*w" IMG."""
        return [self.boi, *self.encode_text(f"{height}*{width}"), self.img]

    def forced(self, height, width, position):
        """The id that must stand at `position` (0 for the first after IMG), None where it is a visual token."""
        body = height * (width + 1)
        if position < body:
            return self.eol if position % (width + 1) == width else None
        return (self.eof, self.eoi, self.eos)[position - body] if position < body + 3 else self.pad

    def forced_ids(self, sizes):
        """`forced` of every position of pictures (h, w), int64 [pictures, positions]: up to the last row end of the
        longest one, -1 where it is a visual token."""
        ids = np.full([len(sizes), max(h * (w + 1) for h, w in sizes)], self.pad, dtype=np.int64)
        for row, (h, w) in zip(ids, sizes, strict=True):
            body, end = h * (w + 1), [self.eof, self.eoi, self.eos]
            row[:body] = -1
            row[w : body : w + 1] = self.eol
            row[body : body + 3] = end[: len(row) - body]
        return ids

    def encode(self, codes):
        """The ids of a whole picture, BOI to EOI. codes: integer array [h, w] -> list[int]."""
        codes = whole_numbers("codes", codes, 0, self.codebook_size - 1)
        if codes.ndim != 2 or 0 in codes.shape:
            raise InputError(f"codes must be [h, w] with values 0 to {self.codebook_size - 1}, got {shown(codes)}")
        rows = np.full([codes.shape[0], codes.shape[1] + 1], self.eol)
        rows[:, :-1] = codes + self.first_visual
        return [*self.head(*codes.shape), *rows.ravel().tolist(), self.eof, self.eoi]

    def decode(self, ids):
        """The codes among a picture's ids, int64 [h, w]; None where they do not make a rectangle."""
        rows, row = [], []
        for i in ids:
            if self.first_visual <= i < self.first_visual + self.codebook_size:
                row.append(i - self.first_visual)
            elif row:
                rows.append(row)
                row = []
        if row:
            rows.append(row)
        if not rows or len({len(row) for row in rows}) > 1:
            return None
        return np.array(rows, dtype=np.int64)

    def whole_rows(self, ids, height, width):
        """The codes of the rows that a picture's first ids complete, int64 [rows, width]. ids: int64 [positions]."""
        ids = np.append(ids, self.eol)  # a row is complete without its end
        rows = min(len(ids) // (width + 1), height)
        return ids[: rows * (width + 1)].reshape(rows, width + 1)[:, :width] - self.first_visual

    def split(self, ids):
        """Ids in pieces: ("text", ids) and, for each BOI ... EOI that holds a picture, ("picture", codes)."""
        pieces, text, start = [], [], None
        for i in ids:
            text.append(i)
            if i == self.boi:
                start = len(text) - 1
            elif i == self.eoi and start is not None:
                codes = self.decode(text[start:])
                if codes is not None:
                    pieces += [("text", text[:start])] if start else []
                    pieces.append(("picture", codes))
                    text = []
                start = None
        return pieces + ([("text", text)] if text else [])
