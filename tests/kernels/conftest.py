"""Ground truth and traps that the tests of the operations share.

Files called test_interpreted*.py run the Triton kernels in Triton's interpreter, which has to be chosen before Triton
is imported. An ordinary session does not collect them; there test_interpreter.py runs them in another process. By hand:

    TRITON_INTERPRET=1 pytest tests/kernels
"""

import collections
import contextlib
import os

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*test_interpreted*.py"]

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """In every test here."""


@pytest.fixture
def poisoned(monkeypatch):
    """Fill what torch.empty and its relatives return with NaN (or the largest integer), so that no byte goes
    unwritten.
    """

    def fill(allocate):
        def filled(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return filled

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def relative():
    """relative(got, truth) = |got - truth| / |truth|, in float64, or |got| where the truth is zero."""

    def measure(got, truth):
        got, truth = got.detach(), truth.detach()
        assert got.shape == truth.shape, (got.shape, truth.shape)
        if truth.numel() == 0:
            return 0.0
        norm = truth.double().norm()
        return float((got.double() - truth.double()).norm() / (norm if norm > 0 else 1.0))

    return measure


@pytest.fixture(scope="session")
def tolerance():
    """Largest relative error of a result stored in a dtype (Triton's interpreter truncates to bfloat16: one
    whole ulp).
    """
    return TOLERANCE.__getitem__


@pytest.fixture(scope="session")
def cosine_truth():
    """The definition, written out in float64 with no help from the package: loops over images, F.normalize's
    formula.
    """

    def truth(student, teacher, subset, student_is_subset=True, eps=1e-12):
        rows = []
        for image in range(subset.shape[0]):
            index = subset[image].long()
            s = student[image] if student_is_subset else student[image][index]
            s, t = s.double(), teacher[image][index].double()
            s = s / s.norm(dim=-1, keepdim=True).clamp_min(eps)
            t = t / t.norm(dim=-1, keepdim=True).clamp_min(eps)
            rows.append((s * t).sum(-1))
        return torch.stack(rows) if rows else torch.zeros(subset.shape, dtype=torch.float64)

    return truth


@pytest.fixture
def alignment_case(generator):
    """alignment_case(B, N, K, C, student dtype, teacher dtype, gathered, index dtype) -> student, teacher,
    subset.
    """

    def make(B, N, K, C, student=torch.float32, teacher=torch.float32, gathered=False, index=torch.int64):
        z = torch.randn(B, N, C, generator=generator)
        z = (z * 40).round().clamp(-127, 127).to(teacher) if teacher == torch.int8 else z.to(teacher)
        s = torch.randn(B, N if gathered else K, C, generator=generator).to(student).requires_grad_()
        subset = torch.rand(B, N, generator=generator).argsort(1)[:, :K].to(index)
        return s, z, subset

    return make


@pytest.fixture
def assert_aligned(cosine_truth, generator):
    """assert_aligned((student, teacher, subset), gathered, limit) holds the cosines to float64's, and the gradient to
    a relative error of limit; outside the subset it is zero to the bit.
    """
    from maskalign_kernels import subset_cosine_alignment

    def check(case, gathered, limit):
        student, teacher, subset = case
        weights = torch.randn(subset.shape, generator=generator)
        out = subset_cosine_alignment(student, teacher, subset, student_is_subset=not gathered)
        exact = student.detach().double().requires_grad_()
        expected = cosine_truth(exact, teacher, subset, not gathered)
        assert out.dtype == torch.float32
        # A single cosine near zero is a sum that cancels: what float32 can tell of it depends on the magnitudes in it.
        sums = cosine_truth(exact.detach().abs(), teacher.double().abs(), subset, not gathered)
        assert float((out.double() - expected).norm()) <= 3e-6 * float(expected.norm()) + 1e-7 * float(sums.norm())
        student.grad = None
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        # One channel has no direction to turn to: its gradient is zero but for rounding. Few rows may be nearly
        # parallel.
        steepest = (weights.norm() / exact.detach().norm().clamp_min(1e-9)).clamp_min(1e-3)
        scale = steepest if student.shape[-1] == 1 else max(exact.grad.norm(), 0.1 * steepest)
        assert float((student.grad.double() - exact.grad).norm() / scale) < limit
        if gathered:
            outside = torch.ones(student.shape[:2], dtype=torch.bool).scatter(1, subset.long(), False)
            assert torch.equal(student.grad[outside], torch.zeros_like(student.grad[outside]))

    return check


@pytest.fixture(scope="session")
def mix_truth():
    """Mix and drop as its docstring defines it, in float64, image by image, with no help from the
    package.
    """

    def truth(x, shift, scale, gate, w1, b1, w2, b2, subset=None):
        images = []
        for image in range(x.shape[0]):
            centered = x[image] - x[image].mean(-1, keepdim=True)
            u = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            a = w1 @ (u * (1 + scale[image]) + shift[image]) + b1[:, None]
            h = 0.5 * a * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a**3)))
            y = x[image] + gate[image] * (w2 @ h + b2[:, None])
            images.append(y if subset is None else y[subset[image].long()])
        return torch.stack(images)

    return truth


