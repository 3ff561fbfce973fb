"""Residual add and norm in numba, for machines without a GPU: a row is read once and stays in the first-level cache.

Axes: m rows, d model width.
"""
# numba infers the types of what it compiles:
# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch
from torch import Tensor

from .cpu import kernel, numbers, run

# Rows per work item. Each item has its own partial sum of the weight's gradient.
ROWS = 32


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (m, d), residual (m, d), weight and bias (d), all contiguous, in fp32 but for x -> normed (m, d) in x's dtype,
    total (m, d) and stats (m, 2) in fp32: the mean to subtract (0 for RMS) and the scale to multiply by.
    """
    m, d = x.shape
    normed, total, stats = torch.empty(m, d), torch.empty(m, d), torch.empty(m, 2)
    added = torch.empty(0, d) if residual is None else residual
    shift = torch.zeros(d) if bias is None else bias
    arrays = [numbers(t) for t in (x.float(), added, weight, shift, normed, total, stats)]
    run(_forward, -(-m // ROWS), *arrays, kind == "layer", eps)
    return normed.to(x.dtype), total, stats


def backward(
    total: Tensor, weight: Tensor, stats: Tensor, dnormed: Tensor, dtotal: Tensor | None, kind: str, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx in dnormed's dtype (empty if that is fp32: dresidual is dx), and in fp32 dresidual (m, d), dweight (d), and
    dbias (d) or empty.
    """
    m, d = total.shape
    items = -(-m // ROWS)
    dresidual = torch.empty(m, d)
    dweight, dbias = torch.zeros(items, d), torch.zeros(items, d)
    added = torch.empty(0, d) if dtotal is None else dtotal
    arrays = [numbers(t) for t in (total, weight, stats, dnormed.float(), added, dresidual, dweight, dbias)]
    run(_backward, items, *arrays, kind == "layer")
    return (
        dnormed.new_empty(0) if dnormed.dtype == torch.float32 else dresidual.to(dnormed.dtype),
        dresidual,
        dweight.sum(0),
        dbias.sum(0) if has_bias else weight.new_empty(0),
    )


@kernel
def _forward(first, last, x, residual, weight, bias, normed, total, stats, layer, eps):
    """A `residual` without rows means that there is none."""
    m, d = x.shape
    for row in range(first * ROWS, min(last * ROWS, m)):
        x_row, total_row, normed_row = x[row], total[row], normed[row]
        if len(residual) > 0:
            residual_row = residual[row]
            for c in range(d):
                total_row[c] = x_row[c] + residual_row[c]
        else:
            for c in range(d):
                total_row[c] = x_row[c]
        mean = np.float32(0)
        if layer:
            for c in range(d):
                mean += total_row[c]
            mean /= np.float32(d)
        squares = np.float32(0)
        for c in range(d):
            centred = total_row[c] - mean
            squares += centred * centred
        scale = np.float32(1 / np.sqrt(squares / d + eps))
        for c in range(d):
            normed_row[c] = (total_row[c] - mean) * scale * weight[c] + bias[c]
        stats[row, 0], stats[row, 1] = mean, scale


@kernel
def _backward(first, last, total, weight, stats, dnormed, dtotal, dresidual, dweight, dbias, layer):
    """A `dtotal` without rows means that there is none. dweight and dbias (items, d) must be zero; the kernel adds."""
    m, d = total.shape
    for item in range(first, last):
        dweight_sum, dbias_sum = dweight[item], dbias[item]
        for row in range(item * ROWS, min((item + 1) * ROWS, m)):
            mean, scale = stats[row]
            total_row, dnormed_row, dresidual_row = total[row], dnormed[row], dresidual[row]
            along, across = np.float32(0), np.float32(0)
            for c in range(d):
                unit = (total_row[c] - mean) * scale
                dunit = dnormed_row[c] * weight[c]
                along += dunit * unit
                across += dunit
                dweight_sum[c] += dnormed_row[c] * unit
                dbias_sum[c] += dnormed_row[c]
            along /= np.float32(d)
            across = across / np.float32(d) if layer else np.float32(0)
            for c in range(d):
                unit = (total_row[c] - mean) * scale
                dresidual_row[c] = (dnormed_row[c] * weight[c] - along * unit - across) * scale
            if len(dtotal) > 0:
                dtotal_row = dtotal[row]
                for c in range(d):
                    dresidual_row[c] += dtotal_row[c]
