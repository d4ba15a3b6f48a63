"""subset_cosine_alignment through Triton's interpreter, against float64."""

import itertools

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskalign_kernels import runtime, subset_cosine_alignment, subset_cosine_alignment_loss
from maskalign_kernels.rows import rows_contiguous

F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
SHAPES = [(2, 7, 3, 33), (1, 5, 5, 768), (3, 20, 9, 8), (2, 16, 8, 320), (1, 4, 3, 2500), (1, 1, 1, 1)]


def test_public_functions_take_the_triton_path():
    assert runtime.INTERPRET
    assert runtime.use_triton(torch.zeros(1))


@pytest.mark.parametrize("student", [F32, F16, BF16])
@pytest.mark.parametrize("teacher", [F32, F16, BF16, INT8])
@pytest.mark.parametrize("gathered", [False, True])
def test_forward_and_gradient(student, teacher, gathered, alignment_case, assert_aligned, tolerance, poisoned):
    for number, (B, N, K, C) in enumerate(SHAPES):
        index = (torch.int32, torch.int64)[number % 2]
        case = alignment_case(B, N, K, C, student, teacher, gathered, index)
        assert_aligned(case, gathered, 3e-5 if C == 1 else tolerance(student))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 90)), share=st.floats(0, 1),
    student=st.sampled_from([F32, F16, BF16]), teacher=st.sampled_from([F32, F16, BF16, INT8]),
    gathered=st.booleans(), index=st.sampled_from([torch.int32, torch.int64]), numbers=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape(
    sizes, share, student, teacher, gathered, index, numbers, alignment_case, assert_aligned, tolerance, generator
):
    generator.manual_seed(numbers)  # an example that fails can be had again
    B, N, C = sizes
    K = round(share * N)
    case = alignment_case(B, N, K, C + 1, student, teacher, gathered, index)
    if K == 0:
        assert subset_cosine_alignment(*case, student_is_subset=not gathered).shape == (B, 0)
        return
    assert_aligned(case, gathered, 2 * tolerance(student))


@pytest.mark.parametrize("gathered", [False, True])
def test_widest_rows(gathered, alignment_case, assert_aligned, poisoned):
    assert_aligned(alignment_case(1, 3, 2, 8192, F32, BF16, gathered), gathered, 3e-6)


@pytest.mark.parametrize("gathered", [False, True])
def test_views_are_read_in_place(gathered, cosine_truth, relative, generator, poisoned, monkeypatch):
    B, N, K, C = 3, 10, 4, 40
    big_s = torch.randn(B, 2 * N, C + 9, generator=generator)
    big_z = torch.randn(N, B + 1, 2 * C, generator=generator)
    student = big_s[:, : 2 * (N if gathered else K) : 2, 3 : 3 + C].requires_grad_()
    teacher = big_z[:, 1:, C:].transpose(0, 1)  # Rows lie B + 1 pitches apart, images next to each other.
    subset = torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(B)])
    monkeypatch.setattr(torch.Tensor, "clone", None)
    expected = cosine_truth(student, teacher, subset, not gathered)
    out = subset_cosine_alignment(student, teacher, subset, student_is_subset=not gathered)
    assert relative(out, expected) < 3e-6
    assert rows_contiguous(student) is student and rows_contiguous(teacher) is teacher
    # One row for all images, and channels that do not lie side by side (this one is copied).
    shared = torch.randn(1, N, C, generator=generator).expand(B, -1, -1)
    wide = torch.randn(B, C, N, generator=generator).transpose(1, 2)
    for z in (shared, wide):
        out = subset_cosine_alignment(student, z, subset, student_is_subset=not gathered)
        assert relative(out, cosine_truth(student, z, subset, not gathered)) < 3e-6


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("kept", [0, 6])
def test_no_token_and_all_tokens(gathered, kept, alignment_case, cosine_truth, poisoned):
    student, teacher, subset = alignment_case(2, 6, kept, 12, gathered=gathered)
    for function in (subset_cosine_alignment, subset_cosine_alignment_loss):
        student.grad = None
        out = function(student, teacher, subset, student_is_subset=not gathered)
        out.sum().backward()
        assert torch.isfinite(student.grad).all() and student.grad.shape == student.shape
        if kept == 0:
            assert not student.grad.any() and not out.any()
    # A mean that may cancel of cosines, which are at most 1.
    expected = -cosine_truth(student, teacher, subset, not gathered).mean() if kept else 0.0
    assert abs(float(out) - float(expected)) < 1e-6


def test_rows_outside_the_subset_are_never_used(alignment_case, poisoned):
    student, teacher, subset = alignment_case(2, 9, 4, 24, gathered=True)
    outside = torch.ones(2, 9, dtype=torch.bool).scatter(1, subset, False)
    with torch.no_grad():
        student[outside] = float("nan")
        teacher[outside] = float("inf")
    out = subset_cosine_alignment(student, teacher, subset, student_is_subset=False)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(student.grad).all()
    assert not student.grad[outside].any()