@pytest.fixture
def mix_case(generator):
    """mix_case(B, N, D, K, T, dtype of x and of the vectors, of the weights, of the indices) -> the nine
    arguments.
    """

    def make(B, N, D, K, T, dtype=torch.float32, weights=None, index=torch.int64):
        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        tokens = [normal(B, N, D) * 2 + 1, normal(B, D), normal(B, D), normal(B, D)]
        matrices = [normal(T, N) / N**0.5, normal(T), normal(N, T) / T**0.5, normal(N)]
        tensors = [t.to(dtype) for t in tokens] + [t.to(weights or dtype) for t in matrices]
        subset = None if K is None else torch.rand(B, N, generator=generator).argsort(1)[:, :K].to(index)
        return [t.requires_grad_() for t in tensors], subset

    return make


@pytest.fixture
def shaken(generator):
    """shaken(function, tensors, dtype) -> for each result of function(*tensors), how far one rounding of every input
    moves it, relative to its norm.

    Where terms cancel, a result is no more certain than this, whoever computes it. In float64, the largest of eight
    draws; each input entry moves by half a spacing of dtype, up or down.
    """

    def measure(function, tensors, dtype):
        exact = [t.detach().double() for t in tensors]
        truths = [t.detach() for t in function(*exact)]
        moved = [0.0] * len(truths)
        for _ in range(8):
            signs = [torch.randint(2, t.shape, generator=generator, dtype=torch.float64) * 2 - 1 for t in exact]
            near = [t * (1 + sign * torch.finfo(dtype).eps / 2) for t, sign in zip(exact, signs, strict=True)]
            for place, (result, true) in enumerate(zip(function(*near), truths, strict=True)):
                norm = float(true.norm())
                moved[place] = max(moved[place], float((result.detach() - true).norm()) / (norm if norm > 0 else 1.0))
        return moved

    return measure


@pytest.fixture
def assert_mixed(mix_truth, relative, tolerance, shaken, generator):
    """assert_mixed(tensors, subset) holds mix_and_drop's output and eight gradients to float64's: dtype, shape, and
    each to the tolerance of the coarsest dtype of the call, or what four roundings of the inputs do to it.
    """
    from maskalign_kernels import mix_and_drop

    names = ("output", "x", "shift", "scale", "gate", "w1", "b1", "w2", "b2")

    def results(function, tensors, weights, subset):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves, subset)
        return out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))

    def check(tensors, subset):
        x = tensors[0]
        coarse = max((t.dtype for t in tensors), key=lambda d: torch.finfo(d).eps)
        kept = x.shape[1] if subset is None else subset.shape[1]
        weights = torch.randn(x.shape[0], kept, x.shape[2], generator=generator).to(x.dtype)
        got = results(mix_and_drop, tensors, weights, subset)
        truths = results(mix_truth, [t.double() for t in tensors], weights, subset)
        moved = shaken(lambda *t: results(mix_truth, t[:-1], t[-1], subset), [*tensors, weights], coarse)
        for name, like, result, true, shift in zip(names, (x, *tensors), got, truths, moved, strict=True):
            assert result.dtype == like.dtype, name
            limit = tolerance(coarse) * (1 if name == "output" else 2)
            if x.shape[2] == 1:  # One channel is normalized to 0 with 1 / std = 1000: rounding, a thousandfold.
                limit = {"scale": float("inf"), "w1": float("inf"), "x": max(limit, 1e-4)}.get(name, limit)
            allowed, error = max(limit, 4 * shift), relative(result, true)
            assert error < allowed, (name, error, allowed)

    return check


