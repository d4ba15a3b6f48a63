"""subset_cosine_alignment without Triton's interpreter: the CPU path, tracing for a GPU, and bad input."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from maskalign_kernels import runtime, subset_cosine_alignment, subset_cosine_alignment_loss
from maskalign_kernels.subset_cosine_alignment import naive

F32, F16, BF16, F64, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8
compiled_kernels = pytest.mark.skipif(runtime.INTERPRET, reason="the kernels of this process are interpreted")


@pytest.mark.parametrize("student", [F32, F16, BF16])
@pytest.mark.parametrize("teacher", [F32, F16, BF16, INT8])
@pytest.mark.parametrize("gathered", [False, True])
def test_forward_and_gradient(student, teacher, gathered, alignment_case, assert_aligned, tolerance, poisoned):
    for shape in [(2, 7, 3, 33), (3, 20, 9, 8), (1, 4, 4, 700), (2, 5, 0, 6)]:
        assert_aligned(alignment_case(*shape, student, teacher, gathered, torch.int32), gathered, tolerance(student))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("teacher", [F64, INT8])
def test_the_naive_twin_is_the_formula(gathered, teacher, alignment_case, cosine_truth, relative):
    s, z, subset = alignment_case(2, 6, 4, 5, F64, teacher, gathered, torch.int32)
    cosine = naive.subset_cosine_alignment(s, z, subset, student_is_subset=not gathered)
    true = cosine_truth(s, z, subset, not gathered)
    assert relative(cosine, true) < 1e-12
    weight = torch.tensor([0.5, 2.0])
    loss = naive.subset_cosine_alignment_loss(s, z, subset, weight=weight, student_is_subset=not gathered)
    expected = -(weight[:, None] * true).mean()
    assert relative(loss, expected) < 1e-12
    ours, exact = (torch.autograd.grad(value, s)[0] for value in (loss, expected))
    assert relative(ours, exact) < 1e-12


@pytest.mark.parametrize("gathered", [False, True])
def test_gradcheck(gathered, alignment_case):
    s, z, subset = alignment_case(2, 6, 3, 5, F64, F64, gathered)
    for function in (subset_cosine_alignment, subset_cosine_alignment_loss):
        assert torch.autograd.gradcheck(lambda s, f=function: f(s, z, subset, student_is_subset=not gathered), s)


@pytest.mark.parametrize("compiled", [False, True])
def test_zero_tiny_and_huge_rows(compiled, cosine_truth, generator):
    function = subset_cosine_alignment
    if compiled:  # aot_eager: the same graph as inductor's, without its code.
        function = torch.compile(subset_cosine_alignment, fullgraph=True, backend="aot_eager")
    base = torch.randn(40, generator=generator)
    rows = torch.stack([0 * base, 1e-14 * base, 1e-9 * base, base, 1e15 * base, 1e25 * base])
    subset = torch.arange(6)[None]
    other = torch.randn(1, 6, 40, generator=generator)
    for s, z in ((rows[None], other), (other, rows[None])):
        s = s.clone().requires_grad_()
        exact = s.detach().double().requires_grad_()
        out, expected = function(s, z, subset), cosine_truth(exact, z, subset)
        assert (out - expected).abs().max() < 1e-6
        out.sum().backward()
        expected.sum().backward()
        error = (s.grad.double() - exact.grad).norm(dim=-1)
        limit = 1e-5 * exact.grad.norm(dim=-1) + 1e-7 / exact.norm(dim=-1).clamp_min(1e-12)
        assert bool((error <= limit).all())


def test_views_of_every_pitch(cosine_truth, relative, generator):
    B, N, K, C = 3, 8, 5, 12
    subset = torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(B)])
    teachers = [
        torch.randn(B, 2 * N, 2 * C, generator=generator)[:, ::2, C:], torch.randn(N, B, C).transpose(0, 1),
        torch.randn(1, N, C).expand(B, -1, -1), torch.randn(B, C, N).transpose(1, 2),
    ]  # fmt: skip
    for z in teachers:
        for s, gathered in (
            (torch.randn(B, K, 2 * C)[..., :C], False),
            (torch.randn(N, B, C).transpose(0, 1), True),
        ):
            s = s.requires_grad_()
            out = subset_cosine_alignment(s, z, subset, student_is_subset=not gathered)
            assert relative(out.detach(), cosine_truth(s.detach(), z, subset, not gathered)) < 3e-6


@pytest.mark.parametrize("gathered", [False, True])
def test_loss(gathered, alignment_case, cosine_truth):
    s, z, subset = alignment_case(3, 9, 4, 10, F32, INT8, gathered)
    cosine = cosine_truth(s.detach(), z, subset, not gathered)
    weight = torch.tensor([0.5, 2.0, 0.0])
    loss = subset_cosine_alignment_loss(s, z, subset, weight=weight, student_is_subset=not gathered)
    assert abs(float(loss.detach() + (cosine * weight[:, None]).mean())) < 1e-6
    loss = subset_cosine_alignment_loss(s, z, subset, weight=0.25, student_is_subset=not gathered)
    assert abs(float(loss.detach() + 0.25 * cosine.mean())) < 1e-6
    empty = subset_cosine_alignment_loss(
        s[:, :0] if not gathered else s, z, subset[:, :0], student_is_subset=not gathered
    )
    assert float(empty.detach()) == 0


def test_only_inputs_and_three_scalars_are_saved(alignment_case):
    """The naive chain would save gathered, widened and normalized copies: several times the student."""
    s, z, subset = alignment_case(4, 64, 32, 256, F32, INT8)
    known = {t.untyped_storage().data_ptr() for t in (s, z, subset)}
    saved = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            saved.append(tensor.numel() * tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subset_cosine_alignment(s, z, subset)
    assert sum(saved) == 3 * 4 * 4 * 32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic, alignment_case, relative):
    def loss(s, z, subset):
        return subset_cosine_alignment(s * 2, z, subset).mean() + subset_cosine_alignment_loss(s, z, subset, weight=0.5)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in (2, 3, 5):
        s, z, subset = alignment_case(B, 9, 4, 16, F32, INT8)
        gradients = []
        for function in (loss, compiled):
            s.grad = None
            function(s, z, subset).backward()
            gradients.append(s.grad)
        assert relative(gradients[1], gradients[0]) < 1e-5


@compiled_kernels
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_for_a_gpu(gathered, dynamic, alignment_case, gpu_graphs):
    """Forward and backward become Triton launches in one graph each, and a new batch size reuses dynamic
    ones.
    """

    def loss(s, z, subset, weight):
        cosine = subset_cosine_alignment(s * 2, z, subset, student_is_subset=not gathered)
        options = {"weight": weight, "student_is_subset": not gathered}
        return cosine.mean() + subset_cosine_alignment_loss(s, z, subset, **options)

    batches = [(*alignment_case(B, 9, 4, 64, BF16, INT8, gathered), w) for B, w in ((5, 0.5), (6, 0.25), (11, 0.75))]
    graphs = gpu_graphs(loss, *(batches if dynamic else batches[:1]), dynamic=dynamic)
    assert len(graphs) == 2, "one forward and one backward graph"
    forward, backward = (graph.code for graph in graphs)
    assert forward.count("triton_kernel_wrapper_functional(") == 3  # The cosines, the loss's sums, their mean.
    assert backward.count("triton_kernel_wrapper_functional(") == 2


@compiled_kernels
def test_fake_cuda_tensors():
    """Shapes, dtypes and devices of both directions, with nothing but fake CUDA tensors."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        s = torch.empty(4, 8, 64, device="cuda", dtype=BF16, requires_grad=True)
        z, subset = (
            torch.empty(4, 16, 64, device="cuda", dtype=INT8),
            torch.empty(4, 8, device="cuda", dtype=torch.int64),
        )
        cosine = subset_cosine_alignment(s, z, subset)
        assert cosine.shape == (4, 8) and cosine.dtype == F32 and cosine.device.type == "cuda" and cosine.requires_grad
        loss = subset_cosine_alignment_loss(s, z, subset, weight=0.5)
        assert loss.shape == () and loss.device.type == "cuda" and loss.requires_grad
        ops = torch.ops.maskalign_kernels
        saved = ops.subset_cosine_alignment(s.detach(), z, subset, True, 1e-12)[1]
        grad = ops.subset_cosine_alignment_backward(cosine.detach(), s.detach(), z, subset, saved, True)
        assert grad.shape == s.shape and grad.dtype == BF16 and grad.device.type == "cuda"


