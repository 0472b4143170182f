"""SeFi Load and Apply Face Adapter, against an attention that is computed by hand."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import comfy.controlnet
import comfy.lora
import comfy.sd
import folder_paths
import pytest
import torch
from sefi_ide.nodes.apply_identity import SeFiApplyIdentity
from sefi_ide.nodes.face_adapter import SeFiApplyFaceAdapter, SeFiLoadFaceAdapter
from sefi_ide.sefi_core.comfyui.base_model import cross_attention_layers
from sefi_ide.sefi_core.comfyui.face_adapters import OpenedAdapter
from sefi_ide.sefi_core.comfyui.unet.adapter import BESIDE_KEY
from sefi_ide.sefi_core.errors import SeFiError
from sefi_ide.sefi_core.face2diffusion.files import read_face_encoder, write_face_encoder
from sefi_ide.sefi_core.face_adapter.files import (
    FACEID,
    INFINITE_ID,
    PLUS_V2,
    PORTRAIT,
    UNNORM,
    VARIANTS,
    Embedder,
    Layer,
    write_face_adapter,
)
from sefi_ide.sefi_core.faces.alignment import aligned
from sefi_ide.sefi_core.faces.yunet import YuNetDetector
from sefi_ide.tests.comfy.adapter_oracle import Adapted, AdapterOracle, attentions
from sefi_ide.tests.comfy.composition import (
    LATENT_CHANNELS,
    NEGATIVE,
    SCALE,
    SIDE,
    TEXT,
    TOLERANCE,
    VISIBLE,
    World,
)
from sefi_ide.tests.comfy.oracle import Region, cfg
from sefi_ide.tests.comfy.random_checkpoint import of_all_families, of_families
from sefi_ide.tests.comfy.vision import vision_model
from sefi_ide.tests.unit.face2diffusion_files import encoder_for
from sefi_ide.tests.unit.face_adapter_files import adapter_for
from sefi_ide.tests.unit.face_drawing import drawn
from sefi_ide.tests.unit.recognition_models import save_recogniser

import nodes

pytestmark = pytest.mark.usefixtures("inference_mode")

PLAIN = "a photo of a person, smiling"
PIXELS = 8 * SIDE
LEFT = torch.zeros(1, PIXELS, PIXELS)
LEFT[..., : PIXELS // 2] = 1
FEATHER = torch.linspace(1, 0, PIXELS).expand(1, PIXELS, PIXELS).clone()
STATES = 64
"""Of the random CLIP vision model."""


@pytest.fixture(scope="module")
def photos():
    """Three photos whose every place is another colour, and masks of a square in them."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(3, 40, 40, 3, generator=generator)
    masks = torch.zeros(3, 40, 40)
    masks[:, 4:36, 4:36] = 1
    return pictures, masks


