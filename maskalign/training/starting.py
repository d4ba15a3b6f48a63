"""Find the checkpoint to resume from, describe the run in one line, and warn about settings before the first step."""

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from maskalign.checkpoints.layout import FOLDER, find, newest_sound
from maskalign.config import TokenBudget, as_schedule, load_config
from maskalign.errors import UsageError
from maskalign.training.logs import read_metrics

log = logging.getLogger(__name__)
MUCH = 0.1  # a larger share of the initial weights in the moving average causes a warning


def find_resume(config, placement):
    """Path of the checkpoint that `training.resume` selects; None if the run begins at step 0.

    `auto` selects the newest undamaged checkpoint, and prints a line about newer damaged ones. All ranks get the same
    result.

    Raises:
        UsageError: the run has or had checkpoints, and none can be used. It would be wrong to start again silently.
    """
    resume = config.training.resume
    if resume in ("never", "restart"):
        return None
    if resume != "auto":
        return find(resume)

    def gather(value):
        values = [value] * placement.world_size
        if len(values) > 1:
            dist.all_gather_object(values, value)
        return values

    found, passed_over = newest_sound(Path(config.run_dir), (placement.rank, placement.world_size, gather))
    lost = None if found else gather(_lost(Path(config.run_dir), passed_over))[0]
    if lost:
        raise UsageError(
            f"{lost}; restore a checkpoint, start in another folder with --run_dir NEW, or give --training.resume "
            "restart to begin at step 0 here (existing files are set aside)"
        )
    if passed_over and placement.is_main:
        print(f"maskalign: {passed_over}", file=sys.stderr, flush=True)
    return found


def _lost(run_dir, passed_over):
    """Why no checkpoint of a run can be used, as text; None if the run may not have saved one yet."""
    if any(Path(run_dir, FOLDER).glob("step_*")):
        return f"training.resume: no checkpoint of this run is complete: {passed_over}"
    try:
        last = max((row["step"] for row in read_metrics(run_dir / "metrics.csv")), default=0)
        settings = load_config(run_dir / "config.yaml").training
    except (OSError, UsageError):
        return None
    # When a second checkpoint is due the first one is complete, and a run that ends normally saves one.
    if last >= min(2 * settings.checkpoint_every, settings.max_steps):
        return f"training.resume: {run_dir} has trained {last} steps, and its checkpoints are gone"
    return None


def start_line(config, manifest, facts, num_samples, model, placement):
    """A run in one line of text: model, data, teachers, hardware.

    Args:
        config: `Config`.
        manifest: `Manifest` of the (first) data set.
        facts: from `config.validate_with_data`.
        num_samples: number of images in all data sets.
        model: `SiT`.
        placement: `ranks.Placement`.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
    teachers = [f"{name} {'cached' if cached else 'online'}" for name, cached in facts.teachers]
    parts = [
        f"{size} parameters",
        f"{num_samples:,} images of {len(manifest.class_names):,} classes",
        f"teacher {', '.join(teachers)}" if teachers else "no teacher",
    ]
    if model.class_dim:
        name, cached = facts.class_token
        parts.append(f"class token of {name} ({model.class_dim} numbers, {'cached' if cached else 'online'})")
    parts.append(kept_tokens(TokenBudget(config.method, model)))
    precision = "bf16" if placement.dtype == torch.bfloat16 else "fp32"
    ranks = f" on {placement.world_size} ranks" if placement.world_size > 1 else ""
    parts += [f"batch {config.training.batch_size}", f"{placement.device}, {precision}"]
    return f"{config.run_dir}: {'; '.join(parts)}, plan {config.parallel.plan}{ranks}"


def kept_tokens(budget):
    """The number of tokens that a `TokenBudget` keeps after rounding, as text."""
    counts = list(dict.fromkeys(budget.ends))
    text = " to ".join(str(count) for count in counts)
    ratio = " to ".join(f"{count / budget.tokens:.3g}" for count in counts)
    return f"{text} of {budget.tokens} tokens kept (keep ratio {ratio})"


def warn_of_short_average(optimizer, steps):
    """Warn if the moving average still contains a large share of the initial weights after `steps` steps.

    Args:
        optimizer: `OptimizerConfig`.
        steps: number of steps of the whole run.

    Returns:
        True if it warned.
    """
    share = initial_share(optimizer, steps)
    if share > MUCH:
        log.warning(
            "optimizer.ema_decay: after %d steps the average, which samples are drawn from, is %.0f %% initial "
            "weights; set optimizer.ema_decay %.4g, or optimizer.ema_warmup 0.05 (EDM's ramp)",
            steps, 100 * share, max(0.0, 1 - 10 / steps),
        )  # fmt: skip
    return share > MUCH


def initial_share(optimizer, steps):
    """Weight of the initial values in the moving average after `steps` steps."""
    return 0.0 if optimizer.ema_warmup else optimizer.ema_decay**steps


def warn_of_full_subset(budget):
    """Warn if rounding to `method.keep_multiple` makes a keep ratio below 1 keep all tokens.

    Args:
        budget: `TokenBudget`.
    """
    low = min(as_schedule(budget.method.keep_ratio).ends)
    if low < 1 and budget.least == budget.tokens:
        log.warning(
            "method.keep_multiple: keep ratio %g of %d tokens, in multiples of %d, keeps all of them; set it lower",
            low, budget.tokens, budget.method.keep_multiple,
        )  # fmt: skip