def test_adversarial_rows(cosine_truth, relative, generator, poisoned):
    """Zero, tiny, huge, equal and opposite rows; each row is judged alone, so that no large one hides a wrong
    one.
    """
    C = 48
    base = torch.randn(C, generator=generator)
    other = torch.randn(C, generator=generator)
    students = {
        "zero": 0 * base, "under eps": 1e-14 * base, "above eps": 1e-9 * base, "large": 1e15 * base,
        "square overflows": 1e30 * base, "largest": base / base.abs().max() * 3e38, "one": torch.eye(C)[0],
    }  # fmt: skip
    teachers = {
        "other": other,
        "zero": 0 * other,
        "huge": 1e25 * other,
        "tiny": 1e-30 * other,
        "sparse": torch.eye(C)[0],
    }
    for (s_name, s), (t_name, t) in itertools.product(students.items(), teachers.items()):
        student = s.view(1, 1, C).clone().requires_grad_()
        exact = s.double().view(1, 1, C).clone().requires_grad_()
        subset = torch.zeros(1, 1, dtype=torch.int64)
        out = subset_cosine_alignment(student, t.view(1, 1, C), subset)
        expected = cosine_truth(exact, t.view(1, 1, C), subset)
        out.sum().backward()
        expected.sum().backward()
        assert abs(float(out - expected)) < 3e-6 * max(1e-6, abs(float(expected))) + 1e-7, (s_name, t_name)
        if s_name != "largest":  # 1/|s| is below the smallest normal float there.
            size = float(exact.grad.norm())
            error = float((student.grad.double() - exact.grad).norm())
            assert error <= 1e-5 * size + 1e-7 / max(1e-12, float(s.double().norm())), (
                s_name,
                t_name,
                error,
                size,
            )
    same = subset_cosine_alignment(base.view(1, 1, C), base.view(1, 1, C), subset)
    opposite = subset_cosine_alignment(base.view(1, 1, C), -base.view(1, 1, C), subset)
    assert abs(float(same) - 1) < 3e-7 and abs(float(opposite) + 1) < 3e-7


def test_not_a_number_stays_in_its_row(alignment_case):
    student, teacher, subset = alignment_case(1, 8, 8, 16)
    with torch.no_grad():
        student[0, 3, 5] = float("nan")
        student[0, 6, 0] = float("inf")
    out = subset_cosine_alignment(student, teacher, subset)
    assert out.isnan()[0].nonzero().flatten().tolist() == [3, 6]
    out.sum().backward()
    assert student.grad.isnan().any(-1)[0].nonzero().flatten().tolist() == [3, 6]


def test_duplicates_add_up_in_the_kernel(alignment_case, cosine_truth, relative):
    """Rejected on the CPU, unchecked on a GPU: there the gradients of a repeated row have to add up, not
    race.
    """
    from maskalign_kernels.subset_cosine_alignment.launch import cosine_op

    student, teacher, _ = alignment_case(1, 5, 2, 16, gathered=True)
    subset = torch.tensor([[3, 1, 3, 3]])
    weights = torch.tensor([[1.0, 2.0, -0.5, 4.0]])
    exact = student.detach().double().requires_grad_()
    (cosine_op(student, teacher, subset, False, 1e-12)[0] * weights).sum().backward()
    (cosine_truth(exact, teacher, subset, False) * weights).sum().backward()
    assert relative(student.grad, exact.grad) < 3e-6


def test_gradient_against_finite_differences(alignment_case, cosine_truth, generator):
    """As gradcheck does it, but the differences come from the float64 definition: the kernels know no
    float64.
    """
    student, teacher, subset = alignment_case(2, 6, 3, 20)
    weights = torch.randn(2, 3, generator=generator)
    (subset_cosine_alignment(student, teacher, subset) * weights).sum().backward()
    for _ in range(5):
        direction = torch.randn(student.shape, generator=generator, dtype=torch.float64)
        ends = [cosine_truth(student.detach().double() + h * direction, teacher, subset) for h in (1e-6, -1e-6)]
        slope = float(((ends[0] - ends[1]) * weights).sum() / 2e-6)
        assert abs(float((student.grad * direction).sum()) - slope) < 1e-5 * max(1, abs(slope))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