@pytest.fixture(scope="session")
def adaln_truth():
    """The three adaLN operations as their docstrings define them, by name, in the dtype of their arguments, image by
    image, with no help from the package.
    """

    def normed(rows):
        centered = rows - rows.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def each(x, subset, image):
        return torch.stack([image(i, x[i] if subset is None else x[i][subset[i].long()]) for i in range(len(x))])

    def adaln_modulate(x, shift, scale, subset=None):
        return each(x, subset, lambda i, rows: normed(rows) * (1 + scale[i]) + shift[i])

    def gated_residual(x, branch, gate, subset=None):
        return each(x, subset, lambda i, rows: rows + gate[i] * branch[i])

    def gated_residual_adaln(x, branch, gate, shift, scale, subset=None):
        y = gated_residual(x, branch, gate, subset)
        return y, adaln_modulate(y, shift, scale)

    return {f.__name__: f for f in (adaln_modulate, gated_residual, gated_residual_adaln)}


ADALN_TENSORS = {
    "adaln_modulate": ("x", "shift", "scale"),
    "gated_residual": ("x", "branch", "gate"),
    "gated_residual_adaln": ("x", "branch", "gate", "shift", "scale"),
}


@pytest.fixture
def adaln_case(generator):
    """adaln_case(operation, B, N, D, K, dtype of x, of the others, of the indices) -> its tensors and the subset."""

    def make(operation, B, N, D, K, dtype=torch.float32, others=None, index=torch.int64):
        sizes = {"x": (B, N, D), "branch": (B, N if K is None else K, D)}
        tensors = []
        for name in ADALN_TENSORS[operation]:
            values = torch.randn(sizes.get(name, (B, D)), generator=generator)
            tensors.append((2 * values + 1).to(dtype) if name == "x" else values.to(others or dtype))
        subset = None if K is None else torch.rand(B, N, generator=generator).argsort(1)[:, :K].to(index)
        return [t.requires_grad_() for t in tensors], subset

    return make


@pytest.fixture
def assert_adaln(adaln_truth, relative, tolerance, shaken, generator):
    """assert_adaln(operation, tensors, subset) holds the outputs and the gradients of one of the adaLN operations to
    float64's: dtype, shape, zeros outside the subset to the bit, and each to the tolerance of the coarsest dtype of the
    call, or what four roundings of the inputs do to it.
    """
    import maskalign_kernels

    def results(function, tensors, weights, subset):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves, subset)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outs, leaves, [w.to(o.dtype) for w, o in zip(weights, outs, strict=True)])
        return *(o.detach() for o in outs), *grads

    def check(operation, tensors, subset):
        x = tensors[0]
        outputs = 2 if operation == "gated_residual_adaln" else 1
        coarse = max((t.dtype for t in tensors), key=lambda d: torch.finfo(d).eps)
        kept = x.shape[1] if subset is None else subset.shape[1]
        size = (x.shape[0], kept, x.shape[2])
        weights = [torch.randn(size, generator=generator).to(x.dtype) for _ in range(outputs)]
        got = results(getattr(maskalign_kernels, operation), tensors, weights, subset)
        truth = adaln_truth[operation]
        truths = results(truth, [t.double() for t in tensors], weights, subset)
        moved = shaken(
            lambda *t: results(truth, t[:-outputs], t[-outputs:], subset), [*tensors, *weights], coarse
        )  # fmt: skip
        names = ("out", "modulated")[:outputs] + ADALN_TENSORS[operation]
        dtypes = [x.dtype] * outputs + [t.dtype for t in tensors]
        for name, dtype, result, true, shift in zip(names, dtypes, got, truths, moved, strict=True):
            assert result.dtype == dtype, name
            limit = tolerance(coarse) * (1 if name in ("out", "modulated") else 2)
            if x.shape[2] == 1:  # One channel is normalized to 0 with 1 / std = 1000: rounding, a thousandfold.
                limit = {"scale": float("inf"), "x": max(limit, 1e-4)}.get(name, limit)
            allowed, error = max(limit, 4 * shift), relative(result, true)
            assert error < allowed, (name, error, allowed)
        if subset is not None:
            outside = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, subset.long(), False)
            assert not got[outputs][outside].any()

    return check


