"""The measuring functions of ``make bench-cost`` at their smallest, and what they compare.

No time is looked at: whether the bars are met is for ``make bench-cost`` to say.
"""

from __future__ import annotations

import gc
import json
import math
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from sefi_ide.benchmarks import contenders, cost, full, lora
from sefi_ide.tests.mini_sd.checkpoints import CHECKPOINTS

SIDE = 64
CASE = contenders.Case(SIDE)
LARGE = contenders.Case(SIDE, batch=2, photos=2, chunks=2)
PLAN = cost.Plan(SIDE, rounds=1, steps=2, growth=(CASE, LARGE), most_rounds=1)


@pytest.fixture(scope="module")
def models(mini_checkpoint) -> contenders.Models:
    return contenders.Models.load(Path(mini_checkpoint))


def test_all_ratios_are_measured(models):
    figures = cost.measure_training(models, PLAN) | cost.measure_sampling(models, PLAN)
    memory = {"memory_over_floor", "memory_bytes_per_unet_parameter"}
    assert cost.HIGHEST.keys() <= figures.keys() | memory
    # Steps before the first are a difference, which may come to less than nothing here.
    ratios = {name: value for name, value in figures.items() if not name.startswith("steps_before")}
    assert len(figures) - len(ratios) == 2
    assert all(map(math.isfinite, figures.values())) and min(ratios.values()) > 0


def test_growth_compares_a_small_training_with_a_large_one(models, monkeypatch):
    """The large case of ours takes three times what its floor takes, the small one twice."""
    seconds = {"IdentityTraining": {CASE: 2.0, LARGE: 12.0}, "Floor": {CASE: 1.0, LARGE: 4.0}}
    for name, of in seconds.items():
        monkeypatch.setattr(cost, name, lambda _, of=of: lambda case, steps: [of[case]])
    assert cost.measure_growth(models, PLAN) == {"growth_time": pytest.approx(1.5)}
    assert cost.measure_growth(models, replace(PLAN, growth=None)) == {}

    def peak(kind, checkpoint, case):
        steps = {"identity": {CASE: 105, LARGE: 360}, "floor": {CASE: 100, LARGE: 300}}[kind][case]
        report = 5 if kind == "identity" else 0
        return {"peak": steps + report, "peak_of_steps": steps, "unet_parameters": 20}

    monkeypatch.setattr(cost, "peak_in_own_process", peak)
    assert cost.measure_memory(Path("any"), PLAN) == {
        "memory_over_floor": pytest.approx(1.1),
        "memory_bytes_per_unet_parameter": pytest.approx(0.5),
        "growth_memory": pytest.approx(1.2 / 1.05),
    }


def test_the_large_training_is_larger_in_all_respects(models):
    small, large = cost.miniature_plan().growth
    assert all(a < b for a, b in zip(astuple(small), astuple(large), strict=True))
    figures = cost.measure_growth(models, PLAN)
    assert figures.keys() == {"growth_time"} and math.isfinite(figures["growth_time"])


def test_rounds_go_on_until_a_figure_is_on_one_side_of_its_bar(caplog):
    plan = replace(PLAN, rounds=5, most_rounds=30)
    over = cost.ratios("ours", "floor")

    def rounds(ours, *barred):
        values = iter([9.0, *ours])  # the first is the round that warms up
        turns = {"ours": lambda: [next(values)], "floor": lambda: [1.0]}
        times = cost.interleaved(turns, plan, barred)
        assert times["ours"] == ours[: len(times["ours"])]
        return len(times["ours"])

    assert rounds([1.0] * 30) == 5
    assert rounds([1.0] * 30, (over, 1.1)) == rounds([1.2] * 30, (over, 1.1)) == 10
    assert rounds([1.0] * 30, (over, 1.1), (over, 0.9)) == 10
    assert rounds([1.2] + [1.0] * 29, (over, 1.1)) == 13  # twelve of thirteen are beyond chance
    assert not caplog.records
    assert rounds([1.0, 1.2] * 15, (over, 1.1)) == 30
    assert "after 30 rounds still too near to tell: bar [1.1]" in caplog.text


