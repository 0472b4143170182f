"""Where the words of a prompt are in its context."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from comfy.sd import CLIP

from ...errors import SeFiError, quoted
from ...text.placeholders import placeholder_of
from .tokens import PlaceholderToken, Tokens, encoder_names

END_OF_WORD = "</w>"


class Item(NamedTuple):
    """A token of the prompt's text: its column in the context, what it is compared by, and its
    text, which ends with ``</w>`` where a word ends."""

    column: int
    key: Hashable
    text: str


def word_columns(clip: CLIP, tokens: Tokens, word: str) -> list[int]:
    """The tokens of the context, counted from 0, of all occurrences of ``word`` in a prompt.

    ``tokens`` are ``clip.tokenize(prompt)``. A word may be a placeholder, or several words that
    follow each other. Start and end tokens and the chunks of long prompts are counted. Raises
    :class:`SeFiError` if the word is not in the prompt.
    """
    prompt = _items(clip, tokens)
    wanted = [item.key for item in _items(clip, clip.tokenize(word))]
    columns = []
    for start in range(len(prompt) - len(wanted) + 1) if wanted else ():
        part = prompt[start : start + len(wanted)]
        begins_a_word = start == 0 or prompt[start - 1].text.endswith(END_OF_WORD)
        if begins_a_word and [item.key for item in part] == wanted:
            columns += [item.column for item in part]
    if not columns:
        text = "".join(item.text for item in prompt)
        words = [word for word in dict.fromkeys(text.split(END_OF_WORD)) if word]
        raise SeFiError(
            f"words: {quoted(word)} is not in the prompt: "
            + (f"choose from {', '.join(words)}" if words else "write it into the prompt too")
        )
    return sorted(set(columns))


def _items(clip: CLIP, tokens: Tokens) -> list[Item]:
    """The tokens of the text itself, without start, end and padding."""
    encoder = encoder_names(clip)[0]  # several encoders stand side by side, token by token
    tokenizer = getattr(clip.tokenizer, f"clip_{encoder}")
    items = []
    begin = 0
    for chunk in tokens[encoder]:
        for column, (token, *_) in enumerate(chunk[1:], start=begin + 1):
            if isinstance(token, int) and token == tokenizer.end_token:
                break
            items.append(Item(column, *_key_and_text(tokenizer.inv_vocab, token)))
        begin += len(chunk)
    return items


def _key_and_text(vocabulary: dict[int, str], token: Any) -> tuple[Hashable, str]:
    if isinstance(token, PlaceholderToken):
        text = placeholder_of(token.name) if token.position == 0 else ""
        return (token.name, token.position), text + END_OF_WORD
    if isinstance(token, int):
        return token, vocabulary[token]
    # ComfyUI loads an embedding anew for each prompt, and does not tell its name.
    return token.numpy(force=True).tobytes(), END_OF_WORD
