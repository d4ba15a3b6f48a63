"""Checkpoints that are mutated at random: names, shapes, dtypes, args, notes, bytes. One line, or the right weights."""

import argparse
import copy
import functools
import json
import random
import struct
from collections import OrderedDict

import pytest
import torch

from maskalign.checkpoints import convert, load
from maskalign.checkpoints.spec import ModelInfo
from maskalign.checkpoints.weight_files import reg_checkpoint, repa_checkpoint, write_safetensors
from maskalign.errors import RunError, UsageError
from maskalign.models import SiT

SIZES = dict(
    input_size=8, patch_size=2, in_channels=3, num_classes=3, depth=2, width=16, heads=2, teacher_dims=(5,),
    align_depth=2, projector_dim=8, mixer="none",
)  # fmt: skip
PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."]
NAMES = ["", "x", "blocks.7.attn.qkv.weight", "blocks.99999999.x", "blocks.-1.x", "mixer.layers.0.x",
         "projectors.5.0.weight", "decoder_blocks.0.attn.qkv.weight", "wg_norm.weight", "fuse.linear.weight",
         "blocks.1", "pos_embed ",
         "mixer.conv.weight", "blocks." + "9" * 5000 + ".x", "caf\u00e9"]  # fmt: skip
VALUES = [None, 0, -1, 1, 2, 2.5, True, "", "x", "v", "linear", "cosine", "Linear", "GVP", "VP", "noise", "SiT-XL/2",
          "SiT-B/2", "DiT-XL/2", [], {}, [1, 2], 10**30, float("nan")]  # fmt: skip
ARGS = ["model", "num_classes", "path_type", "prediction", "encoder_depth", "resolution", "qk_norm", "more"]
DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn, torch.int8]


@functools.cache
def pair(class_dim, seed):
    """Two models with nothing at zero: the weights, and their average."""
    torch.manual_seed(seed)
    models = [SiT(**SIZES, class_dim=class_dim) for _ in range(2)]
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return models


def whole(draw, seed):
    """(the dict of a checkpoint, the averaged weights that are right, the path)."""
    class_dim = draw.choice([None, 5])
    models = pair(class_dim, seed)
    path = draw.choice(["linear", "cosine"])
    make = repa_checkpoint if class_dim is None else reg_checkpoint
    return make(*models, 5, path), dict(models[1].state_dict()), path


def mutate(draw, checkpoint):
    """Change one thing; returns (what was changed, whether the weights of `ema` are still the right ones)."""
    kind = draw.choice(["name", "prefix", "drop", "add", "shape", "dtype", "value", "args", "args", "top", "type"])
    ema = checkpoint["ema"] = dict(checkpoint["ema"])
    name = draw.choice(list(ema))
    if kind == "name":
        new = draw.choice(NAMES + [name[:-1], name + "x", name.upper(), name.replace("0", "1")])
        ema[new] = ema.pop(name)
        return f"{name[:40]} renamed to {new[:40]!r}", new == name
    if kind == "prefix":
        prefix = draw.choice(PREFIXES)
        some = draw.random() < 0.5
        checkpoint["ema"] = {prefix + n if not some or draw.random() < 0.5 else n: w for n, w in ema.items()}
        return f"prefix {prefix}", True
    if kind == "drop":
        del ema[name]
        return f"without {name}", False
    if kind == "add":
        new = draw.choice(NAMES + [draw.choice(PREFIXES) + name, 5, None, ("a", 1)])
        ema[new] = torch.randn(3)
        return f"with {str(new)[:40]!r}", False
    if kind == "shape":
        shape = list(ema[name].shape)
        axis = draw.randrange(len(shape))
        shape[axis] = draw.choice([0, 1, shape[axis] + 1, max(0, shape[axis] - 1), 2 * shape[axis]])
        if shape == list(ema[name].shape):
            shape = [1, *shape]
        ema[name] = torch.randn(shape)
        return f"{name} of shape {shape}", False
    if kind == "dtype":
        dtype = draw.choice(DTYPES)
        ema[name] = ema[name].to(dtype)
        return f"{name} as {dtype}", False
    if kind == "value":
        odd = draw.choice([float("nan"), float("inf")])
        ema[name] = torch.full_like(ema[name], odd)
        return f"{name} of {odd}", False
    if kind == "type":
        value = draw.choice([None, 1.0, [1.0], "w", {}, torch.ones(2).to_sparse()])
        ema[name] = value
        return f"{name} is {value!r}", False
    if kind == "args":
        entry, value = draw.choice(ARGS), draw.choice(VALUES)
        setattr(checkpoint["args"], entry, value)
        return f"args.{entry} = {value!r}", True
    entry = draw.choice(["model", "ema", "args", "steps", "opt"])
    value = draw.choice([None, 3, "x", [], {}, torch.ones(2), {"a": 1}])
    checkpoint[entry] = value
    return f"{entry} = {value!r}", entry in ("args", "steps", "opt", "model")


