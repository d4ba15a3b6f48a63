"""Which of a kernel's few configurations runs: a fixed default, or the fastest one measured once per shape.

A configuration is a dict of the kernel's block sizes with `num_warps` and `num_stages`. Every kernel lists a handful of
them, the first being the default, chosen by reasoning that its file explains. Nothing is timed unless asked for, so a
run repeats bit for bit by default; under torch.compile and in the interpreter nothing is ever timed.

Why not `triton.autotune` (Triton 3.8):

- Here the configuration is known before anything is allocated. The backward launches leave one part of a sum per
  program, so the sizes of their outputs, and the arguments of the launch after them, depend on the configuration.
  `triton.autotune` chooses at the launch, when the outputs exist: they would have to be as large as the largest
  configuration needs, and the chosen one would have to be read back out of the kernel's `best_config`.
- `triton.autotune` always times. A configuration decides the order of sums, so two runs could differ by rounding. It
  also cannot time while a CUDA graph is captured.
- Off, one configuration of each launch is built: 19 builds for the operations at XL/2's sizes (forward and backward in
  bfloat16, as in `benchmarks.gpu`), where timing all of them builds 48.
- Host time of the choice for a launch, on one core of a Xeon at 2.6 GHz: 0.4 us off, 1.2 us with a kept choice;
  `triton.autotune` takes 3.8 us for a shape that it has seen, and 2.2 us for a list of one configuration.

What `triton.autotune` has and this has not (pruning by a model, restoring inputs) is not needed for lists of one to
four configurations whose outputs are overwritten.

Environment variables:
    MASKALIGN_KERNELS_AUTOTUNE=1: time the list on the GPU the first time a shape is seen (eager calls only),
        keep the fastest, and write it to the cache file. Later runs, compiled ones too, read it from there.
    MASKALIGN_KERNELS_CACHE: the cache file; default ~/.cache/maskalign_kernels/configurations.json. It is
        read only with MASKALIGN_KERNELS_AUTOTUNE=1 (tune and use) or =cached (use, never time).
"""

import functools
import json
import os
import pathlib

import torch

from .operators import triton
from .runtime import INTERPRET, is_abstract


def mode():
    """'off', 'cached' or 'on'."""
    value = os.environ.get("MASKALIGN_KERNELS_AUTOTUNE", "0").lower()
    return "off" if value in ("", "0", "off") else "cached" if value == "cached" else "on"


def cache_path():
    default = pathlib.Path.home() / ".cache" / "maskalign_kernels" / "configurations.json"
    return pathlib.Path(os.environ.get("MASKALIGN_KERNELS_CACHE", default))


_decided = {}  # what `choose` has found in a cache file or measured, by what it depends on


def forget():
    """Read the cache file again at the next launch, as another process does."""
    _decided.clear()
    _chosen.cache_clear()


@functools.cache
def _chosen(path):
    """The choices in a cache file, read once per process; an unreadable file counts as empty."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _save(path, choices):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(choices, indent=1, sort_keys=True))
    part.replace(path)  # Atomic: several ranks may tune at once, and the last one wins.


def choose(kernel_name, key, configs, tensor, launch):
    """The configuration to launch with.

    Args:
        key: tuple of the sizes and dtypes that the best choice depends on; plain ints and strings, never
            symbolic sizes.
        configs: the list; configs[0] is the default.
        tensor: one of the call's tensors, which tells the device and whether there is data at all.
        launch: function of a configuration that launches the kernel once; its outputs are overwritten by the
            real launch.
    """
    if INTERPRET or mode() == "off":
        return configs[0]
    place = (os.environ.get("MASKALIGN_KERNELS_CACHE"), kernel_name, key, tensor.device)
    if place in _decided:
        return _decided[place]
    path = cache_path()
    choices = _chosen(path)
    abstract = is_abstract(tensor) or torch.compiler.is_compiling()
    name = "" if abstract and not torch.cuda.is_available() else torch.cuda.get_device_name()
    entry = "|".join([name, f"triton {triton.__version__}", kernel_name, *map(str, key)])
    if choices.get(entry) in configs:
        _decided[place] = choices[entry]
        return choices[entry]
    if abstract or mode() == "cached" or torch.cuda.is_current_stream_capturing():
        return configs[0]
    # A configuration that does not fit the device (shared memory, registers) is skipped.
    times = []
    for index, config in enumerate(configs):
        try:
            time = triton.testing.do_bench(
                lambda config=config: launch(config), warmup=10, rep=40, return_mode="median"
            )
        except triton.runtime.errors.OutOfResources:
            continue
        times.append((time, index))
    choices[entry] = configs[min(times)[1]] if times else configs[0]
    _save(path, choices)
    _decided[place] = choices[entry]
    return choices[entry]
