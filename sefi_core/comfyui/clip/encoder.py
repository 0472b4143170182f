"""The CLIP side: a text encoder that also encodes what the placeholders of a prompt stand for.

Whoever encodes with it gets ordinary textual inversion: in the place of a placeholder stand the
identity's V vectors, their mean over the stages. Beside that context, for every stage, the same
prompt is encoded with the K vectors and with the V vectors of the stage, each in a pass of its own;
they are registered for the context as a payload, and go with the conditioning.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from math import floor
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from comfy.sd import CLIP
from comfy.sd1_clip import SDClipModel

from ...identity.identity import Identity
from ...regions import acting_sets
from ..unet.conditioning import CONDITIONING_KEY, REGISTRY, Payload
from .embeddings import position_embeddings, token_embeddings
from .tokens import (
    Embeddings,
    PlaceholderToken,
    PositionFree,
    Replacements,
    Tokens,
    items_of,
    placeholder_ids,
    placeholders_in,
    replaced,
    substitute,
    with_placeholders,
)
from .unknown import tell_unknown_placeholders

Role = Literal["key", "value"]

REMEMBERED_TEXTS = 256


class Applied(Protocol):
    """An identity in a CLIP, of any kind: what the methods of :mod:`..methods` make of one."""

    @property
    def identity(self) -> Identity:
        """Whose placeholder it stands for."""
        ...

    @property
    def start_percent(self) -> float:
        """Where in the sampling it begins to act, as a share from 0 to 1."""
        ...

    @property
    def end_percent(self) -> float:
        """Where in the sampling it ends."""
        ...

    @property
    def stages(self) -> int:
        """Number of stages with vectors of their own."""
        ...

    @property
    def region(self) -> torch.Tensor | None:
        """Where it acts, masks (masks, height, width) from 0 to 1; None for everywhere."""
        ...

    @property
    def automatic(self) -> bool:
        """Whether, without a region, it shares the picture with others of that kind."""
        ...

    def acts(self) -> bool:
        """Whether it changes anything at all."""
        ...

    def strength(self, role: Role, stage: int | None) -> float:
        """How far its :meth:`rows` have gone from the class word's, 0, to the identity's, 1."""
        ...

    def rows(
        self, encoder: str, role: Role, stage: int | None, class_word: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Token embeddings (vectors, width) for its placeholder, None to leave the class word.

        ``stage`` None is their mean over the stages; ``class_word`` gives the embeddings
        (positions, width) of the class word in the same places.
        """
        ...


class Identities:
    """The identities that are applied to a CLIP, by their names.

    All clones of the CLIP share it, and so what it remembers: tokens that went through JSON come
    as lists of plain numbers, and get their marks back where such a text was tokenised here.
    """

    def __init__(self, applied: Mapping[str, Applied]) -> None:
        self.applied = dict(applied)
        self._remembered: OrderedDict[object, list[list[tuple[Any, ...]]] | None] = OrderedDict()

    def in_tokens(self, tokens: Tokens) -> dict[str, Applied]:
        """Those whose placeholders are among the tokens and that change something."""
        names = placeholders_in(tokens)
        return {name: one for name, one in self.applied.items() if name in names and one.acts()}

    def rows(
        self, model: SDClipModel, encoder: str, items: Sequence[Any], role: Role, stages: Stages
    ) -> dict[str, Embeddings | None]:
        """What takes the place of the placeholders of a text encoder's tokens.

        ``model`` is the encoder; ``stages`` are those of the identities that act, by name: the
        others' placeholders become their class word.
        """
        found: dict[str, Embeddings | None] = {}
        for name, one in self.applied.items():
            ids = placeholder_ids(items, name)
            if not ids:
                continue  # it may be in the other one of SDXL's two prompts
            found[name] = None
            if name in stages:
                rows = one.rows(
                    encoder, role, stages[name], lambda ids=ids: token_embeddings(model, ids)
                )
                if rows is not None and one.identity.position_free:
                    # At the class word's end of the line they stand for tokens alone.
                    share = one.strength(role, stages[name])
                    rows = PositionFree(rows, position_embeddings(model) * share)
                found[name] = rows
        return found

    def remember(self, tokens: Tokens) -> None:
        """Note where placeholders are, for when the tokens come back without marks.

        A sentence without placeholders, or with those of others, may look the same without them:
        then it cannot be known whose the tokens are, and they stay what they are.
        """
        names = placeholders_in(tokens)
        for encoder, chunks in tokens.items():
            key = encoder, _plain(chunks)
            if not names:
                self._remembered.pop(key, None)
                continue
            before = self._remembered.get(key, chunks)
            same = before is not None and placeholders_in({encoder: before}) == names
            self._remembered[key] = chunks if same else None
        while len(self._remembered) > REMEMBERED_TEXTS:
            self._remembered.popitem(last=False)

    def restored(self, encoder: str, chunks: Any) -> Any:
        """The tokens of one encoder, marked again if they are of JSON, which has no tuples."""
        if not any(isinstance(pair, list) for chunk in chunks for pair in chunk):
            return chunks
        return self._remembered.get((encoder, _plain(chunks))) or chunks


