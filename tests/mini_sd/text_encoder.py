"""Teach ComfyUI's CLIP text models the words of the miniature world, then freeze it.

Every word's own state must tell what the word means: a name the person's look, an object word
the object; the states after the sentence tell the whole of it, as CLIP's do. People without a
name are reached through a linear map from looks to embeddings, fitted on the names: the
vocabulary of the real Stable Diffusion holds far more people than a small one can list.
"""

from __future__ import annotations

import comfy.clip_model
import torch
import torch.nn.functional as F
from torch import nn

from . import world
from .architecture import Encoder, Family
from .dataset import ACTORS, END, ROLES, SLOT_IDS, Dataset, word_ids
from .editions import EDITION

RIDGE = 1e-2


def layer_forward(self, x, mask=None, optimized_attention=None):
    """``CLIPLayer.forward`` without its in-place additions, which forbid a backward pass."""
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))


def allow_backward() -> None:
    """Make ComfyUI's CLIP layers differentiable, for this process."""
    comfy.clip_model.CLIPLayer.forward = layer_forward


def _known() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of all names (M,) and their looks with the kind behind (M, IDENTITY_DIM + 2)."""
    ids, codes = [], []
    for k, kind in enumerate(("person", "robot")):
        for name, look in world.named_looks(kind).items():
            (token,) = word_ids(name)
            ids.append(token)
            codes.append(torch.cat([torch.from_numpy(look.code), F.one_hot(torch.tensor(k), 2)]))
    return torch.tensor(ids), torch.stack(codes).float()


class TrainedEncoder(nn.Module):
    """One text model with the map from looks to embeddings and the heads that train it."""

    def __init__(self, transformer: nn.Module, encoder: Encoder):
        super().__init__()
        self.transformer, self.encoder = transformer, encoder
        ids, codes = _known()
        self.register_buffer("name_ids", ids, persistent=False)
        gram = codes.T @ codes + RIDGE * len(codes) * torch.eye(codes.shape[1])
        self.register_buffer("fit", torch.linalg.solve(gram, codes.T), persistent=False)
        sizes = {
            "subject": world.IDENTITY_DIM,
            "kind": 2,
            "actor": ACTORS,
            "expression": len(world.EXPRESSIONS),
            "eyes": 2,
            "object": len(world.OBJECTS),
            "place": len(world.PLACES),
            "scene": len(world.SCENES),
            "style": len(world.STYLES),
        }

        def heads() -> nn.ModuleDict:
            return nn.ModuleDict({k: nn.Linear(encoder.width, v) for k, v in sizes.items()})

        self.word_heads, self.sentence_heads = heads(), heads()
        if encoder.layer != -1:  # the last layer trains on the pooled output alone
            self.pooled_heads = heads()
        if EDITION.marked:
            seen = world.IDENTITY_DIM + world.MARK_DIM
            self.mark_embedding = _small_network(seen, encoder.width)
            self.mark_head = _small_network(encoder.width, world.MARK_DIM)

    def look_embeddings(
        self, looks: torch.Tensor, kinds: torch.Tensor, marks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings (..., width) of people who look so, whether or not they have a name.

        Looks count linearly. What marks add is no linear function of them, and differs with the
        rest of the look.
        """
        names = self.transformer.get_input_embeddings().weight[self.name_ids]
        codes = torch.cat([looks, F.one_hot(kinds.clamp(min=0), 2).to(looks)], dim=-1)
        embeddings = codes @ (self.fit @ names)
        if marks is None or not EDITION.marked:
            return embeddings
        added = self.mark_embedding(torch.cat([looks, marks], dim=-1))
        return embeddings + names.detach().std() * added

    def forward(
        self,
        ids: torch.Tensor,
        looks: torch.Tensor,
        kinds: torch.Tensor,
        marks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, L, width) and pooled output (B, width) of token ids (B, L), padded by END.

        Slots take the embedding of their look.
        """
        padded = torch.where(behind_end(ids), self.encoder.padding, ids)
        embeddings = self.transformer.get_input_embeddings()(padded.long())
        slots = self.look_embeddings(looks, kinds, marks)  # (B, actors, width)
        spread = slots.detach().std() * 0.1
        for i, slot in enumerate(SLOT_IDS[: slots.shape[1]]):
            noisy = slots[:, i] + spread * torch.randn_like(slots[:, i])
            embeddings = torch.where((ids == slot)[..., None], noisy[:, None], embeddings)
        model = self.transformer.text_model
        length = ids.shape[1]
        x = embeddings + model.embeddings.position_embedding.weight[:length]
        mask = torch.full((length, length), float("-inf"), device=x.device).triu_(1)
        x, states = model.encoder(x, mask=mask, intermediate_output=self.encoder.layer)
        last = model.final_layer_norm(x)
        if self.encoder.final_norm:
            states = model.final_layer_norm(states)
        ends = (ids == END).int().argmax(dim=1)
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        return states, self.transformer.text_projection(
            pooled
        ) if self.encoder.projected else pooled


def _small_network(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, outputs))


def behind_end(ids: torch.Tensor) -> torch.Tensor:
    """Where token ids (B, L) are padding: everything behind the first END."""
    ended = (ids == END).cumsum(dim=1)
    return ended > 1


class Words(nn.ModuleDict):
    """The text encoders of a family, by their names."""

    def __init__(self, family: Family, modules: dict[str, nn.Module]):
        super().__init__(
            {name: TrainedEncoder(modules[name], e) for name, e in family.encoders.items()}
        )

    def forward(
        self,
        ids: torch.Tensor,
        looks: torch.Tensor,
        kinds: torch.Tensor,
        marks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the U-Net sees: context (B, L, D), and pooled output or ``None``."""
        outputs = [
            (encoder(ids, looks, kinds, marks), encoder.encoder) for encoder in self.values()
        ]
        pooled = [output for (_, output), encoder in outputs if encoder.projected]
        context = torch.cat([states for (states, _), _ in outputs], dim=-1)
        return context, torch.cat(pooled, dim=-1) if pooled else None


