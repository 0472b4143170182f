"""A training that was interrupted goes on as if it had not been, bit by bit."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from sefi_ide.sefi_core.digest import digest, weights_digest
from sefi_ide.sefi_core.learning.loop import optimise
from sefi_ide.sefi_core.learning.parametrisation import PARAMETRISATIONS, build_parametrisation
from sefi_ide.sefi_core.learning.state import LoopState, Snapshot, from_bytes, to_bytes

from .test_training import Half, Toy, settings

STAGES, WIDTH = 5, 4
KEY = "1f" * 32


class Cancelled(Exception):
    pass


class LastState:
    """Keeps what a training that ends with an exception would leave on the disk."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.asked = 0

    def __call__(self, state, last: bool) -> None:
        self.asked += 1
        if last:
            self.data = to_bytes(Snapshot(state(), ["smiling"]), KEY)

    @property
    def state(self) -> LoopState:
        assert self.data is not None
        return from_bytes(self.data, KEY).state


class Broken(Toy):
    """A model that fails in one of its calls, as when memory is short."""

    def __init__(self, call: int, **options) -> None:
        super().__init__(**options)
        self.failing = call

    def __call__(self, keys, values, batch):
        if self.calls + 1 == self.failing:
            raise MemoryError
        return super().__call__(keys, values, batch)


def begin(kind: str):
    rows = torch.randn(STAGES, 1, WIDTH, generator=torch.Generator().manual_seed(4))
    return build_parametrisation(kind, {"l": rows}, {"l": rows.flip(0)}, 0, {"l": 0.5})


def same(one, other) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def cancel_at(step: int):
    def on_step(done) -> None:
        if done.number == step:
            raise Cancelled

    return on_step


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_it_ends_where_a_training_without_an_interruption_ends(kind):
    """Interrupted at every step, by a cancel after it or an error within the next one."""
    chosen = settings(steps=14, batch_size=2, seed=3)
    whole = begin(kind)
    history = optimise(whole, Toy(), chosen)
    for at in range(1, 14):
        for model, on_step in ((Toy(), cancel_at(at)), (Broken(at + 1), None)):
            kept = LastState()
            with pytest.raises((Cancelled, MemoryError)):
                optimise(begin(kind), model, chosen, on_step, keep=kept)
            again, toy = begin(kind), Toy()
            assert kept.state.fits(again) and len(kept.state.history) == at
            assert optimise(again, toy, chosen, begin=kept.state) == history
            assert toy.calls == 14 - at
            assert same(again, whole), (kind, at)


def test_it_may_be_interrupted_again_and_again():
    chosen = settings(steps=12)
    whole = begin("offsets")
    history = optimise(whole, Toy(), chosen)
    state = None
    for at in (2, 3, 7, 12):
        kept = LastState()
        with pytest.raises(Cancelled):
            optimise(begin("offsets"), Toy(), chosen, cancel_at(at), begin=state, keep=kept)
        state = kept.state
    again, toy = begin("offsets"), Toy()
    assert optimise(again, toy, chosen, begin=state) == history and toy.calls == 0
    assert same(again, whole)


def test_the_loss_scale_that_was_found_is_kept():
    """Half precision: gradients overflow above some scale."""
    chosen = settings(steps=6)
    whole = begin("direct")
    history = optimise(whole, Half(), chosen, loss_scale=2.0**50)
    kept = LastState()
    with pytest.raises(Cancelled):
        optimise(begin("direct"), Half(), chosen, cancel_at(3), 2.0**50, keep=kept)
    assert kept.state.loss_scale < 2.0**50
    again, model = begin("direct"), Half()
    assert optimise(again, model, chosen, None, 2.0**50, kept.state) == history
    assert model.calls == 3 and same(again, whole)


def test_states_are_offered_after_each_step_and_are_of_their_own():
    states = []
    parameters = begin("offsets")
    optimise(parameters, Toy(), settings(steps=4), keep=lambda state, last: states.append(state()))
    assert [len(state.history) for state in states] == [1, 2, 3, 4]
    first, last = (state.tensors["keys.common.l"] for state in (states[0], states[-1]))
    assert not torch.equal(first, last)
    assert torch.equal(last, parameters.get_parameter("keys.common.l"))


def test_nothing_is_kept_of_a_training_without_a_step():
    kept = LastState()
    with pytest.raises(MemoryError):
        optimise(begin("direct"), Broken(1), settings(), keep=kept)
    assert kept.asked == 0


# --- the file ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    kept = LastState()
    with pytest.raises(Cancelled):
        optimise(begin("offsets"), Toy(), settings(), cancel_at(4), keep=kept)
    return Snapshot(kept.state, ["smiling", 'quote " and \u0436'])


