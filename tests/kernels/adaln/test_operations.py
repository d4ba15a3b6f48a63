"""The adaLN operations on the CPU's path: exact, compiled, traced for a GPU, and clear about bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import maskalign_kernels
from maskalign_kernels import adaln_modulate, gated_residual, gated_residual_adaln, runtime

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
OPERATIONS = ("adaln_modulate", "gated_residual", "gated_residual_adaln")
every_operation = pytest.mark.parametrize("operation", OPERATIONS)
compiled_kernels = pytest.mark.skipif(runtime.INTERPRET, reason="the kernels of this process are interpreted")


@every_operation
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("shape", [(2, 37, 40, 18), (1, 70, 130, None), (2, 1, 8, 1), (1, 5, 1, 2)], ids=str)
def test_forward_and_gradients(operation, shape, dtype, adaln_case, assert_adaln):
    if shape[2] == 1 and dtype != F64 and operation != "gated_residual":
        pytest.skip("one channel is normalized to 0: below float64 its gradients are rounding")
    index = torch.int32 if shape[1] % 2 else torch.int64
    assert_adaln(operation, *adaln_case(operation, *shape, dtype, index=index))


@every_operation
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("kept", [7, None])
def test_the_numbers_are_those_of_a_plain_block(operation, kept, dtype, adaln_case):
    """Bit for bit, gradients included: the lines that a block without these functions runs."""

    def modulate(rows, shift, scale):
        return torch.addcmul(shift.unsqueeze(1), F.layer_norm(rows, rows.shape[-1:], eps=1e-6), 1 + scale.unsqueeze(1))

    def plain(x, *rest, subset):
        rows = x if subset is None else x.gather(1, subset.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if operation == "adaln_modulate":
            return (modulate(rows, *rest),)
        y = torch.addcmul(rows, rest[1].unsqueeze(1), rest[0])
        return (y,) if operation == "gated_residual" else (y, modulate(y, *rest[2:]))

    tensors, subset = adaln_case(operation, 3, 20, 48, kept, dtype)
    ours = getattr(maskalign_kernels, operation)(*tensors, subset)
    pairs = []
    for outs in (ours if isinstance(ours, tuple) else (ours,), plain(*tensors, subset=subset)):
        pairs.append((*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@every_operation
@pytest.mark.parametrize("kept", [3, None])
def test_gradcheck(operation, kept, adaln_case):
    tensors, subset = adaln_case(operation, 2, 5, 4, kept, F64)
    assert torch.autograd.gradcheck(lambda *t: getattr(maskalign_kernels, operation)(*t, subset), tensors)


@every_operation
def test_keeping_nothing(operation, adaln_case):
    tensors, subset = adaln_case(operation, 2, 5, 4, 0)
    out = getattr(maskalign_kernels, operation)(*tensors, subset)
    outs = out if isinstance(out, tuple) else (out,)
    assert all(o.shape == (2, 0, 4) for o in outs)
    for grad, tensor in zip(torch.autograd.grad(sum(o.sum() for o in outs), tensors), tensors, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_a_fresh_block_is_the_identity(adaln_case):
    """adaLN starts at zero: with a zero gate the rows come back to the bit, and the modulated ones are normalized."""
    (x, branch, gate, shift, scale), subset = adaln_case("gated_residual_adaln", 2, 12, 16, 5)
    zero = torch.zeros_like(gate)
    y, u = gated_residual_adaln(x, branch, zero, zero, zero, subset)
    rows = x.gather(1, subset.unsqueeze(-1).expand(-1, -1, 16))
    assert torch.equal(y, rows) and torch.equal(u, F.layer_norm(rows, (16,), eps=1e-6))


def test_autocast_gives_what_a_matrix_product_takes(adaln_case, adaln_truth, relative):
    tensors, subset = adaln_case("gated_residual_adaln", 2, 9, 24, 5)
    with torch.autocast("cpu", BF16):
        y, u = gated_residual_adaln(*tensors, subset)
        again = adaln_modulate(y, *tensors[3:])
    expected = adaln_truth["gated_residual_adaln"](*(t.detach().double() for t in tensors), subset)
    assert (y.dtype, u.dtype, again.dtype) == (F32, BF16, BF16)
    assert relative(y, expected[0]) < 1e-6 and relative(u, expected[1]) < 1e-2 and torch.equal(u, again)


def test_the_residual_keeps_its_dtype(adaln_case):
    (x, branch, gate), subset = adaln_case("gated_residual", 2, 9, 24, 5, F32, BF16)
    assert gated_residual(x, branch, gate, subset).dtype == F32
    assert gated_residual(x.to(BF16), branch.float(), gate, subset).dtype == BF16


@every_operation
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(operation, dynamic, adaln_case, relative):
    function = getattr(maskalign_kernels, operation)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, kept in ((2, 6), (3, 8)):
        tensors, subset = adaln_case(operation, batch, 12, 16, kept)
        found = []
        for f in (compiled, function):
            out = f(*tensors, subset)
            outs = out if isinstance(out, tuple) else (out,)
            found.append((*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), tensors)))
        for a, b in zip(*found, strict=True):
            assert relative(a, b) < 1e-5


@compiled_kernels
@every_operation
@pytest.mark.parametrize("kept, dynamic", [(4, False), (4, True), (None, True)])
def test_traces_for_a_gpu(operation, kept, dynamic, adaln_case, gpu_graphs):
    """One launch forward, the gradients and their sums backward, in one graph each, which a new batch size or number of
    tokens reuses where it is dynamic. A tensor that stands for a missing one is not taken for a result.
    """

    def loss(x, subset, *others):
        out = getattr(maskalign_kernels, operation)(x, *others, subset)
        return sum(o.square().mean() for o in (out if isinstance(out, tuple) else (out,)))

    batches = []
    for batch in (5, 6, 11):
        (x, *others), subset = adaln_case(operation, batch, 9 if kept else 20 - batch, 32, kept, BF16)
        batches.append((x, subset, *others))
    graphs = gpu_graphs(loss, *(batches if dynamic else batches[:1]), dynamic=dynamic)
    assert len(graphs) == 2, "one forward and one backward graph"
    launches = [
        sorted(node.kwargs["tensors_to_clone"])
        for graph in graphs for node in graph.graph.nodes if "tensors_to_clone" in node.kwargs
    ]  # fmt: skip
    residual, norm = operation != "adaln_modulate", operation != "gated_residual"
    written = [["y"] * residual + ["u", "mean", "rstd"] * norm]
    written += [["dx"] * (norm or kept is not None) + ["dbranch"] * residual + ["parts"]]
    written += [["first", "second", "third"][: residual + 2 * norm]]
    assert launches == [sorted(names) for names in written], "what torch.compile takes for written"


@compiled_kernels
@every_operation
@pytest.mark.parametrize("kept", [128, None])
def test_fake_cuda_tensors(operation, kept):
    """Shapes, dtypes and devices of both directions, with nothing but fake CUDA tensors."""
    with FakeTensorMode():

        def tensor(*shape, dtype=BF16):
            return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=dtype == BF16)

        rows, subset = (4, kept or 256, 96), None if kept is None else tensor(4, kept, dtype=torch.int64)
        named = {"x": tensor(4, 256, 96), "branch": tensor(*rows)}
        named |= {name: tensor(4, 96) for name in ("gate", "shift", "scale")}
        names = {"adaln_modulate": ("x", "shift", "scale"), "gated_residual": ("x", "branch", "gate")}
        tensors = [named[name] for name in names.get(operation, named)]
        out = getattr(maskalign_kernels, operation)(*tensors, subset)
        outs = out if isinstance(out, tuple) else (out,)
        assert [(o.shape, o.dtype, o.device.type) for o in outs] == [(rows, BF16, "cuda")] * len(outs)
        ops, detached, grad = torch.ops.maskalign_kernels, [t.detach() for t in tensors], outs[0].detach()
        if operation == "adaln_modulate":
            statistics = ops.adaln_modulate(*detached, subset, BF16)[1:]
            assert [(s.shape, s.dtype) for s in statistics] == [(rows[:2], F32)] * 2
            grads = ops.adaln_modulate_backward(grad, *detached, subset, *statistics)
        elif operation == "gated_residual":
            grads = ops.gated_residual_backward(grad, *detached[1:], subset, 256)
            if kept is None:  # The gradient of x is that of the result, and not made again.
                assert grads[0].numel() == 0
                tensors, grads = tensors[1:], grads[1:]
        else:
            y, _, *statistics = ops.gated_residual_adaln(*detached, subset, BF16)
            grads = ops.gated_residual_adaln_backward(grad, grad, y, *detached[1:], subset, *statistics, 256)
        assert [(g.shape, g.dtype, g.device) for g in grads] == [(t.shape, BF16, t.device) for t in tensors]


def arguments(**changed):
    made = {name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")}
    made |= {"x": torch.zeros(2, 6, 8), "branch": torch.zeros(2, 2, 8), "subset": torch.tensor([[0, 5], [3, 1]])}
    return made | changed


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", torch.zeros(6, 8), r"x is of shape \(6, 8\).*expected 3 dimensions, \(B, N, D\)"),
        ("x", torch.zeros(2, 6, 8, dtype=torch.int64), r"x is .*int64.*expected dtype bfloat16 or float16 or float32"),
        ("x", None, r"x is a NoneType; expected a tensor"),
        ("branch", torch.zeros(2, 6, 8), r"branch is of shape \(2, 6, 8\).*expected shape \(B=2, K=2, D=8\)"),
        ("gate", torch.zeros(2, 1, 8), r"gate is of shape \(2, 1, 8\).*expected 2 dimensions, \(B=2, D=8\)"),
        ("shift", torch.zeros(3, 8), r"shift is of shape \(3, 8\).*expected shape \(B=2, D=8\)"),
        ("scale", torch.zeros(2, 8, device="meta"), r"scale is .*expected device cpu"),
        ("subset", torch.zeros(3, 2, dtype=torch.int64), r"subset is .*expected shape \(B=2, K"),
        ("subset", torch.zeros(2, 2), r"subset is .*float32.*expected dtype int32 or int64"),
        ("subset", torch.tensor([[0, 6], [1, 2]]), r"subset is .*expected indices in \[0, 6\), found 6"),
        ("subset", torch.tensor([[0, 1], [2, 2]]), r"subset is .*distinct indices per row, found 2 twice in row 1"),
    ],
)
def test_bad_arguments(name, value, message):
    with pytest.raises(ValueError, match="gated_residual_adaln: " + message):
        gated_residual_adaln(**arguments(**{name: value}))
