"""mix_and_drop through Triton's interpreter, forward and backward, against float64."""

import collections

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskalign_kernels import mix_and_drop, runtime
from maskalign_kernels.mix_and_drop import launch as mix_launch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "shift", "scale", "gate", "w1", "b1", "w2", "b2")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
SHAPES = [
    # (B, N, D, K, T): grids of 7x9 and 14x14, one token, tiles that end early, several tiles of each.
    (2, 63, 40, 31, 13), (1, 196, 24, 98, 16), (2, 1, 8, 1, 1), (1, 70, 130, 66, 70), (2, 16, 64, None, 64),
    (3, 9, 20, 9, 5), (1, 5, 1, 2, 3),
]  # fmt: skip


def gradients(tensors, subset, weights):
    out = mix_and_drop(*tensors, subset)
    return out.detach(), torch.autograd.grad(out, tensors, weights.to(out.dtype))


@pytest.mark.parametrize(
    "shape, dtype", [(s, F32) for s in SHAPES] + [(s, dtype) for s in SHAPES[-3:] for dtype in (F16, BF16)], ids=str
)
def test_forward_and_gradients(shape, dtype, mix_case, assert_mixed, poisoned):
    assert runtime.INTERPRET
    index = torch.int32 if shape[1] % 2 else torch.int64
    assert_mixed(*mix_case(*shape, dtype, index=index))


@pytest.mark.parametrize("tokens, weights", [(BF16, F32), (F32, BF16), (F16, F32)])
def test_weights_of_another_dtype(tokens, weights, mix_case, assert_mixed, poisoned):
    assert_mixed(*mix_case(2, 20, 24, 12, 9, tokens, weights))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(2, 70), st.integers(1, 40)),
    share=st.one_of(st.none(), st.floats(0, 1)), dtype=st.sampled_from([F32, F16, BF16]),
    index=st.sampled_from([torch.int32, torch.int64]), numbers=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape(sizes, share, dtype, index, numbers, mix_case, assert_mixed, generator):
    generator.manual_seed(numbers)  # an example that fails can be had again
    B, N, D, T = sizes
    K = None if share is None else round(share * N)
    case = mix_case(B, N, D, K, T, dtype, index=index)
    if K != 0:
        assert_mixed(*case)
        return
    out, grads = gradients(*case, torch.zeros(B, 0, D))
    assert out.shape == (B, 0, D)
    assert all(torch.equal(grad, torch.zeros_like(t)) for grad, t in zip(grads, case[0], strict=True))


@pytest.mark.parametrize("block, steps", [(128, 1), (16, 8), (32, 1), (16, 2)])
def test_adversarial_rows(block, steps, mix_case, mix_truth, relative, generator, poisoned, monkeypatch):
    """Constant rows (variance zero) small and huge, a single spike, a large offset, huge values, zero gates and scales.

    Once with the statistics in one pass over the row, once by the path of rows too long for that.
    """
    config = {"ROWS": 4, "STEPS": steps, "BLOCK_D": block, "threads": 128, "stages": 1, "WHOLE": block * steps == 128}
    monkeypatch.setattr(mix_launch, "statistics_configs", lambda width: [config])
    tensors, subset = mix_case(2, 9, 96, 7, 4)
    with torch.no_grad():
        x, _, scale, gate = tensors[:4]
        x[0, 0], x[0, 1], x[0, 2] = 0, 1e-3, 3e7
        x[0, 3], x[0, 3, -1] = 0, 1e4
        x[1, 0] *= 1e15
        x[1, 1] *= 1e-20
        x[1, 2] += 64
        gate[0, ::2], scale[1, ::2] = 0, -1
    subset[:] = torch.stack([torch.arange(7), torch.arange(7).flip(0)])
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = mix_truth(*exact, subset)
    weights = torch.randn(expected.shape, generator=generator)
    out, grads = gradients(tensors, subset, weights)
    truths = torch.autograd.grad(expected, exact, weights.double())
    for row in range(7):  # Row by row: the huge ones would hide the others.
        assert relative(out[:, row], expected[:, row].detach()) < 1e-5, row
    for name, grad, true in zip(NAMES[1:], grads[1:], truths[1:], strict=True):
        assert relative(grad, true) < 1e-4, (name, relative(grad, true))
    for row in range(9):  # The mean of a large offset costs float32 some digits.
        assert relative(grads[0][:, row], truths[0][:, row]) < 2e-4, row


