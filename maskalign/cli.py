"""The commands. Nothing else parses arguments, and nothing heavy is imported before the arguments are known to be good.

The functions of commands.py say what each command takes: jsonargparse reads its options off the signature and their
help off the docstring.
"""

import os
import re
import sys
import time
from contextlib import suppress
from difflib import get_close_matches
from typing import get_args, get_origin

from maskalign import __version__
from maskalign.commands import COMMANDS, POSITIONAL, SUMMARIES
from maskalign.errors import RunError, UsageError, one_line
from maskalign.runtime.files import disk_reason, is_disk_error
from maskalign.runtime.home import expand_home
from maskalign.runtime.thread_waiting import look, make_room

STARTED = look()


def overview():
    lines = [f"maskalign {__version__}: diffusion transformers aligned on random token subsets", "", "commands:"]
    lines += [f"  maskalign {name:<12} {summary}" for name, summary in SUMMARIES.items()]
    lines += ["", "maskalign COMMAND --help lists the settings of a command."]
    return "\n".join(lines)


def make_parser(name, **kwargs):
    from jsonargparse import ArgumentParser

    class OneLineParser(ArgumentParser):
        def error(self, message, ex=None):
            from maskalign.config.messages import plain_message

            raise UsageError(f"{plain_message(message)} (maskalign {name} --help lists the settings)")

    return OneLineParser(prog=f"maskalign {name}", allow_abbrev=False, **kwargs)


def run_function(name, function, argv):
    import docstring_parser

    parser = make_parser(name, description=SUMMARIES[name])
    positional = POSITIONAL.get(name, [])
    help_of = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__).params}
    for argument in positional:
        annotation = function.__annotations__[argument]
        several = get_origin(annotation) is list
        kind = {"type": get_args(annotation)[0], "nargs": "+"} if several else {"type": annotation}
        parser.add_argument(argument, metavar=argument.upper(), help=help_of[argument], **kind)
    parser.add_function_arguments(function, as_group=False, skip=set(positional))
    add_dashed_names(parser)
    argv = complete_switches(function, join_labels(argv) if name in ("sample", "evaluate") else argv)
    arguments = expand_paths(function, parser.parse_args(argv).as_dict())
    make_room(STARTED)
    function(**arguments)


# Options that are text, as they may be a URL or a name instead of a path.
PATHS = {"source", "data", "latents", "vae", "weights", "teacher_weights", "inception", "held_out", "device"}


def expand_paths(function, arguments):
    """The arguments of a command with the home folder put into its paths."""
    annotations = function.__annotations__
    return {
        name: expand_home(value) if name in PATHS or "Path" in str(annotations.get(name)) else value
        for name, value in arguments.items()
    }


def add_dashed_names(parser):
    """Take --cfg-scale as well as --cfg_scale, and show the former."""
    for action in list(parser._actions):
        for option in action.option_strings:
            dashed = "--" + option[2:].replace("_", "-")
            if option.startswith("--") and dashed not in parser._option_string_actions:
                action.option_strings.insert(0, dashed)
                parser._option_string_actions[dashed] = action


def complete_switches(function, argv):
    """Take `--hflip` as well as `--hflip true`."""
    switches = {f"--{name}" for name, annotation in function.__annotations__.items() if annotation is bool}
    completed = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        completed.append(word)
        if word.replace("_", "-") in {s.replace("_", "-") for s in switches} and following.startswith("--"):
            completed.append("true")
    return completed


def join_labels(argv):
    """Take `--classes 0 3 5-8` as well as `--classes 0,3,5-8`."""
    joined = []
    for word in argv:
        if len(joined) > 1 and joined[-2] == "--classes" and re.fullmatch(r"\d[\d,-]*", word):
            joined[-1] += "," + word
        else:
            joined.append(word)
    return joined


def run_train(argv):
    from maskalign.config import parse_config

    config = parse_config(argv, prog="maskalign train", description=SUMMARIES["train"])
    # The data set is looked at before torch is imported: most mistakes are found within a second.
    from maskalign.training.preflight import check_data

    manifest, facts = check_data(config)
    make_room(STARTED)
    from maskalign.training.trainer import train

    train(config, manifest, facts)


def run_plan(argv):
    from maskalign.config import Config, make_config_parser, validate

    plan = COMMANDS["plan"]
    parser = make_config_parser(prog="maskalign plan", description=SUMMARIES["plan"])
    parser.add_function_arguments(plan, as_group=False, skip={"config"})
    add_dashed_names(parser)
    given = parser.instantiate(parser.parse_args(argv))
    config = expand_home(Config(**{name: getattr(given, name) for name in Config.__dataclass_fields__}))
    validate(config)
    own = {name: getattr(given, name) for name in plan.__annotations__ if name != "config"}
    plan(config, **expand_paths(plan, own))


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
    elif name == "plan":
        run_plan(argv[words:])
    else:
        run_function(name, COMMANDS[name], argv[words:])


def complain(what, error):
    """Print an error's line, once where the ranks of torchrun meet the same one.

    Rank 0 speaks at once and ends; torchrun then ends the others before they have waited. What only another rank has
    met is told by that rank.
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
            # The reader of our output has gone (`maskalign ... | head`): say no more.
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
