"""Recall@k: the share of queries that find an item of their own label among the k nearest, by cosine similarity.

Every item is a query against all others; an item whose label no other item has is nobody's match and is left out as a
query (it still stands in the way of others). An item as near as the best match counts as nearer, so an embedding that
maps everything to one point scores 0, not 1. Higher is better.
"""

import datasets
import evaluate
import numpy as np

# Similarities held at a time: 16 MiB of float32, whatever the number of items.
_SIMILARITIES = 2**22


class RecallAtK(evaluate.Metric):
    """
    Args:
        predictions (`list` of `list` of `float`): embedding of each item, all of one width; held as float32. Lengths do
            not matter, but must be above 0.
        references (`list` of `int`): class or instance label of each item; any integers. `evaluate` truncates floats.
        k (`int`): how many neighbours to look at, from 1 (the default) to the number of items - 1.

    Returns:
        recall_at_k (`float`): in [0, 1].

    Raises:
        ValueError: no items, no two items of one label, embeddings of different widths, an embedding with a NaN or
            infinite entry or of length 0, or k out of range.

    Example:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> recall_at_k = evaluate.load(path("recall_at_k"))
        >>> embeddings = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]]
        >>> recall_at_k.compute(predictions=embeddings, references=[0, 0, 1, 1])
        {'recall_at_k': 0.75}
        >>> recall_at_k.compute(predictions=embeddings, references=[0, 0, 1, 1], k=3)
        {'recall_at_k': 1.0}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="H. Oh Song, Y. Xiang, S. Jegelka, S. Savarese: "
            "Deep Metric Learning via Lifted Structured Feature Embedding. CVPR 2016, arXiv 1511.06452.",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, k=1):
        directions, labels = _directions(predictions, references)
        items = len(labels)
        if not (1 <= k < items and k == int(k)):
            raise ValueError(f"k={k}, but it must be an integer from 1 to {items - 1}, the number of other items.")
        rows = max(1, _SIMILARITIES // items)
        found = queries = 0
        for start in range(0, items, rows):
            similarity = directions[start : start + rows] @ directions.T
            other = labels[start : start + rows, None] != labels
            match = ~other
            match[np.arange(len(match)), np.arange(start, start + len(match))] = False  # nobody finds themselves
            best = similarity.max(axis=1, where=match, initial=-np.inf, keepdims=True)
            nearer = (other & (similarity >= best)).sum(axis=1)  # at least as near as the best match
            is_query = match.any(axis=1)
            found += (is_query & (nearer < k)).sum()
            queries += is_query.sum()
        if queries == 0:
            raise ValueError(f"no two of the {items} items have one label, so there is nothing to retrieve.")
        return {"recall_at_k": float(found / queries)}


def _directions(predictions, references):
    """(directions, labels): [n, width] float32 of length 1 and [n] int; ValueError where these are undefined."""
    labels = np.asarray(references)
    if labels.size == 0:
        raise ValueError("got no items, so the metric is undefined: pass at least two of one label.")
    if labels.dtype.kind not in "iu":
        raise ValueError("references hold missing or non-integer values: pass an integer label for every item.")
    try:
        embeddings = np.asarray(predictions, dtype=np.float32)
    except ValueError as error:
        widths = sorted({np.size(row) for row in predictions})
        raise ValueError(f"embeddings have widths {widths}: all must have one.") from error
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = ~((lengths > 0) & (lengths < np.inf))  # NaN compares false
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"the embedding of item {first} has length {lengths[first, 0]}; cosine similarity needs a finite length "
            "above 0, without NaN or missing entries."
        )
    return embeddings / lengths, labels
