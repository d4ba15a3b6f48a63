"""torch.compile of the blocks, each as one full graph, and recomputation of activations.

Both replace a module's `forward` inside the hooks with which FSDP gathers and frees weights, so `fully_shard` may be
called before or after.
"""

import torch
from torch.utils.checkpoint import checkpoint

from maskalign.config import as_schedule
from maskalign.errors import UsageError, one_line

BACKEND = "inductor"


def prepare_blocks(model, config):
    """Wrap the blocks of a `SiT` in place, according to `training.compile` and `parallel.recompute`.

    With `selective` recomputation, torch's partitioner selects the activations of compiled blocks to recompute (its
    activation memory budget, a knapsack of FLOPs and bytes). Of eager blocks, as many as the budget requires are
    recomputed completely, evenly spread over the depth.
    """
    parallel = config.parallel
    budget = {"none": 1.0, "block": 0.0, "selective": parallel.memory_budget}[parallel.recompute]
    compiled = config.training.compile
    if compiled:
        compile_model(model, config.method.keep_ratio, budget)
    if not compiled or parallel.recompute == "block":
        blocks = model.all_blocks
        for number in spread(round((1 - budget) * len(blocks)), len(blocks)):
            recompute(blocks[number])


def compile_model(model, keep=None, budget=1.0):
    """torch.compile the blocks and the mixer of a SiT in place, as full graphs. Equal blocks share one compilation.

    If the number of kept tokens changes during the run, it is a symbolic size that is compiled once for all numbers. If
    it is constant, a block has at most two lengths, inside and outside of the route, and each is compiled separately.

    Args:
        model: a `SiT`.
        keep: the keep ratio, a number or a `Schedule`; None for a constant one.
        budget: share of a block's activations that is saved for the backward; the rest is recomputed.
    """
    keep = as_schedule(1.0 if keep is None else keep)
    varying = len(set(keep.ends)) > 1
    torch._functorch.config.activation_memory_budget = budget
    torch._dynamo.config.optimize_ddp = False  # blocks are smaller than DDP's buckets, so no graph has to be split
    # Only the last mixing layer drops tokens; the others are like all other blocks.
    dropping = model.mixing_layers[-1:] or [model.mixer]
    for block in model.all_blocks:
        if block not in dropping:
            block.forward = _compiled_block(block.forward, varying)
    for module in dropping:
        module.forward = _compiled_mixer(module.forward, varying, keep.start)


def compile_units(modules):
    """torch.compile the forward of each module in place, as a full graph with static shapes."""
    for module in modules:
        module.forward = _compile(module.forward, varying=False)


def _compile(function, varying):
    return torch.compile(function, fullgraph=True, dynamic=None if varying else False, backend=BACKEND)


def _compiled_block(function, varying):
    compiled = _compile(function, varying)

    def forward(x, c):
        torch._dynamo.maybe_mark_dynamic(x, 1)
        return compiled(x, c)

    return forward if varying else compiled


def _compiled_mixer(function, varying, start):
    compiled = _compile(function, varying)

    def forward(x, c, subset=None):
        # With and without a subset, the graphs differ. If both occur in a run, only that of its beginning is compiled,
        # so that no compilation interrupts the run. The mixer is one fused operation in both cases.
        if (subset is None) != (start == 1):
            return function(x, c, subset)
        if subset is not None:
            torch._dynamo.maybe_mark_dynamic(subset, 1)
        return compiled(x, c, subset)

    return forward if varying else compiled


def recompute(block):
    """Save only a block's inputs for the backward, in place. The forward has no random numbers to be repeated."""
    inner = block.forward

    def forward(x, c, subset=None):
        inputs = (x, c) if subset is None else (x, c, subset)
        if not torch.is_grad_enabled():
            return inner(*inputs)
        return checkpoint(inner, *inputs, use_reentrant=False, preserve_rng_state=False)

    block.forward = forward


def spread(count, total):
    """`count` evenly spread numbers from 0 to total - 1."""
    return [number for number in range(total) if (number + 1) * count // total > number * count // total]


def check_compile(device):
    """Check that torch.compile works on a device, before a model is built. It needs a C++ compiler, or Triton on GPUs.

    Raises:
        UsageError: torch.compile does not work.
    """
    if BACKEND != "inductor":
        return
    needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler (Debian, Ubuntu: apt install g++)"
    try:
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()  # raises without a compiler, even if the code below is in torch's cache
        compiled = torch.compile(lambda x: (x * 2).sum(), fullgraph=True, dynamic=False, backend=BACKEND)
        with torch.no_grad():
            compiled(torch.ones(16, device=device))
    except Exception as error:
        raise UsageError(
            f"training.compile: torch.compile does not work on {device} here ({_root(error)}); it needs {needs}; "
            "install it, or set training.compile false"
        ) from None


def _root(error):
    """The type and first line of the original error of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(error)[:160]}"
