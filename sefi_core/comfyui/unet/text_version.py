"""The plain text of prompts with identities: the class words in the places of placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid5

import torch

from ...injection import Injection, Row
from .adapter import BESIDE_KEY
from .conditioning import Known
from .places import Place
from .run import Run
from .sampling import RUN_KEY

PLACES_KEY = "sefi_mixed_attention_rows"

CONTEXT = "c_crossattn"
VECTOR = "y"

STRIPPED = ("attn2_patch", "attn2_output_patch")
"""Patches by which other packs bring identities into the model's attention to the text."""

TEXT_GROUPS = ("positive", "middle")
"""Names of a guider's conditionings that identities of other nodes act in."""

KEPT_TEXTS = 64
"""Windows of frames have new conditionings at each step."""


class TextRun(Run):
    """A run in which every known prompt is its class word's, at any noise level."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.has_regions = False
        self.word_places: dict[Injection, Sequence[int]] = {}
        """Tokens of the placeholders in the prompt that an injection is of."""

    def _injections_of(self, known: Known) -> Sequence[Injection]:
        if known not in self._injections:
            found = []
            if word := known.payload.get("word"):
                context = word["context"]
                one = Injection(float("-inf"), float("inf"), context, context, word["pooled"])
                self.word_places[one] = word["places"]
                found = [one]
            self._injections[known] = found
        return self._injections[known]

    def columns(self, row: Row) -> list[int]:
        """Tokens of a row's context that are class words of identities."""
        return [
            place
            for segment in row
            for injection in segment.injections
            for offset in self.word_places[injection]
            if (place := segment.start + offset) < segment.end
        ]

    def conditioning(self, cond: dict[str, Any], number: int) -> dict[str, Any]:
        """A conditioning as it is sampled, with the class words' context and pooled output.

        ``number`` is its own in the sampling, so that the prompts of its dict come first.
        """
        given = cond["model_conds"]
        if CONTEXT not in given:
            return cond
        context: torch.Tensor = given[CONTEXT].cond
        rows = self.rows(context, [number] * len(context))
        contexts = self.swap(context, rows, 0.0)
        if contexts is None:
            return cond
        changed = {CONTEXT: given[CONTEXT]._copy_with(contexts.keys)}
        if VECTOR in given and len(given[VECTOR].cond) == len(rows):
            vectors = self.swap_pooled(given[VECTOR].cond, rows, 0.0, ())
            changed[VECTOR] = given[VECTOR]._copy_with(vectors)
        return {**cond, "model_conds": {**given, **changed}}


class Texts:
    """The conditionings of a sampling, and their text versions.

    ``of_others``: identities are those of other nodes, which patch the MODEL.
    """

    def __init__(self, guider: Any, of_others: bool) -> None:
        self.guider, self.of_others = guider, of_others
        named = [(name, cond) for name, group in guider.conds.items() for cond in group or ()]
        self.conds = [cond for _, cond in named]
        self._of_text = {number for number, (name, _) in enumerate(named) if name in TEXT_GROUPS}
        self._run: TextRun | None = None
        self._rows: dict[int, list[tuple[Row, Row]]] = {}
        self._made: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    @property
    def run(self) -> TextRun | None:
        """That of the text versions, None where the MODEL knows no identities."""
        run = self._identities
        if self._run is None and run is not None:
            self._run = TextRun(self.guider.model_patcher, run.own, run.size)
        return self._run

    @property
    def _identities(self) -> Run | None:
        return self.guider.model_options.get("transformer_options", {}).get(RUN_KEY)

    def any(self, sigma: float) -> bool:
        """Whether an identity acts in a conditioning at a noise level."""
        if self.of_others:
            return bool(self._of_text)
        return any(
            _differs(row, text, sigma)
            for number in range(len(self.conds))
            for row, text in self._rows_of(number)
        )

    def acting(self, group: Sequence[dict[str, Any]] | None, sigma: float) -> frozenset[int]:
        """The numbers of a group's conditionings in which an identity acts at a noise level."""
        numbers = {number for cond in group or () if (number := number_of(cond)) is not None}
        if self.of_others:
            return frozenset(numbers & self._of_text)
        return frozenset(
            number
            for number in numbers
            if any(_differs(row, text, sigma) for row, text in self._rows_of(number))
        )

    def of(self, group: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """A group of conditionings with class words, each made once.

        They have ids of their own, by which nodes such as EasyCache keep what was computed.
        """
        return group and [_named_apart(self._made_of(cond)) for cond in group]

    def options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The ``transformer_options`` of the text version."""
        made = dict(options)
        if self.run is not None:
            made[RUN_KEY] = self.run
        if self.of_others:
            made.pop(BESIDE_KEY, None)
            patches = made.get("patches", {})
            replaced = made.get("patches_replace", {})
            made["patches"] = {name: one for name, one in patches.items() if name not in STRIPPED}
            made["patches_replace"] = {
                name: one for name, one in replaced.items() if name != "attn2"
            }
        return made

    def columns(self, place: Place) -> list[int]:
        """The class words of identities in the context of a row."""
        rows = self._rows_of(place.number)
        return self.run.columns(rows[place.latent % len(rows)][1]) if self.run and rows else []

    def _rows_of(self, number: int) -> list[tuple[Row, Row]]:
        """For each context of a conditioning its known prompts, and the same with class words."""
        if number not in self._rows:
            context, run = self.conds[number].get("cross_attn"), self._identities
            self._rows[number] = []
            if context is not None and run is not None and self.run is not None:
                numbers = [number] * len(context)
                both = run.rows(context, numbers), self.run.rows(context, numbers)
                self._rows[number] = list(zip(*both, strict=True))
        return self._rows[number]

    def _made_of(self, cond: dict[str, Any]) -> dict[str, Any]:
        number = number_of(cond)
        if number is None or self.run is None:
            return cond
        if id(cond) not in self._made:
            while len(self._made) >= KEPT_TEXTS:
                del self._made[next(iter(self._made))]
            self._made[id(cond)] = cond, self.run.conditioning(cond, number)
        return self._made[id(cond)][1]


def number_of(cond: Mapping[str, Any]) -> int | None:
    """That of a conditioning in the sampling, None for one that a node has brought since."""
    places = cond["model_conds"].get(PLACES_KEY)
    return None if places is None else int(places.cond[0, 0])


def _named_apart(cond: dict[str, Any]) -> dict[str, Any]:
    return {**cond, "uuid": uuid5(cond["uuid"], "text")} if "uuid" in cond else cond


def _differs(row: Row, text: Row, sigma: float) -> bool:
    """Whether an identity acts in a row at a noise level, and its class word is known."""
    pairs = [(one.at(sigma), word.at(sigma)) for one, word in zip(row, text, strict=True)]
    return any(
        acting is not None
        and word is not None
        and (bool(acting.parts) or acting.key is not word.key or acting.value is not word.value)
        for acting, word in pairs
    )