def test_a_missed_bar_is_named():
    good = {name: 0.5 for name in cost.HIGHEST}
    assert cost.missed({"miniature": good | {"growth_time": 1.0}}) == []
    assert cost.missed({"miniature": good | {"step_over_floor": 2.0, "growth_time": 3.0}}) == [
        "miniature: step_over_floor is 2.000, the bar is 1.15",
        "miniature: growth_time is 3.000, the bar is 1.10",
    ]


@pytest.mark.parametrize(("step_over_floor", "code"), [(1.1, 0), (1.2, 1)])
def test_the_exit_code_and_the_last_line_tell_the_result(
    step_over_floor, code, tmp_path, monkeypatch, capsys
):
    found = {name: 0.5 for name in cost.HIGHEST} | {"step_over_floor": step_over_floor}
    found |= {"memory_bytes_per_unet_parameter": 0.1, "steps_before_first": 7.0}
    monkeypatch.setattr(cost, "OUTPUT", tmp_path)
    monkeypatch.setattr(cost, "measure", lambda checkpoint, plan: found)
    monkeypatch.setattr(cost.full_shape, "write_checkpoint", lambda file, family: None)

    def last_line(shape):
        monkeypatch.setenv("SHAPE", shape)
        assert cost.main() == code
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert last_line("miniature") == {"miniature": found}
    assert last_line("full_shape") == {"full_shape": found}
    assert not (tmp_path / "table.md").exists()
    assert last_line("") == {"miniature": found, "full_shape": found}
    table = (tmp_path / "table.md").read_text().splitlines()
    assert f"| step_over_floor | {step_over_floor:.3f} | {step_over_floor:.3f} | 1.15 |" in table
    assert "| steps_before_first | 7.000 | 7.000 |  |" in table


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_step_of_every_family_is_measured_over_its_floor(family):
    figures = full.measure_steps(contenders.Models.load(CHECKPOINTS[family]), PLAN)
    assert figures["step_side"] == SIDE and figures["step_rounds"] == PLAN.rounds
    assert all(math.isfinite(value) and value > 0 for value in figures.values())


@pytest.mark.parametrize(
    ("missed", "code"),
    [({}, 0), ({"step_over_floor": 1.16}, 1), ({"extra_bytes_per_weight": 0.61}, 1)],
)
def test_the_bars_of_the_full_shape(missed, code, monkeypatch, capsys, caplog):
    memory = {"family": "sd2", "extra_bytes_per_weight": 0.3}
    steps = {"step_over_floor": 1.1}
    found = memory | steps | missed
    written = []
    monkeypatch.setenv("FAMILY", "sd2")
    monkeypatch.setattr(
        full.full_shape, "write_checkpoint", lambda file, family: written.append(family)
    )
    monkeypatch.setattr(full.Models, "load", lambda checkpoint: None)
    monkeypatch.setattr(full, "measure_memory", lambda family: {k: found[k] for k in memory})
    monkeypatch.setattr(full, "measure_steps", lambda models, plan: {k: found[k] for k in steps})
    assert full.main() == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert written == ["sd2"]
    assert [line for line in caplog.messages if "missed" in line] == [
        f"missed: {name} is {value:.3f}, the bar is {full.BARS[name]:.2f}"
        for name, value in missed.items()
    ]


def test_an_unknown_family_is_refused(monkeypatch):
    monkeypatch.setenv("FAMILY", "flux")
    with pytest.raises(SystemExit, match="FAMILY is flux; there are sd1, sd2, sdxl"):
        full.main()


