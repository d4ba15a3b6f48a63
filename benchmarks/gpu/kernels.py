"""Time the kernels at XL/2's sizes in their default configurations; each is first checked against float64.

The rows are those of benchmarks.kernels, written one by one. The mixer comes first, because its backward has been
rewritten since it was last compared on a GPU.
"""

import argparse
import sys

import torch

from benchmarks.gpu.rows import Rows
from benchmarks.kernels import command
from benchmarks.kernels.timing import GPU, HOST

BF16, INT8 = torch.bfloat16, torch.int8
# Sizes of XL/2: int8 features of DINOv2-B; half of the tokens, mixed along the token axis; the blocks' operations with
# a class token on all rows and, as in the last mixing layer, on three quarters of the patches.
SHAPES = {
    "mix_and_drop": [(32, 256, 128, 1152, 64, BF16, BF16, BF16)],
    "gated_residual_adaln": [(32, 257, None, 1152, BF16, BF16), (32, 257, 193, 1152, BF16, BF16)],
    "adaln_modulate": [(32, 257, None, 1152, BF16, BF16)],
    "gated_residual": [(32, 257, None, 1152, BF16, BF16)],
    "subset_cosine_alignment": [(32, 256, 128, 768, BF16, INT8)],
}
TINY = {
    "mix_and_drop": [(2, 16, 8, 32, 8, BF16, BF16, BF16)],
    "gated_residual_adaln": [(2, 17, None, 32, BF16, BF16), (2, 17, 9, 32, BF16, BF16)],
    "adaln_modulate": [(2, 17, None, 32, BF16, BF16)],
    "gated_residual": [(2, 17, None, 32, BF16, BF16)],
    "subset_cosine_alignment": [(2, 16, 8, 32, BF16, INT8)],
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="the CSV")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(argv)
    rows = Rows(options.out, command.COLUMNS, rehearsal=int(options.rehearse))
    shapes, clock = (TINY if options.rehearse else SHAPES), (GPU if options.device == "cuda" else HOST)
    # On a CPU compiling would take longer than all other work.
    providers = ("kernel", "compiled", "eager") if options.device == "cuda" else ("kernel", "eager")
    wrong = False
    for row in command.measured(list(shapes), shapes, torch.device(options.device), clock, providers):
        rows.add(**row)
        wrong |= row["ms"] == ""
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
