"""Arguments of the benchmarks of a whole training step: the sizes of its model."""


def add_sizes(parser):
    """Adds them to an `argparse.ArgumentParser`."""
    parser.add_argument("--experts", type=int, default=64, help="number of experts")
    parser.add_argument("--units", type=int, default=128, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=256, help="hidden units of an expert"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=10_000, help="number of words"
    )
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch")
    parser.add_argument("--time", type=int, default=32, help="time steps of a batch")
