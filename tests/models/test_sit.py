"""The method's forward pass: presets, routes, restores, taps and mixers, each against what the setting promises."""

import itertools

import pytest
import torch

from maskalign.errors import UsageError
from maskalign.models import PRESETS, SiT, draw_subset
from maskalign.models.layers import patchify, unpatchify
from maskalign.models.mixer import DepthwiseConvMixer

MIXERS = ("token_mlp", "depthwise_conv", "attention", "none")
SMALL = dict(
    input_size=8, patch_size=2, in_channels=3, num_classes=5, depth=4, width=16, heads=2,
    teacher_dims=(6,), align_depth=2, projector_dim=12, mixer_hidden=4,
)  # fmt: skip


def small(seed=0, **settings):
    """A tiny float64 model whose gates are open, so that every part of it shows in the output."""
    torch.manual_seed(seed)
    model = SiT(**{**SMALL, **settings}).double()
    for name, p in model.named_parameters():
        if "adaLN" in name or "final_layer" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


def inputs(batch=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.rand(batch, generator=g, dtype=torch.float64), torch.randint(0, 6, (batch,), generator=g)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_published_size(name):
    with torch.device("meta"):
        model = SiT.from_preset(name, mixer="none")
    depth, width, heads = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}[
        name[4:].split("/")[0]
    ]
    assert (len(model.blocks), model.width, model.heads) == (depth, width, heads)
    assert model.patch_size == int(name[-1]) and model.num_tokens == (32 // model.patch_size) ** 2
    assert model.align_depth == (4 if name[4] in "SB" else 8)


def test_xl_has_the_parameters_of_the_reference():
    with torch.device("meta"):
        model = SiT.from_preset("SiT-XL/2", mixer="none")
    projector = sum(p.numel() for p in model.projectors.parameters())
    # The published count holds the position embedding, which is a buffer here.
    backbone = sum(p.numel() for p in model.parameters()) - projector + model.pos_embed.numel()
    assert round(backbone / 1e6, 1) == 675.1 and round(projector / 1e6, 1) == 8.1


@pytest.mark.parametrize("mixer", MIXERS)
def test_runs_on_meta(mixer):
    """Shapes and memory of a model that is nowhere."""
    with torch.device("meta"):
        model = SiT(**SMALL, mixer=mixer)
        subset = torch.zeros(3, 4, dtype=torch.int64)
        out = model(torch.randn(3, 3, 8, 8), torch.rand(3), torch.zeros(3, dtype=torch.int64), subset)
        (out.velocity.sum() + sum(rows.sum() for rows in out.aligned)).backward()
    assert out.velocity.is_meta and out.velocity.shape == (3, 4, model.patch_size**2 * 3)
    assert all(p.grad is None or p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 3, 4, 16), (2, 3, 16, 16), (2, 4, 8, 8), (3, 8, 8)])
def test_another_shape_is_one_clear_line(shape):
    with pytest.raises(ValueError, match=r"x is of shape .* takes \(B, 3, 8, 8\)"):
        SiT(**SMALL)(torch.randn(shape), torch.rand(shape[0]), torch.zeros(shape[0], dtype=torch.int64))


def test_unknown_preset_is_one_clear_line():
    with pytest.raises(UsageError, match="SiT-B/2"):
        SiT.from_preset("SiT-H/2")


@pytest.mark.parametrize("patch, size, channels", [(2, 8, 3), (4, 12, 4), (8, 8, 1), (1, 5, 2)])
def test_patchify_is_the_layout_of_the_final_layer(patch, size, channels, seed):
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed))
    tokens = patchify(x, patch)
    grid = (size // patch,) * 2
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        own = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].permute(0, 2, 3, 1)
        assert torch.equal(tokens[:, row * grid[1] + column], own.flatten(1))
    assert torch.equal(unpatchify(tokens, patch, grid), x)


