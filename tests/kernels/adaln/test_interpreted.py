"""The adaLN operations through Triton's interpreter, forward and backward, against float64."""

import collections

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import maskalign_kernels
from maskalign_kernels import adaln_modulate, gated_residual, gated_residual_adaln, runtime
from maskalign_kernels.adaln import launch as adaln_launch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPERATIONS = ("adaln_modulate", "gated_residual", "gated_residual_adaln")
every_operation = pytest.mark.parametrize("operation", OPERATIONS)
SHAPES = [
    # (B, N, D, K): rows that end in the middle of a program, columns in the middle of a tile; one token, one channel.
    (2, 37, 40, 18), (1, 35, 300, None), (2, 1, 8, 1), (1, 5, 1, 2), (3, 9, 20, 9),
]  # fmt: skip


def results(operation, tensors, subset, weights):
    out = getattr(maskalign_kernels, operation)(*tensors, subset)
    outs = out if isinstance(out, tuple) else (out,)
    grads = torch.autograd.grad(outs, tensors, [weights.to(o.dtype) for o in outs])
    return *(o.detach() for o in outs), *grads


@every_operation
@pytest.mark.parametrize(
    "shape, dtype", [(s, F32) for s in SHAPES] + [(s, dtype) for s in SHAPES[:2] for dtype in (F16, BF16)], ids=str
)
def test_forward_and_gradients(operation, shape, dtype, adaln_case, assert_adaln, poisoned):
    assert runtime.INTERPRET
    index = torch.int32 if shape[1] % 2 else torch.int64
    assert_adaln(operation, *adaln_case(operation, *shape, dtype, index=index))


@every_operation
@pytest.mark.parametrize("tokens, others", [(F32, BF16), (F16, F32)])
def test_branch_and_vectors_of_another_dtype(operation, tokens, others, adaln_case, assert_adaln, poisoned):
    assert_adaln(operation, *adaln_case(operation, 2, 19, 24, 11, tokens, others))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    operation=st.sampled_from(OPERATIONS),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(8, 70)),  # of few numbers gradients cancel
    share=st.one_of(st.none(), st.floats(0, 1)), dtype=st.sampled_from([F32, F16, BF16]),
    index=st.sampled_from([torch.int32, torch.int64]), numbers=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape(operation, sizes, share, dtype, index, numbers, adaln_case, assert_adaln, generator):
    generator.manual_seed(numbers)  # an example that fails can be had again
    B, N, D = sizes
    K = None if share is None else round(share * N)
    assert_adaln(operation, *adaln_case(operation, B, N, D, K, dtype, index=index))


