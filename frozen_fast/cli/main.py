"""One table of subcommands, one place where mistakes become a line on stderr and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from frozen_fast import __version__
from frozen_fast.cli import commands, search_commands, share_commands
from frozen_fast.cli.doctor import doctor, doctor_arguments
from frozen_fast.cli.feature_commands import (
    convert_features,
    convert_features_arguments,
    make_caption_masks,
    make_caption_masks_arguments,
)
from frozen_fast.cli.find_batch_size import find_batch_size, find_batch_size_arguments
from frozen_fast.cli.label_command import label, label_arguments
from frozen_fast.cli.pack_command import pack, pack_arguments
from frozen_fast.cli.serve_command import serve, serve_arguments
from frozen_fast.errors import UserError, UserErrors

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130

OTHER_RANKS_WAIT_SECONDS = 5.0
MOST_MESSAGE_CHARACTERS = 2000

COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "train": ("train the stages of a config, evaluate, report", commands.train_arguments, commands.train),
    "evaluate": ("retrieval numbers of a checkpoint", commands.evaluate_arguments, commands.evaluate),
    "pack": ("frames of a source's clips into JPEG shards, for fast reading", pack_arguments, pack),
    "convert-checkpoint": (
        "turn a released .pth/.pth.tar checkpoint into a frozen_fast folder",
        commands.convert_arguments,
        commands.convert,
    ),
    "convert-features": (
        "turn released expert features into a memory-mapped feature store",
        convert_features_arguments,
        convert_features,
    ),
    "make-caption-masks": (
        "which training captions a teacher finds their own video with, to train on those",
        make_caption_masks_arguments,
        make_caption_masks,
    ),
    "find-batch-size": (
        "the largest batch of each number of frames that fits one device",
        find_batch_size_arguments,
        find_batch_size,
    ),
    "embed": (
        "vectors of clips into an index that can be searched",
        search_commands.embed_arguments,
        search_commands.embed,
    ),
    "search": ("clips of an index that fit a text or a clip", search_commands.search_arguments, search_commands.search),
    "index": ("what an index holds; build, remove, compact", search_commands.index_arguments, search_commands.index),
    "label": ("labels for clips from a list, without training", label_arguments, label),
    "serve": ("a local page that searches an index", serve_arguments, serve),
    "doctor": ("whether this machine can run an experiment, and what to do where it cannot", doctor_arguments, doctor),
    "push": (
        "upload a checkpoint with a model card to the Hugging Face Hub",
        share_commands.push_arguments,
        share_commands.push,
    ),
    "export": ("both towers to ONNX or torch.export", share_commands.export_arguments, share_commands.export),
    "report": ("write a run's report.md and report.html again", commands.report_arguments, commands.report),
    "compare": ("put several runs side by side", commands.compare_arguments, commands.compare),
    "config-docs": ("write docs/config.md from the schema", commands.config_docs_arguments, commands.config_docs),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see --help)")


def build_parser(program: str = "frozen-fast") -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog=program, description="Train and evaluate video-text dual encoders.")
    parser.add_argument("--version", action="version", version=f"frozen_fast {__version__}")
    table = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, add_arguments, function) in COMMANDS.items():
        command_program = program if program == f"{name}.py" else f"{program} {name}"
        description = summary[0].upper() + summary[1:] + "."
        command = table.add_parser(name, help=summary, description=description, allow_abbrev=False)
        command.prog = command_program
        add_arguments(command)
        command.set_defaults(function=function)
    return parser


def main(arguments: Sequence[str] | None = None, *, program: str = "frozen-fast") -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes sys.argv.
        program: the name in usage lines.

    Returns:
        The exit code: 0 done, 2 a mistake of the user's, 75 stopped by a signal with a checkpoint saved,
        130 interrupted. Anything else raises.
    """
    return run_and_report(lambda: _run(arguments, program))


def run_and_report(function: Callable[[], int]) -> int:
    """Call a function; turn a UserError into one line on stderr for each mistake, and exit code 2."""
    try:
        return function()
    except UserError as error:
        mistakes = error.args if isinstance(error, UserErrors) else (str(error),)
        _tell([_shortened(" ".join(str(mistake).split())) for mistake in mistakes])
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _shortened(message: str) -> str:
    """A message with its middle left out where it echoes what nobody can read on a terminal."""
    half = MOST_MESSAGE_CHARACTERS // 2
    return message if len(message) <= MOST_MESSAGE_CHARACTERS else f"{message[:half]} [..] {message[-half:]}"


def _tell(messages: Sequence[str]) -> None:
    """Print a line for each message on rank 0; on other ranks only if rank 0 had nothing to say.

    A mistake is most often the same on every rank. The launcher ends all processes when the first one leaves, so the
    others wait: that lets rank 0 print before it is ended, and one who is still there afterwards is the only one
    who knows.
    """
    rank = os.environ.get("RANK", "0")
    prefix = ""
    if rank != "0":
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
        prefix = f"[rank {rank}] "
    print("\n".join(f"error: {prefix}{message}" for message in messages), file=sys.stderr, flush=True)


def console_script() -> NoReturn:
    """Entry point of `frozen-fast`."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    sys.exit(code)


def _run(arguments: Sequence[str] | None, program: str) -> int:
    parser = build_parser(program)
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:  # argparse takes only the first group of overrides when options stand between them
        parsed.overrides += rest
    return parsed.function(parsed)
