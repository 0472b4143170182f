"""Whether pictures show what their prompts ask for, and ID(P) from that and their likeness.

A picture's **prompt score** is the cosine of its CLIP embedding with that of its prompt. Its prompt
counts as fulfilled either where the score reaches a threshold, or where the picture is closer to
its own prompt than to every other prompt of the batch and to the bare class word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .checks import check_choice, check_number
from .errors import SeFiError, quoted
from .evaluation import quality
from .text.markdown import markdown_table
from .text.placeholders import find_placeholders

FULFILLED = ("closest prompt", "threshold")
BARE = "a photo of a {}"
"""What a picture shows that ignores its prompt; the braces stand for the class word."""

_UNKNOWN = re.compile(r"<[\w-]+>")


@dataclass(frozen=True)
class Rule:
    """When a prompt counts as fulfilled; the settings of SeFi Prompt Score, and their defaults.

    ``threshold`` is a cosine, and is used by "threshold" only.
    """

    fulfilled: str = "closest prompt"
    threshold: float = 0.22

    def __post_init__(self) -> None:
        check_choice("fulfilled", self.fulfilled, FULFILLED)
        check_number("threshold", self.threshold, -1.0, 1.0)


@dataclass(frozen=True)
class Scores:
    """What the pictures of a batch have, each a list with one entry for each picture."""

    prompts: list[str]
    """The prompt of each, with the class word in the placeholder's place."""
    cosines: list[float]
    fulfilled: list[bool]

    @property
    def mean(self) -> float:
        """The mean prompt score."""
        return sum(self.cosines) / len(self.cosines)

    @property
    def share(self) -> float:
        """The share of pictures whose prompt is fulfilled, from 0 to 1."""
        return sum(self.fulfilled) / len(self.fulfilled)

    def quality(self, likeness: Sequence[float]) -> dict[str, float]:
        """``id``, ``prompt`` and ``id_p`` (:func:`evaluation.quality`) with these numbers.

        Raises :class:`SeFiError` when they are not of equally many pictures.
        """
        if len(likeness) != len(self.cosines):
            raise SeFiError(
                f"likeness is of {len(likeness)} pictures and images are {len(self.cosines)}: "
                "connect the same pictures to SeFi Likeness, in the same order"
            )
        return quality(torch.tensor(likeness), [[hit] for hit in self.fulfilled])

    def table(self, likeness: Sequence[float] | None = None) -> str:
        """One line for each picture, in the order of the batch, as a Markdown table."""
        heads = ["picture", "prompt score", "fulfilled"] + (["likeness"] if likeness else [])
        lines = []
        for number, (prompt, cosine, hit) in enumerate(
            zip(self.prompts, self.cosines, self.fulfilled, strict=True)
        ):
            line = [str(number), f"{cosine:.3f}", "yes" if hit else "no"]
            line += [f"{likeness[number]:.3f}"] if likeness else []
            lines.append([*line, prompt.replace("|", "/")])
        return markdown_table([*heads, "prompt"], lines)


def prompts_for(text: str, pictures: int) -> list[str]:
    """The prompt of each picture from one prompt a line; a single one is for all of them.

    Empty lines do not count. Raises :class:`SeFiError` when the numbers do not fit.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SeFiError("prompts is empty: write the prompt of each picture, one a line")
    if len(lines) == 1:
        return lines * pictures
    if len(lines) != pictures:
        raise SeFiError(
            f"prompts has {len(lines)} lines and images has {pictures} pictures: write one line "
            "for each picture, in the same order, or a single line for all"
        )
    return lines


def in_plain_words(prompt: str, class_words: Mapping[str, str]) -> str:
    """``prompt`` with the class words, by identity name, in the places of their placeholders.

    Raises :class:`SeFiError` for a placeholder of somebody else: CLIP would read a name in it.
    """
    plain, end = [], 0
    for placeholder in find_placeholders(prompt, class_words):
        plain += [prompt[end : placeholder.start], class_words[placeholder.name]]
        end = placeholder.end
    text = "".join([*plain, prompt[end:]])
    if unknown := _UNKNOWN.search(text):
        raise SeFiError(
            f"prompts has {quoted(unknown[0])}, whose class word is not known: connect its "
            "identity, or the CLIP of SeFi Apply Identity, or write the class word"
        )
    return text


def texts_to_compare(prompts: Sequence[str], class_words: Mapping[str, str]) -> list[str]:
    """All texts that need an embedding, each once: the prompts, and the bare class words."""
    bare = [BARE.format(word) for word in class_words.values()] or [BARE.format("person")]
    return list(dict.fromkeys([*prompts, *bare]))


def scored(
    pictures: torch.Tensor,
    texts: Mapping[str, torch.Tensor],
    prompts: Sequence[str],
    rule: Rule,
) -> Scores:
    """The scores of pictures, from embeddings (N, D) of them and (D,) of each text.

    ``prompts`` has the prompt of each picture, ``texts`` besides them whatever else a picture may
    not be closer to. Raises :class:`SeFiError` where "closest prompt" has nothing to compare with.
    """
    known = list(texts)
    table = F.normalize(pictures.float(), dim=-1) @ F.normalize(
        torch.stack([texts[text] for text in known]).float(), dim=-1
    ).T.to(pictures.device)
    own = torch.tensor([known.index(prompt) for prompt in prompts], device=table.device)
    cosines = table.gather(1, own[:, None])[:, 0]
    if rule.fulfilled == "threshold":
        hits = cosines >= rule.threshold
    elif len(known) < 2:
        raise SeFiError(
            "every prompt is the bare class word, so that no prompt is closer than another: set "
            "fulfilled to 'threshold'"
        )
    else:
        hits = table.argmax(dim=1) == own
    return Scores(list(prompts), cosines.tolist(), hits.tolist())