def check(source, folder, right, path, described, intact, heads=None):
    """Convert; either one line, or a file with the right weights, heads and path."""
    target = folder / "out.safetensors"
    target.unlink(missing_ok=True)
    try:
        convert(source, target, heads=heads)
    except (UsageError, RunError) as error:
        assert "\n" not in str(error) and len(str(error)) < 12000, described
        assert not target.exists() and not list(folder.glob(".*")), described
        return "refused"
    assert intact, f"{described}: converted in silence"
    loaded = load(target)
    found = loaded.model.state_dict()
    assert found.keys() == right.keys(), described
    assert all(torch.equal(found[name], value) for name, value in right.items()), described
    assert loaded.info.path == path, described
    assert loaded.model.heads == SIZES["heads"], described
    return "converted"


def run(seed, count, folder):
    outcomes = {"converted": 0, "refused": 0}
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        checkpoint, right, path = whole(draw, seed)
        noted = draw.random() < 0.7
        for name in ("model", "ema"):
            # Without our notes nothing tells the number of heads, which is then given.
            if not noted and hasattr(checkpoint[name], "_metadata"):
                del checkpoint[name]._metadata
        notes = getattr(checkpoint["ema"], "_metadata", None)
        checkpoint["args"] = copy.copy(checkpoint["args"])
        described, intact = mutate(draw, checkpoint)
        told = vars(checkpoint["args"]) if isinstance(checkpoint["args"], argparse.Namespace) else {}
        told_path = told.get("path_type")
        if isinstance(checkpoint["ema"], dict) and notes is not None:
            checkpoint["ema"] = OrderedDict(checkpoint["ema"])
            checkpoint["ema"]._metadata = notes
        if told_path in ("linear", "cosine"):
            path = told_path  # the file says so, and nothing in it says otherwise
        elif told_path is None:
            path = "linear"
        described = f"seed {seed}, mutation {number}: {described}, notes {noted}"
        source = folder / "in.pt"
        try:
            torch.save(checkpoint, source)
        except Exception:  # what cannot be saved cannot be found on a disk
            continue
        if checkpoint["ema"] is None:
            right = {}
            intact = False
        outcomes[check(source, folder, right, path, described, intact, None if noted else 2)] += 1
    return outcomes


def flip(seed, count, folder):
    """Bytes and notes of a .safetensors file."""
    draw = random.Random(f"{seed}/bytes")
    torch.manual_seed(seed)
    model = SiT(**SIZES)
    info = ModelInfo(step=3, path="cosine", class_names=["a", "b", "c"])
    write_safetensors(folder / "whole.safetensors", model, info)
    raw = (folder / "whole.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    right = dict(model.state_dict())
    for number in range(count):
        source = folder / "in.safetensors"
        notes = json.loads(header["__metadata__"]["maskalign"])
        path, intact = "cosine", True
        if draw.random() < 0.5:
            where = draw.choice([notes, notes["model"], notes["facts"]])
            entry, value = draw.choice([*where, "more"]), draw.choice(VALUES)
            where[entry] = value
            described = f"note {entry} = {value!r}"
            if where is notes and entry == "path" and value in ("linear", "cosine"):
                path = value
            # A number of heads that divides the width is as good as another one.
            if where is notes["model"] if isinstance(notes.get("model"), dict) else False:
                intact = entry != "heads" or value not in (1,)
                if entry == "heads" and value == 1:
                    continue
            if where is notes and entry == "model":
                intact = False  # no notes on the model: the heads have to be asked for
            text = json.dumps({**header, "__metadata__": {**header["__metadata__"], "maskalign": json.dumps(notes)}})
            data = struct.pack("<Q", len(text.encode())) + text.encode() + raw[8 + size :]
        else:
            data = bytearray(raw)
            for _ in range(draw.randint(1, 4)):
                data[draw.randrange(8 + size)] = draw.randrange(256)
            data = bytes(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data)
            described, intact = "bytes of the header", None
        source.write_bytes(data)
        described = f"seed {seed}, file {number}: {described}"
        if intact is None:
            try:
                convert(source, folder / "out.safetensors")
            except (UsageError, RunError) as error:
                assert "\n" not in str(error), described
            continue
        check(source, folder, right, path, described, intact)


def test_mutated_checkpoints(seed, tmp_path):
    outcomes = run(seed, 75, tmp_path)
    assert outcomes["converted"] > 3 and outcomes["refused"] > 20, outcomes


def test_mutated_safetensors(seed, tmp_path):
    flip(seed, 25, tmp_path)


@pytest.mark.slow
def test_many_mutations(seed, tmp_path):
    outcomes = run(seed + 1, 400, tmp_path)
    assert outcomes["converted"] > 30 and outcomes["refused"] > 150, outcomes
    flip(seed + 1, 100, tmp_path)
