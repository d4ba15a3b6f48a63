"""Load a trained model and draw pictures with it, without the command line.

    python examples/sample_in_python.py RUN OUT.png

RUN is a run folder, a checkpoint, or a file of weights (.pt, .safetensors) of a model in pixels.
"""

import sys

import torch

from maskalign.checkpoints import load_model
from maskalign.sampling import Sampling, class_grid, generate, heun, to_uint8


def main(run, out="samples.png", classes=4, per_class=4):
    model = load_model(run)  # a SiT with the averaged weights, in eval mode
    classes = list(range(min(classes, model.num_classes)))

    # `generate` draws the noise per picture, and handles guidance, batches and class tokens.
    labels = torch.tensor(classes).repeat_interleave(per_class)
    images = generate(model, labels, Sampling(sampler="heun", steps=20, cfg_scale=2.0, seed=1))
    class_grid(list(to_uint8(images).unflatten(0, (len(classes), per_class))), [f"class {c}" for c in classes]).save(
        out
    )

    # A solver can also be called with your own velocity function; here for a model without class token, without
    # guidance.
    if model.class_dim is None:
        noise = torch.randn(2, model.in_channels, model.input_size, model.input_size)
        label = torch.zeros(2, dtype=torch.int64)
        image = heun(lambda x, t: model(x, t, label, align=False).velocity, noise, steps=10)
        print(f"two images from heun: {tuple(image.shape)}, from {image.min():.2f} to {image.max():.2f}")
    print(f"samples: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
