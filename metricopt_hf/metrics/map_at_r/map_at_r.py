"""MAP@R: how many of the R nearest items are of the query's label, and how early they come.

Every item is a query against all others, by cosine similarity. With R the number of other items of its label, its score
is the sum of the precisions at those of the R nearest places that hold one of them, divided by R: 1 when they stand
first, lower the later they come, and nothing for those behind place R. The mean over queries is returned. An item whose
label no other item has is left out as a query (it still stands in the way of others). Of items equally near, those of
another label count as nearer, so an embedding that maps everything to one point is not praised. Higher is better.
"""

import datasets
import evaluate
import numpy as np

# Similarities held at a time: 16 MiB of float32, whatever the number of items.
_SIMILARITIES = 2**22


class MapAtR(evaluate.Metric):
    """
    Args:
        predictions (`list` of `list` of `float`): embedding of each item, all of one width; held as float32. Lengths do
            not matter, but must be above 0.
        references (`list` of `int`): class or instance label of each item; any integers. `evaluate` truncates floats.

    Returns:
        map_at_r (`float`): in [0, 1].

    Raises:
        ValueError: no items, no two items of one label, embeddings of different widths, or an embedding with a NaN or
            infinite entry or of length 0.

    Example:
        >>> import evaluate
        >>> from metricopt_hf.metrics import path
        >>> map_at_r = evaluate.load(path("map_at_r"))
        >>> embeddings = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]]
        >>> map_at_r.compute(predictions=embeddings, references=[0, 0, 1, 1])
        {'map_at_r': 0.75}
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="K. Musgrave, S. Belongie, S.-N. Lim: "
            "A Metric Learning Reality Check. ECCV 2020, arXiv 2003.08505.",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        directions, labels = _directions(predictions, references)
        items = len(labels)
        rows = max(1, _SIMILARITIES // items)
        scores = []
        for start in range(0, items, rows):
            distances = -(directions[start : start + rows] @ directions.T)
            for query, distance in enumerate(distances, start):
                match = labels == labels[query]
                others = np.sort(distance[~match])
                match[query] = False  # nobody finds themselves
                mine = np.sort(distance[match])
                if mine.size == 0:
                    continue
                count = np.arange(1, mine.size + 1)
                place = count + np.searchsorted(others, mine, side="right")
                scores.append((count / place)[place <= mine.size].sum() / mine.size)
        if not scores:
            raise ValueError(f"no two of the {items} items have one label, so there is nothing to retrieve.")
        return {"map_at_r": float(np.mean(scores))}


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
