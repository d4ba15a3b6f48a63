"""The processes of torchrun, as sampling uses them: batches are dealt out, and what was drawn is put together."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from maskalign.runtime import rounds

# A rank may draw for long before it meets the others: sets take hours.
PATIENCE = timedelta(days=7)


class Ranks:
    """This process among the others; alone, nothing is sent anywhere."""

    def __init__(self, rank=0, world_size=1):
        self.rank, self.world_size = rank, world_size

    def barrier(self):
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value):
        """Every rank's value (anything that pickles), as a list by rank, on all of them."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share(self, items, function):
        """[function(item) for item in items], each computed by one rank, on all of them."""
        mine = [function(item) for item in items[self.rank :: self.world_size]]
        parts = [iter(part) for part in self.gather(mine)]
        return [next(parts[number % self.world_size]) for number in range(len(items))]


@contextmanager
def torchrun_ranks():
    """`Ranks` of this process: those of torchrun, or one alone. The group ends with the context."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks()
        return
    # gloo, also with GPUs: only finished pictures are sent.
    store, rank, world_size = rounds.join(PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    yield Ranks(dist.get_rank(), world_size)
    # Not after an error: the others may be in the middle of a meeting, and torchrun ends them.
    dist.destroy_process_group()
