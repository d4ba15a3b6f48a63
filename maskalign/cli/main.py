"""Find the command, and turn its errors into one line and an exit status. Imports no torch."""

import importlib
import os
import sys
import time
from contextlib import suppress
from difflib import get_close_matches

from maskalign import __version__
from maskalign.errors import RunError, UsageError, one_line
from maskalign.runtime.files import disk_reason, is_disk_error
from maskalign.runtime.thread_waiting import look, make_room

# A command's module has `run(argv, start)`, which calls `start` once the command line is known to be good.
COMMANDS = {
    "data build": ("data_build", "build a data set of webdataset shards from images"),
    "data encode": ("data_encode", "add teacher features or VAE latents to a data set"),
    "data check": ("data_check", "verify every shard against the manifest"),
    "data show": ("data_show", "write a contact sheet of a data set"),
    "train": ("train", "train a model, or resume a run"),
    "sample": ("sample", "draw pictures from a run or a checkpoint"),
    "evaluate": ("evaluate", "compare samples with real images, and measure held-out losses"),
    "analyze": ("analyze", "measure the gradients of the alignment loss and the stability gap"),
    "report": ("report", "compare runs on one HTML page"),
    "plan": ("plan", "estimate memory, time and energy of a run without its hardware"),
    "convert": ("convert", "convert checkpoints from and to the layouts of REPA and REG"),
    "push": ("push", "upload a run to the Hugging Face Hub, with a model card"),
    "completion": ("completion", "print a script that completes commands and options in bash or zsh"),
}
STARTED = look()


def overview():
    lines = [f"maskalign {__version__}: diffusion transformers aligned on random token subsets", "", "commands:"]
    lines += [f"  maskalign {name:<12} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += ["", "maskalign COMMAND --help lists the options of a command."]
    return "\n".join(lines)


def dispatch(argv):
    """Run the command that a command line names.

    Raises:
        UsageError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help", "help") or argv in (["data"], ["data", "-h"], ["data", "--help"]):
        print(overview())
        return
    if argv[0] == "--version":
        print(__version__)
        return
    words = 2 if argv[0] == "data" else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; maskalign --help lists them"
        raise UsageError(f"there is no command {name!r}{hint}")
    command_module(name).run(argv[words:], lambda: make_room(STARTED))


def command_module(name):
    """The module of a command; its `SETTINGS` is the dataclass of its options (`train` has the tree of settings)."""
    return importlib.import_module(f"maskalign.cli.{COMMANDS[name][0]}")


def complain(what, error):
    """Print an error's line, once where the ranks of torchrun meet the same one.

    Rank 0 prints at once and exits; torchrun then ends the others before they have waited. An error that only another
    rank has is printed by that rank.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(2)
        what = f"{what} (rank {rank})"
    print(f"maskalign: {what}: {one_line(error)}", file=sys.stderr, flush=True)


def main(argv=None):
    """Run one command; a user's mistake ends in one line and status 2, failed work in one line and status 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        dispatch(argv)
    except UsageError as error:
        status = 2
        complain("error", error)
    except RunError as error:
        status = 1
        complain("failed", error)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone (`maskalign ... | head`): print no more.
            status = 0
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif is_disk_error(error):
            status = 1
            with suppress(OSError):  # the log may be on the same disk
                complain("failed", f"{disk_reason(error)}; free space, or write elsewhere")
        else:
            raise
    except KeyboardInterrupt:
        status = 130
        print("maskalign: stopped", file=sys.stderr)
    else:
        status = 0
    sys.exit(status)