@pytest.fixture
def embedder(encoder_folder):
    """A face recogniser of the pack's own in its folder, which looks at heads."""
    path = encoder_folder / "faces.safetensors"
    write_face_encoder(encoder_for("sd1", {"l": 8}, crop="head"), path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return Embedder("sefi", path.name, 10, False, sha)


@pytest.fixture(scope="module")
def vision():
    return vision_model()


@pytest.fixture
def made(setting, family, embedder):
    """Makes a random adapter for the setting's model."""

    def make(variant=FACEID, **settings):
        layers = cross_attention_layers(setting.plain.model.model.diffusion_model).values()
        order = attentions(setting.plain.model.model.diffusion_model)
        assert len(order) == len(layers)
        context = order[0].to_k.weight.shape[1]
        channels = [layer.to_k.weight.shape[0] for layer in order]
        adapter = adapter_for(
            variant, family, channels, context, settings.pop("embedder", embedder),
            states=STATES, **settings,
        )  # fmt: skip
        return OpenedAdapter(adapter, "made.safetensors")

    return make


def apply(model, opened, both, count=1, **settings):
    pictures, masks = both
    given = {
        "model": model,
        "face_adapter": opened,
        "photos": pictures[:count],
        "masks": masks[:count],
        **settings,
    }
    return SeFiApplyFaceAdapter.execute(**{key: [value] for key, value in given.items()}).result[0]


def features(opened, photos, folder):
    """What the recogniser says of photos, computed apart."""
    encoder = read_face_encoder(folder / "faces.safetensors").encoder
    pictures, _ = photos
    squares = pictures[:, 4:36, 4:36].movedim(-1, 1)
    seen = torch.nn.functional.interpolate(
        squares, (112, 112), mode="bicubic", antialias=True, align_corners=False
    )
    return encoder(seen.clamp(0, 1) * 2 - 1)


@pytest.fixture
def oracle(setting, photos, encoder_folder, embedder):
    """Makes the oracle's view of adapters: (opened, faces or None, settings) each."""

    def make(*given, negative=NEGATIVE):
        adapted = []
        for opened, faces, states, settings in given:
            adapter = opened.adapter
            rows = features(opened, photos, encoder_folder)
            faces = rows[:1] if faces is None else faces(rows)
            two = torch.stack([faces, torch.zeros_like(faces)])
            with torch.inference_mode(False), torch.no_grad():
                tokens = adapter.projection(two.clone(), None if states is None else states.clone())
            adapted.append(
                Adapted(
                    tokens[0],
                    tokens[1],
                    [(one.to_k, one.to_v) for one in adapter.layers],
                    **settings,
                )  # fmt: skip
            )
        plain = setting.plain.model
        return AdapterOracle(plain, adapted=adapted, negative=[setting.prompt(negative)])

    return make


def draw(model, world, noise, text=PLAIN, negative=NEGATIVE, scale=SCALE):
    world = replace(world, model=model)
    return world.sample(world.encode(text), world.encode(negative), noise, scale)


def guidance(setting, text=PLAIN, negative=NEGATIVE):
    return cfg([Region(setting.prompt(text))], [Region(setting.prompt(negative))], SCALE)


def close(one, other, tolerance=TOLERANCE):
    assert float((one - other).abs().max() / other.std()) < tolerance


def differs(one, other, least=VISIBLE):
    assert float((one - other).abs().mean() / other.std()) > least


def states_of(opened, vision, photos, detected=None):
    """What the random CLIP gives of no picture and of a face, computed apart."""
    mean = torch.tensor(vision.image_mean).expand(1, 224, 224, 3)
    faces = torch.cat([mean, detected])
    output = vision.encode_image(faces)
    last = opened.adapter.variant == INFINITE_ID
    states = output["last_hidden_state" if last else "penultimate_hidden_states"]
    return states[[1, 0]].float()


@of_all_families
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(setting, made, oracle, photos, vision, variant, encoder_folder):
    """Drawn as the oracle draws it, and not as without it."""
    opened = made(variant)
    extra, states = {}, None
    if opened.adapter.looks_at_pictures:  # which needs a face to align
        picture = torch.from_numpy(drawn(96))[None].float() / 255
        mask = torch.zeros(1, 96, 96)
        mask[:, 10:90, 10:90] = 1
        (face,) = YuNetDetector().detect(drawn(96))
        seen = torch.from_numpy(aligned(drawn(96), face.points, 224)).float()[None] / 255
        states = states_of(opened, vision, photos, seen)
        extra = {"clip_vision": vision, "photos": picture, "masks": mask}
        square = picture[:, 10:90, 10:90].movedim(-1, 1)
        encoder = read_face_encoder(encoder_folder / "faces.safetensors").encoder
        shown = torch.nn.functional.interpolate(
            square, (112, 112), mode="bicubic", antialias=True, align_corners=False
        )
        own = encoder(shown.clamp(0, 1) * 2 - 1)
    model = apply(setting.plain.model, opened, photos, **extra)
    knowing = oracle((opened, (lambda _: own) if states is not None else None, states, {}))
    expected = knowing.sample(setting.noise, setting.plain.sigmas(), guidance(setting))
    result = draw(model, setting.plain, setting.noise)
    close(result, expected)
    differs(result, draw(setting.plain.model, setting.plain, setting.noise))


@of_all_families
def test_each_weight_lands_on_its_block(setting, made, oracle, photos):
    """Adapters that act in one layer each, the middle's too."""
    whole = made().adapter
    plain = draw(setting.plain.model, setting.plain, setting.noise)
    drawn_by = []
    for number in range(len(whole.layers)):
        layers = [
            layer if n == number else Layer(*(torch.zeros_like(one) for one in layer))
            for n, layer in enumerate(whole.layers)
        ]
        opened = OpenedAdapter(replace(whole, layers=layers), "one.safetensors")
        model = apply(setting.plain.model, opened, photos)
        result = draw(model, setting.plain, setting.noise)
        expected = oracle((opened, None, None, {})).sample(
            setting.noise, setting.plain.sigmas(), guidance(setting)
        )
        close(result, expected)
        differs(result, plain, 1e-5)
        drawn_by.append(result)
    assert len(drawn_by) == len(whole.layers) >= 5


@of_all_families
@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.4},
        {"strength": -1.0},
        {"text": False},
        {"start_percent": 0.3},
        {"end_percent": 0.5},
        {"region": FEATHER},
        {"region": LEFT[:, :, :50]},
        {"region": LEFT, "text": False, "strength": 0.7},
    ],
    ids=str,
)
def test_settings(setting, made, oracle, photos, settings):
    opened = made()
    model = apply(setting.plain.model, opened, photos, **settings)
    told = {key.removesuffix("_percent"): value for key, value in settings.items()}
    expected = oracle((opened, None, None, told)).sample(
        setting.noise, setting.plain.sigmas(), guidance(setting)
    )
    result = draw(model, setting.plain, setting.noise)
    close(result, expected)
    differs(result, draw(setting.plain.model, setting.plain, setting.noise))
    always = draw(apply(setting.plain.model, opened, photos), setting.plain, setting.noise)
    differs(result, always, VISIBLE / 10)