@pytest.mark.parametrize("mixer", ["token_mlp", "depthwise_conv", "attention"])
def test_a_fresh_mixer_is_the_identity(mixer):
    torch.manual_seed(3)
    plain = small(mixer="none")
    mixed = small(mixer=mixer)
    for name, p in mixed.named_parameters():
        if name.startswith("mixer") and "adaLN" in name:
            torch.nn.init.zeros_(p)
    missing, unexpected = mixed.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("mixer.") for name in missing)
    subset = draw_subset(3, (4, 4), 8)
    for chosen in (None, subset):
        torch.testing.assert_close(mixed(*inputs(), chosen).velocity, plain(*inputs(), chosen).velocity)


@pytest.mark.parametrize("mixer", MIXERS)
def test_kept_tokens_know_of_dropped_ones_only_through_the_mixer(mixer, seed):
    model = small(mixer=mixer)
    x, t, labels = inputs()
    subset = draw_subset(3, (4, 4), 8, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_(True)
    model(x, t, labels, subset).velocity.square().sum().backward()
    seen = patchify(x.grad, 2).abs().sum(-1) > 0
    kept = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, subset, True)
    assert torch.equal(seen, kept) if mixer == "none" else (seen & ~kept).any()


def test_dropping_without_mixer_is_the_model_on_those_tokens_alone():
    model = small(mixer="none")
    x, t, labels = inputs()
    subset = draw_subset(3, (4, 4), 6)
    out = model(x, t, labels, subset)
    # The same blocks, run by hand on the kept tokens.
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(labels)
    rows = torch.stack([tokens[b, subset[b]] for b in range(3)])
    for depth, block in enumerate(model.blocks):
        rows = block(rows, c)
        if depth == 1:
            aligned = model.projectors[0](rows)
    torch.testing.assert_close(out.velocity, model.final_layer(rows, c)[0])
    torch.testing.assert_close(out.aligned[0], aligned)
    assert torch.equal(out.aligned_index, subset)


@pytest.mark.parametrize("restore", ["none", "bypass", "fuse"])
@pytest.mark.parametrize("route", ["all", "none", (0, 2), (1, 3), (2, 4)])
@pytest.mark.parametrize("align_depth", [1, 2, 4])
def test_shapes_of_every_route_and_tap(restore, route, align_depth):
    if route == "none" and restore != "none":
        restore = "none"
    model = small(route=route, restore=restore, align_depth=align_depth)
    subset = draw_subset(3, (4, 4), 8)
    out = model(*inputs(), subset)
    start, end = {"all": (0, 4), "none": (0, 0)}.get(route, route)
    comes_back = restore != "none" or route == "none"
    assert out.velocity.shape == ((3, 3, 8, 8) if comes_back else (3, 8, 12))
    inside = start < align_depth and (align_depth <= end or not comes_back)
    assert out.aligned[0].shape == (3, 8 if inside or route == "none" else 16, 6)
    if inside or route == "none":
        assert torch.equal(out.aligned_index, subset)
    else:
        assert out.aligned_index is None
    full = model(*inputs())
    assert full.velocity.shape == (3, 3, 8, 8) and full.aligned[0].shape == (3, 16, 6) and full.aligned_index is None
    assert model(*inputs(), subset, align=False).aligned == []


def test_bypass_returns_dropped_tokens_as_they_were():
    model = small(route=(1, 3), restore="bypass", mixer="none")
    x, t, labels = inputs()
    subset = draw_subset(3, (4, 4), 8)
    out = model(x, t, labels, subset).velocity
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(labels)
    tokens = model.blocks[0](tokens, c)
    rows = torch.stack([tokens[b, subset[b]] for b in range(3)])
    rows = model.blocks[2](model.blocks[1](rows, c), c)
    tokens = tokens.clone()
    for b in range(3):
        tokens[b, subset[b]] = rows[b]
    tokens, _ = model.final_layer(model.blocks[3](tokens, c), c)
    torch.testing.assert_close(out, unpatchify(tokens, 2, (4, 4)))


@pytest.mark.parametrize("route", ["all", (1, 3)])
@pytest.mark.parametrize("restore", ["none", "bypass", "fuse"])
def test_the_whole_set_as_subset_is_evaluation(route, restore):
    model = small(route=route, restore=restore)
    everything = torch.arange(16).expand(3, 16)
    a, b = model(*inputs(), everything), model(*inputs())
    torch.testing.assert_close(a.velocity, b.velocity)
    torch.testing.assert_close(a.aligned[0], b.aligned[0])


