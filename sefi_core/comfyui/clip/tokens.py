"""Placeholders in ComfyUI's text encoding: tokenise them, put token embeddings in their place.

``with_placeholders`` gives a CLIP whose tokens remember where a placeholder stood. To everybody
else these tokens are the ids of the class word, so any node may encode them; ``substitute``
puts token embeddings in their place, as ComfyUI does for textual inversion. Prompt weights,
``embedding:`` and chunks of 77 tokens are ComfyUI's own, because only the innermost tokenizer,
from text to ids, is wrapped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel, SDTokenizer
from transformers import BatchEncoding

from ...errors import SeFiError
from ...identity.identity import Identity
from ...text.placeholders import find_placeholders

Tokens = dict[str, list[list[tuple[Any, ...]]]]
"""ComfyUI's tokens: text encoder ("l", "g") -> chunks of (id or embedding, weight, ...)."""


class PositionFree(NamedTuple):
    """Vectors (vectors, width) that stand for token and position together.

    ``positions`` (tokens, width) is what the text encoder adds to each place of a chunk, and is
    therefore taken off them where they are put in.
    """

    rows: torch.Tensor
    positions: torch.Tensor


Embeddings = torch.Tensor | PositionFree
"""Token embeddings (vectors, width), or vectors that no position is added to."""

Rows = Mapping[str, Embeddings | None]
"""Identity name -> what takes the place of its placeholder, None for the class word's ids."""

Replacements = Mapping[str, Mapping[str, Embeddings] | None]
"""Identity name -> text encoder -> what takes the place; None as in ``Rows``."""


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
    """Stands in for the Hugging Face tokenizer inside one ``SDTokenizer``, with its contract.

    ``inner`` is the wrapped tokenizer, ``placeholders`` maps an identity's name to its tokens. Ids
    in lists are marked; those in tensors are the class word's.
    """

    def __init__(self, inner: Any, placeholders: Mapping[str, Sequence[PlaceholderToken]]) -> None:
        self.inner = inner
        self.placeholders = dict(placeholders)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # only while being copied, before __init__
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the inner tokenizer. Raises TypeError for options that placeholders cannot be in."""
        texts = [text] if isinstance(text, str) else text
        if not self._has_placeholder(texts):
            return self.inner(text, *args, **kwargs)
        options = _Options(*args, **kwargs)
        rows = [self._row(one, options) for one in texts]
        length = options.padded_length([len(row) for row in rows])
        pads = [max(0, length - len(row)) for row in rows]
        encoded = {
            "input_ids": [
                row + [self.inner.pad_token_id] * pad for row, pad in zip(rows, pads, strict=True)
            ],
            "attention_mask": [
                [1] * len(row) + [0] * pad for row, pad in zip(rows, pads, strict=True)
            ],
        }
        if isinstance(text, str) and options.return_tensors is None:
            encoded = {name: value[0] for name, value in encoded.items()}
        return BatchEncoding(encoded, tensor_type=options.return_tensors)

    def encode(self, text: str, *args: Any, **kwargs: Any) -> Any:
        """The ids of a text."""
        return self(text, *args, **kwargs)["input_ids"]

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        """The tokens of a text as texts; a placeholder's are the class word's."""
        if not self._has_placeholder([text]):
            return self.inner.tokenize(text, *args, **kwargs)
        return self.inner.convert_ids_to_tokens([int(token) for token in self._marked_ids(text)])

    def _has_placeholder(self, texts: Any) -> bool:
        return isinstance(texts, (list, tuple)) and any(
            isinstance(text, str) and find_placeholders(text, self.placeholders) for text in texts
        )

    def _row(self, text: str, options: _Options) -> list[int]:
        """The ids of one text, with start and end token if they are wanted."""
        specials = self.inner("")["input_ids"] if options.add_special_tokens else []
        ids = self._marked_ids(text)
        if options.truncation and options.max_length is not None:
            ids = ids[: options.max_length - len(specials)]
        return [*specials[:1], *ids, *specials[1:]]

    def _marked_ids(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for placeholder in find_placeholders(text, self.placeholders):
            ids += _ids(self.inner, text[end : placeholder.start])
            ids += self.placeholders[placeholder.name]
            end = placeholder.end
        return ids + _ids(self.inner, text[end:])


@dataclass(frozen=True)
class _Options:
    """The options of a Hugging Face tokenizer's call that go with placeholders, by their names."""

    text_pair: None = None
    _: KW_ONLY
    add_special_tokens: bool = True
    padding: bool | str = False
    truncation: bool | str = False
    max_length: int | None = None
    return_tensors: str | None = None
    return_attention_mask: bool = True
    verbose: bool = True

    def padded_length(self, lengths: Sequence[int]) -> int:
        """What rows of these lengths are padded to; 0 for no padding."""
        if self.padding == "max_length" and self.max_length is not None:
            return self.max_length
        return max(lengths) if self.padding in (True, "longest") else 0