@of_families("sd1", "sdxl")
def test_nothing_is_drawn_bit_by_bit_at_strength_0_and_outside_the_range(setting, made, photos):
    opened = made(rank=2)
    plain = draw(setting.plain.model, setting.plain, setting.noise)
    off = apply(setting.plain.model, opened, photos, strength=0.0)
    assert torch.equal(draw(off, setting.plain, setting.noise), plain)
    assert not off.patches and BESIDE_KEY not in off.model_options["transformer_options"]
    between = apply(setting.plain.model, made(), photos, start_percent=0.1, end_percent=0.3)
    assert torch.equal(draw(between, setting.plain, setting.noise), plain)  # no step is in it


@of_families("sd1")
@pytest.mark.parametrize(
    ("variant", "weights", "mean"),
    [
        (FACEID, "", lambda rows: rows.mean(0, keepdim=True)),
        (FACEID, "1, 0, 3", lambda rows: (rows[:1] + 3 * rows[2:]) / 4),
        (PORTRAIT, "", lambda rows: rows),
        (PORTRAIT, "1 1 2", lambda rows: (rows[:1] + rows[1:2] + 2 * rows[2:]) / 4),
        (UNNORM, "", lambda rows: rows),
    ],
)
def test_several_photos(setting, made, oracle, photos, variant, weights, mean):
    opened = made(variant)
    model = apply(setting.plain.model, opened, photos, 3, weights=weights)
    expected = oracle((opened, mean, None, {})).sample(
        setting.noise, setting.plain.sigmas(), guidance(setting)
    )
    close(draw(model, setting.plain, setting.noise), expected)


@of_families("sd1", "sdxl")
@pytest.mark.parametrize("order", ["identity first", "adapter first"])
@pytest.mark.parametrize("where", ["everywhere", "regions"])
def test_with_an_identity(setting, made, oracle, photos, order, where):
    """Each in its half, and both everywhere."""
    opened = made()
    regions = where == "regions"
    anna, other = (LEFT, 1 - LEFT) if regions else (None, None)

    def identity(model):
        return SeFiApplyIdentity.execute(
            model, setting.plain.clip, setting.anna, region=anna
        ).result

    def adapter(model):
        return apply(model, opened, photos, region=other)

    if order == "identity first":
        model, clip = identity(setting.plain.model)
        model = adapter(model)
    else:
        model, clip = identity(adapter(setting.plain.model))
    world = World(model, clip, setting.applied.people)
    knowing = oracle((opened, None, None, {"region": other}))
    knowing.masks = {"anna": anna} if regions else {}
    expected = knowing.sample(setting.noise, setting.plain.sigmas(), guidance(setting, TEXT))
    result = draw(model, world, setting.noise, TEXT)
    close(result, expected)
    for without in (setting.plain.model, identity(setting.plain.model)[0]):
        differs(result, draw(without, replace(world, clip=clip), setting.noise, TEXT))


