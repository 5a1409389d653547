"""One of several workers, or one alone, with a backup at the end of every epoch.

At a step of the settings a worker stops: `kill` ends it at once, `freeze` leaves it
there without an answer, `full` lets no file become longer, as a full disk does. One
process alone then goes on when there is room again. Prints a digest of its final state,
and the error of the disk; other errors are raised as a user sees them.
"""

import hashlib
import json
import os
import resource
import signal
import sys

import keras
import tensorflow as tf

from keras_moe import distribution, writing
from tests.distribution import child

EPOCHS, STEPS = 4, 5


class Stop(keras.callbacks.Callback):
    """Stops the process in the middle of an epoch."""

    def __init__(self, how, epoch):
        super().__init__()
        self.how, self.stop_epoch, self.epoch = how, epoch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch != self.stop_epoch or batch != 2:
            return
        print("STOPPING", flush=True)
        if self.how == "full":
            limit(100_000)  # less than the weights, more than what is printed
        else:
            number = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[self.how]
            os.kill(os.getpid(), number)


def limit(num_bytes):
    """No file may become longer; Python ignores the signal, so writing fails."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))


def main():
    settings = json.loads(sys.argv[1])
    index = (
        json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0)
    )
    child.start(1)
    strategy = None
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    case = child.Case(num_experts=7, optimizer="Adam", dropout=0.2)
    callbacks = [distribution.Backup(settings["folder"])]
    if settings.get("stop") and index == settings["stopped"]:
        callbacks.append(Stop(settings["stop"], epoch=2))
    model = child.build(case, strategy)
    seen = None
    try:
        fit(model, case, callbacks)
    except writing.NoRoomError as error:
        if strategy is not None:
            raise
        seen = str(error)
        limit(resource.RLIM_INFINITY)
        model = child.build(case, strategy)
        fit(model, case, callbacks[:1])
    state = child.state_of(model)
    digest = hashlib.sha256(b"".join(state[name].tobytes() for name in sorted(state)))
    found = {"state": digest.hexdigest(), "error": seen}
    print("RESULT " + json.dumps(found), flush=True)


def fit(model, case, callbacks):
    model.fit(
        child.dataset(case).repeat(),
        epochs=EPOCHS,
        steps_per_epoch=STEPS,
        verbose=0,
        shuffle=False,
        callbacks=callbacks,
    )


if __name__ == "__main__":
    main()
