"""One training step: draws, forward, backward, clip, AdamW, EMA. The trainer and the benchmarks both use it."""

from typing import List, NamedTuple, Optional

import torch

from maskalign.config.schedules import TokenBudget, schedule_value
from maskalign.objective.draws import Draws, draw
from maskalign.objective.flow_matching import sample_posterior, training_loss
from maskalign.training.graphs import StepGraphs
from maskalign.training.plans import Plan
from maskalign.training.schedules import learning_rate


class StepResult(NamedTuple):
    """The result of a step. The tensors are 0-d and on the device.

    loss, velocity_loss, align_loss, class_velocity_loss: float32, means over the global batch; grad_norm: global
    gradient norm before the clip; skipped: bool, True if the step was not finite; lr: learning rate; kept, drawn:
    numbers of patch tokens, see `TokenBudget`; align_weight: weight of the alignment loss.
    """

    loss: torch.Tensor
    velocity_loss: torch.Tensor
    align_loss: torch.Tensor
    class_velocity_loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    lr: float
    kept: int
    drawn: Optional[int]
    align_weight: float


class MicroBatch(NamedTuple):
    """The inputs of one forward and backward.

    x: (b, C, H, W) clean latents or pixels; labels: (b,) int64; teachers: a list of one (b, N, Dz) tensor per teacher,
    (b, 1 + N, Dz) with a class token, empty in a step without an alignment loss; draws: `Draws` for these b images;
    share: b divided by the number of this rank's images; last: True if the optimizer's step comes next; class_token:
    (b, class_dim) clean class tokens, or None.
    """

    x: torch.Tensor
    labels: torch.Tensor
    teachers: List[torch.Tensor]
    draws: Draws
    share: float
    last: bool
    class_token: Optional[torch.Tensor] = None

    def tensors(self):
        """list of all tensors, always in the same order."""
        optional = [*self.draws, self.class_token]
        return [self.x, self.labels, *self.teachers, *(tensor for tensor in optional if tensor is not None)]

    def map(self, function):
        """A new MicroBatch with function(tensor) in the place of every tensor."""
        draws = Draws(*(None if tensor is None else function(tensor) for tensor in self.draws))
        teachers = [function(z) for z in self.teachers]
        class_token = None if self.class_token is None else function(self.class_token)
        return self._replace(
            x=function(self.x), labels=function(self.labels), teachers=teachers, draws=draws, class_token=class_token
        )


