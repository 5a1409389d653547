"""Trains a Mixture-of-Experts language model and shows what came out.

    python examples/train_language_model.py                       # embedded corpus
    python examples/train_language_model.py --data-dir FOLDER --output-dir runs/mine
    python examples/train_language_model.py --help

`python -m keras_moe train-lm` is the same. The steps are in
`keras_moe/commands/train_lm.py`: read it to see how a model is built, trained on
a stream with carried state, resumed, evaluated, exported and reloaded.
"""

import os
import sys

# TensorFlow's start-up notes say nothing to a reader of this output.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_moe.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train-lm", *sys.argv[1:]]))
