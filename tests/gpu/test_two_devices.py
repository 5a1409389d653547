"""Two logical devices of one GPU train as one does, under both strategies."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.distribution import children


@functools.cache
def losses(engine, layer, kind="GPU"):
    settings = {"engine": engine, "layer": layer, "kind": kind}
    environment = children.environment()
    # Those of this process, where children of other tests get no GPU.
    environment.pop("CUDA_VISIBLE_DEVICES")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    # A collective of which one part is missing waits for ever.
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.child", json.dumps(settings)],
        cwd=children.ROOT,
        env={**environment, "TF_FORCE_GPU_ALLOW_GROWTH": "true"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    return children.result_of(done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["mirrored", "dtensor"])
@pytest.mark.parametrize("layer", ["flat", "hierarchical"])
def test_two_logical_gpus_train_as_one(engine, layer):
    np.testing.assert_allclose(losses(engine, layer), losses("one", layer), rtol=1e-4)