@of_families("sd1", "sdxl")
def test_two_adapters_in_two_regions(setting, made, oracle, photos):
    opened, second = made(), made(seed=9)
    model = apply(setting.plain.model, opened, photos, region=LEFT)
    model = apply(model, second, photos, region=1 - LEFT, strength=0.5)
    expected = oracle(
        (opened, None, None, {"region": LEFT}),
        (second, None, None, {"region": 1 - LEFT, "strength": 0.5}),
    ).sample(setting.noise, setting.plain.sigmas(), guidance(setting))
    close(draw(model, setting.plain, setting.noise), expected)


@of_families("sd1", "sdxl")
def test_batches_and_areas(setting, made, oracle, photos):
    """Masks of a batch go round; areas see a crop of their picture's."""
    generator = torch.Generator().manual_seed(7)
    masks = torch.rand(2, 16, 16, generator=generator)
    noise = torch.randn(3, LATENT_CHANNELS, 8, 16, generator=generator)
    opened = made()
    model = apply(setting.plain.model, opened, photos, region=masks)
    knowing = oracle((opened, None, None, {"region": masks}))
    close(
        draw(model, setting.plain, noise),
        knowing.sample(noise, setting.plain.sigmas(), guidance(setting)),
    )

    world = replace(setting.plain, model=model)
    texts = PLAIN, "a wall in fog"
    areas = [
        nodes.ConditioningSetArea().append(world.encode(text), 64, 64, x, 0, 1.0)[0]
        for text, x in zip(texts, (0, 64), strict=True)
    ]
    result = world.sample(areas[0] + areas[1], world.encode(NEGATIVE), noise)
    cells = [(8, 8, 0, 0), (8, 8, 0, 8)]
    negative = setting.prompt(NEGATIVE)
    positive = [Region(setting.prompt(t), c) for t, c in zip(texts, cells, strict=True)]
    negatives = [Region(negative), *(Region(negative, cell) for cell in cells)]
    close(result, knowing.sample(noise, world.sigmas(), cfg(positive, negatives, SCALE)))


@of_families("sd1")
@pytest.mark.parametrize("order", [1, -1])
def test_tiles_of_another_pack(setting, made, oracle, photos, order):
    """It stacks tiles and gives their rows another order."""
    opened = made()
    model = apply(setting.plain.model, opened, photos, region=FEATHER)

    def wrapper(apply_model, arguments):
        tiles = torch.cat(arguments["input"].chunk(2, dim=3))
        places = list(range(len(tiles)))[::order]
        given = {**arguments["c"], "c_crossattn": arguments["c"]["c_crossattn"].repeat(2, 1, 1)}
        given["c_crossattn"] = given["c_crossattn"][places]
        output = apply_model(tiles[places], arguments["timestep"].repeat(2), **given)[places]
        return torch.cat(output.chunk(2), dim=3)

    model.set_model_unet_function_wrapper(wrapper)
    noise = torch.randn(1, LATENT_CHANNELS, 8, 16, generator=torch.Generator().manual_seed(4))
    knowing = oracle((opened, None, None, {"region": FEATHER}))
    knowing.tiles = 2
    close(
        draw(model, setting.plain, noise),
        knowing.sample(noise, setting.plain.sigmas(), guidance(setting)),
    )


@of_families("sd1", "sdxl")
def test_cfg_1_and_guiders(setting, made, oracle, photos):
    opened = made()
    model = apply(setting.plain.model, opened, photos)
    knowing = oracle((opened, None, None, {}))
    alone = knowing.sample(
        setting.noise,
        setting.plain.sigmas(),
        lambda predict: predict([Region(setting.prompt(PLAIN))]),
    )
    close(draw(model, setting.plain, setting.noise, scale=1.0), alone)

    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    world = replace(setting.plain, model=model)
    guider = DualCFGGuider.execute(
        model, world.encode(PLAIN), world.encode("a wall"), world.encode(NEGATIVE), SCALE, 2.0,
        "regular",
    ).result[0]  # fmt: skip

    def dual(predict):
        one, other, negative = (
            predict([Region(setting.prompt(text))]) for text in (PLAIN, "a wall", NEGATIVE)
        )
        return negative + 2.0 * (other - negative) + SCALE * (one - other)

    expected = knowing.sample(setting.noise, setting.plain.sigmas(), dual)
    close(world.guide(guider, setting.noise), expected)


