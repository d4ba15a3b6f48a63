"""mix_and_drop on the CPU's reference path: exact, lean, compiled, and clear about bad arguments."""

import operator

import pytest
import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode

from maskalign_kernels import mix_and_drop, runtime
from maskalign_kernels.mix_and_drop import naive

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
NAMES = ("x", "shift", "scale", "gate", "w1", "b1", "w2", "b2")
compiled_kernels = pytest.mark.skipif(runtime.INTERPRET, reason="the kernels of this process are interpreted")
SHAPES = [
    (2, 63, 40, 31, 13),
    (1, 196, 24, 98, 16),
    (2, 1, 8, 1, 1),
    (2, 16, 64, None, 64),
    (3, 9, 20, 9, 5),
    (1, 5, 1, 2, 3),
]


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, mix_case, assert_mixed):
    assert_mixed(*mix_case(*shape, dtype, index=torch.int32 if shape[1] % 2 else torch.int64))


@pytest.mark.parametrize("kept", [3, None])
def test_the_naive_twin_is_the_formula(kept, mix_case, mix_truth, relative):
    tensors, subset = mix_case(2, 7, 12, kept, 5, F64)
    results = []
    for function in (naive.mix_and_drop, mix_truth):
        out = function(*tensors, subset)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for ours, true in zip(*results, strict=True):
        assert relative(ours, true) < 1e-12


@pytest.mark.parametrize("kept", [3, None])
def test_gradcheck(kept, mix_case):
    tensors, subset = mix_case(2, 5, 4, kept, 3, F64)
    assert torch.autograd.gradcheck(lambda *t: mix_and_drop(*t, subset), tensors)


def test_keeping_nothing(mix_case):
    tensors, subset = mix_case(2, 5, 4, 0, 3)
    out = mix_and_drop(*tensors, subset)
    assert out.shape == (2, 0, 4)
    assert all(
        torch.equal(g, torch.zeros_like(t))
        for g, t in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True)
    )


def test_a_fresh_mixer_is_the_identity(mix_case):
    """adaLN starts at zero: with a zero gate the kept rows come back to the bit, and only the gate gets a gradient."""
    tensors, subset = mix_case(2, 12, 16, 5, 8)
    with torch.no_grad():
        for vector in tensors[1:4]:
            vector.zero_()
    out = mix_and_drop(*tensors, subset)
    assert torch.equal(out, tensors[0].gather(1, subset.unsqueeze(-1).expand(-1, -1, 16)))
    grads = dict(zip(NAMES, torch.autograd.grad(out.sum(), tensors), strict=True))
    assert grads["gate"].abs().max() > 0
    for name in ("shift", "scale", "w1", "b1", "w2", "b2"):
        assert not grads[name].any()


def test_constant_rows_do_not_blow_up(mix_case):
    tensors, subset = mix_case(1, 6, 32, 4, 3)
    with torch.no_grad():
        tensors[0][0, :3] = torch.tensor([0.0, 7.0, 1e6]).unsqueeze(1)
    out = mix_and_drop(*tensors, subset)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), tensors))