@every_operation
def test_keeping_nothing(operation, adaln_case, poisoned):
    tensors, subset = adaln_case(operation, 2, 5, 8, 0)
    *outs, _, _, _ = found = results(operation, tensors, subset, torch.zeros(2, 0, 8))
    assert outs[0].shape == (2, 0, 8)
    for grad, tensor in zip(found[-len(tensors) :], tensors, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_adversarial_rows(adaln_case, adaln_truth, relative, generator, poisoned):
    """Constant rows (variance zero) small and huge, a single spike, a large offset, huge and tiny values, scales of -1;
    row by row, as the huge ones would hide the others.
    """
    (x, shift, scale), _ = adaln_case("adaln_modulate", 2, 6, 96, None)
    with torch.no_grad():
        x[0, 0], x[0, 1], x[0, 2] = 0, 1e-3, 3e7
        x[0, 3], x[0, 3, -1] = 0, 1e4
        x[1, 0] *= 1e15
        x[1, 1] *= 1e-20
        x[1, 2] += 64
        scale[1, ::2] = -1
    exact = [t.detach().double().requires_grad_() for t in (x, shift, scale)]
    weights = torch.randn(2, 6, 96, generator=generator)
    out, dx, dshift, dscale = results("adaln_modulate", [x, shift, scale], None, weights)
    expected = adaln_truth["adaln_modulate"](*exact)
    truths = torch.autograd.grad(expected, exact, weights.double())
    for image in range(2):
        for row in range(6):
            assert relative(out[image, row], expected[image, row]) < 1e-5, (image, row)
            # The mean of a large offset costs float32 some digits.
            assert relative(dx[image, row], truths[0][image, row]) < 2e-4, (image, row)
    assert relative(dshift, truths[1]) < 1e-6 and relative(dscale, truths[2]) < 1e-4


@every_operation
def test_two_runs_agree_bit_for_bit(operation, adaln_case, generator):
    tensors, subset = adaln_case(operation, 2, 40, 24, 21)
    weights = torch.randn(2, 21, 24, generator=generator)
    first, second = (results(operation, tensors, subset, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_stored_is_what_is_normalized(adaln_case):
    """The modulated rows are those of y as it is rounded, so the two functions in turn give the same."""
    (x, branch, gate, shift, scale), subset = adaln_case("gated_residual_adaln", 2, 9, 24, 5, BF16)
    y, u = gated_residual_adaln(x, branch, gate, shift, scale, subset)
    assert torch.equal(y, gated_residual(x, branch, gate, subset))
    assert torch.equal(u, adaln_modulate(y, shift, scale))


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_uses(used, adaln_case, adaln_truth, relative, generator, poisoned):
    tensors, subset = adaln_case("gated_residual_adaln", 2, 9, 24, 5)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    weights = torch.randn(2, 5, 24, generator=generator)
    out, expected = gated_residual_adaln(*tensors, subset), adaln_truth["gated_residual_adaln"](*exact, subset)
    grads = torch.autograd.grad(out[used], tensors, weights, allow_unused=True)
    truths = torch.autograd.grad(expected[used], exact, weights.double(), allow_unused=True)
    for grad, true in zip(grads, truths, strict=True):
        assert (grad is None) == (true is None)
        assert grad is None or relative(grad, true) < 1e-6


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_configuration_computes_the_same(itemsize, adaln_case, assert_adaln, poisoned, monkeypatch):
    """What tuning would choose last, on rows that take several tiles; each launch asks."""
    asked = set()

    def choose(name, key, configs, tensor, launch):
        asked.add(name)
        assert all(isinstance(part, (int, bool, torch.dtype)) for part in key), key
        launch(configs[0])  # As tuning would, before the real launch.
        return configs[-1]

    monkeypatch.setattr(adaln_launch, "choose", choose)
    dtype = {2: F16, 4: F32}[itemsize]
    assert_adaln("gated_residual_adaln", *adaln_case("gated_residual_adaln", 1, 18, 530, 10, dtype))
    assert asked == {"adaln_forward", "adaln_backward"}


def test_views_are_read_in_place(adaln_truth, relative, generator, poisoned):
    """Any pitch between rows and images, vectors cut from one adaLN output, a broadcast gradient."""
    B, N, D, K = 2, 12, 40, 6
    grid = torch.randn(B + 1, 2 * N, D + 9, generator=generator)
    wide = torch.randn(B, K, 2 * D, generator=generator)
    x, branch = grid[1:, ::2, 3 : 3 + D], wide[:, :, D:]
    vectors = torch.randn(B, 6 * D, generator=generator).chunk(6, dim=1)[1:4]
    tensors = [t.requires_grad_() for t in (x, branch, *vectors)]
    subset = torch.rand(N, B, generator=generator).argsort(0).mT[:, :K]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, expected = gated_residual_adaln(*tensors, subset), adaln_truth["gated_residual_adaln"](*exact, subset)
    for a, b in zip(out, expected, strict=True):
        assert relative(a, b) < 1e-6
    grads = torch.autograd.grad(out[0].sum() + out[1].square().sum(), tensors)
    truths = torch.autograd.grad(expected[0].sum() + expected[1].square().sum(), exact)
    for grad, true in zip(grads, truths, strict=True):
        assert relative(grad, true) < 1e-5


def test_autocast_modulates_in_its_dtype_and_keeps_the_residual(adaln_case, adaln_truth, relative):
    tensors, subset = adaln_case("gated_residual_adaln", 2, 9, 24, 5)
    with torch.autocast("cpu", BF16):
        y, u = gated_residual_adaln(*tensors, subset)
    expected = adaln_truth["gated_residual_adaln"](*(t.detach().double() for t in tensors), subset)
    assert (y.dtype, u.dtype) == (F32, BF16)
    assert relative(y, expected[0]) < 1e-6 and relative(u, expected[1]) < 1e-2
    grads = torch.autograd.grad(y.sum() + u.float().square().sum(), tensors)
    assert [g.dtype for g in grads] == [F32] * 5


@every_operation
def test_operators_pass_opcheck(operation, adaln_case):
    tensors, subset = adaln_case(operation, 2, 6, 8, 3)
    ops = torch.ops.maskalign_kernels
    for index in (subset, None) if operation == "gated_residual" else (subset,):
        if index is None:
            tensors, _ = adaln_case(operation, 2, 6, 8, None)
        arguments = (*tensors, index) if operation == "gated_residual" else (*tensors, index, F32)
        torch.library.opcheck(getattr(ops, operation).default, arguments)
        detached = [t.detach() for t in tensors]
        rows = torch.randn(2, 6 if index is None else 3, 8)
        with torch.no_grad():
            out = getattr(ops, operation)(*arguments)
        if operation == "adaln_modulate":
            backward = (rows, *detached, index, *out[1:])
        elif operation == "gated_residual":
            backward = (rows, *detached[1:], index, 6)
        else:
            backward = (rows, rows + 1, out[0], *detached[1:], index, *out[2:], 6)
        torch.library.opcheck(getattr(ops, f"{operation}_backward").default, backward)


@every_operation
@pytest.mark.parametrize("kept", [16, None])
def test_launches_load_and_store_what_the_report_counts(operation, kept, adaln_case, counted_bytes):
    """The count of the compile report plus the re-reads that it says a cache serves is what the programs move."""
    from maskalign_kernels.adaln import cases

    B, N, D = 2, 32, 128  # Whole tiles: of a masked tile of indices all lanes are compared.
    tensors, subset = adaln_case(operation, B, N, D, kept)
    with counted_bytes() as count:
        out = getattr(maskalign_kernels, operation)(*tensors, subset)
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outs, tensors, [torch.ones(B, kept or N, D) for _ in outs])
    moved, again = collections.Counter(), collections.Counter()
    for case in cases.OPERATIONS[operation].aot_cases([(B, N, kept, D, F32, F32)], every_configuration=False):
        moved[case.kernel.__name__] += case.moved
        again[case.kernel.__name__] += case.cached
    assert count == moved + again
    assert count.distinct == moved, "what is moved is every tensor's bytes once, and the rest is read again"


@every_operation
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(operation, dynamic, adaln_case):
    function = getattr(maskalign_kernels, operation)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        tensors, subset = adaln_case(operation, batch, 6, 8, 3)
        pairs = []
        for f in (compiled, function):
            out = f(*tensors, subset)
            outs = out if isinstance(out, tuple) else (out,)
            pairs.append((*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), tensors)))
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_recomputed_gradients_are_the_same(adaln_case):
    tensors, subset = adaln_case("gated_residual_adaln", 2, 9, 24, 5)
    again = torch.utils.checkpoint.checkpoint(gated_residual_adaln, *tensors, subset, use_reentrant=False)
    plain = gated_residual_adaln(*tensors, subset)
    first, second = (torch.autograd.grad(y.sum() + u.square().sum(), tensors) for y, u in (plain, again))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_too_long_a_row_takes_the_naive_path(adaln_case, monkeypatch):
    monkeypatch.setattr(adaln_launch, "modulate", None)
    (x, shift, scale), _ = adaln_case("adaln_modulate", 1, 2, 4097, None)
    assert adaln_modulate(x, shift, scale).shape == x.shape
    with pytest.raises(TypeError):  # At 4096 the operator, which is not there, is asked for.
        adaln_modulate(x[:, :, 1:], shift[:, 1:], scale[:, 1:])


