# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What is decoded: a picture or an answer. Each knows its prompts, its tokens and its sampling, and no other's.

A `Batch` asks a sequence in every step: `feed` what the next forward pass reads of it, `pick` ids from logits, `accept`
them. The noise of what a pass picks is that of the positions from `cached + read - picked` on.
"""

import numpy as np

from paddlemix.utils import InputError, shown, whole_number, whole_numbers

from .sampling import GREEDY, Noise, Sampling, check_guidance_scale
from .windows import expected_gain

MOST_CODES = 1 << 24  # of a picture, more than any memory holds the keys and values of
PASSES_REMEMBERED = 32  # that a picture's luck with its guesses is a running mean of


class Drawing:
    """One picture: its tokens, drawn one after the other, between those that the grammar forces.

    With guidance (Ho and Salimans, arXiv 2207.12598) it takes two rows of a pass, with and without the prompt, and the
    logits are scale * (cond - uncond) + uncond. Only the visual tokens' rows of the head are computed, and what the
    grammar forces takes no pass of its own.

    Args:
        prompt: token ids that end with the image token (Emu3Processor, mode "G"): a list, an array or a tensor.
            Padding at its ends is left out.
        size: (h, w) in codes.
        grammar: ImageGrammar.
        negative_prompt: as prompt; what guidance leads away from. Needed unless guidance_scale is 1.
        guidance_scale: 1 is no guidance.
        sampling: Sampling.
        number: of the picture in its request: another number gives another picture for the same seed.
        drawn: int64 [positions], what `drawn()` gave of this very picture before: it is gone on with.

    Raises:
        InputError: a prompt, a size, a scale or `drawn` that cannot be.
    """

    ahead = 128  # tokens that passes on a card may pick before the host looks; as many positions' noise is there
    passes_ahead = 8  # with guesses at most: those behind a picture's end are in vain, and another prompt waits for all

    def __init__(
        self, prompt, size, grammar, negative_prompt=None, guidance_scale=3.0, sampling=None, number=0, drawn=None
    ):
        guidance_scale = check_guidance_scale(guidance_scale)
        prompts = [prompt] if guidance_scale == 1 else [prompt, negative_prompt]
        self.prompts = [_without_padding(row, grammar.pad) for row in prompts]
        if not all(row and row[-1] == grammar.img for row in self.prompts):
            raise InputError(
                "a drawing prompt, and with guidance a negative prompt, must end with the image token: make it with "
                "Emu3Processor, mode='G'"
            )
        sides = whole_numbers("a picture's size in tokens", size)
        if sides.shape != (2,) or sides.min() < 1:
            raise InputError(f"a picture has at least one row and one column of tokens, got {shown(size)}")
        size = tuple(sides.tolist())
        if size[0] * size[1] > MOST_CODES:
            raise InputError(f"a picture of {size[0]} x {size[1]} codes is too large: at most {MOST_CODES} are taken")
        number = whole_number("number", number, "0 or more, a whole number", 0)
        self.size, self.grammar, self.guidance_scale, self.number = size, grammar, guidance_scale, number
        self.sampling = sampling or Sampling()
        self.head = grammar.first_visual, grammar.first_visual + grammar.codebook_size  # the outputs that it needs
        self.noise = Noise(self.sampling, number, grammar.codebook_size)
        # from the prompt's last token to the last visual one; what follows that is known without the model
        self.forced = np.append(grammar.img, grammar.forced_ids([size])[0, :-1])
        self.ids = np.where(self.forced < 0, grammar.first_visual, self.forced)
        self.known = 1  # so many ids are drawn or forced, those behind them are guesses
        self.cached, self.batch = 0, None  # so many ids are in the cache of this batch for good
        self.reused = 0
        if drawn is not None:
            drawn = self._check_drawn(drawn)
            self.known += len(drawn)
            self.ids[1 : self.known] = drawn
        self.length = max(map(len, self.prompts)) - 1 + len(self.ids)
        self.window = 0
        self.luck = 1.0  # what its passes give beside what windows.py expects, which never changes a token

    @property
    def tokens(self):
        """Tokens of the whole picture, up to its end of sequence."""
        return self.grammar.num_tokens(*self.size)

    @property
    def draws(self):
        """Positions that have noise."""
        return len(self.ids) - 1

    @property
    def is_done(self):
        return self._next() == len(self.ids)

    @property
    def rows(self):
        """Rows of the picture that are drawn."""
        return self.size[0] if self.is_done else self.known // (self.size[1] + 1)  # a row's end is known with its last

    @property
    def gained(self):
        """Tokens of the picture up to now."""
        return self.tokens if self.is_done else self.known - 1

    def drawn(self):
        """The tokens up to now, int64 [positions]."""
        return self.ids[1 : len(self.ids) if self.is_done else self.known].copy()

    def codes(self):
        """The picture's codes, int64 [h, w]; of the rows that are drawn where it is not done."""
        return self.grammar.whole_rows(self.drawn(), *self.size)

    def feed(self, most, window, goes_ahead=False):
        """What the next pass reads: (ids int64 [new], how many of their hidden states it picks from).

        At most `most` ids; the last ones may be `window` guesses of tokens to come. `goes_ahead`: with guesses it reads
        as many as the passes that follow it on a card, forced ids and those behind the end among them.
        """
        stop = self._next()
        if goes_ahead and window and self.cached == self.known - 1:
            self.window, ids = window, self.ids[self.cached : self.known + window]
            return np.pad(ids, (0, 1 + window - len(ids)), "edge"), 1 + window
        if stop - self.cached > most:  # tokens that were drawn in an earlier process are read again
            return self.ids[self.cached : self.cached + most], 0
        self.window = max(0, min(window, len(self.ids) - 1 - stop, most - (stop - self.cached)))
        return self.ids[self.cached : stop + self.window], 1 + self.window

    def passes(self, window):
        """How many passes, each after the first fed on a card with what the one before has picked, may run until the
        host looks. One token each: those before a token is forced. With guesses the picture may end before the last
        one: what that picks is lost."""
        is_open = self.forced[self._next() :] < 0
        tokens = int(is_open.sum()) if window or is_open.all() else int(is_open.argmin())
        most = self.ahead // (1 + window)
        return max(1, min(tokens, most, self.passes_ahead if window else most))

    def pick(self, logits, noise):
        """Logits float32 [rows, picked, tokens] -> ids int64 [picked]"""
        return self.sampling.pick_guided(logits, noise, self.guidance_scale, self.grammar.first_visual)

    def accept(self, read, picked):
        """Take what a pass picked, int64 [picked], after it read so many ids. Returns how many tokens were gained."""
        if self.is_done:
            return 0
        if not len(picked):
            self.cached += read
            return 0
        start, before = self.cached + read - len(picked) + 1, self.gained
        picked = picked[: len(self.ids) - start]
        span = slice(start, start + len(picked))
        sampled, picked = picked, np.where(self.forced[span] < 0, picked, self.forced[span])
        # a token counts where all the guesses before it were right
        is_right = picked == self.ids[span]
        right = 1 + int(is_right[:-1].cumprod().sum())
        self._learn(int((self.forced[start : start + right] < 0).sum()) if self.window else 1 + int(is_right[0]))
        self.ids[span] = picked
        # what comes new into the next window: no first guess that was tried is better than more of the same
        new = slice(span.stop, span.stop + right + 1)
        self.ids[new] = np.where(self.forced[new] < 0, sampled[-1], self.forced[new])
        self.known = start + right  # before `cached`: whoever breaks this off may go on
        self.cached = self.known - 1
        return self.gained - before

    def _learn(self, drawn):
        """Tokens that a pass drew; where it guessed none, those that it would have drawn with a guess of one."""
        share = (drawn - 1) / (expected_gain(max(1, self.window), 1) - 1)
        self.luck += (share - self.luck) / PASSES_REMEMBERED

    def _next(self):
        """The place of the next token to draw; the number of ids where there is none."""
        is_open = self.forced[self.known :] < 0
        return self.known + int(is_open.argmax()) if is_open.any() else len(self.ids)

    def _check_drawn(self, drawn):
        """`drawn` as int64 [positions]; InputError where they are not this picture's."""
        drawn, forced, grammar = whole_numbers("drawn, int64 [positions],", drawn), self.forced[1:], self.grammar
        if drawn.ndim != 1 or len(drawn) > len(forced):
            raise InputError(
                f"drawn must be int64 [positions] of at most {len(forced)} positions, got {list(drawn.shape)}"
            )
        expected = forced[: len(drawn)]
        is_visual = (grammar.first_visual <= drawn) & (drawn < grammar.first_visual + grammar.codebook_size)
        if not np.where(expected < 0, is_visual, drawn == expected).all():
            raise InputError("drawn holds tokens that cannot stand where they do: it is of a picture of another size")
        return drawn


