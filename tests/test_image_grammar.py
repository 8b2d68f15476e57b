# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How a picture is written as ids, for every size."""

import numpy as np
import pytest

from paddlemix.models.emu3.image_grammar import ImageGrammar

IMG, BOI, EOI, EOL, EOF, EOS, PAD, FIRST = 203, 204, 205, 206, 207, 202, 200, 256
GRAMMAR = ImageGrammar(
    img=IMG, boi=BOI, eoi=EOI, eol=EOL, eof=EOF, eos=EOS, pad=PAD, first_visual=FIRST, codebook_size=100,
    encode_text=lambda text: [ord(c) for c in text],
)  # fmt: skip


@pytest.mark.parametrize("height", [1, 2, 3, 7])
@pytest.mark.parametrize("width", [1, 2, 3, 10])
def test_every_size_is_spelled_out(height, width):
    """1 x 1 and 1 x 2 too, where counting columns alone takes the closing tokens for row ends."""
    expected = (([None] * width + [EOL]) * height) + [EOF, EOI, EOS]
    assert GRAMMAR.num_tokens(height, width) == len(expected) == height * (width + 1) + 3
    assert [GRAMMAR.forced(height, width, i) for i in range(len(expected) + 2)] == [*expected, PAD, PAD]

    codes = np.random.RandomState(0).randint(0, 100, [height, width])
    ids = GRAMMAR.encode(codes)
    head = [BOI, *map(ord, f"{height}*{width}"), IMG]
    body = [i for row in codes for i in [*(row + FIRST), EOL]]
    assert ids == [*head, *body, EOF, EOI]
    np.testing.assert_array_equal(GRAMMAR.decode(ids), codes)


def test_text_and_pictures_are_told_apart():
    one, two = np.array([[1, 2], [3, 4]]), np.array([[5]])
    ids = [7, 8, *GRAMMAR.encode(one), *GRAMMAR.encode(two), 9, BOI, 10]
    kinds, pieces = zip(*GRAMMAR.split(ids), strict=True)
    assert kinds == ("text", "picture", "picture", "text")
    assert pieces[0] == [7, 8] and pieces[3] == [9, BOI, 10]
    np.testing.assert_array_equal(pieces[1], one)
    np.testing.assert_array_equal(pieces[2], two)


@pytest.mark.parametrize("body", [[], [FIRST, EOL, FIRST, FIRST, EOL], [5, 6]])
def test_what_is_no_picture_stays_text(body):
    ids = [1, BOI, IMG, *body, EOF, EOI, 2]
    assert GRAMMAR.split(ids) == [("text", ids)]
    assert GRAMMAR.split([]) == []


@pytest.mark.parametrize("codes", [[1, 2], [[]], [[-1]], [[100]]])
def test_codes_that_are_none(codes):
    with pytest.raises(ValueError, match="codes must be"):
        GRAMMAR.encode(codes)
