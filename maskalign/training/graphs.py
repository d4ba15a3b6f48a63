"""A training step as one CUDA graph: a GPU is faster at a step than Python at launching its few thousand kernels.

Half as many tokens are half the work in as many launches, so a step on a subset is the first to wait for Python. A
graph holds the launches with their arguments: it is recorded once for each kind of step (number of kept tokens, with an
alignment loss or without) and then replayed, on inputs that are copied to where the recorded kernels read them.
"""

import logging

import torch

log = logging.getLogger(__name__)

# Steps of a kind that run kernel by kernel first: they compile, tune and allocate, which a recording may not.
WARM_UP = 2


def can_record(config, placement):
    """True where steps can be graphs: one GPU whose step nobody interrupts.

    Several ranks talk to each other within a step, and a moving average in host memory waits for a copy.
    """
    return (
        config.training.cuda_graph
        and placement.device.type == "cuda"
        and placement.mesh is None
        and not config.parallel.ema_on_cpu
    )


class StepGraphs:
    """Calls `compute` as a graph.

    A graph keeps the memory of its step for itself, so there is one at a time: it goes when another kind of step comes,
    whose first steps then have the memory. Schedules do not come back to a kind; should one, it runs kernel by kernel.

    Args:
        compute: function (micro_batches, align_weight, lr) -> tuple of tensors. It may neither wait for the GPU nor
            keep anything between its calls but in tensors that stay where they are.
        model: whose gradients it makes and frees.
        device: the GPU.
    """

    def __init__(self, compute, model, device):
        self.compute = compute
        self.model = model
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.numbers = [torch.zeros((), dtype=torch.float32, device=device) for _ in range(2)]
        self.seen = {}  # kind of step -> steps that have run kernel by kernel
        self.kind, self.recording = None, None
        self.works = True

    def __call__(self, micro_batches, align_weight, lr):
        """What `compute` returns of these arguments; micro_batches: list of `step.MicroBatch`, the others numbers."""
        kind = kind_of(micro_batches), align_weight > 0
        for tensor, number in zip(self.numbers, (align_weight, lr), strict=True):
            tensor.fill_(number)
        align_weight = self.numbers[0] if align_weight > 0 else 0
        arguments = micro_batches, align_weight, self.numbers[1]
        if kind != self.kind:
            self._forget()
            self.seen[kind] = self.seen.get(kind, 0) + 1
            if self.seen[kind] != WARM_UP + 1 or not self.works or not self._record(kind, arguments):
                return self._run(arguments)
        return self.recording.replay(micro_batches)

    def _run(self, arguments):
        """Kernel by kernel, on the stream that records: what autograd keeps between steps then belongs to it."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.compute(*arguments)
        current.wait_stream(self.stream)
        return results

    def _forget(self):
        """Give the memory of the last graph back."""
        if self.recording is not None:
            torch.cuda.synchronize(self.device)
            self.kind, self.recording = None, None
            torch.cuda.empty_cache()

    def _record(self, kind, arguments):
        """Record a kind of step; False where it cannot be, which is said once."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the graph takes as much memory as the steps before it have left behind
        try:
            self.recording = Recording(self.compute, arguments, self.stream)
        except RuntimeError as error:
            self.works = False
            self.model.zero_grad(set_to_none=True)  # what there is belongs to the recording
            reason = str(error).strip().splitlines()[0]
            log.warning("training.cuda_graph: a step cannot be recorded (%s); steps run kernel by kernel", reason)
            return False
        self.kind = kind
        return True


class Recording:
    """One kind of step as a graph, with the places of its inputs and of its results."""

    def __init__(self, compute, arguments, stream):
        micro_batches, *numbers = arguments
        self.micro_batches = [micro_batch.map(torch.clone) for micro_batch in micro_batches]
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, of the loader and of a checkpoint being written, may go on meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.results = compute(self.micro_batches, *numbers)

    def replay(self, micro_batches):
        places, values = [], []
        for place, value in zip(self.micro_batches, micro_batches, strict=True):
            places += place.tensors()
            values += value.tensors()
        for place, value in zip(places, values, strict=True):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)  # the next replay writes to the same places


def kind_of(micro_batches):
    """What must be the same for a graph to fit: numbers, shapes and dtypes."""
    return tuple(
        (batch.share, batch.last, *((tensor.shape, tensor.dtype) for tensor in batch.tensors()))
        for batch in micro_batches
    )