def check_clip(clip: CLIP | None) -> CLIP:
    """``clip``, which is a CLIP with words to mark.

    Raises :class:`SeFiError` for what loaders give in the place of one.
    """
    if clip is None:
        raise SeFiError(
            "the clip input is empty, as the checkpoint has no text encoder: connect the CLIP of "
            "another loader"
        )
    if not token_widths(clip):
        raise SeFiError(
            "clip is no text encoder of Stable Diffusion: connect the CLIP of the same checkpoint"
        )
    return clip


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


def known_names(clip: CLIP) -> set[str]:
    """The names of the identities whose placeholders a CLIP marks."""
    inner = (tokenizer.tokenizer for tokenizer in _tokenizers(clip.tokenizer).values())
    return {
        name
        for tokenizer in inner
        if isinstance(tokenizer, PlaceholderTokenizer)
        for name in tokenizer.placeholders
    }


def placeholders_in(tokens: Tokens) -> set[str]:
    """The names of the identities whose placeholders are among the tokens."""
    items = (item for chunks in tokens.values() for item in items_of(chunks))
    return {item.name for item in items if isinstance(item, PlaceholderToken)}


def replaced(chunk: Sequence[Any], rows: Rows) -> list[Any]:
    """A chunk of tokens with what takes the place of each: itself, a row, or the class word's id.

    Position p of a placeholder gets row p, and the last row where there are fewer rows than
    positions. Placeholders that are not in ``rows`` stay marked.
    """
    items, place = [], 0
    for item in chunk:
        if isinstance(item, PlaceholderToken) and item.name in rows:
            found = rows[item.name]
            item = int(item) if found is None else _row(found, item.position, place)
        items.append(item)
        place += _places(item, rows)
    return items


def _row(found: Embeddings, position: int, place: int) -> torch.Tensor:
    """The row of a placeholder's position that stands in a place of the chunk."""
    rows = found.rows if isinstance(found, PositionFree) else found
    row = rows[min(position, len(rows) - 1)]
    if isinstance(found, PositionFree) and place < len(found.positions):
        return row - found.positions[place].to(row)
    return row  # or cut off behind the end of the chunk


def _places(item: Any, rows: Rows) -> int:
    """How many places an item takes, as ``SDClipModel.process_tokens`` counts: an embedding may
    have several vectors, and one of another width is dropped."""
    if not torch.is_tensor(item):
        return 1
    wanted = {
        (one.rows if isinstance(one, PositionFree) else one).shape[-1]
        for one in rows.values()
        if one is not None
    }
    if wanted and item.shape[-1] not in wanted:
        return 0
    return item.numel() // item.shape[-1]


def substitute(tokens: Tokens, replacements: Replacements) -> Tokens:
    """Put token embeddings in the place of marked ids; everything else stays as it is.

    As ComfyUI does for textual inversion. The result carries gradients back to the embeddings.
    """

    def rows_of(encoder: str) -> Rows:
        return {
            name: None if rows is None else rows[encoder]
            for name, rows in replacements.items()
            if rows is None or encoder in rows
        }

    return {
        encoder: [
            [
                (item, *rest)
                for item, (_, *rest) in zip(
                    replaced([item for item, *_ in chunk], rows), chunk, strict=True
                )
            ]
            for chunk in chunks
        ]
        for encoder, chunks, rows in (
            (encoder, chunks, rows_of(encoder)) for encoder, chunks in tokens.items()
        )
    }


def class_word_ids(clip: CLIP, class_word: str) -> list[int]:
    """The token ids of a class word, without start and end token."""
    tokenizer = next(iter(_tokenizers(clip.tokenizer).values())).tokenizer
    if isinstance(tokenizer, PlaceholderTokenizer):
        tokenizer = tokenizer.inner
    return _ids(tokenizer, class_word)


def placeholder_ids(items: Iterable[Any], name: str) -> list[int]:
    """The class word's ids, one per position, that tokens have for a placeholder."""
    ids = {
        item.position: int(item)
        for item in items
        if isinstance(item, PlaceholderToken) and item.name == name
    }
    return [ids[position] for position in sorted(ids)]


def items_of(chunks: Iterable[Iterable[Sequence[Any]]]) -> Iterator[Any]:
    """The ids and embeddings of one encoder's tokens, without weights."""
    return (item for chunk in chunks for item, *_ in chunk)


def encoder_models(clip: CLIP) -> dict[str, SDClipModel]:
    """The text encoders of a CLIP by their names in tokens, without those that are not loaded."""
    models = {
        name: getattr(clip.cond_stage_model, f"clip_{name}", None) for name in encoder_names(clip)
    }
    return {name: model for name, model in models.items() if model is not None}


def token_widths(clip: CLIP) -> dict[str, int]:
    """Text encoder -> width of its token embeddings. Encoders that are not loaded are left out."""
    return {
        name: model.transformer.get_input_embeddings().weight.shape[-1]
        for name, model in encoder_models(clip).items()
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
    return list(tokenizer(text)["input_ids"][1:-1])


def _placeholder_tokens(tokenizer: Any, identity: Identity) -> list[PlaceholderToken]:
    ids = _ids(tokenizer, identity.class_word)
    ids += ids[-1:] * (identity.vectors - len(ids))
    return [PlaceholderToken(token, identity.name, position) for position, token in enumerate(ids)]
