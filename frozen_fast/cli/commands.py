"""The subcommands: for each a function that adds its arguments and one that runs it. Heavy imports are deferred."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import get_args

from frozen_fast.cli.repeats import evaluate_splits, train_repeats
from frozen_fast.config import (
    ExperimentConfig,
    check_for_evaluation,
    check_for_training,
    docs_markdown,
    dump_yaml,
    help_text,
    load_config,
)
from frozen_fast.config.schema import Expansion
from frozen_fast.errors import UserError


class _HelpConfig(argparse.Action):
    """Prints every config key and exits, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        sys.stdout.write(help_text())
        parser.exit()


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="set one config value, e.g. data.sources[0].path=x"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--with-meanings", action="store_true", help="with --print-config: each key's meaning too")
    parser.add_argument("--help-config", action=_HelpConfig, nargs=0, help="list every config key and exit")


def _print_config(config: ExperimentConfig, arguments: argparse.Namespace) -> int:
    sys.stdout.write(dump_yaml(config, meanings=arguments.with_meanings))
    return 0


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `train`."""
    _config_arguments(parser)
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="auto: the run folder's newest checkpoint, if any; none (default): start a new run; PATH: this checkpoint",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="continue the run of the run folder with a longer last stage (a larger budget, or more steps)",
    )
    parser.add_argument("--seeds", metavar="0,1,2", help="train once per seed, and write mean and deviation (seeds.md)")
    parser.add_argument(
        "--splits", metavar="1,2,3", help="train once per split_version of the sources, and write the mean (splits.md)"
    )


def train(arguments: argparse.Namespace) -> int:
    """Train by the config."""
    config = load_config(arguments.config, arguments.overrides)
    check_model_section(config)
    if arguments.print_config:
        return _print_config(config, arguments)
    check_for_training(config)
    from frozen_fast.evaluation.published import published_row
    from frozen_fast.training.run import train as train_run

    if config.paper.table:
        published_row(config.paper.table, config.paper.row)  # report an unknown row before the run
    if arguments.seeds is not None and arguments.splits is not None:
        raise UserError("--splits: got it with --seeds; allowed: one of the two")
    if arguments.seeds is not None or arguments.splits is not None:
        return train_repeats(config, arguments, "seed" if arguments.splits is None else "split")
    if arguments.extend and arguments.resume != "none":
        raise UserError(f"--extend: got it with --resume {arguments.resume}; allowed: one of the two")
    return train_run(config, resume="extend" if arguments.extend else arguments.resume)


def check_model_section(config: ExperimentConfig) -> None:
    """Check model.video, model.text and the frames of the curriculum before reading data or building the model.

    Raises:
        UserError: naming the key.
    """
    from frozen_fast.models import DualEncoder, check_model
    from frozen_fast.models.classifier import Classifier

    if config.model.kind not in (DualEncoder.kind, Classifier.kind):
        return
    stages = config.curriculum.stages
    frames = [(f"curriculum.stages[{index}].frames", stage.frames) for index, stage in enumerate(stages)]
    check_model(config.model, frames)
    asked, learned = config.evaluation.frames, max(number for _, number in frames)
    if config.model.checkpoint is None and asked is not None and asked > learned:
        allowed = f"up to {learned}, the largest number of frames of a stage, or null"
        raise UserError(f"evaluation.frames: got {asked}; allowed: {allowed}")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    _config_arguments(parser)
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="checkpoint folder, run folder or released file (model.checkpoint)"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the numbers to this JSON file")
    parser.add_argument(
        "--splits",
        metavar="1,2,3",
        help="evaluate once per split_version of the sources and add the mean; each split's own run of train --splits",
    )


def evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a checkpoint on the config's evaluation sources and print the numbers as JSON."""
    overrides = list(arguments.overrides)
    if arguments.checkpoint:
        overrides.append(f"model.checkpoint={json.dumps(arguments.checkpoint)}")
    config = load_config(arguments.config, overrides)
    if arguments.print_config:
        return _print_config(config, arguments)
    check_for_evaluation(config)
    if config.model.checkpoint is None:
        raise UserError(
            "--checkpoint: got none; allowed: a checkpoint folder, a run folder or a released .pth/.pth.tar file"
        )
    if arguments.splits is not None:
        result = evaluate_splits(arguments.config, overrides, arguments.splits, arguments.output)
    else:
        from frozen_fast.training.run import evaluate_checkpoint

        result = evaluate_checkpoint(config, config.model.checkpoint, arguments.output)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `convert-checkpoint`."""
    parser.add_argument("source", help="released .pth/.pth.tar file, or a frozen_fast folder")
    parser.add_argument("output", help="output folder; new or empty")
    parser.add_argument("--frames", type=_positive, metavar="T", help="expand or truncate the temporal embeddings to T")
    parser.add_argument(
        "--expansion", choices=get_args(Expansion), default="zero", help="method of the expansion (default zero)"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer to save with the weights")


def convert(arguments: argparse.Namespace) -> int:
    """Load a checkpoint of either form and save it as a frozen_fast folder."""
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output: got {arguments.output!r}, which is not empty; allowed: a new or empty folder")
    from frozen_fast.models import DualEncoder

    model = DualEncoder.from_pretrained(
        arguments.source, num_frames=arguments.frames, expansion=arguments.expansion, tokenizer=arguments.tokenizer
    )
    model.save_pretrained(output)
    if model.tokenizer is None:
        sys.stderr.write(
            "warning: no tokenizer was saved, so the model accepts token ids only; --tokenizer FOLDER saves one, "
            "model.text.tokenizer names one in a config\n"
        )
    print(output)
    return 0


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("run_folder", help="a run folder")


def report(arguments: argparse.Namespace) -> int:
    """Write the report of a run folder."""
    folder = _run_folder(arguments.run_folder)
    from frozen_fast.report.write_report import write_report

    write_report(folder)
    print(folder / "report.html")
    return 0


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    parser.add_argument("run_folders", nargs="+", metavar="run_folder", help="two or more run folders")
    parser.add_argument(
        "--output", metavar="FILE", help="write the comparison (Markdown) to this file instead of stdout"
    )


def compare(arguments: argparse.Namespace) -> int:
    """Compare runs."""
    folders = [_run_folder(text) for text in arguments.run_folders]
    if len(folders) < 2:
        raise UserError(f"run_folder: got {len(folders)}; allowed: two or more to compare")
    from frozen_fast.common.files import write_atomically
    from frozen_fast.report.write_report import compare_runs

    text = compare_runs(folders)
    if arguments.output:
        write_atomically(Path(arguments.output), text)
    else:
        sys.stdout.write(text)
    return 0


def config_docs_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `config-docs`."""
    parser.add_argument(
        "--output", default="docs/config.md", metavar="FILE", help="output file (default docs/config.md); - prints"
    )


def config_docs(arguments: argparse.Namespace) -> int:
    """Write the page of config keys from the schema."""
    if arguments.output == "-":
        sys.stdout.write(docs_markdown())
        return 0
    path = Path(arguments.output)
    if not path.parent.is_dir():
        raise UserError(f"--output: got {arguments.output!r}; allowed: a file in a folder that exists")
    path.write_text(docs_markdown(), encoding="utf-8")
    return 0


def _run_folder(text: str) -> Path:
    folder = Path(text)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run_folder: got {text!r}; allowed: a run folder (it contains config.yaml)")
    return folder


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number, 1 or more")
    return int(text)