@pytest.fixture
def gpu_graphs(monkeypatch):
    """gpu_graphs(function, *args, dynamic=...) -> the graphs (forward, backward) that torch.compile makes for
    a GPU.

    There is no GPU here, so dispatch is told to take the Triton path on CPU tensors, a stand-in driver names
    sm_90 as the target (the analysis of what a kernel writes compiles it as far as Triton's IR), and the
    graphs are kept, not run. fullgraph=True: a graph break is an error.
    """
    import importlib

    import triton
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

    for operation in ("subset_cosine_alignment", "mix_and_drop", "adaln"):
        module = importlib.import_module(f"maskalign_kernels.{operation}.operations")
        monkeypatch.setattr(module, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())

    def concrete(size):
        return size if isinstance(size, int) else size.node.hint

    def compile_for_gpu(function, *batches, dynamic):
        graphs = []

        def capture(graph, _):
            graphs.append(graph)
            outputs = [None if node is None else node.meta["val"] for node in graph.graph.output_node().args[0]]

            def pretend(*_):
                return [
                    torch.zeros([concrete(n) for n in value.shape], dtype=value.dtype)
                    if isinstance(value, torch.Tensor) else None if value is None else concrete(value)
                    for value in outputs
                ]  # fmt: skip

            return make_boxed_func(pretend)

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=capture, bw_compiler=capture)
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
        for number, args in enumerate(batches):
            out = compiled(*args)
            if number == 0:
                out.sum().backward()
        torch._dynamo.reset()
        return graphs

    return compile_for_gpu


class Counts(collections.Counter):
    """Bytes that each kernel's programs loaded and stored; `distinct`: without what a launch loads or stores again."""

    def __init__(self):
        super().__init__()
        self.distinct = collections.Counter()


@pytest.fixture
def counted_bytes():
    """with counted_bytes() as count: ... -> `Counts` by kernel name, of what Triton's interpreter loads and stores."""
    from triton.runtime import interpreter

    @contextlib.contextmanager
    def count():
        found = Counts()
        builder = interpreter.InterpreterBuilder
        load, store, call = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__
        touched = {}  # of the running launch: (load or store, bytes of an element) -> arrays of addresses

        def note(way, ptrs, mask):
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            touched.setdefault((way, size), []).append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())

        def counting_load(self, ptrs, mask, *rest):
            note("load", ptrs, mask)
            return load(self, ptrs, mask, *rest)

        def counting_store(self, ptrs, value, mask, *rest):
            note("store", ptrs, mask)
            return store(self, ptrs, value, mask, *rest)

        def counting_call(self, *args, **kwargs):
            touched.clear()
            result = call(self, *args, **kwargs)
            for (_, size), addresses in touched.items():
                addresses = np.concatenate(addresses)
                found[self.fn.__name__] += size * len(addresses)
                found.distinct[self.fn.__name__] += size * len(np.unique(addresses))
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "create_masked_load", counting_load)
            patch.setattr(builder, "create_masked_store", counting_store)
            patch.setattr(interpreter.GridExecutor, "__call__", counting_call)
            yield found

    return count