@of_families("sd1")
def test_controlnet_sees_the_text_alone(setting, made, oracle, photos, family):
    from sefi_ide.tests.comfy.test_composition_models import controlnet as fixture

    network = fixture.__wrapped__(family)
    picture = torch.rand(1, PIXELS, PIXELS, 3, generator=torch.Generator().manual_seed(13))
    opened = made()
    model = apply(setting.plain.model, opened, photos)
    world = replace(setting.plain, model=model)
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        world.encode(PLAIN), world.encode(NEGATIVE), network, picture, 0.8, 0.0, 1.0
    )
    result = world.sample(positive, negative, setting.noise)
    control = network.copy().set_cond_hint(picture.movedim(-1, 1), 0.8)
    plain = setting.plain.model.model
    control.pre_run(plain, plain.model_sampling.percent_to_sigma)
    both = cfg(
        [Region(setting.prompt(PLAIN), control=control)],
        [Region(setting.prompt(NEGATIVE), control=control)],
        SCALE,
    )
    knowing = oracle((opened, None, None, {}))
    close(result, knowing.sample(setting.noise, setting.plain.sigmas(), both))
    differs(result, draw(model, setting.plain, setting.noise))


@of_families("sd1")
def test_with_patches_of_other_packs(setting, made, photos):
    """A replacement stays in force; region contexts of attention couple add the face once."""
    from sefi_ide.sefi_core.comfyui.unet.capture import plain_attention
    from sefi_ide.tests.comfy.test_textual_inversion import Couple

    opened = made()
    model = apply(setting.plain.model, opened, photos, region=FEATHER)
    alone = draw(model, setting.plain, setting.noise)
    calls = []

    def replacement(q, k, v, options):
        calls.append(len(q))
        return plain_attention(q, k, v, options)

    patched = model.clone()
    for block in cross_attention_layers(model.model.diffusion_model):
        patched.set_model_attn2_replace(replacement, *block)
    close(draw(patched, setting.plain, setting.noise), alone)
    assert calls and set(calls) == {2}

    context = setting.plain.encode(PLAIN)[0][0]
    couple = Couple(lambda _: [(context, context)] * 2)
    close(draw(couple.patched(model), setting.plain, setting.noise), alone)
    couple = Couple(lambda _: [(context, context)] * 2)
    before = apply(couple.patched(setting.plain.model), opened, photos, region=FEATHER)
    close(draw(before, setting.plain, setting.noise), alone)


@of_families("sd1", "sdxl")
def test_upstream_is_untouched_and_runs_are_equal(setting, made, photos):
    plain = draw(setting.plain.model, setting.plain, setting.noise)
    options = {**setting.plain.model.model_options["transformer_options"]}
    model = apply(setting.plain.model, made(rank=2), photos, region=FEATHER)
    kept = {**model.model_options["transformer_options"]}
    first = draw(model, setting.plain, setting.noise)
    assert torch.equal(draw(setting.plain.model, setting.plain, setting.noise), plain)
    assert torch.equal(draw(model, setting.plain, setting.noise), first)
    assert setting.plain.model.model_options["transformer_options"] == options
    assert model.model_options["transformer_options"] == kept
    assert not setting.plain.model.patches


def merged(checkpoint, opened):
    """A fresh model with the LoRA added to its weights."""
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(checkpoint, embedding_directory=None)
    unet = model.model.diffusion_model
    unet.to(torch.float64).dtype = torch.float64
    cross = attentions(unet)
    names = {module: name for name, module in unet.named_modules()}
    for (number, place), (down, up) in opened.adapter.lora.items():
        block = names[cross[number]].removesuffix("attn2")
        layer = unet.get_submodule(block + place)
        layer = layer[0] if place.endswith("to_out") else layer
        layer.weight += (up.double() @ down.double()).to(layer.weight)
    return model


