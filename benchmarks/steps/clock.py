"""Measurements of `benchmarks.steps`: wall time or CPU time, parts of a step, peak FLOP/s, saved bytes."""

import time
from contextlib import contextmanager

import torch

PARTS = ("data", "teacher", "draws", "forward", "backward", "optimizer", "ema")
# CPU seconds do not include the time in which other programs used the processor. With several threads they would also
# count threads that wait for each other, so `--clock cpu` needs one thread.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call, device, clock="wall"):
    """Seconds that a call takes, measured by one of `CLOCKS`."""
    synchronize(device)
    start = CLOCKS[clock]()
    call()
    synchronize(device)
    return CLOCKS[clock]() - start


def matmul_peak(device, precision, clock="wall", size=None, tries=8, patience=10.0):
    """FLOP/s of the fastest of a few square matrix multiplications: the peak of this machine in a precision.

    The matrices are larger on a GPU (`size`, by default 8192, and 2048 on a CPU), which hides the time of a launch. On
    a processor without bf16 instructions one multiplication can take a minute. The matrices are therefore smaller if
    the measurement would take more than `patience` seconds.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def best_of(tries, side):
        left, right = a[:side, :side].contiguous(), b[:side, :side].contiguous()
        return min(seconds_of(lambda: left @ right, device, clock) for _ in range(tries))

    probe = size // 4
    if best_of(2, probe) * tries * (size // probe) ** 3 > patience:
        size = probe
    return 2 * size**3 / best_of(tries, size)


class Clock:
    """Adds up seconds by name; parts may nest."""

    def __init__(self, device, clock="wall"):
        self.device, self.now = device, CLOCKS[clock]
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def _part(self, name):
        synchronize(self.device)
        start = self.now()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[name] += self.now() - start

    def __call__(self, name):
        return Part(self, name)


class Part:
    """A context that can be entered any number of times."""

    def __init__(self, clock, name):
        self.clock, self.name = clock, name

    def __enter__(self):
        self.running = self.clock._part(self.name)
        self.running.__enter__()

    def __exit__(self, *error):
        self.running.__exit__(*error)


def split_of(case, device, steps, clock="wall"):
    """Milliseconds of every part of a step, means over a few steps."""
    taken = Clock(device, clock)
    with case.timed(taken):
        for _ in range(steps):
            case.step()
    parts = {name: 1000 * seconds / steps for name, seconds in taken.seconds.items()}
    if case.averages_inside:
        parts["optimizer"] -= parts["ema"]
    return parts


def saved_bytes(case):
    """Bytes of the distinct storages that autograd keeps for the backward of a step, without weights and inputs."""
    batch = case.batches()
    inputs = [batch.inputs, batch.labels, *batch.teachers]
    inputs += [] if batch.class_token is None else [batch.class_token]
    known = {tensor.untyped_storage().data_ptr() for tensor in [*case.weights(), *inputs]}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # it stays alive until the backward, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.step(batch)
    return sum(sizes.values())
