"""Which trainings count as the same: those whose result is the same, and no others."""

from __future__ import annotations

import gc

import comfy.hooks
import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_model_merging import CLIPMergeSimple, ModelMergeSimple
from sefi_ide.sefi_core.comfyui.apply import apply_identity
from sefi_ide.sefi_core.comfyui.learning import content
from sefi_ide.sefi_core.comfyui.learning.content import training_key
from sefi_ide.sefi_core.comfyui.methods.tokens import AppliedIdentity
from sefi_ide.sefi_core.identity.identity import Identity
from sefi_ide.sefi_core.learning.photos import pair_photos
from sefi_ide.sefi_core.learning.settings import TrainingSettings

import nodes as comfy_nodes

from . import random_checkpoint
from .training_runs import load, photo_and_mask, random_vectors, run, with_lora

pytestmark = pytest.mark.usefixtures("inference_mode")


def key(models, photos=None, masks=None, **changes):
    """The key of a training of one photo, but for some changes."""
    image, mask = photo_and_mask()
    photos = pair_photos([image] if photos is None else photos, [mask] if masks is None else masks)
    arguments = {"name": "anna", "class_word": "person", "start": None}
    arguments |= {name: changes.pop(name) for name in list(changes) if name in arguments}
    settings = TrainingSettings(**changes)
    return training_key(
        *models, photos, arguments["name"], arguments["class_word"], settings, arguments["start"]
    )


@pytest.fixture(scope="module")
def models(mini_checkpoint):
    return load(mini_checkpoint)


@random_checkpoint.of_all_families
def test_the_same_checkpoint_loaded_again_is_the_same(mini_checkpoint):
    first, second = load(mini_checkpoint), load(mini_checkpoint)
    assert first[0].model is not second[0].model
    assert key(first) == key(second) is not None
    assert len(key(first)) == 64


def test_what_was_drawn_or_learned_or_unloaded_in_between_changes_nothing(models):
    before = key(models)
    run(models, steps=1)
    assert key(models) == before
    model, clip = with_lora(*models[:2])
    patched = key((model, clip, models[2]))
    comfy.model_management.load_models_gpu([model, clip.patcher])  # which changes the weights
    assert model.model.current_weight_patches_uuid == model.patches_uuid
    assert key((model, clip, models[2])) == patched != before
    assert key(models) == before
    comfy.model_management.unload_all_models()
    assert key((model, clip, models[2])) == patched and key(models) == before


def with_strength(models, strength_model, strength_clip):
    """As Load LoRA does, with a LoRA that is the same each time but for its objects."""
    model, clip = with_lora(*models[:2])
    for patcher, strength in ((model, strength_model), (clip.patcher, strength_clip)):
        patcher.patches = {
            name: [(strength, *one[1:]) for one in entries]
            for name, entries in patcher.patches.items()
        }
    return model, clip, models[2]


def test_a_lora_counts_by_what_is_in_it_and_by_its_strengths(models):
    strengths = [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5)]
    keys = [key(with_strength(models, *pair)) for pair in strengths]
    assert len({key(models), *keys}) == 4
    first, second = (with_strength(models, 1.0, 1.0) for _ in range(2))
    assert first[0].patches_uuid != second[0].patches_uuid
    assert key(first) == key(second) == keys[0]
    adapter = next(iter(second[0].patches.values()))[0][1]
    adapter.weights[0].view(-1)[0] += 1.0
    assert key(second) != keys[0]


def every_weight(models):
    model, clip, vae = models
    yield from model.model.diffusion_model.state_dict().items()
    yield from clip.cond_stage_model.state_dict().items()
    yield from vae.first_stage_model.state_dict().items()