def test_a_file_holds_all_of_it(snapshot):
    read = from_bytes(to_bytes(snapshot, KEY), KEY)
    assert read.captions == snapshot.captions
    assert read.state.history == snapshot.state.history
    assert read.state.tensors.keys() == snapshot.state.tensors.keys()
    for name, value in read.state.tensors.items():
        assert torch.equal(value, snapshot.state.tensors[name])


def test_files_that_are_cut_or_of_another_training_are_refused(snapshot):
    whole = to_bytes(snapshot, KEY)
    for end in range(0, len(whole), max(1, len(whole) // 200)):
        with pytest.raises(ValueError):
            from_bytes(whole[:end], KEY)
    with pytest.raises(ValueError):
        from_bytes(whole, "0" * 64)


def changed(snapshot, change) -> bytes:
    """The file with something of its header or tensors changed."""
    data = to_bytes(snapshot, KEY)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["sefi_snapshot"])
    tensors = safetensors.torch.load(data)
    change(header, tensors)
    return safetensors.torch.save(tensors, {"sefi_snapshot": json.dumps(header)})


BAD = {
    "of another version": lambda header, _: header.update(version=99),
    "without captions": lambda header, _: header.pop("captions"),
    "with captions that are none": lambda header, _: header.update(captions=3),
    "with a scale that is none": lambda header, _: header.update(loss_scale=None),
    "without its losses": lambda _, tensors: tensors.pop("history"),
    "with too few losses": lambda _, tensors: tensors.update(history=torch.zeros(2, 3)),
    "with no step": lambda _, tensors: tensors.update(history=torch.zeros(0, 4)),
    "with a scalar": lambda _, tensors: tensors.update(history=torch.zeros(())),
    "with values that are no numbers": lambda _, tensors: [
        value.fill_(math.nan) for value in tensors.values()
    ],
}


@pytest.mark.parametrize("kind", BAD)
def test_files_with_something_else_in_them_are_refused(snapshot, kind):
    with pytest.raises(ValueError):
        from_bytes(changed(snapshot, BAD[kind]), KEY)
    from_bytes(changed(snapshot, lambda *_: None), KEY)


def test_a_state_fits_only_parameters_of_its_own_shapes(snapshot):
    state = snapshot.state
    assert state.fits(begin("offsets"))
    assert not any(state.fits(begin(kind)) for kind in PARAMETRISATIONS if kind != "offsets")
    wider = {"l": torch.zeros(STAGES, 1, WIDTH + 1)}
    assert not state.fits(build_parametrisation("offsets", wider, wider, 0))
    less = dict(list(state.tensors.items())[:-1])
    assert not state._replace(tensors=less).fits(begin("offsets"))


# --- digests ----------------------------------------------------------------------------------


VALUES = [
    None, True, 1, 1.0, "1", b"1", [], [1], [[1]], [1, 1], ["1", "2"], ["12"], ["1:2"], {}, {1: 2},
    {2: 1}, {"a": None}, {1}, {1, 2}, torch.float32, torch.float16, torch.device("cpu"),
    torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32),
    torch.tensor([0.0, -0.0]), torch.zeros(0), math.nan, math.inf,
]  # fmt: skip


def test_values_that_differ_in_kind_or_shape_or_content_have_other_digests():
    assert len({digest(value) for value in VALUES}) == len(VALUES)
    assert [digest(value) for value in VALUES] == [digest(value) for value in VALUES]
    assert digest({"b", "a", "c"}) == digest({"c", "b", "a"})
    assert digest((1, [2])) == digest([1, (2,)])


def test_what_is_not_plain_has_to_be_described():
    with pytest.raises(TypeError):
        digest([object()])
    one, other = object(), object()
    names = {one: "one", other: "other"}
    assert digest([one], names.get) == digest([one], names.get) != digest([other], names.get)
    assert digest([one], names.get) != digest(["one"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 1001), (2, 3, 64, 64)])
def test_every_value_of_a_weight_counts(dtype, shape):
    weight = (torch.arange(math.prod(shape)) % 251).to(dtype).reshape(shape)
    before = weights_digest(weight)
    assert weights_digest(weight.clone()) == before
    assert weights_digest(weight.reshape(-1)) != before or weight.ndim == 1
    padded = torch.cat([torch.zeros(1, dtype=dtype), weight.reshape(-1)])
    assert weights_digest(padded[1:].reshape(shape)) == before  # wherever in memory it begins
    flat = weight.reshape(-1)
    for place in range(0, len(flat), max(1, len(flat) // 40)):
        kept = flat[place].clone()
        flat[place] = kept + 1
        assert weights_digest(weight) != before
        flat[place] = kept
    assert weights_digest(weight) == before


def test_weights_count_as_they_are_laid_out():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert weights_digest(weight.T.contiguous()) == weights_digest(weight.T)
    assert weights_digest(weight.T) != weights_digest(weight)
    assert weights_digest(weight.flip(0)) != weights_digest(weight)