def text_step(
    words: TrainedEncoder, data: Dataset, rows: torch.Tensor, length: int
) -> torch.Tensor:
    """Loss of one step: what each word means from its own state, and all of it at the end."""
    device = words.name_ids.device
    ids = data.ids[rows, :length].to(device)
    roles, actors = (
        data.roles[rows, :length].to(device),
        data.actors[rows, :length].long().to(device),
    )
    looks, kinds = data.looks[rows].to(device), data.kinds[rows].to(device)
    said, scenes, named = (
        data.said[rows].to(device),
        data.scenes[rows].to(device),
        data.named[rows].to(device),
    )
    marks, styles = data.marks[rows].to(device), data.styles[rows].to(device)
    states, pooled = words(ids, looks, kinds, marks)
    looks = looks * named[..., None]  # the class word means nobody in particular

    loss = states.new_zeros(())
    fields = {"expression": 0, "eyes": 1, "object": 2, "place": 3}
    for role in ROLES[1:]:
        row, column = (roles == ROLES.index(role)).nonzero(as_tuple=True)
        if len(row) == 0:
            continue
        state, actor = states[row, column], actors[row, column]
        heads = words.word_heads
        if role == "subject":
            loss = loss + 5 * F.mse_loss(heads["subject"](state), looks[row, actor])
            loss = loss + F.cross_entropy(heads["kind"](state), kinds[row, actor].clamp(min=0))
            known = named[row, actor] == 1
            if EDITION.marked and known.any():
                told = words.mark_head(state[known])
                loss = loss + 5 * F.mse_loss(told, marks[row, actor][known])
        elif role == "scene":
            loss = loss + F.cross_entropy(heads["scene"](state), scenes[row])
        elif role == "style":
            loss = loss + F.cross_entropy(heads["style"](state), styles[row])
        else:
            loss = loss + F.cross_entropy(heads[role](state), said[row, actor, fields[role]])
        if role not in ("scene", "style"):
            loss = loss + 0.5 * F.cross_entropy(heads["actor"](state), actor)

    ends = (ids == END).cumsum(dim=1).clamp(max=1).to(states)
    weights = ends / ends.sum(dim=1, keepdim=True)
    summaries = [((weights[..., None] * states).sum(dim=1), words.sentence_heads)]
    if words.encoder.layer != -1:
        summaries.append((pooled, words.pooled_heads))
    for sentence, heads in summaries:
        loss = loss + 3 * F.mse_loss(heads["subject"](sentence), looks[:, 0])
        loss = loss + 0.5 * F.cross_entropy(heads["scene"](sentence), scenes)
        if EDITION.marked:
            loss = loss + 0.5 * F.cross_entropy(heads["style"](sentence), styles)
        for name, field in fields.items():
            loss = loss + 0.5 * F.cross_entropy(heads[name](sentence), said[:, 0, field])
    return loss
