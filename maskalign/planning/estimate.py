"""Estimate memory, time, GPU-hours and energy of a run from its settings, the number of ranks and the device."""

from dataclasses import dataclass, field, replace
from typing import List

import torch

from maskalign.checkpoints.build import build_model
from maskalign.checkpoints.spec import ModelSpec
from maskalign.config import shard_ranks
from maskalign.errors import UsageError
from maskalign.planning.communication import step_collectives
from maskalign.planning.facts import Facts, find_facts
from maskalign.planning.memory import Memory, shard_bytes
from maskalign.planning.options import Options, check_ranks
from maskalign.planning.work import (
    parameter_counts,
    recomputed_flops,
    schedule_phases,
    student_flops,
    teacher_facts,
    vae_encoder_flops,
)

# The plans whose communication is compared, as settings of `ParallelConfig`.
ALTERNATIVES = {
    "ddp": dict(plan="ddp"),
    "fsdp, ZeRO-3": dict(plan="fsdp", reshard_after_forward=True),
    "fsdp, ZeRO-2": dict(plan="fsdp", reshard_after_forward=False),
    "hsdp, ZeRO-3": dict(plan="hsdp", reshard_after_forward=True),
    "hsdp, ZeRO-2": dict(plan="hsdp", reshard_after_forward=False),
}
RANKS = (1, 8, 64, 512, 4096)
SAME_GLOBAL, SAME_PER_RANK = "same global batch", "same batch per rank"
UPDATE_EFFICIENCY = 0.8  # share of the memory bandwidth that the optimizer's passes over its state reach
# Bytes that an update moves per parameter. AdamW reads four float32 numbers and writes three, the norm reads one, and
# the EMA reads two and writes one. With bfloat16 copies, gradients are also cast (2 + 4) and weights copied back (4 +
# 2).
UPDATE_BYTES, COPY_BYTES = 4 * (7 + 1 + 3), 12
ANY_LATENT = {"scale": 1.0, "bias": 0.0}  # the values do not affect the time of a step


@dataclass
class Estimate:
    """The result of a plan.

    Attributes:
        config, options: the `Config` and `Options` of the plan.
        facts: the `Facts` of the data set.
        dtype: dtype of the matrix products.
        tokens: number of patch tokens N.
        parameters: {part: number of parameters}.
        teachers: {name: `work.Frozen`}.
        vae_flops: FLOPs of encoding one image, None for pixels.
        phases: dicts with kept, aligned, share, FLOPs per image by part, and step (FLOPs of a training step per image).
        peaks: {phase: `memory.Peak`} of the phases with the fewest and the most kept tokens, on the requested ranks.
        largest: the largest number of images per rank and micro-batch that fits in memory in every phase.
        collectives: list of `communication.Collective` on the requested ranks.
        alternatives: dicts with plan, sent_mib, link_ms and waiting_ms of a step under each plan on these ranks.
        rows: dicts, one per number of ranks and batch regime.
        asked: the row of the requested settings.
        launches: number of operations of a step that are launched on a rank.
        captured: whether they are replayed as a CUDA graph, so that Python does not launch them.
        assumed: the assumptions, one line each.
    """

    config: object
    options: Options
    facts: Facts
    dtype: torch.dtype
    tokens: int
    parameters: dict
    teachers: dict
    vae_flops: float | None
    phases: List[dict]
    peaks: dict
    largest: int
    collectives: list
    alternatives: List[dict]
    rows: List[dict]
    asked: dict
    launches: float
    captured: bool
    assumed: List[str] = field(default_factory=list)

    @property
    def fits(self):
        return self.asked["fits"]


def plan_run(config, options):
    """Estimate a run.

    Args:
        config: `Config`.
        options: `Options`.

    Returns:
        Estimate.

    Raises:
        UsageError: the settings cannot run on this number of ranks, or do not match the data set.
    """
    return _Planner(config, options).estimate()


