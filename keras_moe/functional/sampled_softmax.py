"""Cross-entropy over a large vocabulary from a sample of it."""

import math

import tensorflow as tf


def unbiased_candidates(drawn, expected_counts, vocabulary_size):
    """Candidates and counts that estimate a sum over the vocabulary without bias.

    TensorFlow's sampler draws from the log-uniform distribution until it has as
    many different words as asked for, and reports the chance of each to be among
    that many tries. But the last word ends the drawing and is always there, so
    sums weighted by these chances come out a few per cent wrong for small samples.
    Here one word more is drawn and the last left out. A word is then among the
    others if one of the L tries that were not its own repetitions drew it:
    $q = 1 - (1 - p)^L$ with $L = T - T p / q_T$, the tries T without the expected
    own ones.

    Args:
        drawn: `(C + 1,)` int64, all different, in the order they were drawn.
        expected_counts: `(C + 1,)` floating point, as the sampler reports them.
        vocabulary_size: Int, V.

    Returns:
        candidates: `(C,)` int64.
        expected_counts: `(C,)`, of the type of `expected_counts`.
    """
    dtype = expected_counts.dtype
    rank = tf.cast(drawn, dtype) + 1
    # log(1 - p) of p = log((rank + 1) / rank) / log(V + 1)
    p = tf.math.log1p(1 / rank) / tf.constant(math.log(vocabulary_size + 1), dtype)
    log_rest = tf.math.log1p(-p)
    # The number of tries is not reported; the rarest word tells it best.
    rarest = tf.argmax(rank)
    tries = tf.round(
        tf.math.log1p(-tf.minimum(expected_counts[rarest], 1 - 1e-6)) / log_rest[rarest]
    )
    others = tries - tries * p / expected_counts
    return drawn[:-1], -tf.math.expm1(others * log_rest)[:-1]


def sampled_cross_entropy(inputs, kernel, bias, targets, candidates, expected_counts):
    """Cross-entropy with the normalizer estimated from candidates.

    $L_n = \\log\\left(e^{s_{n,t_n}} +
    \\sum_{c \\in C, c \\ne t_n} e^{s_{n,c}} / q_c\\right) - s_{n,t_n}$ with
    scores $s = x W^T + b$, targets t, candidates C, and the expected number of times
    $q_c$ that c is drawn. The sum in the logarithm is an
    unbiased estimate of the full normalizer. With every word among the candidates
    and $q = 1$ this is the full cross-entropy.

    Only rows of the kernel that are targets or candidates are read, and get a
    gradient (`tf.IndexedSlices`).

    Args:
        inputs: `(N, D)` floating point.
        kernel: `(V, D)`, a row for each word, of the same type.
        bias: `(V,)`, of the same type.
        targets: `(N,)` ints below V.
        candidates: `(C,)` int64, shared by all rows.
        expected_counts: `(C,)`, of the type of `inputs`, positive.

    Returns:
        `(N,)`, of the type of `inputs`.

    Reference:
        Jozefowicz et al. 2016, section 3.1, "importance sampling"; used by
        Shazeer et al. 2017, appendix C.1.
        Where it departs: their correction is applied to the target's score too.
        The target is always there, so its expected count is 1 here, which makes
        the normalizer unbiased and the loss comparable with the full one.
    """
    kernel, bias = tf.convert_to_tensor(kernel), tf.convert_to_tensor(bias)
    targets = tf.cast(targets, tf.int64)[:, tf.newaxis]
    return tf.nn.sampled_softmax_loss(
        kernel,
        bias,
        targets,
        inputs,
        num_sampled=tf.size(candidates),
        num_classes=kernel.shape[0],
        sampled_values=(
            candidates,
            tf.ones_like(targets, inputs.dtype),
            expected_counts,
        ),
        remove_accidental_hits=True,
    )
