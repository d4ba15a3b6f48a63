"""The class token and the mixing layers of MaskAlign's paper: against plain arithmetic, and against mix-then-gather."""

import pytest
import torch

from maskalign.models import SiT, draw_subset
from maskalign.models.layers import ATTENTIONS, unpatchify
from maskalign.models.mixer import AttentionMixer
from maskalign.models.routing import gather_tokens
from maskalign.objective import draw, training_loss

SIZES = dict(
    input_size=8, patch_size=2, in_channels=3, num_classes=7, depth=3, width=24, heads=3, teacher_dims=(10,),
    align_depth=2, projector_dim=12, mixer_hidden=4,
)  # fmt: skip


def make_model(seed, **settings):
    """A float64 model none of whose parameters is at its initial zero."""
    torch.manual_seed(seed)
    model = SiT(**{**SIZES, **settings}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_inputs(seed, class_dim=5, batch=3, keep=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.rand(batch, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 8, (batch,), generator=generator)
    token = torch.randn(batch, class_dim, generator=generator, dtype=torch.float64)
    return x, t, labels, draw_subset(batch, (4, 4), keep, generator=generator), token


@pytest.mark.parametrize("implementation", [name for name in ATTENTIONS if name != "flash_attn"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("layers, tokens, keep", [(1, 17, 13), (2, 17, 1), (3, 9, 9), (2, 5, 0)])
def test_dropping_inside_the_last_mixing_layer_is_mixing_then_gathering(
    layers, tokens, keep, qk_norm, implementation, seed
):
    generator = torch.Generator().manual_seed(seed)
    mixer = AttentionMixer(24, 3, layers, qk_norm=qk_norm, attention=implementation).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 5)
    x = torch.randn(2, tokens, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    subset = torch.stack([torch.randperm(tokens, generator=generator)[:keep].sort().values for _ in range(2)])
    weight = torch.randn(2, keep, 24, generator=generator, dtype=torch.float64)
    leaves = [x, c, *mixer.parameters()]
    results = []
    for rows in (mixer(x, c, subset), gather_tokens(mixer(x, c), subset)):
        results.append((rows, torch.autograd.grad((rows * weight).sum(), leaves, allow_unused=True)))
    (fused, fused_grads), (plain, plain_grads) = results
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(fused_grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_dropping_inside_costs_less():
    """Counted by torch on the math path: queries, output projection and MLP of dropped rows are not computed."""
    from torch.utils.flop_counter import FlopCounterMode

    width, tokens, keep = 24, 17, 5
    mixer = AttentionMixer(width, 3, 1, attention="math")
    x, c = torch.randn(1, tokens, width), torch.randn(1, width)
    flops = []
    for subset in (torch.arange(keep)[None], None):
        with FlopCounterMode(display=False) as counter:
            mixer(x, c, subset)
        flops.append(counter.get_total_flops())
    row = width * width + width * width + 2 * 4 * width * width  # query, output projection, MLP
    row += 2 * tokens * width  # scores and their sum of values
    assert flops[1] - flops[0] == 2 * (tokens - keep) * row


def test_forward_with_a_class_token_by_hand(seed):
    model = make_model(seed, class_dim=5, mixer_layers=2)
    x, t, labels, subset, token = make_inputs(seed)
    out = model(x, t, labels, subset, class_token=token)
    embedded = token @ model.class_embedder.proj.weight.T + model.class_embedder.proj.bias
    mean, var = embedded.mean(-1, keepdim=True), embedded.var(-1, keepdim=True, unbiased=False)
    first = (embedded - mean) / (var + 1e-6).sqrt() * model.class_embedder.norm.weight + model.class_embedder.norm.bias
    h = torch.cat([first[:, None], model.x_embedder(x) + model.pos_embed], dim=1)
    c = model.t_embedder(t) + model.y_embedder(labels)
    for layer in model.mixer.layers:
        h = layer(h, c)
    h = torch.stack([h[b, [0, *(1 + subset[b]).tolist()]] for b in range(3)])
    for depth, block in enumerate(model.blocks):
        h = block(h, c)
        if depth == 1:
            aligned = model.projectors[0](h)
    shift, scale = model.final_layer.adaLN_modulation(c)
    normed = torch.nn.functional.layer_norm(h, (24,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    tight = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.velocity, model.final_layer.linear(normed[:, 1:]), **tight)
    torch.testing.assert_close(out.class_velocity, model.final_layer.class_linear(normed[:, 0]), **tight)
    torch.testing.assert_close(out.aligned[0], aligned, **tight)
    assert torch.equal(out.aligned_index, torch.cat([torch.zeros(3, 1, dtype=torch.int64), 1 + subset], dim=1))
    everything = model(x, t, labels, class_token=token)
    assert everything.velocity.shape == x.shape and everything.aligned_index is None
    assert everything.aligned[0].shape == (3, 17, 10)


@pytest.mark.parametrize("mixer", ["token_mlp", "depthwise_conv"])
def test_mixers_along_the_grid_go_around_the_class_token(mixer, seed):
    model = make_model(seed, class_dim=5, mixer=mixer)
    x, t, labels, subset, token = make_inputs(seed)
    c = model.t_embedder(t) + model.y_embedder(labels)
    mixed = model.mixer(model.x_embedder(x) + model.pos_embed, c)
    h = torch.cat([model.class_embedder(token), gather_tokens(mixed, subset)], dim=1)
    for block in model.blocks:
        h = block(h, c)
    velocity, class_velocity = model.final_layer(h, c)
    out = model(x, t, labels, subset, class_token=token)
    torch.testing.assert_close(out.velocity, velocity, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.class_velocity, class_velocity, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("restore", ["bypass", "fuse"])
@pytest.mark.parametrize("route", ["all", (1, 2)])
def test_the_class_token_is_never_dropped(route, restore, seed):
    """Where dropped tokens return, all patches and the class token are there; a class token reaches every output."""
    model = make_model(seed, class_dim=5, route=route, restore=restore, mixer="none")
    x, t, labels, subset, token = make_inputs(seed)
    out = model(x, t, labels, subset, class_token=token)
    assert out.velocity.shape == x.shape and out.class_velocity.shape == (3, 5)
    assert out.aligned[0].shape == (3, 9, 10) and (out.aligned_index[:, 0] == 0).all()
    assert not torch.allclose(out.class_velocity, model(x, t, labels, subset, class_token=token + 1).class_velocity)


def test_the_convolutional_projector_leaves_the_class_token_out(seed):
    model = make_model(seed, class_dim=5, projector="conv", mixer="none")
    x, t, labels, _, token = make_inputs(seed)
    out = model(x, t, labels, class_token=token)
    assert out.aligned[0].shape == (3, 16, 10)
    assert torch.equal(out.aligned_index, torch.arange(1, 17).expand(3, -1))


@pytest.mark.parametrize("align", [1, 4])
def test_an_aligned_share_always_has_the_class_token(align, seed):
    model = make_model(seed, class_dim=5)
    x, t, labels, subset, token = make_inputs(seed)
    chosen = draw_subset(3, (1, 8), align)
    out = model(x, t, labels, subset, chosen, class_token=token)
    assert torch.equal(out.aligned_index[:, 1:], 1 + subset.gather(1, chosen)) and (out.aligned_index[:, 0] == 0).all()


def test_the_loss_is_the_papers(seed):
    """L = mean |v - v*|^2 over kept patches + 0.03 mean |v_cls - v_cls*|^2 - 0.5 mean cos over K + 1 rows."""
    model = make_model(seed, class_dim=5)
    x, _, labels, _, token = make_inputs(seed)
    labels = labels.clamp(max=6)
    teacher = torch.randn(3, 17, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = draw(seed, 3, 0, 3, shape=(3, 8, 8), grid=(4, 4), keep=8, class_dim=5)
    losses = training_loss(model, x, labels, [teacher], draws, class_token=token)
    t, eps, eps_class = draws.time.double(), draws.noise.double(), draws.class_noise.double()
    at = t[:, None, None, None]
    dropped = torch.where(draws.drop_label, 7, labels)
    out = model(
        (1 - at) * x + at * eps, t, dropped, draws.subset, class_token=(1 - t[:, None]) * token + t[:, None] * eps_class
    )

    full = torch.zeros(3, 16, 12, dtype=torch.float64).scatter(
        1, draws.subset[..., None].expand(-1, -1, 12), out.velocity
    )
    error = (unpatchify(full, 2, (4, 4)) - (eps - x)).square()
    mask = torch.zeros(3, 16, dtype=torch.float64).scatter(1, draws.subset, 1.0).view(3, 1, 4, 4)
    mask = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
    velocity = (error * mask).sum() / (mask.sum() * 3)
    class_velocity = (out.class_velocity - (eps_class - token)).square().mean()
    rows = torch.stack([teacher[b, [0, *(1 + draws.subset[b]).tolist()]] for b in range(3)])
    cosine = torch.nn.functional.cosine_similarity(out.aligned[0], rows, dim=-1)
    assert cosine.shape == (3, 9)
    tight = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses.velocity, velocity, **tight)
    torch.testing.assert_close(losses.class_velocity, class_velocity, **tight)
    torch.testing.assert_close(losses.alignment, -cosine.mean(), **tight)
    torch.testing.assert_close(losses.total, velocity + 0.03 * class_velocity - 0.5 * cosine.mean(), **tight)


def test_class_noise_is_drawn_last(seed):
    """A recipe with a class token shares time, noise, labels and subset with one without."""
    settings = dict(shape=(3, 8, 8), grid=(4, 4), keep=8, align=4, posterior=True)
    without, with_class = draw(seed, 5, 3, 9, **settings), draw(seed, 5, 3, 9, **settings, class_dim=6)
    assert without.class_noise is None and with_class.class_noise.shape == (9, 6)
    for one, other in zip(without[:-1], with_class[:-1], strict=True):
        assert torch.equal(one, other)


def test_a_missing_or_unwanted_class_token_is_refused(seed):
    x, t, labels, _, token = make_inputs(seed)
    with pytest.raises(ValueError, match="class_token is missing; this model needs one of 5 numbers"):
        make_model(seed, class_dim=5)(x, t, labels)
    with pytest.raises(ValueError, match="class_token is given; this model has none"):
        make_model(seed)(x, t, labels, class_token=token)
    with pytest.raises(ValueError, match=r"class_token is of shape \(3, 4\), not \(3, 5\)"):
        make_model(seed, class_dim=5)(x, t, labels, class_token=token[:, :4])


def test_class_parts_start_as_reg_starts_them():
    """Zero head, LayerNorm at one and zero, Xavier projection; the other weights are those of a model without them."""
    plain, model = SiT(**SIZES), SiT(**SIZES, class_dim=5)
    plain.reset_parameters(4)
    model.reset_parameters(4)
    own = dict(model.named_parameters())
    for name, value in plain.named_parameters():
        assert torch.equal(value, own.pop(name)), name
    assert not own.pop("final_layer.class_linear.weight").any() and not own.pop("final_layer.class_linear.bias").any()
    assert (own.pop("class_embedder.norm.weight") == 1).all() and not own.pop("class_embedder.norm.bias").any()
    weight = own.pop("class_embedder.proj.weight")
    bound = (6 / (5 + 24)) ** 0.5
    assert 0.8 * bound < weight.abs().max() <= bound and not own.pop("class_embedder.proj.bias").any()
    assert not own
