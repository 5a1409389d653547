"""The worker that was lost is named: by `launch`, and by the others."""

import re
import signal
import socket

import pytest
import tensorflow as tf

from keras_moe import distribution
from keras_moe.commands import devices
from keras_moe.distribution import launcher, lost_workers
from tests.distribution import children

# The worker whose number is in the script ends as it says, the other with 3 later.
SCRIPT = """
import json, os, signal, time
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
if index == {index}:
    {fault}
time.sleep(1)
raise SystemExit(3)
"""


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("fault", "status", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, r"was ended by signal 9 \(Kill"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", 3, "was stopped by a signal and did"),
        ("raise SystemExit(4)", 4, "failed with exit status 4"),
    ],
)
def test_launch_names_the_worker_that_is_to_blame(
    tmp_path, capsys, monkeypatch, index, fault, status, how
):
    assert signal.SIGKILL == 9
    # Nobody waits for one that is stopped.
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 3600)
    script = SCRIPT.format(index=index, fault=fault)
    assert distribution.launch(["-I", "-c", script], 2, tmp_path) == status
    said = capsys.readouterr().err
    where = r"in .*/worker_1\.log" if index else "above"
    pattern = rf"Worker {index} \(127\.0\.0\.1:\d+\) {how}.* output is {where}\.\n"
    assert re.fullmatch(pattern, said), said


def test_launch_says_nothing_where_all_end_well(tmp_path, capsys):
    assert launcher.run_workers(["-I", "-c", ""], 2, tmp_path) == (0, "")
    assert distribution.launch(["-I", "-c", ""], 2, tmp_path) == 0
    assert not capsys.readouterr().err


class Strategy:
    """As much of one as says who is who."""

    def __init__(self, addresses, own=0, job="worker"):
        self.cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(addresses), task_type=job, task_id=own
        )


HOSTS = [f"host-{i}:5001" for i in range(3)]
# As TensorFlow 2.20 says it, of which most is left out.
UNHEALTHY = """Graph execution error:

Detected at node CollectiveReduceV2 defined at (most recent call last):
  File "/job/train.py", line 18, in <module>

Collective ops is aborted by: Error reported from /job:worker/task:1: The following \
tasks are unhealthy (stopped sending heartbeats):
/job:worker/replica:0/task:1
{more}The tasks have crashed. Check the task logs for an earlier error, or scheduler \
events (e.g. preemption, eviction) to debug further.
"""
RESET = """Collective ops is aborted by: recvmsg:Connection reset by peer
Additional GRPC error information from remote target /job:worker/replica:0/task:0 \
while calling /tensorflow.WorkerService/CompleteInstance:
"""
HEARTBEAT = """Collective ops is aborted by: Deadline Exceeded

RPC: /tensorflow.CoordinationService/Heartbeat
"""


@pytest.mark.parametrize(
    ("message", "own", "lost"),
    [
        (UNHEALTHY.format(more=""), 0, [1]),
        (UNHEALTHY.format(more="/job:worker/replica:0/task:2\n"), 0, [1, 2]),
        (RESET, 1, [0]),
        (HEARTBEAT, 2, [0]),
    ],
)
def test_the_worker_that_tensorflow_names(message, own, lost):
    error = tf.errors.UnavailableError(None, None, message)
    found = lost_workers.describe(error, Strategy({"worker": HOSTS}, own))
    named = "; ".join(
        f"Worker {i} ({HOSTS[i]}) ended, or does not answer" for i in lost
    )
    assert found == f"{named}. Its output says why. (Worker {own} says so.)"


def test_a_chief_keeps_the_list_where_there_is_one():
    error = tf.errors.DeadlineExceededError(None, None, HEARTBEAT)
    strategy = Strategy({"chief": HOSTS[:1], "worker": HOSTS[1:]})
    assert lost_workers.describe(error, strategy).startswith("Chief 0 (host-0:5001)")


def test_a_worker_that_tensorflow_does_not_name_is_looked_for(monkeypatch):
    monkeypatch.setattr(lost_workers, "_PROBE_SECONDS", 0.2)
    silent = socket.create_server(("127.0.0.1", 0))
    alive = tf.distribute.Server(
        {"local": [f"127.0.0.1:{children.free_ports(1)[0]}"]}, job_name="local"
    )
    addresses = [
        "127.0.0.1:1",  # its own
        alive.target.removeprefix("grpc://"),
        f"127.0.0.1:{silent.getsockname()[1]}",
        f"127.0.0.1:{children.free_ports(1)[0]}",
    ]
    error = tf.errors.DeadlineExceededError(None, None, "Collective has timed out.")
    found = lost_workers.describe(error, Strategy({"worker": addresses}))
    silent.close()
    assert found == (
        f"Worker 2 ({addresses[2]}) does not answer: it is stopped, or its host cannot "
        f"be reached; Worker 3 ({addresses[3]}) takes no connections: it ended. Its "
        "output says why. (Worker 0 says so.)"
    )


@pytest.mark.parametrize(
    ("error", "strategy"),
    [
        (tf.errors.UnavailableError(None, None, RESET), None),
        (
            tf.errors.UnavailableError(None, None, RESET),
            Strategy({"worker": HOSTS[:1]}),
        ),
        (
            tf.errors.ResourceExhaustedError(None, None, RESET),
            Strategy({"worker": HOSTS}),
        ),
        (ValueError(RESET), Strategy({"worker": HOSTS})),
    ],
)
def test_other_errors_are_left_alone(error, strategy):
    assert lost_workers.describe(error, strategy) is None


def test_a_command_says_it_in_one_line():
    error = tf.errors.UnavailableError(None, None, RESET)
    expected = (
        r"Worker 0 \(host-0:5001\) ended.* The same command goes on from the last"
    )

    def run():
        with devices.lost_workers_named(Strategy({"worker": HOSTS}, 1)):
            raise error

    with pytest.raises(ValueError, match=expected):
        run()


def test_other_errors_pass_a_command():
    error = tf.errors.UnavailableError(None, None, "something else")

    def run():
        with devices.lost_workers_named(None):
            raise error

    with pytest.raises(tf.errors.UnavailableError, match="something else"):
        run()
