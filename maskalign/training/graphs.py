"""A training step as one CUDA graph, because Python launches its few thousand kernels more slowly than a GPU runs them.

A step on half of the tokens does half of the work in the same number of launches, so steps on subsets wait for Python
first. A graph holds the launches with their arguments, those of collectives included: it is captured once for each
kind of step (the number of kept tokens, with an alignment loss or without) and then replayed on inputs that are copied
to where the captured kernels read them.

What a capture needs, and where it is seen to:

- Steps before the capture, the capture itself, and the construction of DDP or FSDP use one stream beside the default
  one (`capture_stream`, `Plan`): autograd's AccumulateGrad nodes and NCCL remember the stream of their first use.
- Nothing may ask the device for a value (tests/training/test_no_host_sync.py). DDP does so when it looks for unused
  parameters, so `Plan` tells it which ones take part; and it reads timers in its first steps, so `Plan.can_capture`
  waits for those.
- Every capture and every replay covers all micro-batches of a step, so the flags for the last of them do not change.
- Other threads of this process use CUDA meanwhile (NCCL's watchdog, the loader, a checkpoint being staged), which the
  capture mode "thread_local" permits.
- All ranks replay, or all of them launch: NCCL permits no mixture.
"""

import logging
import os

import torch

log = logging.getLogger(__name__)

# Steps of a kind that are launched by Python first: they compile, tune and allocate, which a capture may not.
WARM_UP = 2

# How much of a step is captured.
STEP, GRADIENTS, NOTHING = "step", "gradients", "nothing"


def captures(config, placement):
    """True where steps are to be captured: on NVIDIA's GPUs, under every plan. On HIP, steps are launched by Python."""
    return config.training.cuda_graph and placement.device.type == "cuda" and torch.version.hip is None


def capture_stream(config, placement):
    """The stream on which steps run until they are replayed; None where they are not captured."""
    if not captures(config, placement):
        return None
    # The profiler may come and go beside graphs only if CUPTI stays initialized.
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    return torch.cuda.Stream(placement.device)


class StepGraphs:
    """Runs optimizer steps as CUDA graphs.

    A graph keeps the memory of its step for itself, so there is one at a time: it is released when another kind of step
    comes, whose first steps then have the memory.

    Where the whole step cannot be captured, forward and backward are, and the update is launched by Python; where these
    cannot be captured either, all is. One line says so.

    Args:
        gradients: function (micro_batches, align_weight) -> losses, a tensor: forward and backward of a whole step.
        update: function (losses, lr) -> tuple of tensors: clip, optimizer, moving average. It frees the gradients.
        plan: `plans.Plan` of the model.

    Neither function may wait for the GPU, and what they keep between calls must be tensors at fixed addresses.
    """

    def __init__(self, gradients, update, plan):
        self.gradients, self.update, self.plan = gradients, update, plan
        self.device, self.stream = plan.device, plan.stream
        # What changes from step to step is a tensor: its value is read when the graph is replayed.
        self.align_weight, self.lr = (torch.zeros((), dtype=torch.float32, device=self.device) for _ in range(2))
        self.signature = None  # of the last step
        self.launched = 0  # steps in a row with this signature that Python has launched
        self.captured = None
        self.part = STEP  # how much of a step is captured

    def __call__(self, micro_batches, align_weight, lr):
        """One step.

        Args:
            micro_batches: list of `step.MicroBatch`.
            align_weight, lr: numbers.

        Returns:
            (losses, *what `update` returns): tensors that later steps do not overwrite.
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
        # Not while torch's profiler records the step.
        profiled = torch.autograd._profiler_enabled()
        return self.part != NOTHING and self.launched >= WARM_UP and self.plan.can_capture and not profiled

    def _launch(self, function):
        """Call a function on the capturing stream: what autograd and NCCL keep between steps then belongs to it."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = function()
        current.wait_stream(self.stream)
        return results

    def release(self):
        """Release the memory of the graph. Call it before the process group ends: the graph holds its collectives."""
        if self.captured is not None:
            torch.cuda.synchronize(self.device)
            self.captured = None
            torch.cuda.empty_cache()

    def _capture(self, micro_batches):
        """Capture this kind of step, or as much of it as every rank can."""
        asked, reason = self.part, ""
        while self.captured is None and self.part != NOTHING:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # the graph takes as much memory as the steps before it have left behind
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
            reason = reason or "another rank says why"
            log.warning("training.cuda_graph: a step cannot be captured (%s); %s launched by Python", reason, what)

    def _record(self, micro_batches):
        if self.part == STEP:
            return CapturedStep(self._step, micro_batches, self.stream)
        forward_and_backward = lambda inputs: (self.gradients(inputs, self.align_weight),)  # noqa: E731
        return CapturedStep(forward_and_backward, micro_batches, self.stream, list(self.plan.model.parameters()))


class CapturedStep:
    """One kind of step as a graph, with the places of its inputs and of its results.

    Args:
        compute: function (micro_batches) -> tuple of tensors.
        micro_batches: list of `step.MicroBatch`; replays read from copies of them.
        stream: to capture on.
        parameters: whose gradients a replay leaves behind; () where the graph consumes them itself.
    """

    def __init__(self, compute, micro_batches, stream, parameters=()):
        self.inputs = [micro_batch.map(torch.clone) for micro_batch in micro_batches]
        self.parameters = parameters
        self.results = self._record(lambda: compute(self.inputs), stream)
        # They stay in the graph's memory, where every replay overwrites them.
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
        """The results for these inputs, copied: the next replay writes to the same places."""
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
    """What must be the same for a graph to fit: numbers, shapes and dtypes."""
    return tuple(
        (batch.share, batch.last, len(batch.teachers), *((tensor.shape, tensor.dtype) for tensor in batch.tensors()))
        for batch in micro_batches
    )