@of_all_families
def test_the_lora_inside_is_loaded_once(setting, mini_checkpoint, made, oracle, photos, caplog):
    caplog.set_level("INFO", logger="sefi_ide.sefi_core.comfyui.face_adapters")
    opened = made(rank=2)
    bare = OpenedAdapter(replace(opened.adapter, lora={}), opened.name)
    dense = merged(mini_checkpoint, opened)
    expected = draw(apply(dense, bare, photos, region=LEFT), setting.plain, setting.noise)
    once = apply(setting.plain.model, opened, photos, region=LEFT)
    close(draw(once, setting.plain, setting.noise), expected)
    without = apply(setting.plain.model, opened, photos, region=LEFT, lora_strength=0.0)
    assert not without.patches
    differs(draw(without, setting.plain, setting.noise), expected, VISIBLE / 10)
    assert not any("has the LoRA" in line for line in caplog.messages)

    twice = apply(once, opened, photos, region=1 - LEFT)
    assert {len(patches) for patches in twice.patches.values()} == {1}
    assert sum("has the LoRA of made.safetensors" in line for line in caplog.messages) == 1
    both = draw(twice, setting.plain, setting.noise)
    everywhere = draw(apply(dense, bare, photos), setting.plain, setting.noise)
    close(both, everywhere)

    # The separate file, as Load LoRA loads it.
    keys = comfy.lora.model_lora_keys_unet(setting.plain.model.model, {})
    named = {}
    for name, key in keys.items():
        if name.startswith("diffusion_model."):
            named.setdefault(key, name)
    paths = {module: path for path, module in setting.plain.model.model.named_modules()}
    order = attentions(setting.plain.model.model.diffusion_model)
    file = {}
    for (number, place), (down, up) in opened.adapter.lora.items():
        block = paths[order[number]].removesuffix("attn2")
        key = f"{block}{place}.0.weight" if place.endswith("out") else f"{block}{place}.weight"
        file[f"{named[key]}.lora_down.weight"] = down.half()
        file[f"{named[key]}.lora_up.weight"] = up.half()
    loaded = comfy.sd.load_lora_for_models(setting.plain.model, None, file, 1.0, 0)[0]
    again = apply(loaded, opened, photos, region=LEFT)
    assert {len(patches) for patches in again.patches.values()} == {1}
    close(draw(again, setting.plain, setting.noise), expected, 1e-3)