def test_loss_is_the_weighted_mean(
    gathered, per_image, alignment_case, cosine_truth, relative, tolerance, generator, poisoned
):
    for student_dtype, teacher_dtype in ((F32, F32), (BF16, INT8), (F16, F16)):
        student, teacher, subset = alignment_case(3, 11, 5, 40, student_dtype, teacher_dtype, gathered)
        weight = torch.rand(3, generator=generator) if per_image else 0.5
        loss = subset_cosine_alignment_loss(student, teacher, subset, weight=weight, student_is_subset=not gathered)
        exact = student.detach().double().requires_grad_()
        cosine = cosine_truth(exact, teacher, subset, not gathered)
        expected = -(cosine * (weight[:, None] if per_image else weight)).mean()
        assert loss.shape == () and abs(float(loss - expected)) < 1e-6
        (3 * loss).backward()
        (3 * expected).backward()
        # float16 gradients of a mean come close to its smallest numbers.
        assert relative(student.grad, exact.grad) < tolerance(student_dtype) * (4 if student_dtype == F16 else 1)
        again = subset_cosine_alignment_loss(student, teacher, subset, weight=weight, student_is_subset=not gathered)
        assert torch.equal(loss, again)


def test_bytes_moved_are_what_the_report_says(alignment_case, counted_bytes):
    from maskalign_kernels.subset_cosine_alignment.cases import count_bytes
    from maskalign_kernels.subset_cosine_alignment.launch import configurations

    B, N, K, C = 2, 40, 21, 96
    for student_dtype, teacher_dtype in ((F32, INT8), (F16, F16)):
        for gathered, loss in itertools.product((False, True), (False, True)):
            student, teacher, subset = alignment_case(B, N, K, C, student_dtype, teacher_dtype, gathered)
            weight = {"weight": torch.rand(B)} if loss else {}
            function = subset_cosine_alignment_loss if loss else subset_cosine_alignment
            with counted_bytes() as forward:
                out = function(student, teacher, subset, student_is_subset=not gathered, **weight)
            with counted_bytes() as backward:
                out.backward(torch.ones(out.shape))
            narrow = min(student_dtype.itemsize, teacher_dtype.itemsize)
            for direction, counted in (("forward", forward), ("backward", backward)):
                looks_up = gathered and direction == "backward"
                config = configurations(C, narrow, gather_backward=looks_up)[0]
                programs = B * -(-(N if looks_up else K) // config["ROWS"])
                sizes = (student_dtype.itemsize, teacher_dtype.itemsize, programs)
                moved, least = count_bytes(direction, gathered, loss, B, N, K, C, *sizes)
                for counts in (counted, counted.distinct):
                    counts.pop("mean_kernel", None)
                assert sum(counted.values()) == moved, (direction, gathered, loss, counted)
                # The least is every byte once, and of the loss one sum instead of one for each program.
                parts = 4 * (programs - 1) if loss and direction == "forward" else 0
                assert sum(counted.distinct.values()) - parts == least, (direction, gathered, loss, counted.distinct)


@pytest.mark.parametrize("gathered", [False, True])
def test_opcheck(gathered, alignment_case):
    """Schema, autograd registration, fake tensors and AOT tracing with static and dynamic shapes."""
    from maskalign_kernels import subset_cosine_alignment as _  # noqa: F401

    student, teacher, subset = alignment_case(2, 6, 3, 16, BF16, INT8, gathered)
    ops = torch.ops.maskalign_kernels
    detached = student.detach()
    torch.library.opcheck(ops.subset_cosine_alignment.default, (student, teacher, subset, not gathered, 1e-12))
    saved = ops.subset_cosine_alignment(detached, teacher, subset, not gathered, 1e-12)[1]
    backward = (torch.ones(2, 3), detached, teacher, subset, saved, not gathered)
    torch.library.opcheck(ops.subset_cosine_alignment_backward.default, backward)
    weight = torch.ones(2)
    loss = (student, teacher, subset, weight, 0.5, not gathered, 1e-12)
    torch.library.opcheck(ops.subset_cosine_alignment_loss.default, loss)
    loss_backward = (torch.ones(()), detached, teacher, subset, None, saved, 0.5, not gathered)
    torch.library.opcheck(ops.subset_cosine_alignment_loss_backward.default, loss_backward)


def test_autocast_checkpoint_and_compile(alignment_case, relative):
    student, teacher, subset = alignment_case(2, 6, 3, 16)
    linear = torch.nn.Linear(16, 16)

    def loss(student):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return subset_cosine_alignment_loss(linear(student), teacher, subset)

    gradients = []
    for function in (
        loss,
        lambda s: torch.utils.checkpoint.checkpoint(loss, s, use_reentrant=False),
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
    ):
        student.grad = None
        function(student).backward()
        gradients.append(student.grad)
    assert relative(gradients[1], gradients[0]) < 1e-6 and relative(gradients[2], gradients[0]) < 1e-2


def test_float64_is_refused():
    z = torch.zeros(1, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"student is of shape \(1, 2, 4\), float64, on cpu; expected bfloat16"):
        subset_cosine_alignment(z, z, torch.tensor([[0, 1]]))