def test_backward_needs_little_memory(mix_case):
    """Of what the forward makes, two scalars per token survive."""
    tensors, subset = mix_case(2, 64, 96, 32, 16)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mix_and_drop(*tensors, subset)
    given = {t.untyped_storage().data_ptr() for t in (*tensors, subset)}
    assert sum(size for pointer, size in saved.items() if pointer not in given) == 2 * 4 * 2 * 64


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, mix_case, relative):
    compiled = torch.compile(mix_and_drop, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, kept in ((2, 6), (3, 8)):
        tensors, subset = mix_case(batch, 12, 16, kept, 8)
        out, expected = compiled(*tensors, subset), mix_and_drop(*tensors, subset)
        assert relative(out.detach(), expected.detach()) < 1e-6
        for a, b in zip(*(torch.autograd.grad(o.square().sum(), tensors) for o in (out, expected)), strict=True):
            assert relative(a, b) < 1e-5


def test_autocast_and_recomputation(mix_case, mix_truth, relative):
    tensors, subset = mix_case(2, 20, 24, 12, 9)
    with torch.no_grad():
        tensors[3].mul_(1e-3)  # A small gate: what is left of the output is the residual, in float32.
    with torch.autocast("cpu", BF16):
        out = mix_and_drop(*tensors, subset)
        again = torch.utils.checkpoint.checkpoint(mix_and_drop, *tensors, subset, use_reentrant=False)
    assert out.dtype == F32
    assert 1e-7 < relative(out.detach(), mix_truth(*(t.detach().double() for t in tensors), subset)) < 1e-4
    first, second = (torch.autograd.grad(o.sum(), tensors) for o in (out, again))
    assert all(a.dtype == F32 and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@compiled_kernels
@pytest.mark.parametrize("kept, dynamic", [(4, False), (4, True), (None, False)])
def test_traces_for_a_gpu(kept, dynamic, mix_case, gpu_graphs):
    """Two Triton launches forward, three backward, in one graph each, and no PyTorch sums or casts of weight gradients;
    a new batch size reuses dynamic graphs.
    """

    def loss(x, subset, *others):
        return mix_and_drop(x, *others, subset).square().mean()

    batches = []
    for batch in (5, 6, 11):
        (x, *others), subset = mix_case(batch, 9, 32, kept, 8, BF16)
        batches.append((x, subset, *others))
    graphs = gpu_graphs(loss, *(batches if dynamic else batches[:1]), dynamic=dynamic)
    assert len(graphs) == 2, "one forward and one backward graph"
    assert [graph.code.count("triton_kernel_wrapper_functional(") for graph in graphs] == [2, 3]
    results = [node for node in graphs[1].graph.output_node().args[0] if node is not None]
    assert len(results) == 8, "eight gradients"
    for node in results:
        assert node.target is operator.getitem and "triton_kernel_wrapper" in str(node.args[0].target), node


@compiled_kernels
@pytest.mark.parametrize("kept", [128, None])
def test_fake_cuda_tensors(kept):
    """Shapes, dtypes and devices of both directions, with nothing but fake CUDA tensors."""
    with FakeTensorMode():

        def tensor(*shape, dtype=BF16):
            return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=dtype == BF16)

        tensors = [
            tensor(4, 256, 96),
            *(tensor(4, 96) for _ in range(3)),
            tensor(64, 256),
            tensor(64),
            tensor(256, 64),
            tensor(256),
        ]
        subset = None if kept is None else tensor(4, kept, dtype=torch.int64)
        out = mix_and_drop(*tensors, subset)
        assert (out.shape, out.dtype, out.device.type) == ((4, kept or 256, 96), BF16, "cuda")
        ops, detached = torch.ops.maskalign_kernels, [t.detach() for t in tensors]
        _, mean, rstd = ops.mix_and_drop(*detached, subset, BF16)
        assert mean.shape == rstd.shape == (4, 256)
        grads = ops.mix_and_drop_backward(out.detach(), *detached, subset, mean, rstd, BF16)
        assert [(g.shape, g.dtype, g.device) for g in grads] == [(t.shape, BF16, t.device) for t in tensors]


GOOD = {
    "x": (2, 6, 8),
    "shift": (2, 8),
    "scale": (2, 8),
    "gate": (2, 8),
    "w1": (4, 6),
    "b1": (4,),
    "w2": (6, 4),
    "b2": (6,),
}


def arguments(**changed):
    made = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    return made | {"subset": torch.tensor([[0, 5], [3, 1]])} | changed


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", torch.zeros(6, 8), r"x is of shape \(6, 8\).*expected 3 dimensions, \(B, N, D\)"),
        (
            "x",
            torch.zeros(2, 6, 8, dtype=torch.int64),
            r"x is .*int64.*expected dtype bfloat16 or float16 or float32",
        ),
        ("x", None, r"x is a NoneType; expected a tensor"),
        (
            "shift",
            torch.zeros(2, 1, 8),
            r"shift is of shape \(2, 1, 8\).*expected 2 dimensions, \(B=2, D=8\)",
        ),
        ("scale", torch.zeros(3, 8), r"scale is of shape \(3, 8\).*expected shape \(B=2, D=8\)"),
        ("gate", torch.zeros(2, 9), r"gate is .*expected shape \(B=2, D=8\)"),
        ("w1", torch.zeros(4, 7), r"w1 is of shape \(4, 7\), float32, on cpu; expected shape \(T=4, N=6\)"),
        ("b1", torch.zeros(5), r"b1 is .*expected shape \(T=4,\)"),
        ("w2", torch.zeros(4, 6), r"w2 is .*expected shape \(N=6, T=4\)"),
        ("b2", torch.zeros(4), r"b2 is .*expected shape \(N=6,\)"),
        ("b2", torch.zeros(6, device="meta"), r"b2 is .*expected device cpu"),
        ("subset", torch.zeros(3, 2, dtype=torch.int64), r"subset is .*expected shape \(B=2, K"),
        ("subset", torch.zeros(2, 2), r"subset is .*float32.*expected dtype int32 or int64"),
        ("subset", torch.tensor([[0, 6], [1, 2]]), r"subset is .*expected indices in \[0, 6\), found 6"),
        ("subset", torch.tensor([[0, 1], [-1, 2]]), r"subset is .*found -1"),
        (
            "subset",
            torch.tensor([[0, 1], [2, 2]]),
            r"subset is .*distinct indices per row, found 2 twice in row 1",
        ),
    ],
)
def test_bad_arguments(name, value, message):
    with pytest.raises(ValueError, match="mix_and_drop: " + message):
        mix_and_drop(**arguments(**{name: value}))


# Multiprocessors, most resident warps (waves) of one, bytes of L2 (Infinity Cache on MI300X).
CACHES = {
    "sm_80": (108, 64, 40 << 20), "sm_90": (132, 64, 50 << 20), "sm_100": (148, 64, 126 << 20),
    "gfx942": (304, 32, 256 << 20),
}  # fmt: skip


@compiled_kernels
@pytest.mark.parametrize("target", CACHES)
@pytest.mark.parametrize("tokens, hidden", [(256, 64), (1024, 64), (1024, 128)])
@pytest.mark.parametrize("every_configuration", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_what_is_read_again_is_in_l2(target, tokens, hidden, every_configuration):
    """The tiles of x that all resident programs go through twice fit L2 together: the byte count rests on it."""
    from maskalign_kernels import aot
    from maskalign_kernels.mix_and_drop import cases as mix_cases

    shape = (32, tokens, tokens // 2, 1152, hidden, BF16, BF16, BF16)
    processors, most, cache = CACHES[target]
    for case in mix_cases.aot_cases([shape], every_configuration):
        if case.launch in ("mix", "tokens"):
            warps = case.waves if target == "gfx942" else case.num_warps
            resident = min(case.grid[0], processors * int(aot.build(case, target).occupancy * most / warps))
            constants, shared = case.constexprs, 0
            if case.launch == "tokens":  # Whole rows of a tile of tokens; and all of S, which an image's tiles share.
                tile = constants["BLOCK_N"] * 1152 * 2
                shared = -(-resident * constants["BLOCK_N"] // tokens) * hidden * 1152 * 2
            else:
                tile = tokens * constants["BLOCK_D"] * 2
            assert resident * tile + shared <= cache, (case.launch, case.config)
