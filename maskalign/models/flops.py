"""Floating-point operations of a training step, counted from the sizes: 2 per multiply-add of every matrix product.

torch's counter does not count attention on CPUs. Elementwise operations, norms and the optimizer are not counted here.
"""


def forward_flops(model, kept, align=True, drawn=None):
    """FLOPs of the matrix products of one forward pass, per image.

    Args:
        model: a `SiT`, or an object with its sizes, blocks, projectors, mixer and route. Without an attribute
            `class_dim`
            it has no class token.
        kept: number of patch tokens K in the subset; N for all. A class token is counted in addition.
        align: False for steps without an alignment loss, in which the projectors do not run.
        drawn: number of patch tokens that `method.align_ratio` draws at the tap; None aligns all tokens at the tap.
    """
    tokens, width, extra = model.num_tokens, model.width, _class_tokens(model)
    pixels = model.patch_size**2 * model.in_channels
    total = tokens * pixels * width + (256 + width) * width  # patches; the time MLP
    total += (getattr(model, "class_dim", None) or 0) * 2 * width  # the class token's embedding and its final linear
    total += 2 * width * width  # the final layer's adaLN
    total += sum(multiply_adds for _, multiply_adds in _blocks(model, kept))
    total += _grid_mixing(model, kept)
    if model.route and model.restore == "fuse":
        total += (tokens + extra) * 2 * width * width
    returned = model.route is None or model.restore != "none"
    total += (tokens if returned else kept) * width * pixels  # the final linear
    return 2 * total + (projector_flops(model, aligned_rows(model, kept, drawn)) if align else 0)


def step_flops(model, kept, align=True, drawn=None):
    """FLOPs of forward and backward per image: the backward of a matrix product is two products of its size."""
    return 3 * forward_flops(model, kept, align, drawn)


def projector_flops(model, rows):
    """FLOPs of projecting `rows` tokens of one image to all teachers."""
    return 2 * rows * sum(p.numel() for net in model.projectors for p in net.parameters() if p.dim() > 1)


def aligned_rows(model, kept, align=None):
    """Rows of one image that go through the projectors.

    Args:
        model, kept: as for `forward_flops`.
        align: number of patch tokens that `method.align_ratio` draws at the tap; None aligns all tokens at the tap.
    """
    if model.projectors and getattr(model.projectors[0], "needs_grid", False):
        return model.num_tokens  # a projector along the token grid projects all patches, without the class token
    if align is None:
        # With loss-only masking (no route) the subset chooses the rows that are projected.
        align = kept if model.route is None or _on_route(model, model.align_depth - 1) else model.num_tokens
    return align + _class_tokens(model)


def block_flops(model, kept):
    """FLOPs of each block in `model.all_blocks` (which includes mixing layers) in one forward pass per image."""
    return [2 * multiply_adds for _, multiply_adds in sorted(_blocks(model, kept), key=lambda block: block[0])]


def _class_tokens(model):
    """1 for a model with a class token, else 0."""
    return 1 if getattr(model, "class_dim", None) else 0


def _on_route(model, depth):
    """Whether the block of index `depth` sees only the subset."""
    if model.route is None:
        return False
    start, end = model.route
    return start <= depth and (depth < end or model.restore == "none")


def _blocks(model, kept):
    """(sort key of the execution order, multiply-adds) of every SiT block, including its adaLN linear.

    The last mixing layer computes keys and values of all tokens, but queries, output projection and MLP only for the
    kept rows.
    """
    tokens, width, extra = model.num_tokens, model.width, _class_tokens(model)
    hidden = model.blocks[0].mlp.fc1.out_features
    start = model.route[0] if model.route else 0

    def block(seen, computed):
        """Multiply-adds of a block that attends to `seen` tokens and computes `computed` rows."""
        attention = 2 * seen * width + 2 * computed * width + 2 * computed * seen  # keys, values; q, proj; the maps
        return width * (attention + 2 * computed * hidden) + 6 * width * width

    found = []
    layers = len(getattr(model.mixer, "layers", ()))
    for layer in range(layers):
        drops = layer + 1 == layers and model.route is not None and model.restore == "none"
        found.append(((start, layer), block(tokens + extra, (kept if drops else tokens) + extra)))
    for depth in range(model.depth):
        present = (kept if _on_route(model, depth) else tokens) + extra
        found.append(((depth, layers), block(present, present)))
    return found


def _grid_mixing(model, kept):
    """Multiply-adds of a mixer along the token grid, which the class token bypasses; 0 for other mixers."""
    tokens, width, kind = model.num_tokens, model.width, type(model.mixer).__name__
    conditions = 3 * width * width
    if kind == "TokenMLPMixer":
        # The last product is computed for the kept rows only.
        rows = kept if model.route and model.restore == "none" else tokens
        return model.mixer.fc1.out_features * (tokens + rows) * width + conditions
    if kind == "DepthwiseConvMixer":
        return model.mixer.conv.weight.shape[1:].numel() * tokens * width + conditions
    return 0
