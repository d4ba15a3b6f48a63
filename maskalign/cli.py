"""The commands. Nothing else parses arguments, and nothing heavy is imported before the arguments are known to be good.

Each command is a thin function: jsonargparse reads its options off the signature and their help off the docstring,
and the work is done by one function of the room that owns it.
"""

import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Optional

from maskalign import __version__
from maskalign.errors import RunError, UsageError


def data_build(
    source: str,
    out: Path,
    size: int = 32,
):
    """Build a data set of webdataset shards.

    Args:
        source: openmoji, a folder or a .zip/.tar of images (folder name = class), or torchvision:NAME.
        out: the folder for the shards and manifest.json.
        size: side of the stored square images in pixels.
    """
    from maskalign.data.build import build

    build(source, out, size=size)


def data_encode(
    data: Path,
    teacher: Optional[str] = None,
    latents: Optional[str] = None,
    dtype: Literal["int8", "float16"] = "int8",
):
    """Add teacher features or VAE moments to the shards of a data set.

    Args:
        data: folder of the data set.
        teacher: name of a teacher, e.g. dinov2-b, efficientnet-lite0 or timm:MODEL.
        latents: name or local folder of a diffusers AutoencoderKL.
        dtype: how teacher features are stored.
    """
    from maskalign.data.encode import encode

    encode(data, teacher=teacher, latents=latents, dtype=dtype)


def data_check(data: Path):
    """Verify every shard of a data set against its manifest; exit status 1 and a list where one is bad.

    Args:
        data: folder of the data set.
    """
    from maskalign.data.check import check

    check(data)


def data_show(data: Path, out: Path):
    """Write a contact sheet PNG of a data set, with its labels.

    Args:
        data: folder of the data set.
        out: the PNG file to write.
    """
    from maskalign.data.show import show

    show(data, out)


def sample(run: Path, out: Path):
    """Draw pictures from a trained model.

    Args:
        run: a run folder or one of its checkpoints.
        out: folder for the pictures.
    """
    from maskalign.sampling.generate import sample as generate

    generate(run, out)


def convert(src: Path, dst: Path, to: Optional[Literal["repa", "safetensors"]] = None):
    """Convert checkpoints: REPA's .pt, ours, safetensors.

    Args:
        src: the checkpoint to read.
        dst: the file to write.
        to: the layout to write; taken from the ending of dst where it is left out.
    """
    from maskalign.models.convert import convert as convert_checkpoint

    convert_checkpoint(src, dst, to=to)


# The arguments that are given by position; all the others are options.
POSITIONAL = {
    "data build": ["source"],
    "data check": ["data"],
    "data show": ["data"],
    "sample": ["run"],
    "convert": ["src", "dst"],
}
COMMANDS = {
    "data build": data_build,
    "data encode": data_encode,
    "data check": data_check,
    "data show": data_show,
    "train": None,  # its options are the tree of settings in config.py
    "sample": sample,
    "convert": convert,
}
SUMMARIES = {
    "data build": "build a data set of webdataset shards from images",
    "data encode": "add teacher features or VAE latents to a data set",
    "data check": "verify every shard against the manifest",
    "data show": "write a contact sheet of a data set",
    "train": "train a model, or go on with a run",
    "sample": "draw pictures from a run or a checkpoint",
    "convert": "convert checkpoints from and to REPA's layout",
}


def overview():
    lines = [f"maskalign {__version__}: diffusion transformers aligned on random token subsets", "", "commands:"]
    lines += [f"  maskalign {name:<12} {summary}" for name, summary in SUMMARIES.items()]
    lines += ["", "maskalign COMMAND --help lists the settings of a command."]
    return "\n".join(lines)


def one_line(message):
    """Fold a message of jsonargparse, which may span lines, into one."""
    return " ".join(str(message).split())


def make_parser(name, **kwargs):
    from jsonargparse import ArgumentParser

    class OneLineParser(ArgumentParser):
        def error(self, message, ex=None):
            raise UsageError(f"{one_line(message)} (maskalign {name} --help lists the settings)")

    return OneLineParser(prog=f"maskalign {name}", **kwargs)


def run_function(name, function, argv):
    import docstring_parser

    parser = make_parser(name, description=SUMMARIES[name])
    positional = POSITIONAL.get(name, [])
    help_of = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__).params}
    for argument in positional:
        annotation = function.__annotations__[argument]
        parser.add_argument(argument, metavar=argument.upper(), type=annotation, help=help_of[argument])
    parser.add_function_arguments(function, as_group=False, skip=set(positional))
    function(**parser.parse_args(argv).as_dict())


def run_train(argv):
    from maskalign.config import parse_config

    config = parse_config(argv, prog="maskalign train", description=SUMMARIES["train"])
    # The data set is looked at before torch is imported: most mistakes are found within a second.
    from maskalign.training.preflight import check_data

    manifest, facts = check_data(config)
    from maskalign.training.trainer import train

    train(config, manifest, facts)


def dispatch(argv):
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if argv[0] == "--version":
        print(__version__)
        return
    words = 2 if argv[0] == "data" else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        if argv[0] == "data" and (len(argv) == 1 or argv[1] in ("-h", "--help")):
            print(overview())
            return
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; maskalign --help lists them"
        raise UsageError(f"there is no command {name!r}{hint}")
    if name == "train":
        run_train(argv[words:])
    else:
        run_function(name, COMMANDS[name], argv[words:])


def main(argv=None):
    """Run one command. A user's mistake ends in one line and status 2, a failure of the work in one line and status 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        dispatch(argv)
    except UsageError as error:
        status = 2
        print(f"maskalign: error: {one_line(error)}", file=sys.stderr)
    except RunError as error:
        status = 1
        print(f"maskalign: failed: {one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
        print("maskalign: stopped", file=sys.stderr)
    except BrokenPipeError:
        # The reader of our output has gone (`maskalign ... | head`): say no more.
        status = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        status = 0
    sys.exit(status)
