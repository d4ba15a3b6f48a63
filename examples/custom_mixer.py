"""A mixer of your own, trained with the loop of minimal.py.

    python examples/custom_mixer.py [STEPS]

A mixer receives all tokens x (B, N, D), the condition c (B, D) and the indices of the rows to keep, and returns only
these rows. This one adds to every token an average over all tokens, weighted by a learned score per token.
CONTRIBUTING.md lists the changes to make a mixer available as a setting.
"""

import sys

import minimal
import torch
from torch import nn

from maskalign.models.layers import AdaLN, modulate
from maskalign.models.routing import gather_tokens


class AverageMixer(nn.Module):
    """x + gate(c) * W sum_j softmax(score(u))_j u_j with u = LayerNorm(x) * (1 + scale(c)) + shift(c)."""

    needs_grid = False  # True for a mixer along the patch grid, which cannot process the class token

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.score = nn.Linear(width, 1)
        self.out = nn.Linear(width, width)
        self.adaLN_modulation = AdaLN(width, 3)
        # With a gate of zero the new mixer is the identity, so training of a SiT can be continued with it.
        for parameter in self.adaLN_modulation.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x, c, subset=None):
        shift, scale, gate = self.adaLN_modulation(c)
        u = modulate(self.norm(x), shift, scale)
        average = (self.score(u).softmax(dim=1) * u).sum(dim=1)  # (B, D), of all N tokens
        kept = x if subset is None else gather_tokens(x, subset)  # (B, K, D)
        return kept + (gate * self.out(average)).unsqueeze(1)


def main(steps=300):
    torch.manual_seed(0)
    pictures, labels = minimal.load_pictures()
    features = minimal.load_features(pictures)
    model = minimal.make_model(features.shape[-1], mixer="none")
    model.mixer = AverageMixer(model.width)
    _, losses = minimal.train(model, pictures, labels, features, steps)
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