def test_the_longest_row(adaln_case, assert_adaln, poisoned):
    assert_adaln("gated_residual_adaln", *adaln_case("gated_residual_adaln", 1, 3, 4096, 2, BF16))


def test_float64_is_refused_on_the_triton_path(adaln_case):
    tensors, subset = adaln_case("gated_residual", 1, 4, 8, 2, torch.float64)
    with pytest.raises(ValueError, match=r"gated_residual: x is .*float64"):
        gated_residual(*tensors, subset)


@pytest.mark.parametrize("kept", [7, None])
def test_a_block_of_the_model(kept, relative, generator, poisoned):
    """The kernels where the model uses them, with the vectors cut from one adaLN output and attention in between."""
    from maskalign.models.layers import Block

    plain, fused = (Block(24, 3, fused_adaln=flag) for flag in (False, True))
    for parameter in plain.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    fused.load_state_dict(plain.state_dict())
    plain.double()
    x, c = torch.randn(2, 17, 24, generator=generator), torch.randn(2, 24, generator=generator)
    subset = None if kept is None else torch.rand(2, 17, generator=generator).argsort(1)[:, :kept].sort(1).values
    results = []
    for block, dtype in ((plain, torch.float64), (fused, F32)):
        leaves = [x.to(dtype).requires_grad_(), c.to(dtype).requires_grad_()]
        out = block(*leaves, subset)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *block.parameters()])])
    for true, found in zip(*results, strict=True):
        assert relative(found, true) < 2e-6
