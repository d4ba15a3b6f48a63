"""Gradients of the alignment loss: with respect to the tokens at the tap, and to the trunk's parameters before it."""

import copy
from contextlib import contextmanager
from typing import NamedTuple

import torch

from maskalign.objective.alignment import alignment_loss


class TokenGradients(NamedTuple):
    """norms, cosines: (B, N) in the model's dtype, for the patches only; NaN at patches that the loss does not align.

    A norm is the norm of d(sum over aligned tokens of -cos) / d h, where h is the token's features at the tap. The
    training loss divides this sum by the number of aligned tokens; this is omitted here, because it would only make the
    gradients of subsets larger.
    """

    norms: torch.Tensor
    cosines: torch.Tensor


def cut_at_tap(model):
    """A frozen copy of a `SiT` that ends at its tap, because later blocks do not affect the alignment loss.

    The copy has the same forward pass, but its `velocity` has no meaning.
    """
    trunk = copy.deepcopy(model).eval().requires_grad_(False)
    trunk.blocks = trunk.blocks[: trunk.align_depth]
    return trunk


@contextmanager
def _leaf_at_tap(trunk):
    """Context in which the output of the last block is a leaf; gives a list that holds it after a forward pass."""
    found = []

    def cut(block, inputs, output):
        found[:] = [output.detach().requires_grad_()]
        return found[0]

    handle = trunk.blocks[-1].register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


def _forward(trunk, x_t, t, labels, subset, align_subset, full_forward, class_token):
    """The model's output. With `full_forward` the blocks see all tokens, and only the loss uses the subset."""
    extra = {} if class_token is None else {"class_token": class_token}
    if full_forward and subset is not None:
        if align_subset is not None:
            subset = subset.gather(1, align_subset)
        return trunk(x_t, t, labels, None, subset, **extra)
    return trunk(x_t, t, labels, subset, align_subset, **extra)


def token_gradients(
    trunk, x_t, t, labels, teachers, subset=None, align_subset=None, *, full_forward=False, class_token=None
):
    """Norm of the alignment loss's gradient at every patch token of the tapped block's output, before the projector.

    The loss includes the class token if the model has one; the gradient of the class token itself is not returned.

    Args:
        trunk: from `cut_at_tap`.
        x_t: (B, C, H, W) noised input; t (B,) time; labels (B,) int64.
        teachers: one (B, N, Dz) per teacher, floating or int8, on the student's grid; (B, 1 + N, Dz) with the class
            token as row 0 for a model that has one.
        subset: (B, K) int64, ascending: the patches that are kept; None aligns all tokens.
        align_subset: (B, n) int64, positions among the kept patches; None aligns all of these.
        full_forward: let the blocks see all tokens, and align those of the subset.
        class_token: (B, class_dim) the noised class token, for a model that has one.

    Returns:
        TokenGradients. With several teachers the mean of their cosines is used, as in the training loss.
    """
    with torch.enable_grad(), _leaf_at_tap(trunk) as found:
        out = _forward(trunk, x_t, t, labels, subset, align_subset, full_forward, class_token)
        (h,) = found
        batch, aligned = out.aligned[0].shape[:2]
        loss = alignment_loss(out.aligned, teachers, out.aligned_index) * (batch * aligned)
        (gradient,) = torch.autograd.grad(loss, h)
    shift = 0 if trunk.class_dim is None else 1  # the class token goes first
    norms = gradient[:, shift:].norm(dim=-1)
    if norms.shape[1] < trunk.num_tokens:  # the tap saw only the subset: put the norms at its positions
        norms = norms.new_full((batch, trunk.num_tokens), float("nan")).scatter(1, subset, norms)
    index = out.aligned_index
    if index is None:
        index = torch.arange(shift + trunk.num_tokens, device=h.device).expand(batch, -1)
    cosine = torch.stack([_cosines(z, y, index) for z, y in zip(out.aligned, teachers, strict=True)]).mean(dim=0)
    if shift:  # a projector along the grid does not project the class token
        first = 0 if trunk.projectors[0].needs_grid else 1
        index, cosine = index[:, first:] - 1, cosine[:, first:]
    nowhere = torch.full_like(norms, float("nan"))
    return TokenGradients(nowhere.scatter(1, index, norms.gather(1, index)), nowhere.scatter(1, index, cosine))


@torch.no_grad()
def _cosines(rows, teacher, index):
    wanted = teacher.to(rows.dtype).gather(1, index.unsqueeze(-1).expand(-1, -1, teacher.shape[-1]))
    return torch.cosine_similarity(rows, wanted, dim=-1)


def parameter_groups(trunk):
    """Parameters of the trunk that affect the alignment loss: dict from a group's name to its parameters.

    The groups are `embedding` (patches, time, label, class token), `mixer` if the model has one, and `block 1` to the
    tapped block. Projectors are not included, because they are discarded after training.
    """
    embedders = [trunk.x_embedder, trunk.t_embedder, trunk.y_embedder, trunk.class_embedder]
    groups = {"embedding": [module for module in embedders if module is not None], "mixer": [trunk.mixer]}
    groups |= {f"block {depth + 1}": [block] for depth, block in enumerate(trunk.blocks)}
    found = {name: [p for module in modules for p in module.parameters()] for name, modules in groups.items()}
    return {name: parameters for name, parameters in found.items() if parameters}


def trunk_gradients(
    trunk, x_t, t, labels, teachers, subset=None, align_subset=None, *, full_forward=False, class_token=None
):
    """Gradient of the alignment loss (the mean, as in training) with respect to the trunk's parameters up to the tap.

    For the arguments see `token_gradients`.

    Returns:
        dict from the name of a group (`parameter_groups`) to its flat gradient, which is zero for parameters that do
        not affect the loss.
    """
    groups = parameter_groups(trunk)
    parameters = [parameter for group in groups.values() for parameter in group]
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            out = _forward(trunk, x_t, t, labels, subset, align_subset, full_forward, class_token)
            loss = alignment_loss(out.aligned, teachers, out.aligned_index)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    finally:
        for parameter, needed in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed)
    gradients = iter(gradients)
    return {name: torch.cat([next(gradients).flatten() for _ in group]) for name, group in groups.items()}


def gradient_cosines(first, second):
    """Cosine of two results of `trunk_gradients`: dict group -> float, and `all` for the whole trunk.

    The products are summed in float64. A group with a zero gradient has no direction and is not included.
    """
    products = {}
    for name in first:
        a, b = first[name].double(), second[name].double()
        products[name] = torch.stack([a @ b, a @ a, b @ b])
    products["all"] = torch.stack(list(products.values())).sum(dim=0)
    found = {}
    for name, values in products.items():
        ab, aa, bb = values.tolist()
        if aa > 0 and bb > 0:
            found[name] = ab / (aa * bb) ** 0.5
    return found
