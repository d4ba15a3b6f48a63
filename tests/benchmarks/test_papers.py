"""What the convergence benchmark measures of the paper: rates, equal steps, the classifier, and the table beside it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.convergence import beside_paper
from benchmarks.convergence.command import Benchmark, chosen_recipes, parse
from benchmarks.convergence.papers import TIMES, paper_measures
from benchmarks.convergence.quality import Heldout, heldout_losses
from benchmarks.convergence.rates import choice, read_rates, with_rates, write_rates
from benchmarks.convergence.recipes import RECIPES
from maskalign.errors import UsageError
from maskalign.models import SiT

SIZES = dict(input_size=8, patch_size=2, depth=3, width=16, heads=2, teacher_dims=(5,), align_depth=2, projector_dim=8,
             num_classes=3, in_channels=3)  # fmt: skip


def row(recipe, metric, value, seed=0, step=10, run_steps=10):
    return dict(data="tiny", recipe=recipe, seed=seed, share=1.0, run_steps=run_steps, step=step, seconds=1.0,
                tflop=1000.0, metric=metric, time="", value=value)  # fmt: skip


def test_the_search_chooses_the_lowest_distance_at_the_end(tmp_path):
    rows = [row(f"{name}@{rate}", "frechet_cnn", value) for name, rate, value in
            (("repa", "0.1", 5.0), ("repa", "0.2", 4.0), ("reg", "0.1", 1.0), ("reg", "0.2", 2.0))]  # fmt: skip
    rows += [row("repa@0.1", "frechet_cnn", 0.5, step=5)]  # on the way: does not count
    write_rates(choice(rows), tmp_path / "rates.csv")
    assert read_rates(tmp_path / "rates.csv") == {"repa": "0.2", "reg": "0.1"}
    recipes = {"repa": {"a": 1}, "reg": {"optimizer.lr": "9"}, "other": {}}
    found = with_rates(recipes, "chosen", tmp_path / "rates.csv", {"other": "0.3"})
    assert [found[name]["optimizer.lr"] for name in recipes] == ["0.2", "9", "0.3"] and found["repa"]["a"] == 1
    found = with_rates({"repa": {}, "other": {}}, "reg", tmp_path / "rates.csv", {})
    assert {name: settings["optimizer.lr"] for name, settings in found.items()} == {"repa": "0.1", "other": "0.1"}
    with pytest.raises(UsageError, match="no learning rate for other"):
        with_rates({"other": {}}, "chosen", tmp_path / "rates.csv", {})


def test_suites_take_their_rates_where_they_should(tmp_path):
    words = ["--out", str(tmp_path), "--name", "tiny"]
    recipes, seeds, _ = chosen_recipes(parse([*words, "--suite", "rates", "--recipes", "reg", "--rates", "0.1,0.2"]))
    assert recipes == {f"reg@{rate}": {**RECIPES["reg"], "optimizer.lr": rate} for rate in ("0.1", "0.2")}
    assert seeds == (0,)
    write_rates([{"recipe": "maskalign", "lr": "0.3", "chosen": 1}], tmp_path / "rates-tiny.csv")
    recipes, _, _ = chosen_recipes(parse([*words, "--suite", "ablations"]))
    assert {settings["optimizer.lr"] for settings in recipes.values()} == {"0.3"} and len(recipes) == 8
    recipes, _, _ = chosen_recipes(parse([*words, "--suite", "final", "--rate", "repa=0.5"]))
    assert recipes["repa"]["optimizer.lr"] == "0.5" and "optimizer.lr" not in recipes["maskalign-fast"]


@pytest.mark.parametrize(
    "steps, slowest, points, sample_points",
    [
        (60, None, [20, 40, 60], [60]),
        (60, 60, [20, 40, 60], [60]),
        (100, 60, [20, 40, 60, 80, 100], [60, 100]),
        (110, 60, [20, 40, 60, 80, 100, 110], [60, 110]),
    ],
)
def test_equal_steps_are_points_of_every_run(steps, slowest, points, sample_points):
    options = SimpleNamespace(points=3, sample_points=1)
    found = Benchmark._points(SimpleNamespace(options=options), steps, slowest)
    assert found == (20, points, sample_points)


def heldout_of(images=6, class_dim=4):
    """A stand-in for `Heldout` with random arrays on a 2 x 2 grid of teacher rows."""
    generator = torch.Generator().manual_seed(0)
    arrays = {
        "images": torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8, generator=generator),
        "labels": torch.zeros(images, dtype=torch.int64),
        "tokens": torch.randn(images, 16, 5, generator=generator).half(),
        "class_tokens": torch.randn(images, 5, generator=generator).half(),
    }
    return SimpleNamespace(
        arrays=arrays,
        teacher=SimpleNamespace(grid=(4, 4)),
        class_tokens=lambda dim: arrays["class_tokens"].float()[:, :dim],
    )


def test_losses_given_a_class_token_have_names_of_their_own():
    """The class token goes in noised by the image's time, and the loss and cosine are of the patches alone."""
    heldout, seen = heldout_of(), []
    model = SiT(**SIZES, class_dim=4).eval()
    forward = model.forward

    def watched(x, t, labels, class_token=None):
        seen.append(class_token)
        return forward(x, t, labels, class_token=class_token)

    model.forward = watched
    found = heldout_losses(model, heldout, [0.0, 1.0], batch=4)
    assert set(found) == {(f"{name}_given_class", at) for name in ("velocity_loss", "cosine") for at in (0.0, 1.0)}
    torch.testing.assert_close(torch.cat(seen[:2]), heldout.class_tokens(4))  # nothing is noised at time 0
    assert not torch.equal(torch.cat(seen[2:]), heldout.class_tokens(4))
    assert set(heldout_losses(SiT(**SIZES).eval(), heldout, [0.5])) == {("velocity_loss", 0.5), ("cosine", 0.5)}


