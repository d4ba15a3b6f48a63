"""Draws depend on (seed, step, slot) and on nothing else."""

import pytest
import torch

from maskalign.objective.draws import SLOT_GROUP, draw, group_seed

SETTINGS = dict(shape=(2, 4, 4), grid=(4, 4), keep=8, align=4, posterior=True, class_dim=5)


def equal(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "parts",
    [[32], [16, 16], [8, 24], [4] * 8, [1, 30, 1], [5, 11, 16], [3, 13, 7, 9], [0, 32, 0], [8, 0, 24]],
)
def test_any_split_of_the_batch_draws_the_same(parts, seed):
    whole = draw(seed, 7, 0, 32, **SETTINGS)
    first, pieces = 0, []
    for count in parts:
        pieces.append(draw(seed, 7, first, count, **SETTINGS))
        first += count
    assert equal(whole, [torch.cat(column) for column in zip(*pieces, strict=True)])


def test_seed_step_and_slot_matter(seed):
    base = draw(seed, 3, 0, 8, **SETTINGS)
    others = [draw(seed + 1, 3, 0, 8, **SETTINGS), draw(seed, 4, 0, 8, **SETTINGS), draw(seed, 3, 8, 8, **SETTINGS)]
    for other in others:
        assert not torch.equal(base.noise, other.noise) and not torch.equal(base.time, other.time)
    noise = draw(seed, 3, 0, 4 * SLOT_GROUP, **SETTINGS).noise.flatten(1)
    assert len(noise[:, 0].unique()) == len(noise)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(0, 0, 0, 8, **SETTINGS)
    assert torch.equal(torch.rand(3), expected)


def test_recipes_share_time_noise_and_labels(seed):
    full = draw(seed, 0, 0, 8, shape=(2, 4, 4), grid=(4, 4), keep=16)
    part = draw(seed, 0, 0, 8, **SETTINGS)
    assert full.subset is None and full.align_subset is None and full.posterior is None
    assert torch.equal(full.time, part.time) and torch.equal(full.noise, part.noise)
    assert torch.equal(full.drop_label, part.drop_label)


def test_distributions(seed):
    d = [draw(seed, step, 0, 64, label_dropout=0.1, **SETTINGS) for step in range(100)]
    time = torch.cat([x.time for x in d])
    assert abs(time.mean() - 0.5) < 0.02 and abs(time.std() - 12**-0.5) < 0.02
    noise = torch.cat([x.noise for x in d])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    dropped = torch.cat([x.drop_label for x in d]).double().mean()
    assert abs(dropped - 0.1) < 6 * (0.09 / 6400) ** 0.5
    assert all((x.subset.diff(dim=1) > 0).all() and x.align_subset.max() < 8 for x in d)


def test_group_seeds_differ():
    seeds = {group_seed(seed, step, group) for seed in range(5) for step in range(50) for group in range(20)}
    assert len(seeds) == 5 * 50 * 20 and all(0 <= s < 2**63 for s in seeds)
