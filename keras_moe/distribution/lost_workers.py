"""Which worker was lost, when TensorFlow says that an exchange failed."""

import re
import socket
from typing import Any

import tensorflow as tf

_TASK = re.compile(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)")
# What TensorFlow 2.20 says of a worker without heartbeats, and of a broken connection.
_UNHEALTHY = re.compile(r"tasks are unhealthy[^\n]*\n((?:\s*/job:\S+\s*\n?)+)")
_REMOTE = re.compile(r"from remote target (\S+)")
# The first task keeps the list of those that are well.
_COORDINATION = "tensorflow.CoordinationService/"
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
)
# How an HTTP/2 client begins, to which a server that runs answers: a preface, and
# settings of none.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_PROBE_SECONDS = 5.0


def describe(error: Exception, strategy: Any) -> str | None:
    """Which worker was lost, in a sentence or two.

    Args:
        error: What a step, or another exchange of the workers, raised.
        strategy: That of the model.

    Returns:
        Str; None unless the strategy has several workers and TensorFlow says that an
        exchange failed.
    """
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or not isinstance(error, _LOST):
        return None
    cluster = resolver.cluster_spec().as_dict()
    own = (resolver.task_type, resolver.task_id)
    tasks = {
        (job, index): address
        for job, addresses in cluster.items()
        for index, address in enumerate(addresses)
        if (job, index) != own
    }
    if not tasks:
        return None
    lost = [task for task in _named(str(error), cluster) if task in tasks]
    states = {task: "ended, or does not answer" for task in lost}
    if not states:
        found = {task: _state(address) for task, address in tasks.items()}
        states = {task: state for task, state in found.items() if state is not None}
    if not states:
        return None
    listed = "; ".join(
        f"{job.capitalize()} {index} ({tasks[job, index]}) {state}"
        for (job, index), state in sorted(states.items())
    )
    job, index = own
    return f"{listed}. Its output says why. ({job.capitalize()} {index} says so.)"


def _named(message, cluster):
    """The tasks of which TensorFlow says that they are lost."""
    found = _UNHEALTHY.search(message) or _REMOTE.search(message)
    if found:
        return [(job, int(index)) for job, index in _TASK.findall(found[1])]
    if _COORDINATION in message:
        return [("chief" if "chief" in cluster else "worker", 0)]
    return []


def _state(address):
    """What is wrong with a server of TensorFlow; None if it answers."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 1.0) as connection:
            connection.settimeout(_PROBE_SECONDS)
            connection.sendall(_HELLO)
            return None if connection.recv(1) else "closes connections: it ends"
    except ConnectionError:
        return "takes no connections: it ended"
    except OSError:
        return "does not answer: it is stopped, or its host cannot be reached"
