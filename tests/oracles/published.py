"""Blocks of published models as their formulas say, one token at a time, in float64.

Tensors stand in a dict by their published names, `(out, in)`.
"""

import numpy as np

from tests.oracles.experts import silu


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def mixtral_block(x, tensors, block, k=2):
    """Jiang et al. 2024, section 2.1."""
    layer = f"model.layers.{block}.block_sparse_moe"

    def expert(e, token):
        w1, w2, w3 = (
            tensors[f"{layer}.experts.{e}.w{i}.weight"].astype(np.float64)
            for i in (1, 2, 3)
        )
        return w2 @ (silu(w1 @ token) * (w3 @ token))

    rows = []
    for token in np.asarray(x, np.float64):
        logits = tensors[f"{layer}.gate.weight"].astype(np.float64) @ token
        chosen = np.argsort(-logits)[:k]
        gates = softmax(logits[chosen])
        rows.append(
            sum(g * expert(e, token) for g, e in zip(gates, chosen, strict=True))
        )
    return np.array(rows)


def switch_block(x, tensors, layer):
    """Fedus et al. 2022, equations 1 and 2, without a capacity."""
    rows = []
    for token in np.asarray(x, np.float64):
        probabilities = softmax(
            tensors[f"{layer}.mlp.router.classifier.weight"].astype(np.float64) @ token
        )
        e = int(np.argmax(probabilities))
        wi, wo = (
            tensors[f"{layer}.mlp.experts.expert_{e}.{w}.weight"].astype(np.float64)
            for w in ("wi", "wo")
        )
        rows.append(probabilities[e] * (wo @ np.maximum(wi @ token, 0.0)))
    return np.array(rows)