class Answer:
    """A text that follows a prompt: greedy, or drawn by chance.

    Args:
        prompt: token ids, at least one: a list, an array or a tensor. Padding at its ends is left out.
        max_new_tokens: an end of sequence stops it earlier.
        config: Emu3Config, for the end of sequence and the number of tokens.
        sampling: Sampling; greedy where it is left out.
        number: of the answer in its request, as a Drawing's.

    `ids` are its tokens up to now, without the end of sequence, `reused` how many of its prompt's tokens the batch had
    read for another sequence.
    """

    luck = 0  # a pass gives one token
    forced, ahead = None, 1  # nothing is; the host looks after each token

    def __init__(self, prompt, max_new_tokens, config, sampling=GREEDY, number=0):
        prompt = _without_padding(prompt, config.pad_token_id)
        if not prompt:
            raise InputError("give at least one prompt of at least one token")
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, "1 or more, a whole number", 1)
        self.prompts, self.max_new_tokens = [prompt], max_new_tokens
        number = whole_number("number", number, "0 or more, a whole number", 0)
        self.head, self.ends = (0, config.vocab_size), config.eos_token_ids
        self.sampling, self.noise = sampling, Noise(sampling, number, config.vocab_size)
        self.ids, self.ended = [], False
        self.cached, self.batch = 0, None  # so many of the prompt's last token and the ids, in this batch's cache
        self.reused = 0
        self.length = len(prompt) + max_new_tokens - 1

    @property
    def is_done(self):
        return self.ended or len(self.ids) == self.max_new_tokens

    @property
    def draws(self):
        return self.max_new_tokens

    def feed(self, most, window, goes_ahead=False):
        ids = [self.prompts[0][-1], *self.ids][self.cached :]
        return np.array(ids[:most]), int(len(ids) <= most)

    def passes(self, window):
        return 1  # the answer may end with each token

    def pick(self, logits, noise):
        return self.sampling.pick_guided(logits, noise)

    def accept(self, read, picked):
        if len(picked):
            token = int(picked[0])
            self.ended = token in self.ends
            self.ids += [] if self.ended else [token]
        self.cached += read  # last: whoever breaks this off may go on
        return int(len(picked) and not self.ended)


def _without_padding(prompt, pad):
    """A prompt's ids as a list, without the padding of a batch's row."""
    ids = whole_numbers("a prompt's ids", [] if prompt is None else prompt)
    if ids.ndim != 1:
        raise InputError(f"a prompt must be one row of token ids, got {shown(prompt)}")
    own = np.flatnonzero(ids != pad)
    return ids[own[0] : own[-1] + 1].tolist() if own.size else []
