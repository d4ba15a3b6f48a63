"""Measure the use of the hardware: FLOP/s of the tokens that are computed, the share of the device's peak (MFU), and
the time in communication.
"""

import os
import time
from contextlib import contextmanager

import torch

from maskalign.models.flops import step_flops
from maskalign.runtime.accelerators import peak_tflops

# Numbers of steps before the first profiled step (which is slow), between it and the second, and between later ones.
SAMPLES = (1, 9, 50)


class TeacherShare:
    """Measures the share of a step's time that is spent on the teachers' features, and reports a large one.

    Args:
        device: where the steps run.
        online: True if some features are computed from the images.
        tell: function of the share in [0, 1], called at most once, if the share is above `LARGE`.
    """

    SKIPPED, MEASURED = 4, 5  # numbers of steps; the skipped ones compile, tune and capture
    LARGE = 0.5

    def __init__(self, device, online, tell):
        self.device, self.tell = device, tell
        self.left = self.SKIPPED + self.MEASURED if online else 0
        self.seconds = {"features": 0.0, "step": 0.0}

    def features(self):
        """Context in which a step's inputs are computed."""
        return self._timed("features")

    def step(self):
        """Context in which the rest of the step is computed."""
        return self._timed("step")

    @contextmanager
    def _timed(self, part):
        if not 0 < self.left <= self.MEASURED:
            yield
        else:
            _synchronize(self.device)
            start = time.perf_counter()
            yield
            _synchronize(self.device)
            self.seconds[part] += time.perf_counter() - start
        if part == "step" and self.left:
            self.left -= 1
            share = self.seconds["features"] / max(sum(self.seconds.values()), 1e-9)
            if not self.left and share > self.LARGE:
                self.tell(share)


def device_peak(device, dtype):
    """Peak FLOP/s of a device for a dtype.

    This is the published number if the device's name is known, else the fastest of a few square matrix multiplications
    with this process's threads.
    """
    if device.type == "cuda":
        known = peak_tflops(torch.cuda.get_device_name(device))
        if known:
            return 1e12 * known[0 if dtype == torch.bfloat16 else 1]
    size = 4096 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Throughput:
    """Counts the work of the steps of an interval.

    Args:
        model: the `SiT`.
        config: `Config`.
        placement: `ranks.Placement`.
    """

    def __init__(self, model, config, placement):
        self.model, self.config, self.placement = model, config, placement
        self.peak = None
        self.flops = 0
        self.flops_of = {}
        self.share_in_communication = 0.0
        self.pauses = list(SAMPLES)
        self.until_sample = self.pauses.pop(0)

    def count(self, kept, drawn, aligned):
        """Add one step of the global batch: forward and backward of the student, without recomputation.

        Args:
            kept, drawn: numbers of patch tokens, see `TokenBudget`.
            aligned: True if the step has an alignment loss.
        """
        key = (kept, drawn, aligned)
        if key not in self.flops_of:
            self.flops_of[key] = step_flops(self.model, kept, aligned, drawn)
        self.flops += self.flops_of[key] * self.config.training.batch_size

    def interval(self, seconds):
        """Throughput of the steps counted since the last call.

        Args:
            seconds: the time that these steps took.

        Returns:
            dict: tflops, TFLOP/s per rank; mfu, their share of the device's peak; comm_seconds, the part of `seconds`
            in which a collective was running, even if computation ran at the same time.
        """
        if self.peak is None:
            self.peak = device_peak(self.placement.device, self.placement.dtype)
        rate = self.flops / seconds / self.placement.world_size
        self.flops = 0
        return {"tflops": rate / 1e12, "mfu": rate / self.peak, "comm_seconds": self.share_in_communication * seconds}

    def run(self, step, *args, **kwargs):
        """Call `step`. On several ranks, some calls run under torch's profiler to measure the time in collectives."""
        self.until_sample -= 1
        if self.until_sample >= 0 or self.placement.world_size == 1:
            return step(*args, **kwargs)
        self.until_sample = self.pauses.pop(0) if len(self.pauses) > 1 else self.pauses[0]
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler warns if there is no GPU
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.placement.device.type == "cuda":
            activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            begin = time.perf_counter()
            result = step(*args, **kwargs)
            _synchronize(self.placement.device)
            end = time.perf_counter()
        spans = [
            (event.time_range.start, event.time_range.end) for event in profile.events() if _collective(event.name)
        ]
        self.share_in_communication = min(1.0, _union(spans) * 1e-6 / (end - begin))
        return result


def _collective(name):
    """True if a profiler event with this name is a collective of gloo or a kernel of NCCL."""
    return name.startswith("gloo:") or "nccl" in name and "Kernel" in name


def _union(spans):
    """Total length of the union of (start, end) intervals."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