def test_two_runs_agree_bit_for_bit(mix_case, generator):
    tensors, subset = mix_case(3, 20, 40, 9, 20)
    weights = torch.randn(3, 9, 40, generator=generator)
    first, second = (gradients(tensors, subset, weights) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_batch_sums_over_several_images_per_program(mix_case, assert_mixed, poisoned, monkeypatch):
    images_per_program = mix_launch.images_per_program
    monkeypatch.setattr(mix_launch, "images_per_program", lambda *sizes: 2)
    assert_mixed(*mix_case(5, 40, 24, 20, 8))
    assert images_per_program(1, 1, 64, 1152) == 1 and images_per_program(256, 16, 64, 1152) == 8
    assert images_per_program(32, 8, 256, 1152) == 2 and images_per_program(4, 8, 256, 1152) == 1


def test_every_launch_may_take_another_configuration(mix_case, assert_mixed, poisoned, monkeypatch):
    """What tuning would choose last computes the same; each launch asks."""
    asked = set()

    def choose(name, key, configs, tensor, launch):
        asked.add(name)
        assert all(isinstance(part, (int, bool, torch.dtype)) for part in key), key
        launch(configs[0])  # As tuning would, before the real launch.
        return configs[-1]

    monkeypatch.setattr(mix_launch, "choose", choose)
    assert_mixed(*mix_case(2, 40, 70, 20, 8, F16))
    assert asked == {"statistics", "mix", "hidden", "tokens"}


def test_views_are_read_in_place(mix_truth, relative, generator, poisoned):
    """Any pitch between rows and images, vectors cut from one adaLN output, a broadcast gradient."""
    B, N, D, K, T = 2, 12, 40, 6, 8
    grid = torch.randn(B + 1, 2 * N, D + 9, generator=generator)
    adaln = torch.randn(B, 6 * D, generator=generator)
    x = grid[1:, ::2, 3 : 3 + D].requires_grad_()
    vectors = [v.requires_grad_() for v in adaln.chunk(6, dim=1)[1:4]]
    w1, w2 = torch.randn(N, T, generator=generator).mT, torch.randn(T, N, generator=generator).mT
    b1, b2 = torch.randn(2, T, generator=generator)[1], torch.randn(N, 3, generator=generator)[:, 1]
    tensors = [x, *vectors, *(t.requires_grad_() for t in (w1, b1, w2, b2))]
    subset = torch.rand(N, B, generator=generator).argsort(0).mT[:, :K]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, expected = mix_and_drop(*tensors, subset), mix_truth(*exact, subset)
    assert relative(out.detach(), expected.detach()) < 1e-6
    grads, truths = torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), exact)
    for name, grad, true in zip(NAMES, grads, truths, strict=True):
        assert relative(grad, true) < 1e-5, name


def test_autocast_multiplies_in_its_dtype_and_keeps_the_residual(mix_case, mix_truth, relative, generator):
    tensors, subset = mix_case(2, 20, 24, 12, 9)
    with torch.no_grad():
        tensors[3].mul_(1e-3)  # A small gate: what is left of the output is the residual, in float32.
    with torch.autocast("cpu", BF16):
        out = mix_and_drop(*tensors, subset)
    expected = mix_truth(*(t.double() for t in tensors), subset)
    assert out.dtype == F32
    assert 1e-7 < relative(out.detach(), expected.detach()) < 1e-4
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [g.dtype for g in grads] == [F32] * 8


def test_checkpointed_gradients_are_the_same(mix_case, generator):
    tensors, subset = mix_case(2, 20, 24, 12, 9)
    weights = torch.randn(2, 12, 24, generator=generator)
    _, plain = gradients(tensors, subset, weights)
    out = torch.utils.checkpoint.checkpoint(mix_and_drop, *tensors, subset, use_reentrant=False)
    again = torch.autograd.grad(out, tensors, weights)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_operators_pass_opcheck(mix_case):
    tensors, subset = mix_case(2, 6, 8, 3, 4)
    for index in (subset, None):
        torch.library.opcheck(torch.ops.maskalign_kernels.mix_and_drop.default, (*tensors, index, F32))
    with torch.no_grad():
        _, mean, rstd = torch.ops.maskalign_kernels.mix_and_drop(*tensors, subset, F32)
    arguments = (torch.randn(2, 3, 8), *(t.detach() for t in tensors), subset, mean, rstd, F32)
    torch.library.opcheck(torch.ops.maskalign_kernels.mix_and_drop_backward.default, arguments)


