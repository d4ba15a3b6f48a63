"""The stability gap: against a model whose losses are known in closed form, and against the layers run one by one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from maskalign.evaluation.gap import (
    alignment_by_image,
    alignment_by_token,
    can_mask,
    ending_at_tap,
    gaps_by_image,
    kept_patches,
    keyed_subsets,
)
from maskalign.models import SiT
from maskalign.models.routing import gather_tokens


def make_model(seed=0, **settings):
    """A small float64 `SiT` with weights that are nowhere zero."""
    sizes = dict(
        input_size=8, patch_size=2, in_channels=3, num_classes=3, depth=4, width=16, heads=2, teacher_dims=(5, 7),
        align_depth=2, projector_dim=8, mixer="attention", mixer_hidden=6,
    )  # fmt: skip
    model = SiT(**{**sizes, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def make_inputs(model, seed=0, batch=3, keep=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, generator=generator).double()
    t, labels = torch.rand(batch, generator=generator).double(), torch.arange(batch)
    rows = model.num_tokens + (model.class_dim is not None)
    teachers = [torch.randn(batch, rows, dim, generator=generator).double() for dim in model.teacher_dims]
    own = {}
    if model.class_dim is not None:
        own["class_token"] = torch.randn(batch, model.class_dim, generator=generator).double()
    return (x, t, labels, teachers), own, keyed_subsets("test", range(batch), model.num_tokens, keep)


def loss_by_layers(model, x, t, labels, teachers, subset=None, class_token=None, start=0):
    """-mean cos at the tap: embed, mix, drop, and run the blocks up to the tap on what is left."""
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(labels)
    shift = int(class_token is not None)
    if shift:
        first = model.class_embedder.norm(model.class_embedder.proj(class_token))
        tokens = torch.cat([first.unsqueeze(1), tokens], dim=1)
    kept = torch.arange(tokens.shape[1]).expand(len(x), -1)
    for depth, block in enumerate(model.blocks[: model.align_depth]):
        if depth == start:
            if model.mixer.needs_grid:
                tokens = torch.cat([tokens[:, :shift], model.mixer(tokens[:, shift:], c)], dim=1)
            else:
                tokens = model.mixer(tokens, c)
            if subset is not None:
                kept = torch.cat([torch.zeros(len(x), shift, dtype=torch.long), shift + subset], dim=1)
                tokens = gather_tokens(tokens, kept)
        tokens = block(tokens, c)
    losses = 0
    for projector, teacher in zip(model.projectors, teachers, strict=True):
        z, wanted = projector(tokens), gather_tokens(teacher, kept)
        cosines = (z * wanted).sum(dim=-1) / (z.norm(dim=-1) * wanted.norm(dim=-1))
        losses = losses - cosines.mean(dim=1) / len(teachers)
    return losses


CASES = {
    "mixing layers": dict(),
    "class token": dict(class_dim=6),
    "class token, no mixer": dict(class_dim=6, mixer="none"),
    "class token, token mixer": dict(class_dim=6, mixer="token_mlp"),
    "depthwise": dict(mixer="depthwise_conv"),
    "loss only": dict(route="none", class_dim=6),
    "bypass": dict(route=(1, 4), restore="bypass"),
    "fuse": dict(route=(1, 3), restore="fuse", class_dim=6),
    "ends before the tap": dict(route=(0, 1), restore="bypass", align_depth=3),
}


@pytest.mark.parametrize("name", CASES)
def test_both_losses_are_those_of_the_layers_one_by_one(name, seed):
    model = make_model(seed, **CASES[name])
    inputs, own, subset = make_inputs(model, seed)
    start = model.route[0] if model.route else 0
    with torch.no_grad(), ending_at_tap(model) as trunk:
        for chosen in (None, subset):
            found = alignment_by_image(trunk, *inputs, subset=chosen, **own)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, loss_by_layers(model, *inputs, chosen, **own, start=start))
    # With all tokens it is the model's own loss, whatever comes after the tap.
    torch.testing.assert_close(
        alignment_by_image(model, *inputs, **own), loss_by_layers(model, *inputs, **own, start=start)
    )


def test_a_mixer_after_the_tap_has_no_part(seed):
    model = make_model(seed, route=(3, 4), restore="bypass")
    inputs, _, subset = make_inputs(model, seed)
    with torch.no_grad(), ending_at_tap(model) as trunk:
        found = alignment_by_image(trunk, *inputs, subset=subset)
    torch.testing.assert_close(alignment_by_image(model, *inputs), loss_by_layers(model, *inputs, start=None))
    no_mixer = make_model(seed, mixer="none")
    no_mixer.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mixer.")})
    torch.testing.assert_close(found, loss_by_layers(no_mixer, *inputs, subset))


def test_the_model_is_left_as_it_was():
    model = make_model(class_dim=6, route=(1, 3), restore="fuse")
    inputs, own, _ = make_inputs(model)
    x, t, labels, _ = inputs
    before, names = model(x, t, labels, **own), [name for name, _ in model.named_parameters()]
    with pytest.raises(KeyError), ending_at_tap(model):
        assert len(model.blocks) == 2
        raise KeyError
    assert torch.equal(model(x, t, labels, **own).velocity, before.velocity) and model.route == (1, 3)
    assert [name for name, _ in model.named_parameters()] == names and model.restore == "fuse"


class KnownAlignment(nn.Module):
    """Its rows have cosine s(n) with the teacher's, where n is how many patches it sees: G_r is s(N) - s(K)."""

    def __init__(self, teacher, cosine):
        super().__init__()
        self.teacher, self.cosine = teacher, cosine

    def forward(self, x, t, labels, subset=None):
        wanted = self.teacher if subset is None else gather_tokens(self.teacher, subset)
        s = self.cosine(wanted.shape[1])
        unit = wanted / wanted.norm(dim=-1, keepdim=True)
        across = torch.linalg.cross(unit, torch.ones_like(unit), dim=-1)
        across = across / across.norm(dim=-1, keepdim=True)
        return SimpleNamespace(aligned=[5 * (s * unit + (1 - s * s) ** 0.5 * across)], aligned_index=subset)


