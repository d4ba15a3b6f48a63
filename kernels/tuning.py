"""Select a kernel's configuration: a fixed default, or the fastest of a few, measured once per shape.

A configuration is a dict of the kernel's block sizes with `num_warps` and `num_stages`. Every kernel has a list of a
few configurations. The first is the default; the kernel's launch.py explains the choice. Nothing is timed by default,
so runs are reproducible bit for bit. Under torch.compile and in the interpreter, nothing is ever timed.

Reasons for not using `triton.autotune` (Triton 3.8):

- Here the configuration is known before outputs are allocated. The backward launches write one partial sum per
  program, so the sizes of their outputs, and the arguments of the next launch, depend on the configuration.
  `triton.autotune` chooses at the launch, when the outputs exist: they would have to be as large as the largest
  configuration needs, and the choice would have to be read from the kernel's `best_config`.
- `triton.autotune` always times. A configuration determines the order of sums, so two runs could differ by rounding. It
  also cannot time while a CUDA graph is captured.
- With tuning off, one configuration of each launch is compiled: 19 builds for the operations at XL/2's sizes (forward
  and backward in bfloat16, as in `benchmarks.gpu`). Timing all configurations compiles 48.
- Host time of the choice for a launch, on one core of a Xeon at 2.6 GHz: 0.4 us with tuning off, 1.2 us with a cached
  choice; `triton.autotune` takes 3.8 us for a known shape, and 2.2 us for a list of one configuration.

The other features of `triton.autotune` (pruning by a model, restoring inputs) are not needed for lists of one to four
configurations whose outputs are overwritten.

Environment variables:
    MASKALIGN_KERNELS_AUTOTUNE=1: time the list on the GPU the first time a shape occurs (in eager calls only), use the
        fastest, and write it to the cache file. Later runs, including compiled ones, read it from there.
    MASKALIGN_KERNELS_CACHE: the cache file; default ~/.cache/maskalign_kernels/configurations.json. It is read only
        with MASKALIGN_KERNELS_AUTOTUNE=1 (time and use) or =cached (use, never time).
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


_decided = {}  # the choices of this process, from the cache file or measured, by (cache file, kernel, key, device)


def forget():
    """Forget the choices of this process, so that the next launch reads the cache file again."""
    _decided.clear()
    _chosen.cache_clear()


@functools.cache
def _chosen(path):
    """The choices in a cache file, read once per process. An unreadable file is treated as empty."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _save(path, choices):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(choices, indent=1, sort_keys=True))
    part.replace(path)  # Atomic: several ranks may tune at the same time, and the last one's file stays.


def choose(kernel_name, key, configs, tensor, launch):
    """The configuration to launch with.

    Args:
        kernel_name: the name under which the choice is cached.
        key: tuple of the sizes and dtypes that the best choice depends on; plain ints and strings, never symbolic
            sizes.
        configs: the list; configs[0] is the default.
        tensor: one of the call's tensors. It determines the device, and whether there is data to time with.
        launch: function of a configuration that launches the kernel once. The actual launch overwrites its outputs.
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
