"""AdamW on float32 masters, with gradient clipping, skipped steps and the moving average of the weights."""

from contextlib import contextmanager
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from maskalign.training.flat_buffers import FlatBuffers, norm_of
from maskalign.training.fused_update import FusedUpdate, library


class Optimizer:
    """One optimizer step of training: clip, AdamW, EMA, without a synchronization with the host.

    torch's fused AdamW divides the gradients by `grad_scale` and skips the update if `found_inf` is set, in its single
    pass over the weights. The gradient clip and the check for non-finite steps use these two.

    If the model computes in bfloat16, its parameters are bfloat16 copies of float32 masters. This avoids a cast at
    every use and halves the memory traffic, and small updates are not lost to rounding. The parameters, the moments and
    the averages are views of one buffer each, see flat_buffers.py.

    If the parameters are DTensors (plans fsdp and hsdp), every rank updates and averages its own shards as plain
    tensors, and only the gradient norm is summed over the ranks. In these plans the gathered weights are the bfloat16
    copies.

    Args:
        model: the model; its parameters are cast to `dtype` in place unless they are sharded.
        config: `OptimizerConfig`.
        dtype: float32, bfloat16, or float64 for tests.
        ema_on_cpu: keep the moving average in host memory; every step then copies the weights there.
        fused: on a CPU, do the whole step in one pass if a C compiler is available, see fused_update.py.
    """

    def __init__(self, model, config, dtype=torch.float32, ema_on_cpu=False, fused=False):
        self.config = config
        self.model = model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.sharded = isinstance(self.params[0], DTensor)
        device = self.params[0].device
        ema_device = torch.device("cpu") if ema_on_cpu else device
        # On a GPU the learning rate is a tensor, so that a step needs nothing from the host and graphs.py can capture
        # it.
        on_gpu = device.type != "cpu"
        self.lr = torch.tensor(config.lr, device=device) if on_gpu else config.lr
        self.pull = 1 - config.ema_decay  # weight of the new parameters in the average
        # This is a tensor for the same reason: in a captured step, every value that changes must be a tensor.
        ramp_on_gpu = config.ema_warmup and on_gpu and not ema_on_cpu
        self.pull_tensor = torch.tensor(self.pull, device=device) if ramp_on_gpu else None
        # With the average in host memory, a step on a GPU waits for a copy. This happens last, outside of the graph.
        self.averages_apart = on_gpu and ema_on_cpu
        plain = not on_gpu and all(p.dtype == torch.float32 and p.is_contiguous() for p in self.params)
        single = fused and plain and library() is not None
        self.flat = None
        if self.sharded:
            self.masters = [p.detach().to_local() for p in self.params]
            mesh = self.params[0].device_mesh
            self.shard_group = mesh.get_group(mesh.ndim - 1)
        elif single and dtype == torch.bfloat16:
            self.masters = [p.detach().float().clone() for p in self.params]
            for p in self.params:
                p.data = p.data.to(dtype)
        else:
            self.masters = self.params
        self.adamw = torch.optim.AdamW(
            self.masters,
            lr=config.lr,
            betas=tuple(config.betas),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        if self.sharded or single:
            with torch.no_grad():
                self.ema = [p.detach().to(ema_device, copy=True) for p in self.masters]
        else:
            self.flat = FlatBuffers(self.params, dtype, ema_device, self.adamw)
            self.ema = self.flat.views(self.flat.ema)
            if dtype == torch.bfloat16:
                self.masters = self.flat.views(self.flat.master)
        self.fused_update = None
        if single:
            states = [self._state(k) for k in range(len(self.masters))]
            copies = self.params if self.has_copies else None
            self.fused_update = FusedUpdate(library(), config, self.masters, self.ema, copies, states)

    @property
    def has_copies(self):
        return self.masters is not self.params and not self.sharded

    def set_step(self, step):
        """Choose the decay of the average for a step, counted from 0, by `optimizer.ema_warmup`."""
        if not self.config.ema_warmup:
            return
        self.pull = 1 - average_decay(self.config, step)
        if self.pull_tensor is not None:
            self.pull_tensor.fill_(self.pull)

    @torch.no_grad()
    def step(self, lr, healthy):
        """Clip the gradients, update the weights and the average, and free the gradients.

        Args:
            lr: learning rate, a number, or a 0-d tensor on the masters' device.
            healthy: 0-d bool tensor, False where the loss was not finite.

        Returns:
            (norm, skipped): the global gradient norm before the clip, 0-d float32, and a 0-d bool tensor that is True
            if the step was skipped because the loss or the norm was not finite.
        """
        if self.fused_update:
            return self._fused_step(lr, healthy)
        gradients = self._take_gradients()
        norm = self._over_shards(gradient_norm(gradients, joined=self.flat is not None))
        skipped = ~(healthy & norm.isfinite())
        divisor = self._clip_divisor(norm)
        if divisor.dtype == torch.float64:
            torch._foreach_div_(gradients, divisor)
            divisor = torch.ones_like(divisor)
        self.adamw.grad_scale = divisor.float()
        self.adamw.found_inf = skipped.float()
        if isinstance(self.lr, torch.Tensor):
            self.lr.fill_(lr)
        else:
            for group in self.adamw.param_groups:
                group["lr"] = lr
        self.adamw.step()
        if not self.averages_apart:
            self._average_all()
        if self.flat is not None and self.flat.copies is not None:
            self.flat.copies.copy_(self.flat.master)
        for master in self._updated():
            master.grad = None
        return norm, skipped

    def _updated(self):
        """The tensors that AdamW updates."""
        return self.masters if self.flat is None else self.flat.masters

    def _take_gradients(self):
        """Move the parameters' gradients to the tensors that AdamW updates; returns the gradients that are not None."""
        gradients = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        if self.flat is not None:
            self.flat.join_gradients(gradients)
        else:
            for master, gradient in zip(self.masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.to_local()
        return [master.grad for master in self._updated() if master.grad is not None]

    @torch.no_grad()
    def average_on_host(self):
        """Update a moving average in host memory, which waits for the device. Call this after `step`."""
        if self.averages_apart:
            self._average_all()

    def _fused_step(self, lr, healthy):
        """The same as `step`, in one pass on the CPU, where reading `skipped` on the host costs nothing."""
        grads = {k: p.grad for k, p in enumerate(self.params) if p.grad is not None}
        if self.sharded:
            grads = {k: grad.to_local() for k, grad in grads.items()}
        self.fused_update.prepare(grads)
        norm = self._over_shards(self.fused_update.norm())
        skipped = ~(healthy & norm.isfinite())
        if not skipped:
            self.fused_update(lr, float(self._clip_divisor(norm)), self.pull)
        done = {} if skipped else grads
        left = [k for k in range(len(self.params)) if k not in done]
        if left:
            self._average([self.masters[k] for k in left], [self.ema[k] for k in left])
        if left and self.has_copies:
            torch._foreach_copy_([self.params[k] for k in left], [self.masters[k] for k in left])
        for p in self.params:
            p.grad = None
        return norm, skipped

    def _clip_divisor(self, norm):
        """The number that gradients are divided by: the inverse of the factor of torch's clip_grad_norm_, which is
        min(1, clip / (norm + 1e-6)).
        """
        clip = self.config.grad_clip
        return ((norm + 1e-6) / clip).clamp(min=1) if clip else torch.ones_like(norm)

    def _average_all(self):
        if self.flat is None:
            self._average(self.masters, self.ema)
        else:
            self._average([self.flat.master], [self.flat.ema])

    def _average(self, masters, averages):
        """Move averages towards their masters."""
        moved = [master.to(average.device) for master, average in zip(masters, averages, strict=True)]
        if self.pull_tensor is None:
            torch._foreach_lerp_(averages, moved, self.pull)
        else:
            gap = torch._foreach_sub(moved, averages)
            torch._foreach_mul_(gap, self.pull_tensor)
            torch._foreach_add_(averages, gap)

    def _over_shards(self, norm):
        """The global norm, a 0-d tensor, from the norm of this rank's gradients; all ranks get the same value."""
        if not self.sharded:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.shard_group)
        return square.sqrt()

    def _state(self, k):
        """AdamW's state of parameter number k, created if needed; only for masters that are not in flat buffers."""
        master = self.masters[k]
        state = self.adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master.detach())
            state["exp_avg_sq"] = torch.zeros_like(master.detach())
        return state

    def ema_state(self):
        """dict from parameter name to its moving average (not a copy), a DTensor if the parameter is one."""
        return {name: self._whole(k, ema) for k, (name, ema) in enumerate(zip(self.names, self.ema, strict=True))}

    def _whole(self, k, local):
        """The tensor that `local` is this rank's part of, for parameter number k."""
        if not self.sharded:
            return local
        p = self.params[k]
        mesh = p.device_mesh if local.device.type == p.device.type else self._host_mesh
        return DTensor.from_local(local, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    @cached_property
    def _host_mesh(self):
        """A mesh of the parameters' ranks for tensors in host memory; the process groups support gloo beside NCCL."""
        mesh = self.params[0].device_mesh
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim)] if mesh.ndim > 1 else mesh.get_group()
        return DeviceMesh.from_group(groups, "cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)

    @contextmanager
    def averaged(self):
        """Context in which the model's parameters are the moving averages, in float32.

        Sharded averages are gathered in the plan's precision, and all ranks must then call the model together. The
        model runs without compilation in this context.
        """
        with torch.compiler.set_stance("force_eager"):
            yield from self._averaged_shards() if self.sharded else self._averaged_parameters()

    def _averaged_parameters(self):
        own = [p.data for p in self.params]
        try:
            for p, average in zip(self.params, self.ema, strict=True):
                p.data = average.to(p.device)
            yield
        finally:
            for p, data in zip(self.params, own, strict=True):
                p.data = data

    def _averaged_shards(self):
        with torch.no_grad():
            own = [master.detach().clone() for master in self.masters]
        try:
            self._load_shards(self.ema)
            yield
        finally:
            self._load_shards(own)

    @torch.no_grad()
    def _load_shards(self, values):
        """Copy values into the shards, and free the weights that were gathered from the old shards."""
        for master, value in zip(self.masters, values, strict=True):
            master.copy_(value)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def tensors(self):
        """Everything to save in a checkpoint, as a flat dict from `kind/parameter` to tensor.

        The tensors are not copies. If the parameters are sharded, they are DTensors over the shards. Moments are
        created for parameters that have none yet, so that saving and loading see the same names.
        """
        out, states = {}, self._states()
        for k, (name, master, ema) in enumerate(zip(self.names, self.masters, self.ema, strict=True)):
            state = states[k]
            out[f"model/{name}"] = self._whole(k, master.detach())
            out[f"ema/{name}"] = self._whole(k, ema)
            for key in ("exp_avg", "exp_avg_sq"):
                out[f"{key}/{name}"] = self._whole(k, state[key])
            out[f"step/{name}"] = state["step"]
        return out

    def _states(self):
        """AdamW's state of every parameter: dicts of step, exp_avg and exp_avg_sq."""
        if self.flat is None:
            return [self._state(k) for k in range(len(self.masters))]
        self.flat.spread_steps()
        columns = self.flat.steps.unbind(), self.flat.views(self.flat.exp_avg), self.flat.views(self.flat.exp_avg_sq)
        return [dict(zip(("step", "exp_avg", "exp_avg_sq"), row, strict=True)) for row in zip(*columns, strict=True)]

    @torch.no_grad()
    def after_load(self):
        """Call this after loading in place. It reads the step counts and updates the bfloat16 copies of the masters."""
        if self.flat is not None:
            self.flat.after_load()
        if self.has_copies:
            torch._foreach_copy_(self.params, self.masters)


def gradient_norm(gradients, joined):
    """Euclidean norm over all elements of a list of tensors, 0-d; `joined` if they are a few long buffers."""
    if not joined:
        return torch.nn.utils.get_total_norm(gradients)
    norms = [norm_of(gradient) for gradient in gradients]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def average_decay(config, step):
    """Decay of the moving average in a step, counted from 0.

    With `ema_warmup` r, the half-life is at most r times the number of steps done before (EDM, arXiv 2206.00364, uses
    r = 0.05). The first step therefore replaces the initial weights completely.

    Args:
        config: `OptimizerConfig`.
        step: number of the step, from 0.
    """
    if not config.ema_warmup:
        return config.ema_decay
    half_life = config.ema_warmup * step
    return min(config.ema_decay, 0.5 ** (1 / half_life)) if half_life > 0 else 0.0
