"""Floating-point operations of a training step, counted from the sizes: 2 per multiply-add of every matrix product.

torch's own counter misses attention on CPUs. Element-wise work, norms and the optimiser are not counted.
"""


def forward_flops(model, kept, align=True):
    """Matmul FLOPs of one forward pass per image.

    Args:
        model: a `SiT`, or something with its sizes, blocks, projectors, mixer and route.
        kept: number of tokens K in the subset; N for all.
        align: False for steps without an alignment loss, which leave the projectors out.
    """
    tokens, width = model.num_tokens, model.width
    start, end = model.route or (0, 0)
    pixels = model.patch_size**2 * model.in_channels
    hidden = model.blocks[0].mlp.fc1.out_features

    def block(n):
        return n * width * (4 * width + 2 * hidden) + 2 * n * n * width

    def mixing(rows_out):
        """(multiply-adds, vectors of the condition) of the mixer; the last product is needed for rows that stay."""
        kind = type(model.mixer).__name__
        if kind == "TokenMLPMixer":
            return model.mixer.fc1.out_features * (tokens + rows_out) * width, 3
        if kind == "DepthwiseConvMixer":
            return model.mixer.conv.weight.shape[1:].numel() * tokens * width, 3
        if kind == "AttentionMixer":
            return block(tokens), 6
        return 0, 0

    total = tokens * pixels * width + (256 + width) * width  # patches; the time MLP
    conditions = 6 * model.depth + 2
    present = tokens
    for depth in range(model.depth):
        if depth == start:
            after = kept if model.route else tokens
            work, vectors = mixing(after if model.restore == "none" else tokens)
            total, conditions, present = total + work, conditions + vectors, after
        total += block(present)
        if depth + 1 == model.align_depth and align:
            # With loss-only masking (no route) the subset chooses the rows that are projected.
            rows = present if model.route else kept
            total += rows * sum(p.numel() for net in model.projectors for p in net.parameters() if p.dim() > 1)
        if depth + 1 == end and model.restore != "none":
            total += tokens * 2 * width * width if model.restore == "fuse" else 0
            present = tokens
    total += present * width * pixels + conditions * width * width  # the final linear; adaLN linears
    return 2 * total


def step_flops(model, kept, align=True):
    """Forward and backward, per image: the backward of a product is two products of its size."""
    return 3 * forward_flops(model, kept, align)
