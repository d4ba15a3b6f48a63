"""Gradient norms and parameter gradients against plain autograd in float64, token by token."""

import pytest
import torch

from maskalign.analysis.gradients import (
    cut_at_tap,
    gradient_cosines,
    parameter_groups,
    token_gradients,
    trunk_gradients,
)
from maskalign.models.routing import draw_subset


def batch(model, seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, model.in_channels, model.input_size, model.input_size, generator=generator).double()
    t = torch.rand(count, generator=generator).double()
    labels = torch.arange(count) % (model.num_classes + 1)
    rows = model.num_tokens + (model.class_dim is not None)
    teachers = [torch.randn(count, rows, d, generator=generator).double() for d in model.teacher_dims]
    subset = draw_subset(count, model.grid, 7, generator=generator)
    return (x, t, labels, teachers), subset, draw_subset(count, (1, 7), 4, generator=generator)


def token_of(model, seed, count=3):
    """The noised class token as the keyword argument of everything here; None for a model without one."""
    if model.class_dim is None:
        return {"class_token": None}
    generator = torch.Generator().manual_seed(seed + 100)
    return {"class_token": torch.randn(count, model.class_dim, generator=generator).double()}


def features_at_tap(model, x, t, labels, subset, token):
    """Output of the tapped block in the whole model's own forward pass."""
    found = []
    handle = model.blocks[model.align_depth - 1].register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        model(x, t, labels, subset, **token)
    handle.remove()
    return found[0]


def norms_by_loops(model, h, present, aligned, teachers):
    """Norm at each present patch of d(sum of -cos over `aligned` patches) / dh, one image and one token at a time.

    The class token's own term pulls on no patch, since a pointwise projector reads the class token alone there."""
    batch, tokens = len(h), model.num_tokens
    shift = int(model.class_dim is not None)
    norms = torch.full((batch, tokens), float("nan"), dtype=torch.float64)
    for image in range(batch):
        total = torch.zeros_like(h[image])
        for token in aligned[image].tolist():
            row = present[image].tolist().index(token)
            rows = h[image : image + 1].clone().requires_grad_()
            cosine = 0
            for projector, z in zip(model.projectors, teachers, strict=True):
                seen = projector(rows[:, shift:]) if projector.needs_grid else projector(rows)[:, shift:]
                student, wanted = seen[0, row], z[image, shift + token]
                cosine = cosine + (student @ wanted) / (student.norm() * wanted.norm())
            (-cosine / len(teachers)).backward()
            total += rows.grad[0]
        for token in aligned[image].tolist():
            norms[image, token] = total[shift + present[image].tolist().index(token)].square().sum().sqrt()
    return norms