def test_the_gap_of_a_model_in_closed_form(seed):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(4, 64, 3, generator=generator).double()
    model = KnownAlignment(teacher, lambda patches: 0.2 + 0.6 * (patches / 64) ** 2)
    for ratio in (0.25, 0.5, 0.75):
        kept = kept_patches(ratio, 64)
        subset = keyed_subsets("closed form", range(4), 64, kept)
        losses = [alignment_by_image(model, None, None, None, [teacher], subset=chosen) for chosen in (subset, None)]
        expected = 0.6 * (1 - (1 - ratio) ** 2)
        torch.testing.assert_close(losses[0] - losses[1], torch.full((4,), expected).double())


def test_blocks_that_do_nothing_have_no_gap_but_by_chance():
    """Fresh gates are zero: a token's loss is its own, the subset's loss is the mean over its tokens, and the mean over
    all subsets of N - 1 patches, every one of them once, is the full loss."""
    model = SiT(
        input_size=8, patch_size=2, in_channels=3, num_classes=3, depth=3, width=16, heads=2, teacher_dims=(5,),
        align_depth=2, projector_dim=8, mixer="attention",
    ).double()  # fmt: skip
    inputs, _, _ = make_inputs(model)
    everything = torch.arange(16)
    with ending_at_tap(model.eval()) as trunk:
        full = alignment_by_image(trunk, *inputs)
        gaps = []
        for left_out in range(16):
            subset = everything[everything != left_out].expand(3, -1)
            gaps.append(alignment_by_image(trunk, *inputs, subset=subset) - full)
    gaps = torch.stack(gaps)
    assert gaps.abs().max() > 1e-4
    torch.testing.assert_close(gaps.mean(dim=0), torch.zeros(3).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("class_dim", [None, 6])
def test_the_matched_gap_has_the_same_mean_over_all_subsets(seed, class_dim):
    """All 16 subsets that leave one patch out: the two means agree, and the matched gap spreads less."""
    model = make_model(seed, class_dim=class_dim)
    inputs, own, _ = make_inputs(model, seed)
    everything, gaps = torch.arange(16), []
    with ending_at_tap(model) as trunk:
        full = alignment_by_token(trunk, *inputs, **own)
        for left_out in range(16):
            subset = everything[everything != left_out].expand(3, -1)
            masked = alignment_by_token(trunk, *inputs, **own, subset=subset)
            assert masked.shape == (3, 15 + (class_dim is not None))
            gaps.append(torch.stack(gaps_by_image(full, masked, subset, class_dim is not None)))
            torch.testing.assert_close(gaps[-1][0], masked.mean(dim=1) - full.mean(dim=1))
    plain, matched = torch.stack(gaps, dim=1)
    torch.testing.assert_close(plain.mean(dim=0), matched.mean(dim=0), rtol=0, atol=1e-12)
    assert not torch.allclose(plain, matched)


def test_the_matched_gap_of_blocks_that_do_nothing_is_none():
    """Where no token sees the others nothing changes for those that are kept, whichever they are."""
    model = make_model()
    with torch.no_grad():
        for block in model.all_blocks:
            block.adaLN_modulation[1].weight.zero_()
            block.adaLN_modulation[1].bias.zero_()
    inputs, _, subset = make_inputs(model)
    with ending_at_tap(model) as trunk:
        full, masked = (alignment_by_token(trunk, *inputs, subset=chosen) for chosen in (None, subset))
    gaps = gaps_by_image(full, masked, subset, False)
    assert gaps.plain.abs().max() > 1e-3 and gaps.matched.abs().max() < 1e-12


def test_subsets_belong_to_their_images():
    first = keyed_subsets("a", range(6), 64, 48)
    assert first.shape == (6, 48) and (first.diff(dim=1) > 0).all() and first.min() >= 0 and first.max() < 64
    assert torch.equal(keyed_subsets("a", range(2, 5), 64, 48), first[2:5])
    assert not torch.equal(keyed_subsets("b", range(6), 64, 48), first)
    counts = np.bincount(keyed_subsets("c", range(2000), 16, 12).flatten(), minlength=16)
    assert abs(counts / 2000 - 0.75).max() < 0.04  # every patch alike
    assert [kept_patches(0.25, patches) for patches in (256, 64, 16, 9, 2, 1)] == [192, 48, 12, 7, 2, 1]


def test_which_models_have_a_gap():
    assert can_mask(make_model()) and not can_mask(make_model(teacher_dims=()))
    assert not can_mask(make_model(projector="conv", route="none", mixer="none"))


def test_the_held_out_gap_is_the_definition(data):
    """Image by image: the subset's loss minus that of all tokens, at the times and with the noise of the losses."""
    from maskalign.evaluation.gap import held_out_gap
    from maskalign.evaluation.heldout import HeldOut, TeacherTokens, losses_by_time
    from tests.tiny_runs import TEACHER

    model = make_model(input_size=16, patch_size=4, teacher_dims=(6,)).float()
    held_out = HeldOut(data, 7, [TeacherTokens(TEACHER, None, (4, 4))], batch_size=7)
    seen, plain = [], model.forward
    model.forward = lambda *given, **own: seen.append(given) or plain(*given, **own)
    losses = losses_by_time(model, held_out, bins=2)
    noised = [given[:3] for given in seen]
    del model.forward
    ((_, _, _, ((rows, _),)),) = held_out.batches()
    gaps = []
    for index, (x, t, labels) in enumerate(noised):
        subset = keyed_subsets(f"held out/20260608/{index}", range(7), 16, 12)
        with torch.no_grad():
            masked, full = (loss_by_layers(model, x, t, labels, [rows.float()], chosen) for chosen in (subset, None))
        assert float(full.mean()) == pytest.approx(-losses["cosine"][index], rel=1e-5)
        gaps.append((masked - full).double().numpy())
    gaps = np.mean(gaps, axis=0)
    found = held_out_gap(model, held_out)
    assert found["stability_gap"] == pytest.approx(gaps.mean(), rel=1e-4)
    assert found["stability_gap_error"] == pytest.approx(gaps.std(ddof=1) / 7**0.5, rel=1e-4)
    held_out.batch_size = 3
    assert held_out_gap(model.train(), held_out) == pytest.approx(found, rel=1e-4) and model.training
    assert held_out_gap(model, HeldOut(data, 7)) == {} and len(model.blocks) == 4


def test_a_compiled_model_is_not_compiled_again_for_subsets(data):
    from maskalign.evaluation.gap import held_out_gap
    from maskalign.evaluation.heldout import HeldOut, TeacherTokens
    from tests.tiny_runs import TEACHER

    model = make_model(input_size=16, patch_size=4, teacher_dims=(6,)).float()
    held_out = HeldOut(data, 6, [TeacherTokens(TEACHER, None, (4, 4))])
    expected, calls = held_out_gap(model, held_out), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    for block in model.all_blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)
    assert held_out_gap(model, held_out) == pytest.approx(expected) and not calls
