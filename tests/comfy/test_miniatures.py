"""The miniatures are ComfyUI's own families, and training tells them what ComfyUI tells them."""

import comfy.clip_model
import folder_paths
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from comfy import model_base, sdxl_clip
from sefi_ide.tests.comfy import random_checkpoint
from sefi_ide.tests.comfy.random_checkpoint import of_families
from sefi_ide.tests.mini_sd import (
    architecture,
    checkpoints,
    dataset,
    framing,
    text_encoder,
    unet,
    warm_start,
)
from sefi_ide.tests.mini_sd.framing import SIDE, Framing
from sefi_ide.tests.mini_sd.runtime import MiniSDRuntime
from sefi_ide.tests.mini_sd.text_encoder import Words
from sefi_ide.tests.mini_sd.unet import UNetTask, size_conditioning

import nodes

CAPTION = "a photo of a person smiling holding a cup in the forest"
MEGABYTE = 10**6

of_both = of_families(*architecture.FAMILIES)
of_sdxl = of_families("sdxl")


@pytest.fixture
def mini(mini_checkpoint, family):
    return MiniSDRuntime(family, mini_checkpoint)


@of_both
def test_the_stock_loader_knows_a_checkpoint_by_its_shapes(mini_checkpoint, family, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda *_: mini_checkpoint)
    model, clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint("any")
    sizes = architecture.FAMILIES[family]
    expected = {"sd1": model_base.BaseModel, "sdxl": model_base.SDXL}[family]
    assert type(model.model) is expected and model.model.model_type is model_base.ModelType.EPS
    assert type(model.model.model_config) is sizes.model
    assert model.model.latent_format.scale_factor == {"sd1": 0.18215, "sdxl": 0.13025}[family]
    (context, extra), *_ = clip.encode_from_tokens_scheduled(clip.tokenize(CAPTION))
    assert context.shape == (1, 77, sizes.context_dim)
    if sizes.pooled_dim:
        assert isinstance(clip.cond_stage_model, sdxl_clip.SDXLClipModel)
        assert extra["pooled_output"].shape == (1, sizes.pooled_dim)
        own = [getattr(clip.cond_stage_model, f"clip_{name}") for name in ("l", "g")]
        widths = [part.transformer.get_input_embeddings().weight.shape[1] for part in own]
        assert widths == [32, 64]


def test_transformers_of_sdxl_are_deeper_where_it_is_coarser():
    network = architecture.SDXL.build_modules()["unet"]
    depths = [
        len(layer.transformer_blocks)
        for block in network.input_blocks
        for layer in block
        if hasattr(layer, "transformer_blocks")
    ]
    assert depths == [1, 2]


@pytest.mark.parametrize(("family", "largest"), [("sd1", 42), ("sdxl", 30)])
def test_checkpoints_are_small(family, largest):
    sizes = architecture.FAMILIES[family]
    state = sizes.checkpoint(sizes.build_modules(), torch.float16)
    assert sum(value.nbytes for value in state.values()) < largest * MEGABYTE


@of_both
def test_a_checkpoint_holds_all_of_a_miniature(mini_checkpoint, family):
    sizes = architecture.FAMILIES[family]
    saved, loaded = random_checkpoint.build_modules(sizes), sizes.build_modules()
    state = safetensors.torch.load_file(mini_checkpoint)
    sizes.load(loaded, state)
    for name, module in loaded.items():
        for key, value in module.state_dict().items():
            unused = key == "text_projection.weight" and not sizes.encoders[name].projected
            assert unused or torch.equal(value, saved[name].state_dict()[key]), (name, key)
    for prefix in ("model.diffusion_model.", "cond_stage_model.", "conditioner.", "first_stage_"):
        keys = [key for key in state if key.startswith(prefix)]
        if keys:
            with pytest.raises(ValueError, match=sizes.name):
                sizes.load(loaded, {k: v for k, v in state.items() if k != keys[-1]})