CASES = {
    "plain": dict(mixer="none"),
    "token mixer": dict(),
    "two teachers": dict(teacher_dims=(5, 9)),
    "bypass": dict(route=(1, 3), restore="bypass"),
    "tap before the route": dict(route=(2, 3), restore="bypass"),
    "loss only": dict(route="none", mixer="none"),
    "convolution": dict(projector="conv", route="none", mixer="none"),
    "mixing layers": dict(mixer="attention"),
    "class token, mixing layers": dict(class_dim=6, mixer="attention"),
    "class token, two teachers": dict(class_dim=6, teacher_dims=(5, 9), mixer="none"),
    "class token, bypass": dict(class_dim=6, route=(1, 3), restore="bypass"),
    "class token, convolution": dict(class_dim=6, projector="conv", route="none", mixer="none"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["full", "masked", "full forward", "align subset"])
def test_norms_are_those_of_autograd_token_by_token(make_model, seed, name, way):
    model = make_model(seed, **CASES[name])
    inputs, subset, align_subset = batch(model, seed)
    everything = torch.arange(model.num_tokens).expand(3, -1)
    seen = None if way in ("full", "full forward") or model.route is None else subset
    token = token_of(model, seed)
    h = features_at_tap(model, *inputs[:3], seen, token)
    present = subset if h.shape[1] < model.num_tokens else everything
    aligned = {
        "full": everything,
        "masked": subset if model.tap_sees_subset or model.route is None else everything,
        "full forward": subset,
        "align subset": present.gather(1, align_subset),
    }[way]
    arguments = [] if way == "full" else [subset, align_subset] if way == "align subset" else [subset]
    found = token_gradients(cut_at_tap(model), *inputs, *arguments, full_forward=way == "full forward", **token)
    expected = norms_by_loops(model, h, present, aligned, inputs[3])
    torch.testing.assert_close(found.norms, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert (found.norms.isfinite().sum(dim=1) == aligned.shape[1]).all()
    assert torch.equal(found.cosines.isfinite(), found.norms.isfinite())


@pytest.mark.parametrize("class_dim", [None, 6])
def test_cosines_are_those_of_the_projected_tokens(make_model, seed, class_dim):
    model = make_model(seed, teacher_dims=(5, 9), class_dim=class_dim)
    inputs, subset, _ = batch(model, seed)
    shift, own = int(class_dim is not None), token_of(model, seed)
    found = token_gradients(cut_at_tap(model), *inputs, subset, **own)
    with torch.no_grad():
        out = model(*inputs[:3], subset, **own)
    for image in range(3):
        for row, token in enumerate(subset[image].tolist()):
            cosines = [
                torch.cosine_similarity(z[image, shift + row], y[image, shift + token], dim=0)
                for z, y in zip(out.aligned, inputs[3], strict=True)
            ]
            assert float(found.cosines[image, token]) == pytest.approx(float(sum(cosines) / 2), abs=1e-12)


def test_int8_teachers_are_read_as_they_are(make_model, seed):
    model = make_model(seed)
    (x, t, labels, _), subset, _ = batch(model, seed)
    teacher = torch.randint(-127, 128, (3, model.num_tokens, 5), dtype=torch.int8)
    trunk = cut_at_tap(model)
    small = token_gradients(trunk, x, t, labels, [teacher], subset)
    plain = token_gradients(trunk, x, t, labels, [teacher.double() * 7], subset)
    torch.testing.assert_close(small.norms, plain.norms, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_a_cut_model_ends_at_its_tap_and_leaves_the_model_alone(make_model, seed):
    model = make_model(seed, depth=5)
    inputs, subset, _ = batch(model, seed)
    trunk = cut_at_tap(model)
    assert len(trunk.blocks) == 2 and len(model.blocks) == 5
    with torch.no_grad():
        whole, cut = model(*inputs[:3], subset), trunk(*inputs[:3], subset)
    assert torch.equal(whole.aligned[0], cut.aligned[0]) and torch.equal(whole.aligned_index, cut.aligned_index)
    token_gradients(trunk, *inputs)
    trunk_gradients(trunk, *inputs)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in trunk.parameters()) and not trunk.blocks[-1]._forward_hooks


def test_trunk_gradients_of_a_model_with_a_class_token(make_model, seed):
    """The loss is a mean over the class token and the kept patches, and the class token's embedder is in the trunk."""
    model = make_model(seed, class_dim=6, mixer="attention")
    inputs, subset, _ = batch(model, seed)
    token = token_of(model, seed)
    found = trunk_gradients(cut_at_tap(model), *inputs, subset, **token)
    z = model(*inputs[:3], subset, **token).aligned[0]
    rows = torch.cat([torch.zeros_like(subset[:, :1]), 1 + subset], dim=1)
    wanted = inputs[3][0].gather(1, rows.unsqueeze(-1).expand(-1, -1, 5))
    assert z.shape[1] == 8
    (-torch.cosine_similarity(z, wanted, dim=-1).sum() / (3 * 8)).backward()
    embedders = [model.x_embedder, model.t_embedder, model.y_embedder, model.class_embedder]
    for name, modules in {"embedding": embedders, "mixer": [model.mixer], "block 2": [model.blocks[1]]}.items():
        plain = torch.cat([p.grad.flatten() for module in modules for p in module.parameters()])
        torch.testing.assert_close(found[name], plain, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("way", ["full", "masked", "full forward"])
def test_trunk_gradients_are_those_of_the_training_loss(make_model, seed, way):
    model = make_model(seed)
    inputs, subset, _ = batch(model, seed)
    x, t, labels, (teacher,) = inputs
    arguments = [] if way == "full" else [subset]
    found = trunk_gradients(cut_at_tap(model), *inputs, *arguments, full_forward=way == "full forward")
    out = model(x, t, labels, subset if way == "masked" else None)
    z = out.aligned[0]
    wanted = teacher if way != "masked" else teacher.gather(1, subset.unsqueeze(-1).expand(-1, -1, 5))
    cosine = torch.cosine_similarity(z, wanted, dim=-1)
    (-(cosine.gather(1, subset) if way == "full forward" else cosine).mean()).backward()
    for name, group in parameter_groups(cut_at_tap(model)).items():
        modules = {"embedding": [model.x_embedder, model.t_embedder, model.y_embedder], "mixer": [model.mixer]}
        chosen = modules.get(name) or [model.blocks[int(name.split()[-1]) - 1]]
        plain = torch.cat([p.grad.flatten() for module in chosen for p in module.parameters()])
        assert len(plain) == sum(p.numel() for p in group)
        torch.testing.assert_close(found[name], plain, rtol=1e-9, atol=1e-13)
    assert set(found) == {"embedding", "mixer", "block 1", "block 2"}


def test_cosines_of_known_gradients():
    first = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([3.0]), "unused": torch.zeros(2)}
    second = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([-1.0]), "unused": torch.zeros(2)}
    found = gradient_cosines(first, second)
    assert found == {"a": 0.0, "b": -1.0, "all": pytest.approx(-3 / (10 * 5) ** 0.5)}
    assert gradient_cosines(first, first)["all"] == pytest.approx(1)


def test_a_route_behind_the_tap_leaves_the_mixer_out(make_model, seed):
    model = make_model(seed, route=(2, 3), restore="bypass")
    inputs, subset, _ = batch(model, seed)
    gradients = trunk_gradients(cut_at_tap(model), *inputs, subset)
    assert not gradients["mixer"].any() and gradients["block 2"].any()
    assert "mixer" not in gradient_cosines(gradients, gradients)
