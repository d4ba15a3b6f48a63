"""Token rows in PyTorch: gathered by a subset, numbered across images, laid out densely."""

import torch


def rows_contiguous(tensor):
    """The tensor with its last dimension laid out densely; any pitch between rows is left as it is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def flat_rows(subset, num_tokens):
    """The places of the kept rows among all B * num_tokens rows; (B, K) indices in, (B * K,) places out."""
    first = torch.arange(subset.shape[0], device=subset.device).unsqueeze(1) * num_tokens
    return (subset + first).reshape(-1)


def gather_rows(tokens, subset):
    """Rows `subset` (B, K) of tokens (B, N, C), as a copy (B, K, C).

    One index_select over the flattened rows: `gather` with an expanded index is several times slower on a CPU.
    """
    batch, num_tokens, width = tokens.shape
    if tokens.stride(0) != num_tokens * tokens.stride(1):  # Rows that no flat view can number: index them in place.
        return tokens[torch.arange(batch, device=subset.device).unsqueeze(1), subset]
    rows = tokens.reshape(batch * num_tokens, width).index_select(0, flat_rows(subset, num_tokens))
    return rows.view(batch, subset.shape[1], width)
