"""Fewer points of long curves: of each bucket the smallest and the largest value, so that spikes stay."""

from collections.abc import Sequence

import numpy as np


def kept(columns: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Indices of at most about `most` points, ascending. Each column (n) keeps its smallest and largest value of each
    bucket, values that are not finite among them, and all keep the first and the last point.
    """
    count = len(columns[0])
    if count <= most:
        return np.arange(count)
    width = -(-count // max(most // (2 * len(columns)), 1))
    buckets = -(-count // width)
    chosen = [np.array([0, count - 1])]
    for column in columns:
        padded = np.full(buckets * width, np.nan)
        padded[:count] = column
        rows, first = padded.reshape(buckets, width), np.arange(buckets) * width
        broken = ~np.isfinite(rows)
        lowest, highest = np.where(broken, np.inf, rows), np.where(broken, -np.inf, rows)
        present = np.arange(buckets * width).reshape(buckets, width) < count
        chosen += [lowest.argmin(axis=1) + first, highest.argmax(axis=1) + first]
        where = (broken & present).argmax(axis=1) + first
        chosen.append(where[(broken & present & np.isinf(rows)).any(axis=1)])
    found = np.unique(np.concatenate(chosen))
    return found[found < count]


def outliers(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of a heat map (layers, n) in at most `most` buckets: (first column of each bucket, of each layer the
    value in it that is farthest from the layer's median). A bucket without values is nan.
    """
    count = values.shape[1]
    width = max(-(-count // most), 1)
    first = np.arange(0, count, width)
    if width == 1:
        return first, values
    finite = np.where(np.isfinite(values), values, np.nan)
    medians = np.array([np.median(row[~np.isnan(row)]) if (~np.isnan(row)).any() else 0.0 for row in finite])
    padded = np.full((len(values), len(first) * width), np.nan)
    padded[:, :count] = finite
    buckets = padded.reshape(len(values), len(first), width)
    far = np.where(np.isnan(buckets), -1.0, np.abs(buckets - medians[:, None, None]))
    return first, np.take_along_axis(buckets, far.argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