def test_any_weight_that_changes_is_another_model(mini_checkpoint):
    """One value of every thirtieth tensor, in turn, by as little as can be."""
    models = load(mini_checkpoint)
    before = key(models)
    for number, (name, weight) in enumerate(every_weight(models)):
        if number % 30 or not weight.is_floating_point() or name == content._UNUSED:
            continue
        place = weight.view(-1)[weight.numel() // 2 :][:1]
        kept = place.clone()
        place.copy_(torch.nextafter(kept, torch.tensor(torch.inf)))
        assert key(models) != before, name
        place.copy_(kept)
    assert key(models) == before


def merged(models, other, ratio):
    model = ModelMergeSimple().merge(models[0], other[0], ratio)[0]
    clip = CLIPMergeSimple().merge(models[1], other[1], ratio)[0]
    return model, clip, models[2]


def test_merged_models_count_by_what_they_are_merged_of(models, checkpoints):
    path = checkpoints / "another.safetensors"
    random_checkpoint.save(path, torch.float32, seed=5)
    other = load(path)
    assert key(other) != key(models)
    half, again = merged(models, other, 0.5), merged(models, other, 0.5)
    assert key(half) == key(again)
    assert len({key(half), key(models), key(other), key(merged(models, other, 0.25))}) == 4


def sampling(models, **changes):
    arguments = {"sampling": "eps", "zsnr": False} | changes
    return (ModelSamplingDiscrete().patch(models[0], **arguments)[0], *models[1:])


def test_the_sampling_type_counts_by_its_numbers(models):
    kinds = [{}, {"zsnr": True}, {"sampling": "v_prediction"}, {"sampling": "lcm"}]
    keys = [key(sampling(models, **kind)) for kind in kinds]
    assert keys == [key(sampling(models, **kind)) for kind in kinds]
    assert len({key(models), *keys}) == 5
    patched = sampling(models, zsnr=True)
    comfy.model_management.load_models_gpu([patched[0]])  # puts it in force
    assert key(patched) == keys[1] and key(models) not in keys


def test_patches_for_sampling_count_by_being_the_same_object(models):
    """The sample of the report is drawn with them."""

    def patch(q, k, v, extra):
        return q, k, v

    ones = [models[0].clone() for _ in range(3)]
    for one in ones[:2]:
        one.set_model_attn2_patch(patch)
    ones[2].set_model_attn2_patch(lambda q, k, v, extra, factor=[2.0]: (q, k, v))
    keys = [key((one, *models[1:])) for one in ones]
    assert keys[0] == keys[1] and len({key(models), *keys}) == 3


def test_clip_skip_and_options_of_the_tokenizer(models):
    clips = [models[1].clone() for _ in range(3)]
    clips[1].clip_layer(-2)
    clips[2].set_tokenizer_option("min_length", 90)
    assert len({key((models[0], clip, models[2])) for clip in clips}) == 3
    assert key((models[0], clips[0], models[2])) == key(models)


def test_identities_applied_before_count(models):
    vectors = random_vectors("sd1", 1, 3)
    one = AppliedIdentity(Identity("bob", "person", "sd1", vectors, vectors))
    first, second = (apply_identity(*models[:2], one) for _ in range(2))
    with_bob = key((*first, models[2]))
    assert with_bob == key((*first, models[2]))
    assert with_bob not in (None, key(models))
    assert with_bob != key((*second, models[2]))  # of which only its objects know what it holds


CHOICES = {
    "parametrisation": "direct",
    "resolution": 128,
    "templates": ("a painting of <name>",),
    "captions": ("smiling",),
    "background_target": "class word",
    "dtype": "fp32",
    "gradient_checkpointing": "on",
}


def another(field: str) -> object:
    """Another value of a setting: of numbers a larger one."""
    usual = getattr(TrainingSettings(), field)
    return CHOICES[field] if field in CHOICES else usual + (1 if isinstance(usual, int) else 1e-4)


def test_every_setting_counts(models):
    changes = {field: another(field) for field in TrainingSettings.__dataclass_fields__}
    changes |= {"name": "vera", "class_word": "woman"}
    keys = [key(models, **{name: value}) for name, value in changes.items()]
    assert len({key(models), *keys}) == 1 + len(changes) and None not in keys


def test_photos_masks_and_the_identity_to_go_on_from_count(models):
    image, mask = photo_and_mask()
    brighter = image.clone()
    brighter[0, 0, 0, 0] += 1e-6
    wider = mask.clone()
    wider[0, 0, 0] = 1.0
    vectors = random_vectors("sd1", 5, 3)
    starts = [Identity("bob", "person", "sd1", vectors, other) for other in (vectors, {
        name: rows + 1e-3 for name, rows in vectors.items()
    })]  # fmt: skip
    keys = [
        key(models),
        key(models, [brighter]),
        key(models, [image.flip(2)], [mask]),
        key(models, None, [wider]),
        training_key(
            *models, pair_photos([image], None), "anna", "person", TrainingSettings(), None
        ),
        *(key(models, start=start) for start in starts),
    ]
    assert len(set(keys)) == len(keys) and None not in keys
    assert key(models, [image.clone()], [mask.clone()]) == keys[0]
    assert key(models, start=starts[0].renamed("zoe")) == keys[5]


def test_what_changes_by_itself_is_not_remembered(models):
    hooked = models[1].clone()
    hooked.patcher.forced_hooks = comfy.hooks.HookGroup()
    hooked.patcher.forced_hooks.add(comfy.hooks.TransformerOptionsHook())
    assert key((models[0], hooked, models[2])) is None
    assert key(models, templates=("a photo of <name>, embedding:style",)) is None


class OtherVae:
    """As a pack may bring one."""

    def encode(self, pixels):
        raise NotImplementedError

    decode = encode


def test_what_cannot_be_read_counts_by_being_the_same_object(models):
    one, other = OtherVae(), OtherVae()
    keys = [key((*models[:2], vae)) for vae in (one, one, other)]
    assert keys[0] == keys[1] != keys[2]
    ids = {id(one), id(other)}
    assert ids <= content._marks.keys()
    del one, other
    gc.collect()
    assert not ids & content._marks.keys()


def test_methods_that_were_exchanged_in_place_count(mini_checkpoint):
    models = load(mini_checkpoint)
    before = key(models)
    for part in (
        models[0].model.diffusion_model.middle_block,
        models[1].cond_stage_model.clip_l,
        models[2].first_stage_model.taesd_decoder,
    ):
        forward = part.forward
        part.forward = lambda *args, forward=forward: forward(*args)
        assert key(models) not in (None, before)
        del part.forward
        assert key(models) == before


def test_a_file_of_another_content_under_the_same_name(checkpoints):
    keys = []
    path = checkpoints / "exchanged.safetensors"
    folder_paths.add_model_folder_path("checkpoints", str(checkpoints))
    for seed in (1, 2, 1):
        random_checkpoint.save(path, torch.float32, seed=seed)
        loader = comfy_nodes.CheckpointLoaderSimple()
        keys.append(key(loader.load_checkpoint(path.name)[:3]))
    assert keys[0] == keys[2] != keys[1]