class _Planner:
    def __init__(self, config, options):
        self.config, self.options = config, options
        self.parallel, world_size = config.parallel, options.world_size
        check_ranks(config, options)
        self.accumulation = config.training.accumulation
        self.batch = config.training.batch_size // (world_size * self.accumulation)
        self.facts = find_facts(config, options.image_size, options.num_classes)
        self.dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
        self.peak = 1e12 * (options.device.bf16_tflops if self.dtype == torch.bfloat16 else options.device.fp32_tflops)
        aligned, class_token = dict(self.facts.teachers), self.facts.class_token
        used = {**aligned, **dict([class_token] if class_token else [])}
        self.teachers = {name: teacher_facts(name, self.facts.image_size) for name in used}
        self.online = [name for name, cached in used.items() if not cached]
        # The teachers that run in every step, for any alignment weight.
        self.always = [class_token[0]] if class_token and not class_token[1] else []
        dims = [self.facts.teacher_dims.get(name, self.teachers[name].dim) for name in aligned]
        class_dim = None
        if class_token:
            class_dim = self.facts.class_dim or self.teachers[class_token[0]].class_dim
        self.spec = ModelSpec(
            input_size=self.facts.input_size,
            in_channels=self.facts.in_channels,
            num_classes=self.facts.num_classes,
            teacher_dims=dims,
            class_dim=class_dim,
            latent=ANY_LATENT if self.facts.latent else None,
        )
        self.teacher_bytes = [self.facts.teacher_bytes.get(name, 4) for name in aligned]
        with torch.device("meta"):
            self.model = build_model(config, self.spec)
        self.phases = schedule_phases(config, self.model, bool(aligned))
        self.shards = self._shards(world_size)
        self.memories = self._memories()
        compiled = config.training.compile
        self.launches = max(m.low.launches.total(self.accumulation, compiled) for m in self.memories.values())
        self.captured = config.training.cuda_graph and options.device.captures

    def _shards(self, ranks, parallel=None):
        """The number of ranks that share one copy of the weights; None if the plan does not support `ranks`."""
        parallel, per_node = parallel or self.parallel, self.options.device.per_node
        if parallel.plan == "hsdp":
            parallel = replace(parallel, shard_size=min(ranks, parallel.shard_size or per_node))
        try:
            return shard_ranks(parallel, ranks)
        except UsageError:
            return None

    def _memories(self):
        """{phase: `Memory`} of the phases with the fewest and the most kept tokens."""
        frozen = sum(4 * self.teachers[name].parameters for name in self.online)
        if self.parallel.plan in ("fsdp", "hsdp") and frozen > self.parallel.shard_teacher_above * 2**20:
            frozen /= self.shards
        own = dict(dtype=self.dtype, shards=self.shards, frozen=frozen, teacher_bytes=self.teacher_bytes)
        own["plain_attention"] = self.config.model.attention == "math"
        return {phase: Memory(self.config, self.spec, phase, **own) for phase in {self.phases[0], self.phases[-1]}}

    def estimate(self):
        options = self.options
        asked = self._row(options.world_size, self.batch, SAME_GLOBAL)
        rows = [asked]
        for ranks in RANKS:
            if ranks == options.world_size or (ranks > 1 and self.parallel.plan == "none"):
                continue
            if self._shards(ranks) is None:
                continue
            whole = self.config.training.batch_size
            if whole % (ranks * self.accumulation) == 0:
                rows.append(self._row(ranks, whole // (ranks * self.accumulation), SAME_GLOBAL))
            rows.append(self._row(ranks, self.batch, SAME_PER_RANK))
        rows.append({**asked, "batch": SAME_PER_RANK})
        rows.sort(key=lambda row: (row["batch"] != SAME_GLOBAL, row["ranks"]))
        return Estimate(
            config=self.config,
            options=options,
            facts=self.facts,
            dtype=self.dtype,
            tokens=self.model.num_tokens,
            parameters=parameter_counts(self.model),
            teachers=self.teachers,
            vae_flops=vae_encoder_flops(self.facts.image_size) if self.facts.latent else None,
            phases=[self._phase(phase) for phase in self.phases],
            peaks={phase: memory.peak(self.batch) for phase, memory in self.memories.items()},
            largest=min(memory.largest(options.limit) for memory in self.memories.values()),
            collectives=self._collectives(options.world_size, self.shards, self.parallel),
            alternatives=self._alternatives(),
            rows=rows,
            asked=asked,
            launches=self.launches,
            captured=self.captured,
            assumed=self.facts.assumed + self._assumptions(),
        )

    def _phase(self, phase):
        parts = student_flops(self.model, phase)
        teacher = sum(self.teachers[name].flops for name in (self.online if phase.aligned else self.always))
        recomputed = recomputed_flops(self.model, phase, self.parallel)
        step = 3 * sum(parts.values()) + recomputed + teacher
        return {
            "kept": phase.kept, "aligned": phase.aligned, "share": phase.share, **parts, "teacher": teacher,
            "recomputed": recomputed, "step": step,
        }  # fmt: skip

    def _collectives(self, ranks, shards, parallel):
        gathered = 2 if self.dtype == torch.bfloat16 else 4
        return step_collectives(self.model, parallel, ranks, shards, self.accumulation, gathered)

    def _links(self, ranks, shards, images, parallel):
        """The communication of a step: sent_mib, link_ms (time of the collectives) and waiting_ms (not overlapped)."""
        collectives = self._collectives(ranks, shards, parallel)
        options, waiting = self.options, 0.0
        for phase in self.phases:
            compute = self._compute(self._phase(phase), images)
            waiting += phase.share * exposed_seconds(collectives, compute, self.accumulation, options)
        on_links = sum(c.times * c.seconds(options.device, options.link_efficiency) for c in collectives)
        sent = sum(c.sent for c in collectives) / 2**20
        return {"sent_mib": sent, "link_ms": 1e3 * on_links, "waiting_ms": 1e3 * waiting}

    def _alternatives(self):
        ranks, found = self.options.world_size, []
        for name, changes in ALTERNATIVES.items():
            parallel = replace(self.parallel, **changes)
            shards = self._shards(ranks, parallel)
            if ranks > 1 and shards is not None:
                found.append({"plan": name, **self._links(ranks, shards, self.batch, parallel)})
        return found

    def _row(self, ranks, images, batch):
        """One row of the scaling table, for `images` per rank and micro-batch."""
        options, shards = self.options, self._shards(ranks)
        sharded = 1.0
        if self.parallel.plan in ("fsdp", "hsdp"):
            sharded = shard_bytes(self.model, shards) / shard_bytes(self.model, self.shards)
        memory = max(memory.peak(images, sharded).total for memory in self.memories.values())
        links = self._links(ranks, shards, images, self.parallel)
        compute = useful = 0.0
        for phase in map(self._phase, self.phases):
            compute += phase["share"] * self._compute(phase, images)
            parts = phase["student"] + phase["mixer"] + phase["projector"]
            useful += phase["share"] * 3 * parts * images * self.accumulation
        update = self._update(shards)
        busy = compute + links["waiting_ms"] / 1e3 + update
        # The device and Python run in parallel, and Python may be the slower of the two.
        launching = self.launches * options.launch_us * 1e-6
        step = busy if self.captured else max(busy, launching)
        whole = images * ranks * self.accumulation
        all_images = self.config.training.max_steps * self.config.training.batch_size
        hours = all_images / (whole / step) / 3600
        return {
            "batch": batch, "ranks": ranks, "global_batch": whole, "batch_per_rank": images, "shards": shards,
            "memory_gib": memory / 2**30, "fits": memory <= options.limit,
            "step_ms": 1e3 * step, "compute_ms": 1e3 * compute, "update_ms": 1e3 * update, **links,
            "launching_ms": 1e3 * launching, "python_ms": 1e3 * (step - busy),
            "images_per_second": whole / step, "mfu": useful / step / self.peak,
            "hours": hours, "gpu_hours": hours * ranks, "energy_kwh": hours * ranks * options.device.watts / 1000,
        }  # fmt: skip

    def _compute(self, phase, images):
        """Seconds of the matrix products of a step. Teachers in the loop compute in float32."""
        own = (phase["step"] - phase["teacher"]) / self.peak
        teacher = phase["teacher"] / (1e12 * self.options.device.fp32_tflops)
        return (own + teacher) * images * self.accumulation / self.options.efficiency

    def _update(self, shards):
        count = shard_bytes(self.model, shards) / 4
        copies = self.dtype == torch.bfloat16 and self.parallel.plan not in ("fsdp", "hsdp")
        moved = count * (UPDATE_BYTES + COPY_BYTES * copies)
        return moved / (1e9 * self.options.device.bandwidth_gbs * UPDATE_EFFICIENCY)

    def _assumptions(self):
        options, training = self.options, self.config.training
        lines = [
            f"matrix products reach {options.efficiency:.0%} of their peak, links {options.link_efficiency:.0%} of "
            f"theirs, and the optimizer {UPDATE_EFFICIENCY:.0%} of the memory bandwidth; these are not measured",
            f"{options.headroom:.0%} of the memory is reserved for CUDA or ROCm, communication and fragmentation",
            "energy is the power limit of the devices only; loading, checkpoints and previews take no time",
        ]
        if training.precision == "auto":
            lines.append("training.precision auto is bf16 on this device")
        how = "fused in compiled blocks, " if training.compile else ""
        lines.append(
            f"Python takes {options.launch_us:g} us to launch an operation ({how}measured on the host of one H200)"
            if options.launch_us == Options.launch_us
            else f"Python takes {options.launch_us:g} us to launch an operation, as given by --launch-us"
        )
        if training.compile:
            lines.append("activations are those of eager blocks; compiled blocks save fewer")
        if self.online:
            lines.append(
                "teachers in the loop compute in float32, and their activations are freed before the student runs"
            )
        return lines


def exposed_seconds(collectives, compute, accumulation, options):
    """Seconds of a step in which ranks wait for communication.

    Collectives overlap with the computation of their stage (a third of it is the forward, two thirds the backward),
    except those that are exposed. Gradients are reduced only in the last micro-batch, during its backward.

    Args:
        collectives: list of `Collective`.
        compute: seconds of a step's matrix products.
        accumulation: micro-batches per step.
        options: `Options`.
    """
    exposed, hidden = 0.0, {"forward": 0.0, "gather": 0.0, "reduce": 0.0}
    for collective in collectives:
        each = collective.seconds(options.device, options.link_efficiency)
        gathers = collective.operation == "all_gather"
        kind = collective.stage if collective.stage == "forward" else "gather" if gathers else "reduce"
        exposed += collective.exposed * each
        hidden[kind] += (collective.times - collective.exposed) * each
    forward, backward, last = compute / 3, compute * 2 / 3, 1 / accumulation
    waiting = max(0.0, hidden["forward"] - forward)
    waiting += max(0.0, (hidden["gather"] - backward) * (1 - last))
    waiting += max(0.0, hidden["gather"] * last + hidden["reduce"] - backward * last)
    return exposed + waiting
