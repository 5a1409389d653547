"""`python -m keras_moe COMMAND`: the package's commands."""

import argparse
import sys
from collections.abc import Callable
from functools import partial

from keras_moe._version import __version__


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_moe",
        description="Mixture-of-Experts layers for TensorFlow 2 and Keras 3.",
    )
    parser.add_argument(
        "--version", action="version", version=f"keras_moe {__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from keras_moe.commands import options

    for name, text, declared in (
        (
            "train-lm",
            "train a Mixture-of-Experts language model, evaluate, export, sample",
            options.TrainLMOptions,
        ),
        (
            "train-mt",
            "train a translation model with mixtures, translate, score, export",
            options.TrainMTOptions,
        ),
        (
            "export",
            "export a trained model for TensorFlow Serving",
            options.ExportOptions,
        ),
        (
            "plan",
            "plan a model, or a configuration of the paper, on a cluster",
            options.PlanOptions,
        ),
    ):
        command = commands.add_parser(name, help=text, description=f"{text}.")
        options.add_options(command, declared)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments, the command first. None takes those of the process.

    Returns:
        Exit status: 0 on success, 2 for bad arguments or input.
    """
    arguments = vars(make_parser().parse_args(argv))
    from keras_moe import writing
    from keras_moe.commands import folders, options

    command = arguments.pop("command")
    job: Callable[[], object]
    if command == "train-lm":
        from keras_moe.commands import train_lm as train_lm_command

        job = partial(train_lm_command.run, options.TrainLMOptions(**arguments))
    elif command == "export":
        from keras_moe.commands import export as export_command

        job = partial(export_command.run, options.ExportOptions(**arguments))
    elif command == "plan":
        from keras_moe.commands import plan as plan_command

        job = partial(plan_command.run, options.PlanOptions(**arguments))
    else:
        from keras_moe.commands import train_mt as train_mt_command

        job = partial(train_mt_command.run, options.TrainMTOptions(**arguments))
    is_run = command.startswith("train-")
    resumes = f" {folders.GOES_ON}" * is_run
    try:
        job()
    except (ValueError, OSError, ImportError) as error:
        rest = resumes * isinstance(error, writing.NoRoomError)
        print(f"error: {error}{rest}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted.{resumes}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