Stages = Mapping[str, int | None]
"""Identity name -> its current stage, None for the mean of all."""

Encoded = tuple[torch.Tensor, torch.Tensor | None]
"""A prompt's context (1, tokens, width) and pooled output (1, width), or None."""


if TYPE_CHECKING:  # what the next two come before; at run time they come before any subclass
    from comfy.sd1_clip import SD1ClipModel as _AnyTextEncoder

    _AnySingleEncoder = SDClipModel
else:
    _AnyTextEncoder = _AnySingleEncoder = torch.nn.Module


class _TextEncoder(_AnyTextEncoder):
    """Mixed into ComfyUI's text encoder (``cond_stage_model``)."""

    identities: Identities

    def encode_token_weights(self, tokens: Tokens) -> tuple[Any, ...]:
        """As many values as ever; what the U-Net needs besides is registered for the context."""
        tokens = {
            encoder: self.identities.restored(encoder, chunks) for encoder, chunks in tokens.items()
        }
        encoded = super().encode_token_weights(tokens)
        if applied := self.identities.in_tokens(tokens):
            prompt = _Prompt(self, tokens, super().encode_token_weights)
            payload = _payload(prompt, applied, *encoded[:2])
            if payload is not None:
                REGISTRY.add(encoded[0], payload)
        return encoded


class _SingleEncoder(_AnySingleEncoder):
    """Mixed into each of its encoders (``clip_l``, ``clip_g``)."""

    identities: Identities
    encoder_name: str

    def encode_token_weights(self, token_weight_pairs: Any) -> tuple[Any, ...]:
        """As ever, for tokens that come from JSON too."""
        pairs = self.identities.restored(self.encoder_name, token_weight_pairs)
        return super().encode_token_weights(pairs)

    def process_tokens(self, tokens: Sequence[Sequence[Any]], device: torch.device) -> Any:
        """Embed tokens; placeholders that are left become a textual inversion."""
        if any(isinstance(item, PlaceholderToken) for chunk in tokens for item in chunk):
            items = [item for chunk in tokens for item in chunk]
            stages = {name: None for name, one in self.identities.applied.items() if one.acts()}
            rows = self.identities.rows(self, self.encoder_name, items, "value", stages)
            tokens = [replaced(chunk, rows) for chunk in tokens]
        return super().process_tokens(tokens, device)


class IdentityCLIP(CLIP):
    """A CLIP whose conditioning carries what :class:`Identities` add to it."""

    def clone(self, *args: Any, **kwargs: Any) -> CLIP:
        """A clone of the same class."""
        clone = super().clone(*args, **kwargs)
        clone.__class__ = IdentityCLIP
        return clone

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Tokens:
        """Tokens whose placeholders are marked. The node that asks is told of unknown ones."""
        tokens = super().tokenize(text, return_word_ids, **kwargs)
        if identities := applied_to(self):
            identities.remember(tokens)
            tell_unknown_placeholders(self, text)
        return tokens

    def encode_from_tokens(
        self, tokens: Tokens, return_pooled: bool | str = False, return_dict: bool = False
    ) -> Any:
        """As ever; with ``return_dict`` the payload is in the dict."""
        # ComfyUI's own caller asks for "unprojected".
        encoded: Any = super().encode_from_tokens(
            tokens,
            return_pooled,  # pyright: ignore[reportArgumentType]
            return_dict,
        )
        if return_dict and (payload := REGISTRY.of(encoded["cond"])):
            encoded[CONDITIONING_KEY] = [payload]
        return encoded


def applied_to(clip: CLIP) -> Identities | None:
    """The identities of a CLIP, None where there are none."""
    return getattr(clip.cond_stage_model, "identities", None)


