"""A training step as one CUDA graph, because Python launches its few thousand kernels more slowly than a GPU runs them.

A step on half of the tokens is half of the work with the same number of launches, so steps on subsets are the first to
wait for Python. A graph contains the launches with their arguments, including those of collectives. It is captured once
for each kind of step (number of kept tokens, with or without an alignment loss), and then replayed on inputs that are
copied to the addresses that the captured kernels read.

Requirements of a capture, and where they are met:

- Steps before the capture, the capture itself, and the construction of DDP or FSDP use one stream other than the
  default
  one (`capture_stream`, `Plan`), because autograd's AccumulateGrad nodes and NCCL keep the stream of their first use.
- No operation may read a value from the device (tests/training/test_no_host_sync.py). DDP does so when it searches for
  unused parameters, so `Plan` tells it which ones are used. It also reads timers in its first steps, for which
  `Plan.can_capture` waits.
- Every capture and every replay covers all micro-batches of a step, so the flags for the last of them do not change.
- Other threads of this process use CUDA during the capture (NCCL's watchdog, the loader, staging of a checkpoint),
  which
  the capture mode "thread_local" allows.
- Either all ranks replay, or all of them launch, because NCCL does not support a mixture.
"""

import logging
import os

import torch

log = logging.getLogger(__name__)

# The number of steps of a kind that Python launches first: they compile, tune and allocate, which a capture must not.
WARM_UP = 2

# The part of a step that is captured.
STEP, GRADIENTS, NOTHING = "step", "gradients", "nothing"


def captures(config, placement):
    """Whether steps are captured: on NVIDIA's GPUs under every plan, but not on HIP, where Python launches them."""
    return config.training.cuda_graph and placement.device.type == "cuda" and torch.version.hip is None


def capture_stream(config, placement):
    """The stream on which steps run until they are replayed; None if they are not captured."""
    if not captures(config, placement):
        return None
    # The profiler can be started and stopped while graphs are used only if CUPTI stays initialized.
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    return torch.cuda.Stream(placement.device)


class StepGraphs:
    """Runs optimizer steps as CUDA graphs.

    A graph occupies the memory of its step, so there is only one at a time. It is released when another kind of step
    begins, whose first steps need the memory.

    If the whole step cannot be captured, only forward and backward are captured, and Python launches the update. If
    these cannot be captured either, Python launches the whole step. One line reports this.

    Neither function may wait for the GPU, and the tensors that they keep between calls must have fixed addresses.

    Args:
        gradients: function (micro_batches, align_weight) -> losses, a tensor: forward and backward of a whole step.
        update: function (losses, lr) -> tuple of tensors: clipping, optimizer, EMA. It frees the gradients.
        plan: `plans.Plan` of the model.
    """

    def __init__(self, gradients, update, plan):
        self.gradients, self.update, self.plan = gradients, update, plan
        self.device, self.stream = plan.device, plan.stream
        # Values that change between steps are tensors, which are read when the graph is replayed.
        self.align_weight, self.lr = (torch.zeros((), dtype=torch.float32, device=self.device) for _ in range(2))
        self.signature = None  # of the last step
        self.launched = 0  # number of consecutive steps with this signature that Python has launched
        self.captured = None
        self.part = STEP  # the part of a step that is captured

    def __call__(self, micro_batches, align_weight, lr):
        """Run one step.

        Args:
            micro_batches: list of `step.MicroBatch`.
            align_weight, lr: numbers.

        Returns:
            (losses, *results of `update`): tensors that later steps do not overwrite.
        """
        self.align_weight.fill_(align_weight)
        self.lr.fill_(lr)
        signature = signature_of(micro_batches)
        if signature != self.signature:
            self.release()
            self.signature, self.launched = signature, 0
        if self.captured is None and self._is_due():
            self._capture(micro_batches)
        if self.captured is None:
            self.launched += 1
            return self._launch(lambda: self._step(micro_batches))
        results = self.captured.replay(micro_batches)
        if self.part == STEP:
            return results
        self.captured.hand_over_gradients()
        return *results, *self._launch(lambda: self.update(results[0], self.lr))

    def _step(self, micro_batches):
        losses = self.gradients(micro_batches, self.align_weight)
        return losses, *self.update(losses, self.lr)

    def _is_due(self):
        # No capture while torch's profiler records the step.
        profiled = torch.autograd._profiler_enabled()
        return self.part != NOTHING and self.launched >= WARM_UP and self.plan.can_capture and not profiled

    def _launch(self, function):
        """Call a function on the capturing stream, so that the state of autograd and NCCL belongs to this stream."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = function()
        current.wait_stream(self.stream)
        return results

    def release(self):
        """Release the graph and its memory. Call it before the process group ends: the graph has collectives."""
        if self.captured is not None:
            torch.cuda.synchronize(self.device)
            self.captured = None
            torch.cuda.empty_cache()

    def _capture(self, micro_batches):
        """Capture this kind of step, or the largest part of it that all ranks can capture."""
        asked, reason = self.part, ""
        while self.captured is None and self.part != NOTHING:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # the graph needs as much memory as the steps before it have cached
            self.plan.settle()
            captured, failed = None, False
            try:
                captured = self._record(micro_batches)
            except RuntimeError as error:
                failed, reason = True, reason or str(error).strip().splitlines()[0]
            (failed,) = self.plan.max_over_ranks(float(failed))
            if not failed:
                self.captured = captured
            else:
                captured = None
                self.plan.abandon_step()
                self.part = GRADIENTS if self.part == STEP else NOTHING
        if self.part != asked:
            what = "steps are" if self.part == NOTHING else "its update is"
            reason = reason or "another rank prints the reason"
            log.warning("training.cuda_graph: a step cannot be captured (%s); %s launched by Python", reason, what)

    def _record(self, micro_batches):
        if self.part == STEP:
            return CapturedStep(self._step, micro_batches, self.stream)
        forward_and_backward = lambda inputs: (self.gradients(inputs, self.align_weight),)  # noqa: E731
        return CapturedStep(forward_and_backward, micro_batches, self.stream, list(self.plan.model.parameters()))


class CapturedStep:
    """One kind of step as a graph, with its input and result tensors.

    Args:
        compute: function (micro_batches) -> tuple of tensors.
        micro_batches: list of `step.MicroBatch`; replays read from copies of them.
        stream: the stream of the capture.
        parameters: parameters whose gradients a replay returns; () if the graph uses the gradients itself.
    """

    def __init__(self, compute, micro_batches, stream, parameters=()):
        self.inputs = [micro_batch.map(torch.clone) for micro_batch in micro_batches]
        self.parameters = parameters
        self.results = self._record(lambda: compute(self.inputs), stream)
        # The gradients are in the graph's memory, and every replay overwrites them.
        self.gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None

    def _record(self, compute, stream):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            return compute()

    def _launch(self):
        self.graph.replay()

    def replay(self, micro_batches):
        """Run the graph on these inputs, and return copies of the results, which the next replay would overwrite."""
        for place, values in zip(self.inputs, micro_batches, strict=True):
            for target, value in zip(place.tensors(), values.tensors(), strict=True):
                target.copy_(value, non_blocking=True)
        self._launch()
        return tuple(result.clone() for result in self.results)

    def hand_over_gradients(self):
        """Set the parameters' gradients to those of the last replay."""
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient


def signature_of(micro_batches):
    """The properties that must be equal for a graph to be replayed: numbers, shapes and dtypes."""
    return tuple(
        (batch.share, batch.last, len(batch.teachers), *((tensor.shape, tensor.dtype) for tensor in batch.tensors()))
        for batch in micro_batches
    )
