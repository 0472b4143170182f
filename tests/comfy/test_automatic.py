"""Several people who share a picture: who is where is read in the first steps."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.sefi_core.comfyui.unet import automatic
from sefi_ide.sefi_core.comfyui.unet.conditioning import CONDITIONING_KEY, REGISTRY
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.tests.comfy import composition
from sefi_ide.tests.comfy.composition import (
    LATENT_CHANNELS,
    NEGATIVE,
    SCALE,
    SIDE,
    TEXT,
    TOLERANCE,
    VISIBLE,
    World,
    text_case,
    text_guidance,
)
from sefi_ide.tests.comfy.oracle import timestep_of
from sefi_ide.tests.comfy.random_checkpoint import of_families
from sefi_ide.tests.comfy.region_oracle import RegionOracle

import nodes

pytestmark = [pytest.mark.usefixtures("inference_mode"), of_families("sd1", "sdxl")]

TWO = "a photo of <anna> and <bob> at the sea"


def halves_of(size) -> torch.Tensor:
    """The left and the right half of a picture (height, width), (2, height, width)."""
    left = torch.zeros(1, *size)
    left[..., : size[1] // 2] = 1
    return torch.cat([left, 1 - left])


LEFT = halves_of((SIDE, SIDE))[:1]


class ReadingOracle(RegionOracle):
    """The masks hold below a noise level; before, all act everywhere."""

    below = float("inf")

    def attention(self, prompt, timestep, x):
        masks, first = self.masks, timestep >= timestep_of(self.below, self.sigmas)
        self.masks = {} if first else masks
        try:
            return super().attention(prompt, timestep, x)
        finally:
            self.masks = masks


def shared(setting, regions=("automatic", "automatic"), masks=None) -> SimpleNamespace:
    """The setting in which anna and bob share pictures."""
    model, clip = setting.plain.model, setting.plain.clip
    for one, chosen in zip((setting.anna, setting.bob), regions, strict=True):
        mask = (masks or {}).get(one.name)
        applied = SeFiApplyIdentity.execute(model, clip, one, region=mask, regions=chosen)
        model, clip = applied.result
    oracle = ReadingOracle(setting.plain.model)
    oracle.below = float(setting.plain.sigmas()[0])  # the first step reads
    world = World(model, clip, setting.applied.people)
    return SimpleNamespace(**{**vars(setting), "applied": world, "oracle": oracle})


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.std())


def noise(height=SIDE, width=SIDE, count=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, LATENT_CHANNELS, height, width, generator=generator)


def divide_in_halves(monkeypatch) -> list[torch.Tensor]:
    """Whatever is read, anna has the left half and bob the right one; what was read is kept."""
    read = []

    def divided(maps):
        read.append(maps)
        return halves_of(maps.shape[1:])

    monkeypatch.setattr(automatic, "divided", divided)
    return read


@pytest.fixture
def halves(monkeypatch):
    return divide_in_halves(monkeypatch)


# --- where nothing is shared --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regions", "text"),
    [
        (("off", "off"), TWO),
        (("automatic", "off"), TWO),
        (("automatic", "automatic"), TEXT),
        (("automatic", "automatic"), "a photo of <anna> beside <anna>"),
    ],
)
def test_with_fewer_than_two_the_same_bits(setting, regions, text):
    ours = shared(setting, regions)
    (payload,) = ours.applied.encode(text)[0][1][CONDITIONING_KEY]
    assert "automatic" not in payload
    assert not any("parts" in phase for phase in payload["phases"])
    drawn = text_case(text)(ours.applied, setting.noise)
    assert torch.equal(drawn, text_case(text)(setting.applied, setting.noise))


def test_with_a_region_of_ones_own_nothing_is_shared(setting):
    masks = {"anna": LEFT}
    drawn, expected = (
        text_case(TWO)(shared(setting, regions, masks).applied, setting.noise)
        for regions in (("automatic", "automatic"), ("off", "off"))
    )
    assert torch.equal(drawn, expected)


def test_another_choice_is_refused_in_a_sentence(setting):
    plain = setting.plain
    with pytest.raises(SeFiError, match="regions is 'left': choose one of off, automatic"):
        SeFiApplyIdentity.execute(plain.model, plain.clip, setting.anna, regions="left")


# --- exactly what masks would give, once it is known who is where -------------------------------


def check(setting, case=None, guidance=None, **settings):
    """As :func:`composition.check`; people everywhere are drawn otherwise, too."""
    case, guidance = case or text_case(TWO), guidance or text_guidance(setting, TWO)
    masks = halves_of(settings.get("noise", setting.noise).shape[2:])
    setting.oracle.masks = {"anna": masks[:1], "bob": masks[1:]}
    everywhere = case(shared(setting, ("off", "off")).applied, settings.get("noise", setting.noise))
    drawn = composition.check(setting, case, guidance, **settings)
    assert float((drawn - everywhere).abs().mean() / drawn.std()) > VISIBLE / 2


def test_after_the_first_step_each_has_their_part(setting, halves):
    check(shared(setting))
    assert len(halves) == 1 and halves[0].shape == (2, SIDE, SIDE)
    assert (halves[0] > 0).all()


def test_pictures_that_are_not_square(setting, halves):
    check(shared(setting), noise=noise(9, 12))


def test_each_picture_of_a_batch_is_divided_by_itself(setting, monkeypatch):
    """Who looks more at the left has it; alone they are drawn as in the batch."""

    def divided(maps):
        seen.append(maps)
        more = (maps[0] / maps[1]).unflatten(1, (2, SIDE // 2)).mean((0, 2))
        return halves_of((SIDE, SIDE)).roll(int(more[0] < more[1]), 0)

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(automatic, "divided", divided)
    ours = shared(setting)
    latents = noise(count=6)
    together = text_case(TWO)(ours.applied, latents)
    of_batch = list(seen)
    assert len(of_batch) == 6
    for number in range(6):
        alone = text_case(TWO)(ours.applied, latents[number : number + 1])
        assert difference(together[number : number + 1], alone) < TOLERANCE
        torch.testing.assert_close(seen[-1], of_batch[number])
    sides = {bool(divided(maps)[0, 0, 0]) for maps in of_batch}
    assert sides == {True, False}


def test_a_region_of_a_third_part_takes_its_share(setting, halves):
    """Somebody with a region acts there, whoever shares the rest of the prompt."""
    model, clip = shared(setting).applied.model, shared(setting).applied.clip
    third = composition.identity(setting.plain.clip, "carl", 2, seed=9)
    whole = SeFiApplyIdentity.execute(model, clip, third, region=1 - torch.zeros(1, 4, 4)).result
    nowhere = SeFiApplyIdentity.execute(model, clip, third, region=torch.zeros(1, 4, 4)).result
    plain = SeFiApplyIdentity.execute(model, clip, third).result
    text = f"{TWO}, and <carl>"

    def drawn(model_and_clip, text=text):
        return text_case(text)(World(*model_and_clip, setting.applied.people), setting.noise)

    assert difference(drawn(whole), drawn(plain)) < TOLERANCE
    class_word = drawn((model, clip), text.replace("<carl>", "person"))
    assert difference(drawn(nowhere), class_word) < TOLERANCE
    assert difference(drawn(whole), drawn(nowhere)) > VISIBLE


def test_without_guidance(setting, halves):
    """cfg 1: the positive alone is asked."""
    ours = shared(setting)

    def case(world, latents):
        return world.sample(world.encode(TWO), world.encode(NEGATIVE), latents, scale=1.0)

    def guidance(predict):
        return predict([composition.Region(ours.prompt(TWO))])

    check(ours, case, guidance)


def test_an_area_is_read_where_it_lies(setting, halves):
    ours = shared(setting)

    def case(world, latents):
        left, right = (
            nodes.ConditioningSetArea().append(world.encode(text), 64, 64, x, 0, 1.0)[0]
            for text, x in ((TWO, 0), ("<bob> in fog", 64))
        )
        return world.sample(left + right, world.encode(NEGATIVE), latents)

    case(ours.applied, noise(8, 16))
    (maps,) = halves
    assert (maps[..., :8] > 0).all() and not maps[..., 8:].any()


@pytest.mark.parametrize("order", [1, -1])
def test_tiles_of_another_pack_are_put_together(setting, halves, order):
    ours = shared(setting)

    def wrapper(apply_model, arguments):
        tiles = torch.cat(arguments["input"].chunk(2, dim=3))
        places = list(range(len(tiles)))[::order]
        given = {**arguments["c"], "c_crossattn": arguments["c"]["c_crossattn"].repeat(2, 1, 1)}
        given["c_crossattn"] = given["c_crossattn"][places]
        if "y" in given:
            given["y"] = given["y"].repeat(2, 1)[places]
        output = apply_model(tiles[places], arguments["timestep"].repeat(2), **given)[places]
        return torch.cat(output.chunk(2), dim=3)

    def case(world, latents):
        model = world.model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return text_case(TWO)(replace(world, model=model), latents)

    ours.oracle.tiles = 2
    check(ours, case, noise=noise(8, 16))
    assert (halves[0] > 0).all()


def test_saved_conditioning_still_shares(setting, halves):
    ours = shared(setting)

    def case(world, latents):
        file = io.BytesIO()
        torch.save(world.encode(TWO), file)
        REGISTRY.__init__(REGISTRY.unused_bytes)
        file.seek(0)
        positive = torch.load(file, weights_only=True)
        return world.sample(positive, world.encode(NEGATIVE), latents)

    check(ours, case)


# --- when it is read ----------------------------------------------------------------------------


def read_levels(monkeypatch, setting, sampler: str, steps: int, denoise=1.0, reading=0.1):
    """The noise levels at which a sampling reads, and those at which it asks the model."""
    monkeypatch.setattr("sefi_ide.sefi_core.comfyui.unet.run.READING", reading)
    levels, asked = [], []
    begin = automatic.Automatic.begin

    def noted(self, rows, places, sigma):
        reader = begin(self, rows, places, sigma)
        asked.append(sigma)
        if reader:
            levels.append(sigma)
        return reader

    monkeypatch.setattr(automatic.Automatic, "begin", noted)
    ours = shared(setting).applied
    nodes.common_ksampler(
        ours.model, 1, steps, SCALE, sampler, "normal", ours.encode(TWO), ours.encode(NEGATIVE),
        {"samples": 0.1 * noise()}, denoise=denoise,
    )  # fmt: skip
    return levels, asked


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2_ancestral", "dpmpp_2m_sde", "uni_pc"])
def test_it_goes_by_noise_levels_not_by_calls(setting, monkeypatch, halves, sampler):
    levels, asked = read_levels(monkeypatch, setting, sampler, 8, reading=0.4)
    until = setting.plain.model.get_model_object("model_sampling").percent_to_sigma(0.4)
    wanted = {sigma for sigma in asked if sigma >= until}
    assert set(levels) == wanted and len(levels) == len(wanted) >= 2
    assert len(asked) > len(wanted)
    assert len(halves) == 1


def test_a_sampling_that_begins_later_reads_at_once(setting, monkeypatch, halves):
    levels, asked = read_levels(monkeypatch, setting, "heun", 6, denoise=0.5)
    assert levels == [max(asked)] and len(halves) == 1


def test_nobody_reads_afterwards(setting, halves, monkeypatch):
    """Then each query asks once, as with given regions, and no maps are computed."""
    counts = []
    probabilities = automatic.attention_probabilities
    monkeypatch.setattr(
        automatic,
        "attention_probabilities",
        lambda q, *args: (counts.append(len(q)), probabilities(q, *args))[1],
    )
    ours = shared(setting)
    layers = len(automatic_layers(ours))
    text_case(TWO)(ours.applied, ours.noise)
    assert counts == [1] * layers  # one step, the row of the positive alone


def automatic_layers(ours):
    from sefi_ide.sefi_core.comfyui.base_model import representative_layers

    return representative_layers(ours.plain.model.model.diffusion_model)


# --- where it cannot be found out ---------------------------------------------------------------


def test_contexts_of_another_pack_are_not_read(setting, halves, caplog):
    """A patch that cuts contexts: all act everywhere, and the log says so once."""
    caplog.set_level("INFO")

    def cut(q, k, v, options):
        return q, k[:, : k.shape[1] // 2], v[:, : v.shape[1] // 2]

    def case(world, latents):
        model = world.model.clone()
        model.set_model_attn2_patch(cut)
        return text_case(TWO)(replace(world, model=model), latents)

    ours = shared(setting)
    drawn = case(ours.applied, noise(count=2))
    everywhere = case(shared(setting, ("off", "off")).applied, noise(count=2))
    assert difference(drawn, everywhere) < 1e-5
    assert not halves
    assert sum("cannot be read" in line for line in caplog.messages) == 1


def test_a_changed_tile_is_not_read(setting, halves, caplog):
    caplog.set_level("INFO")

    def wrapper(apply_model, arguments):
        larger = torch.nn.functional.pad(arguments["input"], (4, 4, 0, 0), mode="circular")
        return apply_model(larger, arguments["timestep"], **arguments["c"])[..., 4:-4]

    drawn, everywhere = (
        text_case(TWO)(replace(world, model=padded), setting.noise)
        for world in (shared(setting).applied, shared(setting, ("off", "off")).applied)
        for padded in (world.model.clone(),)
        if padded.set_model_unet_function_wrapper(wrapper) is None
    )
    assert difference(drawn, everywhere) < 1e-5
    assert not halves
    assert sum("regions cannot be found" in line for line in caplog.messages) == 1


def test_upstream_is_untouched(setting):
    before = text_case()(setting.plain, setting.noise)
    options = {**setting.plain.model.model_options["transformer_options"]}
    text_case(TWO)(shared(setting).applied, setting.noise)
    assert torch.equal(before, text_case()(setting.plain, setting.noise))
    assert setting.plain.model.model_options["transformer_options"] == options
