"""Trains a Mixture-of-Experts translation model and shows what came out.

    python examples/train_translation.py                       # embedded corpus
    python examples/train_translation.py --data-dir FOLDER --directions en-fra
    python examples/train_translation.py --help

`python -m keras_moe train-mt` is the same. The steps are in
`keras_moe/commands/train_mt.py`: read it to see how subwords are learnt, how a model
is built, trained on pairs in many directions, scored, exported and reloaded.
"""

import os
import sys

# TensorFlow's start-up notes say nothing to a reader of this output.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_moe.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train-mt", *sys.argv[1:]]))