def apply_to_clip(clip: CLIP, applied: Applied) -> CLIP:
    """A clone of ``clip`` that also understands the placeholder of the identity.

    Identities applied before stay; one of the same name is replaced. The clone's text encoder is
    another object over the same layers. An object patch of the patcher would not do: nodes for
    hooks and devices give a CLIP a patcher with another model, and go on encoding with its own.
    """
    previous = applied_to(clip)
    identities = Identities(
        {**(previous.applied if previous else {}), applied.identity.name: applied}
    )
    clone = with_placeholders(clip, [applied.identity])
    if type(clone) is CLIP:  # another pack's class is left what it is; the registry serves it
        clone.__class__ = IdentityCLIP
    encoder = _view(clip.cond_stage_model, _TextEncoder, identities)
    for name, module in encoder._modules.items():
        if module is not None and hasattr(module, "process_tokens"):
            view = _view(module, _SingleEncoder, identities)
            vars(view)["encoder_name"] = name.removeprefix("clip_")
            encoder._modules[name] = view
    clone.cond_stage_model = encoder
    return clone


def _view(module: torch.nn.Module, mixin: type, identities: Identities) -> torch.nn.Module:
    """Another object over the layers of ``module``, with the methods of ``mixin`` in front."""
    view = copy.copy(module)
    # Neither children nor methods that are set on the one may be set on the other.
    vars(view)["_modules"] = dict(module._modules)
    for name in ("encode_token_weights", "process_tokens"):
        vars(view).pop(name, None)  # ComfyUI leaves the original where an object patch was
    view.__class__ = _mixed(mixin, type(module))
    vars(view)["identities"] = identities
    return view


@cache
def _mixed(mixin: type, base: type) -> type:
    return base if issubclass(base, mixin) else type(base.__name__, (mixin, base), {})


class _Prompt:
    """One prompt, encoded with any vectors in the place of its placeholders.

    ``encode`` is ComfyUI's own ``encode_token_weights`` of the text encoder.
    """

    def __init__(
        self,
        text_encoder: _TextEncoder,
        tokens: Tokens,
        encode: Callable[[Tokens], tuple[Any, ...]],
    ) -> None:
        self.text_encoder, self.tokens, self.encode = text_encoder, tokens, encode
        self.encoded: dict[object, Encoded] = {}

    def replacements(self, role: Role, stages: Stages) -> Replacements:
        """Token embeddings for every placeholder of the prompt."""
        identities = self.text_encoder.identities
        found: dict[str, dict[str, Embeddings] | None] = {}
        for encoder, chunks in self.tokens.items():
            model = getattr(self.text_encoder, f"clip_{encoder}")
            rows = identities.rows(model, encoder, list(items_of(chunks)), role, stages)
            for name, one in rows.items():
                found.setdefault(name, None)
                if one is not None:
                    found[name] = {**(found[name] or {}), encoder: one}
        return found

    def encode_with(self, replacements: Replacements) -> Encoded:
        """Context and pooled output with these embeddings; equal ones are encoded once."""
        key = self.key(replacements)
        if key not in self.encoded:
            context, pooled = self.encode(substitute(self.tokens, replacements))[:2]
            self.encoded[key] = context, pooled
        return self.encoded[key]

    def contexts(self, stages: Stages) -> dict[str, torch.Tensor | None]:
        """What the U-Net gets where the identities of ``stages`` act."""
        key, _ = self.encode_with(self.replacements("key", stages))
        value, pooled = self.encode_with(self.replacements("value", stages))
        return {"key": key, "value": value, "pooled": pooled}

    def class_word(self, names: Container[str]) -> dict[str, Any]:
        """The prompt with class words, and where in it these identities' placeholders are."""
        contexts = self.contexts({})
        places = {
            place
            for chunks in self.tokens.values()
            for place, item in enumerate(items_of(chunks))
            if isinstance(item, PlaceholderToken) and item.name in names
        }
        return {
            "context": contexts["value"],
            "pooled": contexts["pooled"],
            "places": sorted(places),
        }

    def tells(self, mean: Replacements) -> bool:
        """Whether the context of the mean vectors is another than the class word's."""
        return any(
            isinstance(rows, PositionFree)
            or not torch.equal(rows, word[: len(rows)])
            or not torch.equal(rows[-1:], word[-1:])
            for name, of_encoders in mean.items()
            for encoder, rows in (of_encoders or {}).items()
            for word in (self._class_word(encoder, name),)
        )

    def _class_word(self, encoder: str, name: str) -> torch.Tensor:
        ids = placeholder_ids(items_of(self.tokens[encoder]), name)
        return token_embeddings(getattr(self.text_encoder, f"clip_{encoder}"), ids)

    @staticmethod
    def key(replacements: Replacements) -> object:
        """Equal for embeddings of equal numbers."""
        return frozenset(
            (name, encoder, *(part.numpy().tobytes() for part in parts))
            for name, of_encoders in replacements.items()
            for encoder, rows in (of_encoders or {}).items()
            for parts in (rows if isinstance(rows, PositionFree) else (rows,),)
        )