def test_autocast_and_recomputation(alignment_case, relative):
    s, z, subset = alignment_case(2, 6, 3, 16, F32, F16)
    linear = torch.nn.Linear(16, 16)

    def loss(s):
        with torch.autocast("cpu", dtype=BF16):
            projected = linear(s)
            assert projected.dtype == BF16
            return -subset_cosine_alignment(projected, z, subset).mean()

    plain, again = torch.autograd.grad(loss(s), s)[0], []
    torch.utils.checkpoint.checkpoint(loss, s, use_reentrant=False).backward()
    again.append(s.grad)
    assert relative(again[0], plain) < 1e-6
    exact = -F.cosine_similarity(linear(s), z.float().take_along_dim(subset[..., None], 1), dim=-1).mean()
    assert abs(float(loss(s).detach() - exact.detach())) < 1e-2


BAD = [
    (
        "teacher",
        torch.zeros(2, 5),
        r"teacher is of shape \(2, 5\), float32, on cpu; expected 3 dimensions, \(B, N, C\)",
    ),
    (
        "teacher",
        torch.zeros(2, 5, 4, dtype=torch.int32),
        "teacher is .* int32.*expected dtype bfloat16 or float16",
    ),
    ("teacher", [1, 2], "teacher is a list; expected a tensor"),
    ("teacher", torch.zeros(2, 5, 0), "teacher .*at least one channel"),
    ("teacher", torch.zeros(2, 5, 4, requires_grad=True), r"teacher .*frozen, pass teacher.detach\(\)"),
    ("subset", torch.zeros(2, 3, 1).long(), r"subset is of shape \(2, 3, 1\).*2 dimensions, \(B=2, K\)"),
    ("subset", torch.zeros(3, 3).long(), r"subset is of shape \(3, 3\).*shape \(B=2, K\)"),
    ("subset", torch.zeros(2, 3), "subset .*float32.*expected dtype int32 or int64"),
    ("subset", torch.tensor([[0, 1, 5], [0, 1, 2]]), r"subset .*indices in \[0, 5\), found 5"),
    ("subset", torch.tensor([[0, 1, 4], [-1, 1, 2]]), r"subset .*indices in \[0, 5\), found -1"),
    ("subset", torch.zeros(2, 3, device="meta").long(), "subset .*on meta; expected device cpu"),
    ("student", torch.zeros(2, 4, 4), r"student is of shape \(2, 4, 4\).*shape \(B=2, K=3, C=4\)"),
    ("student", torch.zeros(2, 3, 5), r"student is of shape \(2, 3, 5\).*shape \(B=2, K=3, C=4\)"),
    ("student", torch.zeros(2, 3, 4).long(), "student .*int64.*expected dtype bfloat16"),
    ("eps", -1.0, "eps is -1.0; expected a number >= 0"),
    ("eps", float("nan"), "eps is nan"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
@pytest.mark.parametrize("function", [subset_cosine_alignment, subset_cosine_alignment_loss])
def test_bad_input(function, name, value, message):
    good = {
        "student": torch.zeros(2, 3, 4),
        "teacher": torch.zeros(2, 5, 4),
        "subset": torch.arange(3).repeat(2, 1),
    }
    assert function(**good).isfinite().all()
    with pytest.raises(ValueError, match=rf"{function.__name__}: {message}"):
        function(**{**good, name: value})


def test_duplicates_are_refused_where_they_matter():
    subset = torch.tensor([[0, 1, 2], [4, 3, 4]])
    with pytest.raises(ValueError, match=r"distinct indices per row, found 4 twice in row 1"):
        subset_cosine_alignment(torch.ones(2, 5, 4), torch.ones(2, 5, 4), subset, student_is_subset=False)
    assert subset_cosine_alignment(torch.ones(2, 3, 4), torch.ones(2, 5, 4), subset).shape == (2, 3)


def test_bad_weight():
    s, z, subset = torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.arange(3).repeat(2, 1)
    with pytest.raises(ValueError, match=r"weight is of shape \(3,\).*shape \(B=2,\)"):
        subset_cosine_alignment_loss(s, z, subset, weight=torch.ones(3))
    with pytest.raises(ValueError, match="weight .*no gradient"):
        subset_cosine_alignment_loss(s, z, subset, weight=torch.ones(2, requires_grad=True))
