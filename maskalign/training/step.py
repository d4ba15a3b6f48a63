"""One training step: draws, forward, backward, clip, AdamW, EMA. The trainer and the benchmarks both run this one."""

from typing import NamedTuple

import torch

from maskalign.models.routing import keep_count
from maskalign.objective.draws import draw
from maskalign.objective.flow_matching import training_loss
from maskalign.training.plans import Plan
from maskalign.training.schedules import learning_rate, schedule_value


class StepResult(NamedTuple):
    """0-d tensors, still on the device: losses are means over the global batch; `skipped` tells a non-finite step."""

    loss: torch.Tensor
    velocity_loss: torch.Tensor
    align_loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    lr: float
    keep_ratio: float
    align_weight: float


class TrainStep:
    """Runs optimiser steps of a model under the settings of a `Config`.

    Args:
        model: a `SiT`.
        optimizer: an `Optimizer` over it.
        config: `Config`.
        placement: `parallel.Placement`.
        plan: `plans.Plan` over the model; by default one process.
    """

    def __init__(self, model, optimizer, config, placement, plan=None):
        self.model = model
        self.plan = plan or Plan(model, config, placement)
        self.optimizer = optimizer
        self.config = config
        self.placement = placement

    def draws(self, step, first_slot, count, keep_ratio, align_ratio, posterior):
        """The keyed random numbers of `count` images, see `objective.draws`."""
        config, model = self.config, self.model
        keep = keep_count(keep_ratio, model.num_tokens, config.method.keep_multiple)
        align = None
        if align_ratio is not None:
            present = keep if model.tap_sees_subset else model.num_tokens
            align = keep_count(align_ratio, present, config.method.keep_multiple)
        return draw(
            config.seed,
            step,
            first_slot,
            count,
            shape=(model.in_channels, model.input_size, model.input_size),
            grid=model.grid,
            keep=keep,
            align=align,
            time=config.objective.time,
            path=config.objective.path,
            label_dropout=config.objective.label_dropout,
            subset=config.method.subset,
            posterior=posterior,
            device=self.placement.device,
        )

    def __call__(self, step, progress, inputs, labels, teachers, first_slot=0, prepare=None):
        """One optimiser step on this rank's share of the batch.

        Args:
            step: number of the step, from 0; it keys the draws.
            progress: share of the run that is done, for the schedules.
            inputs: (b, C, H, W) float32 latents or pixels, or moments (b, 2C, h, w) with `prepare`.
            labels: (b,) int64.
            teachers: one (b, N, Dz) per teacher, floating or int8.
            first_slot: slot of the first image in the global batch.
            prepare: function (inputs, posterior draw) -> clean latents, for stored moments; None for ready inputs.

        Returns:
            StepResult.
        """
        config = self.config
        keep_ratio = schedule_value(config.method.keep_ratio, progress)
        align_weight = schedule_value(config.method.align_weight, progress)
        align_ratio = config.method.align_ratio
        if align_ratio is not None:
            align_ratio = schedule_value(align_ratio, progress)
        lr = learning_rate(config.optimizer, step, progress)
        parts = config.training.accumulation
        size = labels.shape[0] // parts
        sums = torch.zeros(3, device=labels.device)
        for part in range(parts):
            rows = slice(part * size, labels.shape[0] if part == parts - 1 else (part + 1) * size)
            share = (rows.stop - rows.start) / labels.shape[0]
            draws = self.draws(
                step, first_slot + rows.start, rows.stop - rows.start, keep_ratio, align_ratio, prepare is not None
            )
            x = inputs[rows] if prepare is None else prepare(inputs[rows], draws.posterior)
            with self.plan.micro_batch(last=part == parts - 1):
                losses = training_loss(
                    self.plan.forward,
                    x,
                    labels[rows],
                    [z[rows] for z in teachers],
                    draws,
                    align_weight=align_weight,
                    path=config.objective.path,
                    dtype=self.placement.dtype,
                )
                (losses.total * share).backward()
            sums += torch.stack([loss.detach().float() for loss in losses]) * share
        # The means over all ranks: every rank judges a step by the same numbers, so all of them skip it or none does.
        self.plan.mean(sums)
        norm, skipped = self.optimizer.step(lr, sums[0].isfinite())
        return StepResult(*sums.unbind(), norm, skipped, lr, keep_ratio, align_weight)
