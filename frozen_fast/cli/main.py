"""The table of subcommands, and the conversion of errors to messages and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from frozen_fast import __version__
from frozen_fast.cli import commands, search_commands, share_commands
from frozen_fast.cli.average_command import average, average_arguments
from frozen_fast.cli.doctor import doctor, doctor_arguments
from frozen_fast.cli.extract_command import extract, extract_arguments
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
from frozen_fast.common.secrets import hide_secrets
from frozen_fast.errors import UserError, UserErrors

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130

OTHER_RANKS_WAIT_SECONDS = 5.0
MOST_MESSAGE_CHARACTERS = 2000

COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "train": ("train by a config, evaluate and write the report", commands.train_arguments, commands.train),
    "evaluate": ("evaluate a checkpoint on held-out clips", commands.evaluate_arguments, commands.evaluate),
    "pack": ("extract frames of a source's clips into JPEG shards", pack_arguments, pack),
    "convert-checkpoint": (
        "convert a released .pth/.pth.tar checkpoint to a frozen_fast folder",
        commands.convert_arguments,
        commands.convert,
    ),
    "average-checkpoints": (
        "average the weights of several checkpoints",
        average_arguments,
        average,
    ),
    "convert-features": (
        "convert released expert features to a memory-mapped feature store",
        convert_features_arguments,
        convert_features,
    ),
    "extract": (
        "expert features of own clips, and token features of their captions, into a feature store",
        extract_arguments,
        extract,
    ),
    "make-caption-masks": (
        "select training captions with which a teacher finds their video",
        make_caption_masks_arguments,
        make_caption_masks,
    ),
    "find-batch-size": (
        "find the largest batch that fits one device, per number of frames",
        find_batch_size_arguments,
        find_batch_size,
    ),
    "embed": (
        "embed clips into a search index",
        search_commands.embed_arguments,
        search_commands.embed,
    ),
    "search": ("search an index by a text or a clip", search_commands.search_arguments, search_commands.search),
    "index": ("describe, rebuild or compact an index", search_commands.index_arguments, search_commands.index),
    "label": ("label clips with a list of labels, without training", label_arguments, label),
    "serve": ("serve a local search page", serve_arguments, serve),
    "doctor": ("check whether this machine can run an experiment", doctor_arguments, doctor),
    "push": (
        "upload a checkpoint with a model card to the Hugging Face Hub",
        share_commands.push_arguments,
        share_commands.push,
    ),
    "export": ("export both towers to ONNX or torch.export", share_commands.export_arguments, share_commands.export),
    "report": ("write a run's report.md and report.html again", commands.report_arguments, commands.report),
    "compare": ("compare several runs", commands.compare_arguments, commands.compare),
    "config-docs": ("write docs/config.md from the schema", commands.config_docs_arguments, commands.config_docs),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError."""

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
        130 interrupted. Other exceptions are raised.
    """
    return run_and_report(lambda: _run(arguments, program))


def run_and_report(function: Callable[[], int]) -> int:
    """Call a function; for a UserError, print one line per mistake to stderr and return 2."""
    try:
        return function()
    except UserError as error:
        mistakes = error.args if isinstance(error, UserErrors) else (str(error),)
        _tell([_shortened(" ".join(str(mistake).split())) for mistake in mistakes])
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _shortened(message: str) -> str:
    """Shorten the middle of a very long message."""
    half = MOST_MESSAGE_CHARACTERS // 2
    return message if len(message) <= MOST_MESSAGE_CHARACTERS else f"{message[:half]} [..] {message[-half:]}"


def _tell(messages: Sequence[str]) -> None:
    """Print the messages on rank 0; on other ranks only if rank 0 printed nothing.

    Most mistakes occur on every rank, and the launcher ends all processes when the first one exits. The other ranks
    therefore wait; a rank that has not been ended after the wait prints its own message.
    """
    rank = os.environ.get("RANK", "0")
    prefix = ""
    if rank != "0":
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
        prefix = f"[rank {rank}] "
    print("\n".join(f"error: {prefix}{hide_secrets(message)}" for message in messages), file=sys.stderr, flush=True)


def console_script() -> NoReturn:
    """Entry point of `frozen-fast`."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has exited
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
