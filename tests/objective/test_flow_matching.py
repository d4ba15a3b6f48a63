"""The training loss against sums written out by hand in float64, for routes that predict all tokens and a subset."""

import torch

from maskalign.models import SiT
from maskalign.objective import alignment_loss, draw, sample_posterior, training_loss


def make(seed, **settings):
    torch.manual_seed(seed)
    own = dict(input_size=8, patch_size=2, in_channels=3, num_classes=4, depth=3, width=16, heads=2, mixer_hidden=4)
    model = SiT(**own, teacher_dims=(5, 7), align_depth=2, projector_dim=8, **settings).double()
    for name, p in model.named_parameters():
        if "adaLN" in name or "final" in name:
            torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(4, 3, 8, 8).double()
    return model, x, torch.randint(0, 4, (4,)), [torch.randn(4, 16, 5).double(), torch.randn(4, 16, 7).double()]


def test_velocity_loss_counts_only_the_kept_tokens(seed):
    model, x, labels, teachers = make(seed)
    draws = draw(seed, 0, 0, 4, shape=(3, 8, 8), grid=(4, 4), keep=8)
    losses = training_loss(model, x, labels, teachers, draws, align_weight=0.3)
    t = draws.time.double().view(-1, 1, 1, 1)
    noise = draws.noise.double()
    dropped = torch.where(draws.drop_label, 4, labels)
    out = model((1 - t) * x + t * noise, draws.time.double(), dropped, draws.subset)
    error = 0.0
    for b in range(4):
        for k, token in enumerate(draws.subset[b].tolist()):
            row, column = divmod(token, 4)
            patch = (noise - x)[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(1, 2, 0).reshape(-1)
            error += (out.velocity[b, k] - patch).square().sum()
    torch.testing.assert_close(losses.velocity, error / (4 * 8 * 12))
    cosine = [
        torch.stack(
            [
                torch.cosine_similarity(z[b, k], teacher[b, i], dim=0)
                for b in range(4)
                for k, i in enumerate(draws.subset[b])
            ]
        )
        for z, teacher in zip(out.aligned, teachers, strict=True)
    ]
    torch.testing.assert_close(losses.alignment.double(), -(cosine[0].mean() + cosine[1].mean()) / 2)
    torch.testing.assert_close(losses.total.double(), losses.velocity + 0.3 * losses.alignment.double())


def test_no_alignment_leaves_the_projectors_out(seed):
    model, x, labels, teachers = make(seed)
    draws = draw(seed, 0, 0, 4, shape=(3, 8, 8), grid=(4, 4), keep=16)
    losses = training_loss(model, x, labels, teachers, draws, align_weight=0.0)
    losses.total.backward()
    assert losses.alignment == 0 and all(p.grad is None for p in model.projectors.parameters())
    assert torch.equal(losses.total, losses.velocity)


def test_loss_only_masking_aligns_the_subset_and_predicts_all(seed):
    model, x, labels, teachers = make(seed, route="none")
    draws = draw(seed, 0, 0, 4, shape=(3, 8, 8), grid=(4, 4), keep=8)
    full = draws._replace(subset=None)
    part = training_loss(model, x, labels, teachers, draws)
    whole = training_loss(model, x, labels, teachers, full)
    torch.testing.assert_close(part.velocity, whole.velocity)
    assert part.alignment != whole.alignment


def test_int8_teachers_align_as_their_rows(seed):
    torch.manual_seed(seed)
    z = torch.randn(2, 6, 9).double()
    rows = torch.randint(-127, 128, (2, 6, 9), dtype=torch.int8)
    expected = -torch.cosine_similarity(z, rows.double(), dim=-1).mean()
    torch.testing.assert_close(alignment_loss([z], [rows], None).double(), expected, rtol=1e-6, atol=1e-6)


def test_posterior(seed):
    torch.manual_seed(seed)
    moments, n = torch.randn(2, 8, 3, 3).half(), torch.randn(2, 4, 3, 3)
    z = sample_posterior(moments, n, 0.18215, 0.5)
    torch.testing.assert_close(z, (moments[:, :4].float() + moments[:, 4:].float() * n) * 0.18215 + 0.5)
