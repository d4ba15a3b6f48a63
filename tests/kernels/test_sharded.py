"""Both operations inside a module that FSDP2 shards over two processes, with recomputation: the same
gradients.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskalign_kernels import mix_and_drop, subset_cosine_alignment_loss


class Tiny(nn.Module):
    """A mixer, a projector, an alignment loss: what a training step does with the two operations."""

    def __init__(self, tokens=8, width=12, hidden=4, teacher=10):
        super().__init__()
        torch.manual_seed(3)
        self.modulation = nn.Linear(width, 3 * width)
        self.w1, self.b1 = nn.Parameter(torch.randn(hidden, tokens)), nn.Parameter(torch.randn(hidden))
        self.w2, self.b2 = nn.Parameter(torch.randn(tokens, hidden)), nn.Parameter(torch.randn(tokens))
        self.project = nn.Linear(width, teacher)

    def forward(self, x, c, z, subset):
        def body(x, c):
            return mix_and_drop(x, *self.modulation(c).chunk(3, -1), self.w1, self.b1, self.w2, self.b2, subset)

        kept = checkpoint(body, x, c, use_reentrant=False)
        return subset_cosine_alignment_loss(self.project(kept), z, subset)


def batch():
    generator = torch.Generator().manual_seed(5)
    x, c = torch.randn(4, 8, 12, generator=generator), torch.randn(4, 12, generator=generator)
    z = (40 * torch.randn(4, 8, 10, generator=generator)).round().to(torch.int8)
    return x, c, z, torch.rand(4, 8, generator=generator).argsort(1)[:, :4]


def worker():
    """One of two processes: the sharded module's gradients against those of the plain module on the whole
    batch.
    """
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    plain = Tiny()
    plain(*batch()).backward()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = fully_shard(Tiny(), mesh=dist.init_device_mesh("cpu", (2,)))
    model(*(t[2 * rank : 2 * rank + 2] for t in batch())).backward()
    for (name, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert expected.grad.any(), name
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} agrees")


@pytest.mark.distributed
def test_gradients_are_those_of_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "rank 0 agrees" in run.stdout and "rank 1 agrees" in run.stdout


if __name__ == "__main__":
    worker()
