"""Token rows in PyTorch: making rows dense, indexing rows across images, gathering the rows of a subset."""

import torch


def rows_contiguous(tensor):
    """The tensor with a dense last dimension (stride 1); the strides of the other dimensions may be arbitrary."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def flat_rows(subset, num_tokens):
    """The indices of the kept rows among all B * num_tokens rows: a subset (B, K) as flat indices (B * K,)."""
    first = torch.arange(subset.shape[0], device=subset.device).unsqueeze(1) * num_tokens
    return (subset + first).reshape(-1)


def gather_rows(tokens, subset):
    """Rows `subset` (B, K) of tokens (B, N, C), as a copy (B, K, C).

    This is one index_select over the flattened rows: `gather` with an expanded index is several times slower on a CPU.
    """
    batch, num_tokens, width = tokens.shape
    if tokens.stride(0) != num_tokens * tokens.stride(1):  # No flat view of the rows exists: index both dimensions.
        return tokens[torch.arange(batch, device=subset.device).unsqueeze(1), subset]
    rows = tokens.reshape(batch * num_tokens, width).index_select(0, flat_rows(subset, num_tokens))
    return rows.view(batch, subset.shape[1], width)