@of_families("sd1")
def test_insightfaces_recogniser(setting, made, tmp_path, monkeypatch):
    """The very file that the adapter names, on an aligned face, of length 1 or as it is."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    picture = drawn(96)
    (face,) = YuNetDetector().detect(picture)
    seen = (aligned(picture, face.points).astype(float) - 127.5) / 127.5
    image = torch.from_numpy(picture)[None].float() / 255
    seen_mean = torch.from_numpy(seen.mean((0, 1))).float()
    pack = tmp_path / "insightface" / "models" / "buffalo_l"
    save_recogniser(pack / "w600k_mbf.onnx")
    for unit in (True, False):
        opened = made(embedder=Embedder("insightface", "w600k_r50.onnx", 3, unit))
        given = {"model": [setting.plain.model], "face_adapter": [opened], "photos": [image]}
        if not (pack / "w600k_r50.onnx").exists():
            with pytest.raises(SeFiError, match="sees faces with w600k_r50.onnx, which was not"):
                SeFiApplyFaceAdapter.execute(**given)
            save_recogniser(pack / "w600k_r50.onnx")
        model, faces = SeFiApplyFaceAdapter.execute(**given).result
        assert faces.shape == (1, 112, 112, 3)
        wanted = seen_mean / seen_mean.norm() if unit else seen_mean
        tokens = opened.adapter.tokens(wanted.view(1, 1, 3), None)[0]
        (beside,) = model.model_options["transformer_options"][BESIDE_KEY]
        layers = list(beside.layers.values())
        torch.testing.assert_close(
            layers[0][0][0], tokens @ opened.adapter.layers[0].to_k.T, atol=1e-3, rtol=1e-3
        )
    short = made(embedder=Embedder("insightface", "w600k_r50.onnx", 4))
    with pytest.raises(SeFiError, match="gives 3 numbers and this adapter takes 4: put the model"):
        SeFiApplyFaceAdapter.execute([setting.plain.model], [short], [image])


@of_families("sd1")
def test_what_does_not_fit_is_one_sentence(setting, made, photos, vision, embedder, encoder_folder):
    good = made()
    adapter = good.adapter
    blank = torch.zeros(1, 64, 64, 3)

    def named(**changes):
        return OpenedAdapter(replace(adapter, **changes), "x.safetensors")

    for opened, settings, said in (
        (named(family="sdxl"), {}, "is a face adapter for SDXL and model is SD 1.x: load"),
        (named(layers=adapter.layers[:-1]), {}, "layers of other sizes than the 7 of model"),
        (named(layers=adapter.layers[::-1]), {}, "layers of other sizes"),
        (good, {"weights": "1, 2"}, "weights has more than 1 entries for 1 photos"),
        (good, {"strength": float("nan")}, "strength is not a number"),
        (good, {"start_percent": 0.5, "end_percent": 0.5}, "the range is empty"),
        (good, {"text": "no"}, "text is 'no': set it to true or false"),
        (good, {"region": torch.full((1, 2, 2), float("nan"))}, "region holds values"),
        (made(PLUS_V2), {}, r"clip_vision is empty and this adapter \(plus v2\) looks at"),
        (named(embedder=replace(embedder, file="no.safetensors")), {}, "encoder no.safetensors"),
        (named(embedder=replace(embedder, sha256="0" * 64)), {}, "is another file than the one"),
        (named(embedder=replace(embedder, width=9)), {}, "gives 10 numbers and this adapter takes"),
        (good, {"photos": blank, "masks": None, "detector": "yunet"}, "no face was found in photo"),
    ):
        with pytest.raises(SeFiError, match=said) as caught:
            apply(setting.plain.model, opened, photos, **settings)
        assert str(caught.value).startswith("SeFi Apply Face Adapter: ")
        assert "\n" not in str(caught.value)
    six = photos[0].repeat(2, 1, 1, 1), photos[1].repeat(2, 1, 1)
    with pytest.raises(SeFiError, match="there are 6 photos, and this adapter sees 5"):
        apply(setting.plain.model, made(PORTRAIT), six, 6)
    picture = torch.from_numpy(drawn(96))[None].float() / 255
    with pytest.raises(SeFiError, match="clip_vision gives 128 numbers and this adapter takes 64"):
        apply(
            setting.plain.model, made(INFINITE_ID), photos, photos=picture, masks=None,
            clip_vision=vision_model(hidden_size=128),
        )  # fmt: skip


@of_families("sd1")
def test_files_of_both_folders(setting, made, photos, tmp_path, monkeypatch):
    ours, others = tmp_path / "face_adapters", tmp_path / "ipadapter"
    ours.mkdir(), others.mkdir()
    names = folder_paths.folder_names_and_paths
    monkeypatch.setitem(names, "face_adapters", ([str(ours)], {".safetensors", ".bin"}))
    monkeypatch.setitem(names, "ipadapter", ([str(others)], {".safetensors", ".bin"}))
    with pytest.raises(SeFiError, match="there is no face adapter in .*: put a FaceID file"):
        SeFiLoadFaceAdapter.execute("")
    write_face_adapter(made().adapter, ours / "one.safetensors")
    write_face_adapter(made(seed=8).adapter, others / "two.safetensors")
    schema = SeFiLoadFaceAdapter.GET_SCHEMA()
    assert schema.inputs[0].options == ["one.safetensors", "two.safetensors"]
    (opened,) = SeFiLoadFaceAdapter.execute("two.safetensors").result
    assert opened.name == "two.safetensors"
    model = apply(setting.plain.model, opened, photos)
    differs(
        draw(model, setting.plain, setting.noise),
        draw(setting.plain.model, setting.plain, setting.noise),
    )
    assert SeFiLoadFaceAdapter.validate_inputs("two.safetensors") is True
    assert "is not in" in str(SeFiLoadFaceAdapter.validate_inputs("three.bin"))
    before = SeFiLoadFaceAdapter.fingerprint_inputs("two.safetensors")
    write_face_adapter(made(seed=9).adapter, others / "two.safetensors")
    assert SeFiLoadFaceAdapter.fingerprint_inputs("two.safetensors") != before
    with pytest.raises(SeFiError, match="^SeFi Load Face Adapter: variant is 'x'"):
        SeFiLoadFaceAdapter.execute("two.safetensors", "x")
