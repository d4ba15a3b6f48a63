"""The collectives of one optimizer step under each plan, and their time on the links of a device."""

import math
from dataclasses import dataclass

# NCCL's model of latency (src/graph/tuning.cc; NVLink and network, ring with the Simple and tree with the LL128
# protocol), in seconds: to start, and per step inside a node and between nodes.
RING_START, RING_INTRA, RING_INTER = 8.4e-6, 3.4e-6, 9.6e-6
TREE_START, TREE_INTRA, TREE_INTER = 4.4e-6, 1.2e-6, 8.5e-6


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step.

    Attributes:
        operation: all_gather, reduce_scatter or all_reduce.
        size: bytes of the whole buffer that is gathered, scattered or reduced.
        ranks: number of ranks that take part.
        stride: 1 if they are neighbors, or the size of a shard group if they are replicas of one shard.
        times: number of these collectives in a step.
        stage: forward or backward, the computation with which it can overlap.
        exposed: how many of `times` cannot overlap with computation.
    """

    operation: str
    size: float
    ranks: int
    stride: int
    times: int
    stage: str
    exposed: int = 0

    @property
    def sent(self):
        """Bytes that a rank sends in all `times` collectives."""
        rounds = 2 if self.operation == "all_reduce" else 1
        return self.times * rounds * self.size * (self.ranks - 1) / self.ranks

    def seconds(self, device, efficiency):
        """The time of one collective in seconds.

        Args:
            device: `devices.Device`.
            efficiency: share of the links' peak bandwidth that is reached.
        """
        if self.ranks == 1:
            return 0.0
        members = max(1, min(self.ranks, device.per_node // self.stride))  # on one node
        nodes = math.ceil(self.ranks / members)
        # Rings enter and leave a node through the ports of all of its members.
        rate = device.intra_node_gbs if nodes == 1 else device.inter_node_gbs * members
        rate = 1e9 * efficiency * (rate if members == 1 else min(rate, device.intra_node_gbs))
        rounds = 2 if self.operation == "all_reduce" else 1
        moved = rounds * self.size * (self.ranks - 1) / self.ranks
        inter = nodes - 1
        latency = RING_START + rounds * ((self.ranks - 1 - inter) * RING_INTRA + inter * RING_INTER)
        if self.operation == "all_reduce":
            tree = 2 * ((members - 1) * TREE_INTRA + math.ceil(math.log2(nodes)) * TREE_INTER)
            latency = min(latency, TREE_START + tree)
        return latency + moved / rate


def padded_elements(parameters, ranks):
    """The number of elements that FSDP2 gathers for parameters: rows are padded to a multiple of the ranks."""
    return sum(ranks * -(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) for p in parameters)


def step_collectives(model, parallel, world_size, shards, accumulation=1, gathered_bytes=2):
    """The large collectives of one optimizer step, without those of a few numbers (loss, norm).

    Args:
        model: a `SiT`, which may be on the meta device.
        parallel: `ParallelConfig`.
        world_size: number of ranks.
        shards: number of ranks that share one copy of the weights.
        accumulation: micro-batches per step.
        gathered_bytes: bytes per element of a gathered weight, 2 for bfloat16; gradients are reduced in float32.

    Returns:
        list of `Collective`.
    """
    if world_size == 1:
        return []
    whole = list(model.parameters())
    if parallel.plan == "ddp":
        # Buckets of 25 MiB of gradients. The last bucket is full at the end of the backward and cannot overlap with it.
        count = sum(p.numel() for p in whole)
        buckets = max(1, math.ceil(count * gathered_bytes / (25 * 2**20)))
        return [Collective("all_reduce", 4 * count / buckets, world_size, 1, buckets, "backward", exposed=1)]
    blocks = [list(block.parameters()) for block in model.all_blocks]
    inside = {id(p) for block in blocks for p in block}
    root = [p for p in whole if id(p) not in inside]
    block, rest = padded_elements(blocks[0], shards), padded_elements(root, shards)
    passes = accumulation if parallel.reshard_after_forward else 1
    depth = len(blocks)
    out = []
    if shards > 1:
        own = dict(ranks=shards, stride=1)
        # The weights of the root and of the first block are needed immediately.
        out += [
            Collective("all_gather", rest * gathered_bytes, **own, times=passes, stage="forward", exposed=passes),
            Collective(
                "all_gather", block * gathered_bytes, **own, times=passes * depth, stage="forward", exposed=passes
            ),
        ]
        if parallel.reshard_after_forward and depth > 1:
            again = accumulation * (depth - 1)
            out.append(Collective("all_gather", block * gathered_bytes, **own, times=again, stage="backward"))
        out += [
            Collective("reduce_scatter", 4 * block, **own, times=depth, stage="backward"),
            Collective("reduce_scatter", 4 * rest, **own, times=1, stage="backward", exposed=1),
        ]
    replicas = world_size // shards
    if replicas > 1:
        own = dict(ranks=replicas, stride=shards)
        out += [
            Collective("all_reduce", 4 * block / shards, **own, times=depth, stage="backward"),
            Collective("all_reduce", 4 * rest / shards, **own, times=1, stage="backward", exposed=1),
        ]
    return out