@pytest.mark.parametrize("dtype", [F32, F16])  # two launches of `tokens`, and one
def test_launches_load_and_store_what_the_report_counts(dtype, mix_case, counted_bytes, generator):
    """The count of the compile report plus the re-reads that it says L2 serves is what the programs really move."""
    from maskalign_kernels.mix_and_drop import cases

    B, N, K, D, T = 2, 128, 64, 64, 64  # Whole blocks: masked lanes load nothing, but index 0 is read for them.
    tensors, _ = mix_case(B, N, D, K, T, dtype)
    subset = torch.randperm(N, generator=generator).view(B, K)  # Every token is kept by an image: all of w2 is read.
    with counted_bytes() as count:
        gradients(tensors, subset, torch.ones(B, K, D, dtype=dtype))
    moved, again = collections.Counter(), collections.Counter()
    for case in cases.aot_cases([(B, N, K, D, T, dtype, dtype, dtype)], every_configuration=False):
        moved[case.kernel.__name__] += case.moved
        again[case.kernel.__name__] += case.cached
    assert count == moved + again
    assert count.distinct == moved, "what is moved is every tensor's bytes once, and the rest is read again"


def test_the_least_bytes_are_those_of_one_tile_and_one_group(mix_case, counted_bytes, monkeypatch):
    """Where nothing is left in parts, a launch touches exactly the bytes that the report calls its least."""
    from maskalign_kernels.mix_and_drop import cases

    B, N, K, D, T = 2, 64, 64, 32, 16
    (config, *_) = mix_launch.hidden_configs(T, F16, F16)
    monkeypatch.setattr(mix_launch, "hidden_configs", lambda *sizes: [config | {"BLOCK_D": D}])
    monkeypatch.setattr(mix_launch, "images_per_program", lambda B, *sizes: B)
    tensors, subset = mix_case(B, N, D, K, T, F16)
    with counted_bytes() as count:
        gradients(tensors, subset, torch.ones(B, K, D, dtype=F16))
    found = list(cases.aot_cases([(B, N, K, D, T, F16, F16, F16)], every_configuration=False))
    assert count.distinct == {case.kernel.__name__: case.least for case in found}
    assert all(case.moved == case.least for case in found)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, mix_case, relative):
    compiled = torch.compile(mix_and_drop, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        tensors, subset = mix_case(batch, 6, 8, 3, 4)
        out, expected = compiled(*tensors, subset), mix_and_drop(*tensors, subset)
        assert torch.equal(out, expected)
        for a, b in zip(*(torch.autograd.grad(o.square().sum(), tensors) for o in (out, expected)), strict=True):
            assert torch.equal(a, b)


def test_too_wide_a_hidden_layer_takes_the_reference(mix_case, assert_mixed, monkeypatch):
    monkeypatch.setattr(mix_launch, "mix", None)
    assert_mixed(*mix_case(1, 5, 8, 3, 257))
    with pytest.raises(TypeError):  # At 256 the operator, which is not there, is asked for.
        mix_and_drop(*mix_case(1, 5, 8, 3, 256)[0])


def test_an_empty_hidden_layer_takes_the_reference(mix_case):
    (x, shift, scale, gate, *_, b2), subset = mix_case(2, 5, 8, 3, 1)
    empty = torch.zeros(0, 5), torch.zeros(0), torch.zeros(5, 0)
    out = mix_and_drop(x, shift, scale, gate, *empty, b2, subset)
    rows = subset.unsqueeze(-1).expand(-1, -1, 8).long()
    expected = (x + gate[:, None] * b2[:, None]).gather(1, rows)
    torch.testing.assert_close(out, expected)


def test_float64_is_refused_on_the_triton_path(mix_case):
    tensors, subset = mix_case(1, 4, 8, 2, 2, torch.float64)
    with pytest.raises(ValueError, match=r"mix_and_drop: x is .*float64"):
        mix_and_drop(*tensors, subset)