class TrainStep:
    """Runs optimizer steps of a model under the settings of a `Config`.

    Args:
        model: a `SiT`.
        optimizer: an `Optimizer` over it.
        config: `Config`.
        placement: `ranks.Placement`.
        plan: `plans.Plan` over the model; by default one process.
        latent: the manifest's entry about stored moments, a dict with scale and bias; None if the inputs are clean
            latents or pixels.
    """

    def __init__(self, model, optimizer, config, placement, plan=None, latent=None):
        self.model = model
        self.plan = plan or Plan(model, config, placement)
        self.optimizer = optimizer
        self.config = config
        self.placement = placement
        self.latent = latent
        self.tokens = TokenBudget(config.method, model)
        self.graphs = None if self.plan.stream is None else StepGraphs(self.gradients, self.update, self.plan)

    def draws(self, step, first_slot, count, kept, drawn, posterior):
        """The keyed random numbers of `count` images, see `objective.draws`.

        Args:
            step: number of the step, from 0.
            first_slot: slot of the first image in the global batch.
            count: number of images.
            kept, drawn: numbers of patch tokens, see `TokenBudget`.
            posterior: True if latents are drawn from stored moments.

        Returns:
            Draws.
        """
        config, model = self.config, self.model
        return draw(
            config.seed,
            step,
            first_slot,
            count,
            shape=(model.in_channels, model.input_size, model.input_size),
            grid=model.grid,
            keep=kept,
            align=drawn,
            time=config.objective.time,
            path=config.objective.path,
            label_dropout=config.objective.label_dropout,
            subset=config.method.subset,
            posterior=posterior,
            class_dim=model.class_dim,
            device=self.placement.device,
        )

    def __call__(self, step, progress, inputs, labels, teachers, first_slot=0, class_token=None):
        """One optimizer step on this rank's share of the batch.

        Args:
            step: number of the step, from 0; it is part of the key of the random numbers.
            progress: share of the run that is done, for the schedules.
            inputs: (b, C, H, W) float32 latents or pixels, or with `latent` (b, 2C, h, w) moments of any dtype.
            labels: (b,) int64.
            teachers: list of one (b, N, Dz) tensor per teacher, floating point or int8.
            first_slot: slot of the first image in the global batch.
            class_token: (b, class_dim) clean class tokens, for a model that has one.

        Returns:
            StepResult.
        """
        config = self.config
        kept, drawn = self.tokens.kept(progress), self.tokens.drawn(progress)
        align_weight = schedule_value(config.method.align_weight, progress)
        lr = learning_rate(config.optimizer, step, progress)
        self.optimizer.set_step(step)
        if align_weight == 0:
            teachers = []
        micro_batches = self._micro_batches(step, kept, drawn, inputs, labels, teachers, first_slot, class_token)
        if self.graphs is None:
            losses = self.gradients(micro_batches, align_weight)
            norm, skipped = self.update(losses, lr)
        else:
            losses, norm, skipped = self.graphs(list(micro_batches), align_weight, lr)
        self.optimizer.average_on_host()
        return StepResult(*losses.unbind(), norm, skipped, lr, kept, drawn, align_weight)

    def _micro_batches(self, step, kept, drawn, inputs, labels, teachers, first_slot, class_token):
        """Yield the parts of the batch, each with its draws."""
        size = labels.shape[0]
        parts = self.config.training.accumulation
        for part in range(parts):
            low, high = part * (size // parts), size if part == parts - 1 else (part + 1) * (size // parts)
            draws = self.draws(step, first_slot + low, high - low, kept, drawn, self.latent is not None)
            x = inputs[low:high]
            if self.latent is not None:
                x = sample_posterior(x.float(), draws.posterior, self.latent["scale"], self.latent["bias"])
                draws = draws._replace(posterior=None)  # it is in x
            teachers_of = [z[low:high] for z in teachers]
            class_of = None if class_token is None else class_token[low:high]
            share, last = (high - low) / size, part == parts - 1
            yield MicroBatch(x, labels[low:high], teachers_of, draws, share, last, class_of)

    def gradients(self, micro_batches, align_weight):
        """Forward and backward of every micro-batch.

        Args:
            micro_batches: iterable of `MicroBatch`.
            align_weight: a number, or a 0-d tensor.

        Returns:
            (4,) float32: total, velocity, alignment and class velocity loss, means over the global batch.
        """
        sums = torch.zeros(4, device=self.placement.device)
        for batch in micro_batches:
            align = len(batch.teachers) > 0
            forward = self.plan.forward(align, dropping=batch.draws.subset is not None)
            with self.plan.micro_batch(last=batch.last):
                losses = training_loss(
                    forward,
                    batch.x,
                    batch.labels,
                    batch.teachers,
                    batch.draws,
                    align_weight=align_weight,
                    align=align,
                    path=self.config.objective.path,
                    dtype=self.placement.dtype,
                    class_token=batch.class_token,
                    class_weight=self.config.method.class_weight,
                )
                (losses.total * batch.share).backward()
            sums += torch.stack([loss.detach().float() for loss in losses]) * batch.share
        # Every rank gets the same means, so that either all ranks skip the step or none does.
        return self.plan.mean(sums)

    def update(self, losses, lr):
        """Clip, AdamW and moving average, with the gradients that `gradients` has computed.

        Args:
            losses: (4,) float32, from `gradients`.
            lr: a number, or a 0-d tensor.

        Returns:
            (norm, skipped), see `Optimizer.step`.
        """
        return self.optimizer.step(lr, losses[0].isfinite())

    def close(self):
        """Release the captured graphs. Call this before the process group ends."""
        if self.graphs is not None:
            self.graphs.release()
