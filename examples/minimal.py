"""MaskAlign in one file: pictures, teacher, model, objective, training loop, samples. Takes less than a minute on a
CPU.

    python examples/minimal.py [STEPS] [OUT.png]

A small SiT learns 128 emoji of OpenMoji at 32 px. In every step, two mixing layers process all 64 patches of an image,
the blocks process a random 48 of them, and the features after block 2 are aligned with those of a frozen EfficientNet
on the same 48. `maskalign train` adds data loading, mixed precision, many GPUs, checkpoints and logs.
"""

import copy
import sys

import numpy as np
import torch

from maskalign.data.build.openmoji import draw_emoji, font_path, list_emoji
from maskalign.models import SiT, draw_subset
from maskalign.models.layers import patchify
from maskalign.sampling import Sampling, class_grid, generate, to_uint8
from maskalign.teachers import load_teacher, resample_tokens
from maskalign_kernels import subset_cosine_alignment

CLASSES = ["Smileys & Emotion", "Animals & Nature", "Food & Drink", "Flags"]
PER_CLASS, SIZE, PATCH = 32, 32, 4
BATCH, KEEP, ALIGN_WEIGHT, LABEL_DROPOUT = 16, 48, 0.5, 0.1


def load_pictures():
    """Emoji as (n, 3, 32, 32) uint8, and their labels (n,)."""
    font, _ = font_path()
    pictures, labels = [], []
    for label, category in enumerate(CLASSES):
        members = [text for _, text, group in list_emoji() if group == category]
        for text in members[:: len(members) // PER_CLASS][:PER_CLASS]:
            pictures.append(np.asarray(draw_emoji(text, SIZE, font)))
            labels.append(label)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(labels)


def load_features(pictures):
    """The teacher's rows for every patch of the student: (n, N, Dz), minus the mean row of all images."""
    teacher = load_teacher("efficientnet-lite0")
    z = torch.cat([teacher(part) for part in pictures.split(32)])
    z = resample_tokens(z, teacher.grid, (SIZE // PATCH, SIZE // PATCH))
    return z - z.mean(dim=(0, 1))


def make_model(teacher_dim, **settings):
    """A SiT of 2 M parameters with the paper's mixer: two SiT blocks on all tokens."""
    sizes = dict(depth=4, width=128, heads=4, patch_size=PATCH, align_depth=2, projector_dim=256)
    return SiT(
        input_size=SIZE,
        in_channels=3,
        num_classes=len(CLASSES),
        teacher_dims=[teacher_dim],
        **{**sizes, "mixer": "attention", "mixer_layers": 2, **settings},
    )


def loss_of(model, x, labels, z):
    """L = |v - v*|^2 on the kept patches - align_weight * cosine with the teacher on the same patches.

    Args:
        x: (B, 3, H, W) clean images in [-1, 1].
        labels: (B,) int64.
        z: (B, N, Dz) teacher rows.
    """
    batch = len(x)
    t = torch.rand(batch)  # 0 is data, 1 is noise
    noise = torch.randn_like(x)
    s = t.view(-1, 1, 1, 1)
    x_t, target = (1 - s) * x + s * noise, noise - x
    labels = torch.where(torch.rand(batch) < LABEL_DROPOUT, model.num_classes, labels)
    subset = draw_subset(batch, model.grid, KEEP)  # (B, K), drawn again in every step

    out = model(x_t, t, labels, subset)

    kept = patchify(target, PATCH).gather(1, subset.unsqueeze(-1).expand(-1, -1, PATCH * PATCH * 3))
    velocity = (out.velocity - kept).square().mean()
    cosine = subset_cosine_alignment(out.aligned[0], z, subset).mean()
    return velocity - ALIGN_WEIGHT * cosine, velocity, cosine


def train(model, pictures, labels, features, steps):
    """AdamW with a moving average of the weights; returns the averaged model and the velocity losses."""
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(pictures), (BATCH,))
        x = pictures[rows].float() / 127.5 - 1
        loss, velocity, cosine = loss_of(model, x, labels[rows], features[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.99, (1 + step) / (10 + step))
        for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight.detach(), 1 - decay)
        losses.append(velocity.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  velocity loss {velocity.item():.3f}  cosine {cosine.item():+.3f}")
    return average, losses


def main(steps=300, out="minimal.png"):
    torch.manual_seed(0)
    pictures, labels = load_pictures()
    features = load_features(pictures)
    model, _ = train(make_model(features.shape[-1]), pictures, labels, features, steps)
    drawn = generate(model, torch.arange(len(CLASSES)).repeat_interleave(4), Sampling(steps=30, cfg_scale=2.0))
    class_grid(list(to_uint8(drawn).unflatten(0, (len(CLASSES), 4))), CLASSES).save(out)
    print(f"samples: {out}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