def test_an_unknown_shape_is_refused(monkeypatch):
    monkeypatch.setenv("SHAPE", "sdxl")
    with pytest.raises(SystemExit, match="choose of miniature, full_shape"):
        cost.main()


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_floor_has_gradients_and_nothing_of_the_pack(family):
    models = contenders.Models.load(CHECKPOINTS[family])
    floor = contenders.Floor(models)
    context = floor.step(replace(CASE, batch=2, chunks=2))
    assert context.shape[:2] == (2, 2 * contenders.TOKENS)
    assert context.grad.abs().max() > 0
    encoders = floor.text_encoders.values()
    for module in (floor.unet, *encoders):
        assert not any("forward" in vars(part) for part in module.modules())
        for parameter in module.parameters():
            assert parameter.grad is None and not parameter.is_inference()


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_floors_text_encoders_say_what_comfyuis_say(family):
    """To the layer that the family reads, and SDXL's pooled output."""
    models = contenders.Models.load(CHECKPOINTS[family])
    floor = contenders.Floor(models)
    row = [49406, 320, *[49407] * (contenders.TOKENS - 2)]
    tokens = {name: [[(token, 1.0) for token in row]] for name in floor.text_encoders}
    with torch.no_grad():
        context, pooled = models.clip.encode_from_tokens(tokens, return_pooled=True)
    states = dict(zip(("l", "g", "pooled"), floor.states(torch.tensor([row])), strict=False))
    read = torch.cat([states[name] for name in floor.text_encoders], dim=-1)
    torch.testing.assert_close(read, context, rtol=1e-4, atol=1e-4)
    if family == "sdxl":
        projection = models.clip.cond_stage_model.clip_g.transformer.text_projection
        torch.testing.assert_close(
            projection(states["pooled"]).detach(), pooled, rtol=1e-4, atol=1e-4
        )


def test_the_contenders_have_the_same_weights(models):
    """diffusers' U-Net and transformers' text encoder compute what ComfyUI's do."""
    inversion = contenders.TextualInversion(models)
    tokens = models.clip.tokenize("a photo of person")
    ids = torch.tensor([[token for token, *_ in tokens["l"][0]]])
    x, timestep = models.latents(CASE), torch.tensor([500.0])
    with torch.no_grad():
        context = models.clip.encode_from_tokens(tokens).clone()
        states = inversion.text_encoder(ids).last_hidden_state
        output = models.unet(x, timestep, context, control=None, transformer_options={})
        torch.testing.assert_close(states, context, rtol=1e-4, atol=1e-4)
        converted = inversion.unet(x, timestep, context).sample
        torch.testing.assert_close(converted, output, rtol=1e-4, atol=1e-4)
    ours = {p.untyped_storage().data_ptr() for p in models.unet.parameters()}
    assert {p.untyped_storage().data_ptr() for p in inversion.unet.parameters()} <= ours


def test_training_keeps_no_second_unet(models, monkeypatch):
    weights = [p for p in models.unet.parameters() if p.ndim == 4 and p.shape[-1] == 3]
    storages = {p.untyped_storage().data_ptr() for p in weights}
    shapes = {p.shape for p in weights}

    def copies() -> int:
        return sum(
            tensor.shape in shapes and tensor.untyped_storage().data_ptr() not in storages
            for tensor in gc.get_objects()
            if type(tensor) in (torch.Tensor, torch.nn.Parameter)  # compilers' tensors hold nothing
        )

    counts = [copies()]
    clock = contenders.clock
    monkeypatch.setattr(contenders, "clock", lambda: counts.append(copies()) or clock())
    contenders.IdentityTraining(models)(CASE, 2)
    assert len(counts) > 2 and max(counts) == counts[0]


def test_a_prompt_has_the_length_that_was_asked_for(models):
    for chunks in (1, 2, 3):
        for template in replace(CASE, chunks=chunks).templates:
            tokens = models.clip.tokenize(template.replace("<name>", "person"))
            assert len(tokens["l"]) == chunks


def test_a_lora_of_cores_node_changes_what_is_sampled(models):
    conditioning = contenders.encode(models.clip, "a photo of person")
    latents = models.latents(CASE)
    trained, again = (
        lora.train_lora(models.model, latents, conditioning, 2, 1e-3, seed=3) for _ in range(2)
    )
    assert trained.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.items())

    def sampled(model) -> torch.Tensor:
        x, sigma = latents, torch.tensor([1.0])
        context = conditioning[0][0]
        with torch.inference_mode():
            contenders.comfy.model_management.load_models_gpu([model])
            return model.model.apply_model(x, sigma, c_crossattn=context)

    plain, changed = sampled(models.model), sampled(lora.apply_lora(models.model, trained))
    assert (plain - changed).abs().max() > 1e-3
    assert torch.equal(plain, sampled(lora.apply_lora(models.model, trained, strength=0)))