def test_class_tokens_are_projected_to_the_manifests_components():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal((7, 3))).half()
    components = {"mean": [0.5, 0.0, -1.0], "basis": [[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]], "scale": [2.0, 4.0]}
    entry = {"class_token": {"dim": 3, "components": components}}
    heldout = SimpleNamespace(
        arrays={"class_tokens": values}, name="t", manifest=SimpleNamespace(teachers={"t": entry})
    )
    expected = torch.stack([(values[:, 0].float() - 0.5) / 2, (0.6 * values[:, 1] + 0.8 * (values[:, 2] + 1)) / 4], 1)
    torch.testing.assert_close(Heldout.class_tokens(heldout, 2), expected.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(Heldout.class_tokens(heldout, 3), values.float())


@pytest.mark.parametrize("class_dim", [None, 4])
def test_stability_gap_and_heat_map(class_dim):
    """A model whose tokens do not see each other has no gap; one whose attention mixes them has one."""
    heldout = heldout_of(images=8)
    torch.manual_seed(1)
    model = SiT(**SIZES, class_dim=class_dim, mixer="none").eval()
    found = paper_measures(model, heldout, 8)
    assert set(found) == {*beside_paper.GAPS, "full_align_loss", "heat_ratio", "heat_ratio_chance"}
    assert abs(found["full_align_loss"]) <= 1 and found["heat_ratio"] >= 1
    # Fresh blocks are the identity: a subset of independent tokens has the same loss on average, and a spread.
    assert 0 < found["gap_error"] < 0.2 and abs(found["gap"]) < 6 * found["gap_error"]
    assert len(TIMES) == 5 and paper_measures(SiT(**{**SIZES, "teacher_dims": ()}).eval(), heldout, 8) == {}


def paper_rows(values, step=10):
    """Rows of the suite `paper`: {recipe: [distance by seed]}, the same at equal steps and at the end."""
    rows = []
    for recipe, distances in values.items():
        for seed, value in enumerate(distances):
            rows += [row(recipe, metric, value, seed, step) for metric in ("frechet_cnn", "kernel_cnn")]
            rows += [row(recipe, metric, of, seed, step) for metric, of in
                     (("gap", 0.02 if recipe == "reg" else 0.001), ("gap_error", 0.001), ("heat_ratio", 3.0 + seed),
                      ("full_align_loss", -0.3))]  # fmt: skip
    return rows


def test_the_table_beside_the_paper_says_how_sure_it_is():
    rows = paper_rows({"repa": [9, 10], "reg": [5, 6], "maskalign": [5.5, 7], "repa-maskalign": [11, 12]})
    lines = beside_paper.comparison(rows, None, {"maskalign@0.008 48/64": 0.9, "reg 64/64": 1.0})
    by_claim = {}
    for claim, _, here, sure in lines:
        by_claim.setdefault(claim, []).append((here, sure))
    assert [sure for _, sure in by_claim["`reg` has a lower distance than `repa`"]] == ["yes", "yes"]
    assert [sure for _, sure in by_claim["`maskalign` has a lower distance than `reg`"]] == ["not distinguishable"] * 2
    assert [sure for _, sure in by_claim["`repa-maskalign` has a lower distance than `repa`"]] == ["no", "no"]
    ((here, sure),) = by_claim["a step of `maskalign` takes less time than one of `reg`"]
    assert here.startswith("10.0% less") and sure == "yes"
    ((here, sure),) = by_claim["the stability gap G_r of `maskalign` is smaller than that of `reg`"]
    assert "+0.00100 ± 0.00071 against +0.02000 ± 0.00071, which is 5%" in here and sure == "yes"
    ((_, sure),) = by_claim["masking distributes large alignment gradients more evenly over the positions"]
    assert sure == "not distinguishable"


def test_ablations_name_the_best():
    rows = paper_rows({"reg": [4], "maskalign": [3], "maskalign-mask0": [2], "maskalign-mask0.5": [5],
                       "maskalign-layers0": [6], "maskalign-layers1": [3.5]})  # fmt: skip
    lines = beside_paper.comparison(paper_rows({"repa": [1]}), rows)
    found = {(claim, "steps each" in here): (here, sure) for claim, _, here, sure in lines if "is best" in claim}
    here, sure = found["mask ratio: 0.25 is best", True]
    assert here == "0: 2.00, 0.25: 3.00, 0.5: 5.00 (10 steps each)" and sure == "no: 0 is best, one seed"
    assert found["mixing layers: 2 is best", False][1] == "yes, one seed"
    assert found["parts: all is best", True][1] == "no: no masking is best, one seed"


def test_published_tables_are_whole():
    head, lines = beside_paper.published_table()
    assert all(len(line) == len(head) for line in lines)
    by_name = {(line[0], line[1]): dict(zip(head[2:], line[2:], strict=True)) for line in lines}
    assert by_name["MaskAlign", "XL/2"]["400K"] == "2.84" and by_name["REG", "B/2"]["400K"] == "15.2"
    assert beside_paper.PAPER_MASK["0.25"] == beside_paper.PAPER_LAYERS["2"] == 2.84