@pytest.mark.parametrize("route", ["all", "none", (1, 4)])
@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_an_independent_alignment_subset_selects_rows(route, projector):
    align_depth = 1 if projector == "conv" and route != "none" else 2
    route = (1, 4) if projector == "conv" and route == "all" else route
    model = small(route=route, projector=projector, align_depth=align_depth)
    subset = draw_subset(3, (4, 4), 8)
    whole = model(*inputs(), subset if route != "none" else None)
    chosen = draw_subset(3, (1, whole.aligned[0].shape[1]), 3)
    part = model(*inputs(), subset, align_subset=chosen)
    expected = torch.stack([whole.aligned[0][b, chosen[b]] for b in range(3)])
    torch.testing.assert_close(part.aligned[0], expected)
    places = whole.aligned_index.gather(1, chosen) if whole.aligned_index is not None else chosen
    assert torch.equal(part.aligned_index, places)


def test_several_teachers_and_none():
    out = small(teacher_dims=(6, 3))(*inputs())
    assert [z.shape[-1] for z in out.aligned] == [6, 3]
    assert small(teacher_dims=())(*inputs()).aligned == []


def test_attention_implementations_agree():
    sdpa, plain = small(attention="sdpa", qk_norm=True), small(attention="math", qk_norm=True)
    plain.load_state_dict(sdpa.state_dict())
    torch.testing.assert_close(sdpa(*inputs()).velocity, plain(*inputs()).velocity)


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(patch_size=3), "patch_size"),
        (dict(align_depth=5), "align_depth"),
        (dict(align_depth=0), "align_depth"),
        (dict(route=(2, 9)), "route"),
        (dict(route=(2, 2)), "route"),
        (dict(heads=3), "heads"),
        (dict(mixer="mean"), "mixer"),
        (dict(restore="copy"), "restore"),
        (dict(projector="linear"), "projector"),
        (dict(attention="ring"), "attention"),
        (dict(width=18), "width"),
    ],
)
def test_bad_settings_name_themselves(settings, word):
    with pytest.raises(ValueError, match=word):
        small(**settings)


def random_depthwise(grid, width=6):
    mixer = DepthwiseConvMixer(width, grid).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_depthwise_mixer_is_its_formula(grid, seed):
    """x + gate * conv(LayerNorm(x) * (1 + scale) + shift), the 7x7 convolution written out as a sum."""
    torch.manual_seed(seed)
    (rows, columns), width = grid, 6
    mixer = random_depthwise(grid, width)
    x, c = torch.randn(2, rows * columns, width).double(), torch.randn(2, width).double()
    subset = torch.tensor([[0, 3, 7], [1, 2, 11]])
    shift, scale, gate = (part.unsqueeze(1) for part in mixer.adaLN_modulation(c))
    centered = x - x.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    padded = torch.zeros(2, rows + 6, columns + 6, width, dtype=torch.float64)
    padded[:, 3 : 3 + rows, 3 : 3 + columns] = normed.view(2, rows, columns, width)
    mixed = mixer.conv.bias.expand(2, rows, columns, width).clone()
    for down, right in itertools.product(range(7), range(7)):
        mixed += padded[:, down : down + rows, right : right + columns] * mixer.conv.weight[:, 0, down, right]
    expected = x + gate * mixed.flatten(1, 2)
    torch.testing.assert_close(mixer(x, c), expected, rtol=1e-12, atol=1e-12)
    kept = torch.stack([expected[b, subset[b]] for b in range(2)])
    torch.testing.assert_close(mixer(x, c, subset), kept, rtol=1e-12, atol=1e-12)


def test_a_depthwise_gradient_has_the_strides_of_its_weight():
    """A convolution's own gradient has others in its dimension of size 1, of which DDP warns on every rank."""
    mixer = random_depthwise((8, 8))
    mixer(torch.randn(2, 64, 6).double(), torch.randn(2, 6).double()).square().sum().backward()
    assert mixer.conv.weight.grad.stride() == mixer.conv.weight.stride()
