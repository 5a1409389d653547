"""Cross-entropy over a large vocabulary from a sample of it."""

import math

import tensorflow as tf

from keras_moe.functional import ops
from keras_moe.functional.full_softmax import normalizer


def unbiased_candidates(
    drawn: tf.Tensor, expected_counts: tf.Tensor, vocabulary_size: int
) -> tuple[tf.Tensor, tf.Tensor]:
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
    p = _log_uniform(rank, vocabulary_size)
    log_rest = tf.math.log1p(-p)
    # The number of tries is not reported; the rarest word tells it best.
    rarest = tf.argmax(rank)
    tries = tf.round(
        tf.math.log1p(-tf.minimum(expected_counts[rarest], 1 - 1e-6)) / log_rest[rarest]
    )
    others = tries - tries * p / expected_counts
    return drawn[:-1], -tf.math.expm1(others * log_rest)[:-1]


def log_uniform_candidates(
    uniform: tf.Tensor, num_sampled: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws different words from the log-uniform distribution, in static shapes.

    As TensorFlow's sampler, which XLA cannot compile, with `unbiased_candidates`. Word i
    arrives at time $-\\log(1 - u_i) / p_i$: the order of arrivals is that of draws without
    replacement. The first C words are the candidates, and a word is among them if it
    arrives before the C-th of the others, which for each of them is the time T of word
    C + 1: $q_i = 1 - e^{-p_i T}$. Sums weighted by 1 / q have no bias.

    Args:
        uniform: `(V,)` floating point within [0, 1), a random number for each word.
        num_sampled: Int, C, below V.

    Returns:
        candidates: `(C,)` int64, all different, in the order of their arrival.
        expected_counts: `(C,)`, of the type of `uniform`, within (0, 1].

    Reference:
        Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir"; Cohen
        and Kaplan 2007, "Summarizing data using bottom-k sketches".
    """
    vocabulary_size = uniform.shape[0]
    rank = tf.range(1, vocabulary_size + 1, dtype=uniform.dtype)
    p = _log_uniform(rank, vocabulary_size)
    arrivals = -tf.math.log1p(-uniform) / p
    first, words = tf.math.top_k(-arrivals, num_sampled + 1)
    candidates = tf.cast(words[:-1], tf.int64)
    counts = -tf.math.expm1(tf.gather(p, candidates) * first[-1])
    return candidates, counts


def _log_uniform(rank, vocabulary_size):
    """Chance of the word of a rank, from 1 on, in one draw."""
    total = tf.constant(math.log(vocabulary_size + 1), rank.dtype)
    return tf.math.log1p(1 / rank) / total


def sampled_cross_entropy(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor,
    targets: tf.Tensor,
    candidates: tf.Tensor,
    expected_counts: tf.Tensor,
) -> tf.Tensor:
    """Cross-entropy with the normalizer estimated from candidates.

    $L_n = \\log\\left(e^{s_{n,t_n}} +
    \\sum_{c \\in C, c \\ne t_n} e^{s_{n,c}} / q_c\\right) - s_{n,t_n}$ with
    scores $s = x W^T + b$, targets t, candidates C, and the expected number of times
    $q_c$ that c is drawn. The sum in the logarithm is an
    unbiased estimate of the full normalizer. With every word among the candidates
    and $q = 1$ this is the full cross-entropy.

    Only rows of the kernel that are targets or candidates are read (of a `tf.Variable`
    no copy is made), and get a gradient (`tf.IndexedSlices`).

    Args:
        inputs: `(N, D)` floating point.
        kernel: `(V, D)`, a row for each word, of the same type; tensor or variable.
        bias: `(V,)`, of the same type; tensor or variable.
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
    if not ops.values_are_here():  # on a mesh variables are read whole
        kernel, bias = tf.convert_to_tensor(kernel), tf.convert_to_tensor(bias)
    targets, candidates = tf.cast(targets, tf.int64), tf.cast(candidates, tf.int64)
    return cross_entropy_of_candidates(
        inputs,
        (tf.gather(kernel, targets), tf.gather(bias, targets)),
        (tf.gather(kernel, candidates), tf.gather(bias, candidates)),
        targets,
        candidates,
        expected_counts,
    )


def cross_entropy_of_candidates(
    inputs: tf.Tensor,
    target_rows: tuple[tf.Tensor, tf.Tensor],
    candidate_rows: tuple[tf.Tensor, tf.Tensor],
    targets: tf.Tensor,
    candidates: tf.Tensor,
    expected_counts: tf.Tensor,
) -> tf.Tensor:
    """As `sampled_cross_entropy`, of rows of the kernel that were looked up before.

    Args:
        inputs: `(N, D)` floating point.
        target_rows: `(N, D)` of the kernel and `(N,)` of the bias, of the same type.
        candidate_rows: `(C, D)` and `(C,)`, likewise.
        targets: `(N,)` ints.
        candidates: `(C,)` ints.
        expected_counts: `(C,)`, of the type of `inputs`, positive.

    Returns:
        `(N,)`, of the type of `inputs`.
    """
    targets, candidates = tf.cast(targets, tf.int64), tf.cast(candidates, tf.int64)
    rows, bias = target_rows
    target_scores = bias + tf.reduce_sum(inputs * rows, axis=-1)
    kernel, bias = candidate_rows
    bias = bias - tf.math.log(expected_counts)
    if ops.results_are_static():
        is_hit = targets[:, tf.newaxis] == candidates
        return _normalized_static(inputs, kernel, bias, target_scores, is_hit)
    return _normalized(
        inputs,
        kernel,
        bias,
        target_scores,
        tf.nn.compute_accidental_hits(targets[:, tf.newaxis], candidates, num_true=1)[
            :2
        ],
    )


def _normalized_static(inputs, kernel, bias, target_scores, is_hit):
    """As `_normalized`, for hits `(N, C)` bool, in operations that XLA fuses."""
    scores = tf.matmul(inputs, kernel, transpose_b=True) + bias
    lowest = tf.ones_like(scores) * tf.constant(-math.inf, scores.dtype)
    scores = tf.where(is_hit, lowest, scores)
    scores = tf.concat([target_scores[:, tf.newaxis], scores], axis=1)
    return tf.reduce_logsumexp(scores, axis=1) - target_scores


def _normalized(inputs, kernel, bias, target_scores, hits):
    """`log(exp(t) + sum(exp(x W^T + b))) - t` for each row, without the hits.

    The array of scores, `(N, C + 1)`, is by far the largest of a step. Here it is
    written by the product (bias and all), corrected in place, and its softmax gives
    loss and gradient; stock operations for the same pass over it ten times.

    Args:
        inputs: `(N, D)`.
        kernel: `(C, D)`, rows of the candidates.
        bias: `(C,)`.
        target_scores: `(N,)`.
        hits: Rows `(H,)` int32 and candidates `(H,)` int64 that are their targets.

    Returns:
        `(N,)`.
    """
    rows = tf.range(tf.shape(inputs)[0])
    # Column 0 is that of the target, whose score is added to 0.
    cells = tf.concat(
        [
            tf.stack([rows, tf.zeros_like(rows)], axis=1),
            tf.stack([hits[0], tf.cast(hits[1], tf.int32) + 1], axis=1),
        ],
        axis=0,
    )
    lowest = tf.fill(tf.shape(hits[0]), tf.constant(-math.inf, inputs.dtype))

    @tf.custom_gradient
    def run(inputs, kernel, bias, target_scores):
        rows_with_one = tf.pad(inputs, [[0, 0], [0, 1]], constant_values=1)
        weights = tf.concat([kernel, bias[:, tf.newaxis]], axis=1)
        weights = tf.pad(weights, [[1, 0], [0, 0]])
        scores = tf.matmul(rows_with_one, weights, transpose_b=True)
        scores = ops.add_at(scores, cells, tf.concat([target_scores, lowest], axis=0))
        # But for column 0 also the gradient of the scores: 0 for hits.
        softmax = tf.nn.softmax(scores)
        losses = normalizer(scores, softmax) - target_scores

        def grad(dy):
            # Column 0 meets weights of 0.
            d_inputs = tf.matmul(softmax, weights) * dy[:, tf.newaxis]
            d_weights = tf.matmul(
                softmax, rows_with_one * dy[:, tf.newaxis], transpose_a=True
            )
            return (
                d_inputs[:, :-1],
                d_weights[1:, :-1],
                d_weights[1:, -1],
                (softmax[:, 0] - 1) * dy,
            )

        return losses, grad

    return run(inputs, kernel, bias, target_scores)