@of_both
def test_training_sees_the_text_states_of_comfyui(mini, family):
    sizes = architecture.FAMILIES[family]
    words = Words(sizes, random_checkpoint.build_modules(sizes)).eval()
    captions = dataset.encode_captions([CAPTION], [["person"]])
    nobody = torch.zeros(1, 2, dataset.world.IDENTITY_DIM), torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        context, pooled = words(captions.ids, *nobody)
    (expected, extra), *_ = mini.encode(CAPTION)
    assert torch.allclose(context, expected, atol=2e-2)
    assert torch.allclose(mini.conditions_of_ids(captions.ids)["context"], expected, atol=2e-2)
    assert (pooled is not None) == bool(sizes.pooled_dim)
    if pooled is not None:
        assert torch.allclose(pooled, extra["pooled_output"], atol=2e-2)


@of_both
def test_a_step_reaches_all_that_it_trains(family, monkeypatch):
    """Text first, then the U-Net on what the text says; nothing is left without a gradient."""
    monkeypatch.setattr(comfy.clip_model.CLIPLayer, "forward", text_encoder.layer_forward)
    torch.manual_seed(0)
    sizes = architecture.FAMILIES[family]
    modules = sizes.build_modules()
    encoders = {name: modules[name].requires_grad_(True) for name in sizes.encoders}
    words, data = Words(sizes, encoders), dataset.make_dataset(24, seed=5)
    for encoder in words.values():
        loss = text_encoder.text_step(encoder, data, torch.arange(len(data)), 40)
        loss.backward()
    for name, encoder in words.items():
        left = [k for k, v in encoder.transformer.named_parameters() if v.grad is None]
        assert left == ([] if sizes.encoders[name].projected else ["text_projection.weight"])
    latents = torch.randn(len(data), architecture.LATENT_CHANNELS, 16, 16)
    shown = framing.random_framing(len(data), torch.Generator().manual_seed(1)).sizes
    task = UNetTask(
        modules["unet"], words.requires_grad_(False), data, latents, shown, torch.device("cpu"), 2
    )
    loss = task.step(8)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(value.grad is not None for value in modules["unet"].parameters())


@pytest.mark.parametrize(("part", "alone"), [(0.0, 0.0), (0.0, 1.0), (0.5, 0.0), (1.0, 0.0)])
def test_what_is_left_out_is_the_empty_captions(part, alone, monkeypatch):
    monkeypatch.setattr(unet, "PART_DROPOUT", part)
    monkeypatch.setattr(unet, "POOLED_ALONE", alone)
    data = dataset.make_dataset(64, seed=5, cast=dataset.Cast(slot=0.0))
    modules = random_checkpoint.build_modules(architecture.SDXL)
    words = Words(architecture.SDXL, modules).eval()
    task = UNetTask(modules["unet"], words, data, None, None, torch.device("cpu"), 2)
    with torch.no_grad():
        told = words(data.ids, data.looks, data.kinds)
        nothing = words(task.empty, data.looks[:1], data.kinds[:1])
        context, pooled, silent = task._leave_out(*told)
    parts = [(context[..., :32], 0, slice(32)), (context[..., 32:], 0, slice(32, None))]
    parts.append((pooled, 1, slice(None)))
    left = []
    for found, which, columns in parts:
        whole, empty = told[which][..., columns], nothing[which][..., columns].expand_as(found)
        left.append(_rows_equal(found, empty))
        assert (left[-1] ^ _rows_equal(found, whole)).all()
    assert torch.equal(silent, left[0] & left[1])
    for rows, share in zip(left, (max(part, alone), max(part, alone), part), strict=True):
        assert rows.float().mean().item() == pytest.approx(share, abs=0.25 if 0 < share < 1 else 0)


def _rows_equal(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one == other).flatten(1).all(dim=1)


@of_sdxl
def test_training_sees_the_size_conditioning_of_comfyui(mini):
    pooled, sizes = torch.randn(1, 64), torch.tensor([[96.0, 112.0, 16.0, 8.0, 128.0, 144.0]])
    names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
    told = dict(zip(names, sizes[0].tolist(), strict=True))
    expected = mini.model.model.encode_adm(pooled_output=pooled, device="cpu", **told)
    assert torch.allclose(size_conditioning(pooled, sizes), expected, atol=1e-5)


@of_sdxl
@pytest.mark.parametrize(
    "changed", range(6), ids="height width top left to_height to_width".split()
)
def test_every_size_changes_the_prediction(mini, changed):
    sizes = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])
    other = sizes.clone()
    other[0, changed] += 32
    assert not torch.allclose(*(_predicted(mini, torch.zeros(1, 64), s) for s in (sizes, other)))


