"""`python -m keras_moe COMMAND`: the package's commands."""

import argparse
import sys
from collections.abc import Callable
from functools import partial


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_moe",
        description="Mixture-of-Experts layers for TensorFlow 2 and Keras 3.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train_lm = commands.add_parser(
        "train-lm",
        help="train a Mixture-of-Experts language model, evaluate, export, sample",
    )
    train_mt = commands.add_parser(
        "train-mt",
        help="train a translation model with mixtures, translate, score, export",
    )
    export = commands.add_parser(
        "export", help="export a trained model for TensorFlow Serving"
    )
    # Options are declared without TensorFlow, so that --help answers at once.
    from keras_moe.commands import options

    options.add_options(train_lm, options.TrainLMOptions)
    options.add_options(train_mt, options.TrainMTOptions)
    options.add_options(export, options.ExportOptions)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments, the command first. None takes those of the process.

    Returns:
        Exit status: 0 on success, 2 for bad arguments or input.
    """
    arguments = vars(make_parser().parse_args(argv))
    from keras_moe.commands import options

    command = arguments.pop("command")
    job: Callable[[], object]
    if command == "train-lm":
        from keras_moe.commands import train_lm as train_lm_command

        job = partial(train_lm_command.run, options.TrainLMOptions(**arguments))
    elif command == "export":
        from keras_moe.commands import export as export_command

        job = partial(export_command.run, options.ExportOptions(**arguments))
    else:
        from keras_moe.commands import train_mt as train_mt_command

        job = partial(train_mt_command.run, options.TrainMTOptions(**arguments))
    try:
        job()
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nInterrupted. The same command goes on from the last finished epoch.",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
