"""Placeholders in ComfyUI's text encoding: tokenise them, put token embeddings in their place.

``with_placeholders`` gives a CLIP whose tokens remember where a placeholder stood. To everybody
else these tokens are the ids of the class word, so any node may encode them; ``substitute``
puts token embeddings in their place, as ComfyUI does for textual inversion. Prompt weights,
``embedding:`` and chunks of 77 tokens are ComfyUI's own, because only the innermost tokenizer,
from text to ids, is wrapped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDTokenizer

from ...errors import SeFiError
from ...identity.identity import Identity
from ...text.placeholders import find_placeholders

Tokens = dict[str, list[list[tuple[Any, ...]]]]
"""ComfyUI's tokens: text encoder ("l", "g") -> chunks of (id or embedding, weight, ...)."""

Vectors = Mapping[str, Mapping[str, torch.Tensor]]
"""Identity name -> text encoder -> token embeddings (vectors, width)."""


class PlaceholderToken(int):
    """A token id of the class word that knows which placeholder it stands for.

    ``name`` is the identity's name, ``position`` counts the tokens of one placeholder from 0.
    """

    name: str
    position: int

    def __new__(cls, token_id: int, name: str, position: int) -> PlaceholderToken:
        token = super().__new__(cls, token_id)
        token.name = name
        token.position = position
        return token

    def __getnewargs__(self) -> tuple[int, str, int]:
        return int(self), self.name, self.position


class PlaceholderTokenizer:
    """Stands in for the Hugging Face tokenizer inside one ``SDTokenizer``.

    ``inner`` is the wrapped tokenizer, ``placeholders`` maps an identity's name to its tokens.
    """

    def __init__(self, inner: Any, placeholders: Mapping[str, Sequence[PlaceholderToken]]) -> None:
        self.inner = inner
        self.placeholders = dict(placeholders)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # only while being copied, before __init__
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, text: str, *args: Any, **kwargs: Any) -> Any:
        found = find_placeholders(text, self.placeholders)
        if not found:
            return self.inner(text, *args, **kwargs)
        start, stop = self.inner("")["input_ids"]
        ids: list[int] = [start]
        end = 0
        for placeholder in found:
            ids += _ids(self.inner, text[end : placeholder.start])
            ids += self.placeholders[placeholder.name]
            end = placeholder.end
        ids += _ids(self.inner, text[end:])
        return {"input_ids": [*ids, stop]}


def check_clip(clip: CLIP | None) -> None:
    """Raises :class:`SeFiError` for what loaders give in the place of a CLIP with words to mark."""
    if clip is None:
        raise SeFiError(
            "the clip input is empty, as the checkpoint has no text encoder: connect the CLIP of "
            "another loader"
        )
    if not token_widths(clip):
        raise SeFiError(
            "clip is no text encoder of Stable Diffusion: connect the CLIP of the same checkpoint"
        )


def encoder_names(clip: CLIP) -> list[str]:
    """The CLIP's text encoders as they are named in tokens: ["l"] for SD 1.x, SDXL adds "g"."""
    return list(_tokenizers(clip.tokenizer))


def with_placeholders(clip: CLIP, identities: Sequence[Identity]) -> CLIP:
    """A clone of ``clip`` whose tokens mark the identities' placeholders.

    A placeholder takes P = max(vectors, tokens of the class word) positions; where it has more
    positions than the class word has tokens, the last of these is repeated. Placeholders that
    ``clip`` already marks stay; one of the same name is replaced. ``clip`` itself is untouched.
    """
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    for encoder, tokenizer in _tokenizers(clip.tokenizer).items():
        inner, placeholders = tokenizer.tokenizer, {}
        if isinstance(inner, PlaceholderTokenizer):
            inner, placeholders = inner.inner, inner.placeholders
        marked = {identity.name: _placeholder_tokens(inner, identity) for identity in identities}
        tokenizer = copy.copy(tokenizer)
        tokenizer.tokenizer = PlaceholderTokenizer(inner, {**placeholders, **marked})
        setattr(clone.tokenizer, f"clip_{encoder}", tokenizer)
    return clone


def placeholders_in(tokens: Tokens) -> set[str]:
    """The names of the identities whose placeholders are among the tokens."""
    return {token.name for token in _items(tokens) if isinstance(token, PlaceholderToken)}


def substitute(tokens: Tokens, vectors: Vectors) -> Tokens:
    """Put token embeddings in the place of marked ids; everything else stays as it is.

    Position p of a placeholder gets row p of its embeddings, and the last row where there are
    fewer rows than positions. Placeholders that are not in ``vectors`` keep the class word's ids.
    The result carries gradients back to ``vectors``.
    """

    def replaced(encoder: str, item: Any) -> Any:
        if not isinstance(item, PlaceholderToken) or item.name not in vectors:
            return item
        rows = vectors[item.name][encoder]
        return rows[min(item.position, len(rows) - 1)]

    return {
        encoder: [[(replaced(encoder, item), *rest) for item, *rest in chunk] for chunk in chunks]
        for encoder, chunks in tokens.items()
    }


def class_word_ids(clip: CLIP, class_word: str) -> list[int]:
    """The token ids of a class word, without start and end token."""
    tokenizer = next(iter(_tokenizers(clip.tokenizer).values())).tokenizer
    if isinstance(tokenizer, PlaceholderTokenizer):
        tokenizer = tokenizer.inner
    return _ids(tokenizer, class_word)


def placeholder_ids(chunks: list[list[tuple[Any, ...]]], name: str) -> list[int]:
    """The class word's ids, one per position, that one encoder's tokens have for a placeholder."""
    ids = {
        item.position: int(item)
        for chunk in chunks
        for item, *_ in chunk
        if isinstance(item, PlaceholderToken) and item.name == name
    }
    return [ids[position] for position in sorted(ids)]


def token_widths(clip: CLIP) -> dict[str, int]:
    """Text encoder -> width of its token embeddings. Encoders that are not loaded are left out."""
    models = {
        name: getattr(clip.cond_stage_model, f"clip_{name}", None) for name in encoder_names(clip)
    }
    return {
        name: model.transformer.get_input_embeddings().weight.shape[-1]
        for name, model in models.items()
        if model is not None
    }


def _tokenizers(tokenizer: Any) -> dict[str, SDTokenizer]:
    """Text encoder -> the ``SDTokenizer`` that ComfyUI's tokenizer of a model keeps for it."""
    return {
        name.removeprefix("clip_"): value
        for name, value in vars(tokenizer).items()
        if name.startswith("clip_") and isinstance(value, SDTokenizer)
    }


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a piece of text, without start and end token."""
    return tokenizer(text)["input_ids"][1:-1]


def _placeholder_tokens(tokenizer: Any, identity: Identity) -> list[PlaceholderToken]:
    ids = _ids(tokenizer, identity.class_word)
    ids += ids[-1:] * (identity.vectors - len(ids))
    return [PlaceholderToken(token, identity.name, position) for position, token in enumerate(ids)]


def _items(tokens: Tokens) -> Iterator[Any]:
    for chunks in tokens.values():
        for chunk in chunks:
            for item, *_ in chunk:
                yield item