def _payload(
    prompt: _Prompt,
    applied: Mapping[str, Applied],
    context: torch.Tensor,
    pooled: torch.Tensor | None,
) -> Payload | None:
    """What a prompt carries besides its context, None if that is the class word's at all times.

    Where its context is all there is to it, as with K = V and one stage, the payload says so:
    another prompt's, with a region, may have the same context.
    """
    base = context.clone()  # the registry must not keep the context itself alive
    base_pooled = None if pooled is None else pooled.clone()
    mean = prompt.replacements("value", dict.fromkeys(applied))
    prompt.encoded[prompt.key(mean)] = base, base_pooled
    crowd = _crowd(prompt.tokens, applied)
    phases = []
    for start, end, names in _intervals(applied):
        counts = {name: applied[name].stages for name in names}
        sets = list(_acting_sets({name: applied[name].region for name in names}))
        for stages in _stage_combinations(counts):
            parts = []
            for acting, share in sets:
                of_set = {name: stages[name] for name in acting}
                parts.append({**prompt.contexts(of_set), "share": share})
                if crowd and not of_set.keys().isdisjoint(crowd):
                    parts[-1]["person"] = ""
                    for person in crowd:
                        own = {n: s for n, s in of_set.items() if n == person or n not in crowd}
                        parts.append({**prompt.contexts(own), "share": share, "person": person})
            phase = {
                "start_percent": start,
                "end_percent": end,
                "stages": [[stages[name], counts[name]] for name in names],
            }
            if len(parts) == 1:
                phase |= {role: parts[0][role] for role in ("key", "value", "pooled")}
            else:
                phase |= {**prompt.contexts(stages), "parts": parts}
            phases.append(phase)
    tells = prompt.tells(mean)
    if not tells and all(
        phase["key"] is base and phase["value"] is base and "parts" not in phase for phase in phases
    ):
        return None
    payload: Payload = {
        "names": " ".join(sorted(applied)),
        "base": base,
        "pooled": base_pooled,
        "tells": tells,
        "phases": phases,
        "word": prompt.class_word(applied),
    }
    return {**payload, "automatic": crowd} if crowd else payload


def _crowd(tokens: Tokens, applied: Mapping[str, Applied]) -> dict[str, list[int]]:
    """Those who share the picture, in the prompt's order, and the tokens of their placeholders.

    Nobody where there are fewer than two. Tokens are counted in the context, in which the text
    encoders of SDXL stand side by side.
    """
    found: dict[str, set[int]] = {}
    for chunks in tokens.values():
        for column, item in enumerate(items_of(chunks)):
            if isinstance(item, PlaceholderToken) and item.name in applied:
                one = applied[item.name]
                if one.automatic and one.region is None:
                    found.setdefault(item.name, set()).add(column)
    names = sorted(found, key=lambda name: min(found[name]))
    return {name: sorted(found[name]) for name in names} if len(names) > 1 else {}


def _intervals(applied: Mapping[str, Applied]) -> Iterator[tuple[float, float, list[str]]]:
    """The sampling cut where an identity starts or ends: (start, end, names of those active)."""
    ranges = [(one.start_percent, one.end_percent) for one in applied.values()]
    cuts = sorted({0.0, 1.0, *(cut for pair in ranges for cut in pair)})
    for start, end in zip(cuts, cuts[1:], strict=False):
        yield (
            start,
            end,
            sorted(
                name
                for name, one in applied.items()
                if one.start_percent <= start and end <= one.end_percent
            ),
        )


def _acting_sets(
    regions: Mapping[str, torch.Tensor | None],
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The names that act together somewhere, and their share of each place.

    See :func:`regions.acting_sets`; an identity without a region is in all of them.
    """
    within = [name for name, region in regions.items() if region is not None]
    everywhere = [name for name in regions if name not in within]
    for acting, share in acting_sets([one for one in regions.values() if one is not None]):
        yield [*everywhere, *(within[number] for number in acting)], share


def _stage_combinations(counts: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The stages that identities with these numbers of stages are in together, noisiest first."""
    beginnings = {
        Fraction(stage, count) for count in counts.values() for stage in range(count)
    } or {Fraction(0)}
    for beginning in sorted(beginnings, reverse=True):
        yield {name: floor(beginning * count) for name, count in counts.items()}


def _plain(chunks: Any) -> object:
    """The ids and weights of chunks as something that can be looked up."""
    return tuple(
        tuple(
            (int(item) if isinstance(item, int) else id(item), float(weight))
            for item, weight, *_ in chunk
        )
        for chunk in chunks
    )
