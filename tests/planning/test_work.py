"""Planned FLOPs against torch's counter on the same steps, and phases against their schedules."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskalign.checkpoints.build import build_model
from maskalign.objective.draws import draw
from maskalign.objective.flow_matching import training_loss
from maskalign.planning.work import (
    Phase,
    parameter_counts,
    recomputed_flops,
    schedule_phases,
    student_flops,
    teacher_facts,
    vae_encoder_flops,
)
from maskalign.training.compiling import prepare_blocks

CASES = [
    "--model.mixer none --method.keep_ratio 1",
    "--method.keep_ratio 0.5",
    "--model.mixer attention --model.mixer_layers 1 --method.keep_ratio 0.25",
    "--model.class_token true",
    "--model.class_token true --model.mixer_layers 3 --method.keep_ratio 0.5 --method.align_ratio 0.25 "
    "--parallel.recompute block",
    "--model.class_token true --method.route [2,4] --method.restore bypass --parallel.recompute selective",
    "--model.mixer none --method.keep_ratio 0.5 --method.route [1,3] --method.restore fuse",
    "--model.mixer none --method.keep_ratio 0.5 --method.route none",
    "--method.keep_ratio 0.75 --method.align_ratio 0.25",
    "--method.keep_ratio 0.5 --parallel.recompute block",
    "--model.mixer none --method.keep_ratio 0.5 --method.route [1,3] --method.restore bypass --method.align_weight 0 "
    "--parallel.recompute selective",
]


@pytest.mark.parametrize("words", CASES)
def test_flops_are_within_two_percent_of_torchs_counter(settings, spec, words):
    # Wide enough that what stays uncounted, the gradient of the input, is small.
    config = settings("--model.width", "128", "--model.depth", "6", "--model.attention", "math", *words.split())
    model = build_model(config, replace(spec, class_dim=24 if config.model.class_token else None))
    (phase,) = schedule_phases(config, model)
    planned = 3 * sum(student_flops(model, phase).values()) + recomputed_flops(model, phase, config.parallel)
    prepare_blocks(model, config)
    images, aligned = 2, phase.aligned if config.method.align_ratio is not None else None
    own = dict(shape=(4, 16, 16), grid=model.grid, keep=phase.kept, align=aligned, class_dim=model.class_dim)
    draws = draw(0, 0, 0, images, **own)
    x, labels, teachers = torch.randn(images, 4, 16, 16), torch.zeros(images, dtype=torch.int64), []
    if phase.aligned:
        teachers = [torch.randn(images, model.num_tokens + (model.class_dim is not None), 48)]
    class_token = torch.randn(images, 24) if model.class_dim else None
    with FlopCounterMode(display=False) as counter:
        losses = training_loss(model, x, labels, teachers, draws, align_weight=0.5, class_token=class_token)
        losses.total.backward()
    assert planned * images == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_phases_follow_the_schedules(settings, spec):
    model = build_model(settings(), spec)
    step = settings("--method.keep_ratio", "{kind: step, start: 0.5, end: 1.0, begin: 0.9}")
    assert schedule_phases(step, model) == [Phase(32, 32, 0.9), Phase(64, 64, 0.1)]
    assert schedule_phases(step, model, teachers=False) == [Phase(32, 0, 0.9), Phase(64, 0, 0.1)]
    ending = settings(
        "--method.keep_ratio", "0.5", "--method.align_weight", "{kind: step, start: 0.5, end: 0.0, begin: 0.25}"
    )
    assert schedule_phases(ending, model) == [Phase(32, 0, 0.75), Phase(32, 32, 0.25)]
    linear = schedule_phases(settings("--method.keep_ratio", "{kind: linear, start: 0.25, end: 1.0}"), model)
    assert [phase.kept for phase in linear] == [16, 24, 32, 40, 48, 56, 64]
    assert sum(phase.share for phase in linear) == pytest.approx(1)
    half_step = 0.5 * 8 / 64 / 0.75  # 16 is what 0.25 to 0.3125 of the tokens is rounded to, twice 24's half
    assert linear[0].share == pytest.approx(half_step, abs=1e-3)


def test_parts_add_up_and_the_mixer_is_none_without_one(settings, spec):
    with_mixer, without = (build_model(settings("--model.mixer", kind), spec) for kind in ("token_mlp", "none"))
    counts = parameter_counts(with_mixer)
    assert sum(counts.values()) == sum(p.numel() for p in with_mixer.parameters()) and counts["mixer"] > 0
    assert counts["student"] == parameter_counts(without)["student"] and parameter_counts(without)["mixer"] == 0
    reg = parameter_counts(build_model(settings("--model.mixer", "none"), replace(spec, class_dim=24)))
    width = 64  # of `settings`: Linear and LayerNorm in, Linear out
    assert reg["class token"] == 24 * width + 3 * width + (width + 1) * 24 and counts["class token"] == 0
    assert {**reg, "class token": 0} == parameter_counts(without)
    phase = Phase(32, 32, 1.0)
    there, here = student_flops(with_mixer, phase), student_flops(without, phase)
    assert there["mixer"] > 0 == here["mixer"] and there["student"] == here["student"]


def test_teachers_cost_what_is_known_of_them():
    frozen = teacher_facts("dinov2-s", 256)
    # ViT-S/14: 12 blocks of width 384 on 257 tokens.
    tokens, width = 257, 384
    blocks = 12 * 2 * (tokens * 12 * width**2 + 2 * tokens**2 * width)
    assert frozen.flops == pytest.approx(blocks + 2 * 256 * 14 * 14 * 3 * width, rel=0.01)
    assert (frozen.dim, frozen.grid) == (384, (16, 16)) and 21e6 < frozen.parameters < 23e6
    cnn = teacher_facts("efficientnet-lite0", 64)
    assert (cnn.dim, cnn.grid) == (320, (8, 8)) and cnn.flops > 0


def test_the_vae_costs_what_diffusers_own_does():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        images = torch.empty(1, 3, 128, 128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(images)
    assert vae_encoder_flops(128) == pytest.approx(counter.get_total_flops(), rel=0.005)
