"""torch.compile of a model's blocks, whole graphs."""


def compile_model(model):
    """torch.compile every block of a SiT in place, whole graphs, so that equal blocks share one compilation."""
    for block in model.blocks:
        block.compile(fullgraph=True)