@of_sdxl
def test_the_pooled_output_changes_the_prediction(mini):
    sizes = torch.full((1, 6), 128.0)
    none, some = torch.zeros(1, 64), torch.ones(1, 64)
    assert not torch.allclose(_predicted(mini, none, sizes), _predicted(mini, some, sizes))


@torch.no_grad()
def _predicted(mini, pooled, sizes):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, architecture.LATENT_CHANNELS, 16, 16, generator=generator)
    context = torch.randn(1, 77, mini.family.context_dim, generator=generator)
    y = size_conditioning(pooled, sizes)
    return mini.unet(noisy, torch.tensor([500.0]), context=context, y=y)


def _picture() -> torch.Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def _framing(original: int = SIDE, zoom: float = 1.0, corner: tuple[int, int] = (0, 0)) -> Framing:
    return Framing(torch.tensor([original]), torch.tensor([zoom]), torch.tensor([corner]))


@pytest.mark.parametrize("corner", [(0, 0), (0, SIDE), (SIDE, 0), (64, 32)])
def test_a_cut_shows_what_its_corner_says(corner):
    picture, cut = _picture(), _framing(zoom=2.0, corner=corner)
    doubled = F.interpolate(picture, scale_factor=2, mode="bilinear")
    top, left = corner
    expected = doubled[..., top : top + SIDE, left : left + SIDE]
    assert torch.allclose(cut.show(picture), expected, atol=1e-5)
    assert cut.sizes.tolist() == [[SIDE, SIDE, *corner, SIDE, SIDE]]


def test_the_smaller_the_original_the_less_detail():
    def detail(side):
        return _framing(original=side).show(_picture()).diff(dim=-1).abs().mean().item()

    details = [detail(side) for side in (*framing.SMALL_SIDES, SIDE)]
    assert details == sorted(details) and details[-1] > 2 * details[0]
    assert torch.equal(_framing(original=512).show(_picture()), _picture())


def test_framings_have_the_shares_that_they_name():
    drawn = framing.random_framing(20_000, torch.Generator().manual_seed(0))
    small, cut = drawn.originals < SIDE, drawn.zooms > 1
    assert small.float().mean().item() == pytest.approx(framing.SMALL, abs=0.02)
    assert cut.float().mean().item() == pytest.approx(framing.CUT, abs=0.02)
    assert not (small & cut).any() and drawn.originals.max() <= framing.LARGEST
    assert not drawn.corners[~cut].any()
    assert (drawn.corners <= (SIDE * (drawn.zooms - 1)).round()[:, None]).all()


def test_a_unet_that_starts_from_itself_is_itself():
    donor, started = (architecture.SDXL.build_modules()["unet"] for _ in range(2))
    share = warm_start.start_from(started, donor, torch.eye(architecture.SDXL.context_dim))
    assert share == 1.0
    for name, value in started.state_dict().items():
        assert torch.equal(value, donor.state_dict()[name]), name


def test_the_map_of_text_states_finds_the_old_from_the_new():
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(4000, 96, generator=generator)
    true = torch.randn(128, 96, generator=generator)
    found = warm_start.context_map(new @ true.T, new)
    assert torch.allclose(found, true, atol=0.02)


def test_keys_of_another_width_see_the_old_text_states():
    donor, started = (f.build_modules()["unet"] for f in (architecture.SD1, architecture.SDXL))
    map_of_states = torch.randn(128, 96)
    warm_start.start_from(started, donor, map_of_states)
    state = torch.randn(96)
    old, new = (net.input_blocks[3][1].transformer_blocks[0].attn2.to_k for net in (donor, started))
    assert torch.allclose(new(state), old(map_of_states @ state), atol=1e-4)


def test_families_without_a_checkpoint_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("FAMILY", "sd9")
    with pytest.raises(SystemExit, match="sd9.*sd1, sdxl"):
        checkpoints.chosen_family()
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "sdxl", tmp_path / "absent.safetensors")
    monkeypatch.setenv("FAMILY", "sdxl")
    with pytest.raises(SystemExit, match="train.py --family sdxl"):
        checkpoints.chosen_family()
    monkeypatch.delenv("FAMILY")
    assert checkpoints.chosen_family() == "sd1"
