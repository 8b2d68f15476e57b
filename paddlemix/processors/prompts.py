# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prompts of text and codes: what stands in front of a picture to draw, and a conversation about pictures."""

import re

from paddlemix.utils import InputError, shown

# what the original adds to every drawing prompt, and leads away from
POSITIVE_PROMPT = " masterpiece, film grained, best quality."
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
CHAT_TEMPLATE = "You are a helpful assistant. USER: {image_prompt}{text_prompt}. ASSISTANT:"
IMAGE_SLOT, TEXT_SLOT = "{image_prompt}", "{text_prompt}"
USER = re.compile(r"\s*USER:")  # where a template's part begins that each turn of a conversation repeats


def check_chat_template(template):
    """InputError where a template does not hold {image_prompt} and {text_prompt} once each."""
    if template.count(IMAGE_SLOT) != 1 or template.count(TEXT_SLOT) != 1:
        raise InputError(f"a chat template must hold {IMAGE_SLOT} and {TEXT_SLOT} once each, got {template!r}")


def merge_turns(turns):
    """Turns as `chat_prompt` takes them -> [(role, texts, pictures)], neighbours of one role as one.

    InputError: they are not a conversation.
    """
    merged = []
    for role, parts in turns:
        texts = [part for part in parts if isinstance(part, str)]
        pictures = [part for part in parts if not isinstance(part, str)]
        if role not in ("system", "user", "assistant"):
            raise InputError(f"a turn is of system, user or assistant, got {shown(role)}")
        if pictures and role != "user":
            raise InputError(f"a picture belongs into a turn of user, got one of {role}")
        if not texts and not pictures:
            raise InputError(f"a turn of {role} is empty: give it a text or, of user, a picture")
        if merged and merged[-1][0] == role:
            merged[-1][1].extend(texts)
            merged[-1][2].extend(pictures)
        else:
            merged.append((role, texts, pictures))
    roles = [role for role, _, _ in merged]
    if not roles or roles[-1] != "user" or "system" in roles[1:] or roles[roles[0] == "system"] != "user":
        raise InputError(
            "a conversation has turns of user and assistant, one after the other, from user to user, and system only "
            f"in front; got {shown(roles)}"
        )
    return merged


class Prompts:
    """Ids of prompts.

    Args:
        tokenizer: Emu3Tokenizer.
        grammar: ImageGrammar.
        chat_template: of a conversation's turns, with {image_prompt} and {text_prompt} once each. Special tokens in the
            template are special tokens; in a user's text they are text.
    """

    def __init__(self, tokenizer, grammar, chat_template=CHAT_TEMPLATE):
        check_chat_template(chat_template)
        self.tokenizer, self.grammar, self.chat_template = tokenizer, grammar, chat_template

    def drawing_prompt(self, text):
        """Ids of BOS text; a picture follows, BOI "h*w" IMG and so on."""
        return [self.tokenizer.bos_token_id, *self.tokenizer.encode(text, allow_special=False)]

    def chat_prompt(self, turns):
        """Ids of a conversation whose last turn waits for an answer.

        A user's turn is the chat template: its pictures in their order, then its texts, joined by a space. An answer
        is followed by EOS, as the model ends it, and a later turn by the template from "USER:" on (all of a template
        that has no "USER:"). A system's text takes the place of what stands before "USER:". One turn with one picture
        is the prompt of mode "U".

        Args:
            turns: a list of (role, parts); a role is "system", which comes first, "user" or "assistant"; a part is a
                str or, of a user, a picture's codes, integers [h, w]. Neighbours of one role are one turn.

        InputError: turns that are not a conversation, or codes that are not a picture's.
        """
        return [i for _, ids in self.conversation(turns) for i in ids]

    def conversation(self, turns):
        """The ids of `chat_prompt` turn by turn: (role, ids)."""
        merged = merge_turns(turns)
        start = match.start() if (match := USER.search(self.chat_template)) else 0
        first, template = [self.tokenizer.bos_token_id], self.chat_template
        for role, texts, pictures in merged:
            text = " ".join(texts)
            if role == "user":
                picture = [i for codes in pictures for i in self.grammar.encode(codes)]
                ids = self._fill_template(text, picture, template)
            else:
                ids = self.answer(text) if role == "assistant" else self.tokenizer.encode(text, allow_special=False)
            yield role, first + ids
            first, template = [], self.chat_template[start:]

    def answer(self, text):
        """Ids of an answer, as the model ends it: text EOS."""
        return [*self.tokenizer.encode(text, allow_special=False), self.tokenizer.eos_token_id]

    def _fill_template(self, text, picture_ids, template):
        """A template's ids; only the template itself can name special tokens."""
        special = "|".join(map(re.escape, re.findall(r"<\|[^<>|]+\|>", template))) or r"(?!)"
        row = []
        for piece in re.split(f"({re.escape(IMAGE_SLOT)}|{special})", template):
            if piece == IMAGE_SLOT:
                row += picture_ids
            elif re.fullmatch(special, piece):
                row += self.tokenizer.encode(piece)
            else:
                row += self.tokenizer.encode(piece.replace(TEXT_SLOT, text), allow_special=False)
        return row
