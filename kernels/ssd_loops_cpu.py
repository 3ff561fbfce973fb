"""The loops of the state-space-dual scan on a CPU: weights of tokens, products of small matrices, states of chunks.

Axes: k directions, b images, c chunks of q tokens, h heads, p channels of a head, n states; j is k, or 1 where all
directions read the same x, B and C; g groups of heads, whose gradients of B and C are separate sums.

Local matrices have rows of P or N numbers (p or n, up to a multiple of WIDTH) or of `pitch` (q, up to a multiple of
LANES). A product computes tiles of ROWS x WIDTH numbers in registers, or of ROWS x LANES where fewer columns are left;
rows and columns that pad a tile receive numbers that nothing reads.
"""
# numba infers the types of what it compiles:
# mypy: disable-error-code="no-untyped-def"

import numpy as np

from .cpu import inline, kernel, read_rows, sum_lanes, write_rows, zeros
from .simd import LANES, Variable, emitted, exp2

ROWS, VECTORS = 6, 4 if LANES == 16 else 2
WIDTH = VECTORS * LANES
_BLOCKED = np.float32(-1e9)
"""The logarithm of a decay of zero, for sums."""


def _tile(vectors):
    @emitted
    def tile(code, W, at, across, down, X, x_at, x_row, first, last, Y, y_at, y_row):
        """Y[r] += sum of W[r, i] X[i] over i in [first, last): ROWS rows of some vectors. W[r, i] is at `at + r across
        + i down`, X[i] at `x_at + i x_row`, Y[r] at `y_at + r y_row`.
        """
        rows, columns = range(ROWS), range(0, vectors * LANES, LANES)
        sums = [[Variable(Y[y_at + y_row * r + v]) for v in columns] for r in rows]
        with code.loop(first, last) as i:
            x = [X[x_at + i * x_row + v] for v in columns]
            for r in rows:
                weight = W.spread(at + across * r + i * down)
                for own, factor in zip(sums[r], x, strict=True):
                    own.set(factor.fma(weight, own.get()))
        for r in rows:
            for v, own in zip(columns, sums[r], strict=True):
                Y[y_at + y_row * r + v] = own.get()

    return tile


_wide, _narrow = _tile(VECTORS), _tile(1)


@kernel
def _multiply(W, at, across, down, X, first, last, Y, y_at, low, high):
    """Y's ROWS rows from y_at on, columns [low, high), plus the product of W's rows (see `_tile`) and X's. The columns
    are complete vectors.
    """
    column = low
    while column < high:
        start = y_at * Y.shape[1] + column
        if column + WIDTH <= high:
            _wide((W, at, across, down, X, column, X.shape[1], first, last, Y, start, Y.shape[1]))
            column += WIDTH
        else:
            _narrow((W, at, across, down, X, column, X.shape[1], first, last, Y, start, Y.shape[1]))
            column += LANES


# A row of decays is zero where the scan has not been yet, so that loops run over complete vectors: the triangle is
# never masked.


@emitted
def _weigh_row(code, W, at, G, scores_at, row, factor, first, last):
    """One more token: decay the row, and write its products with the scores."""
    with code.loop(first, last, LANES) as s:
        row[s] = row[s] * factor
        W[at + s] = G[scores_at + s] * row[s]


@emitted
def _unweigh_row(code, dW, from_at, G, dG, scores_at, row, dt, factor, W, products, at, first, last):
    """One token of the backward pass: its weights, the products of its decays' gradients, and its part of dG."""
    with code.loop(first, last, LANES) as s:
        decay = row[s] * factor
        row[s] = decay
        upstream, score, weight = dW[from_at + s], G[scores_at + s], decay * dt[s]
        W[at + s] = score * weight
        products[at + s] = upstream * score * decay
        dG[scores_at + s] = dG[scores_at + s] + upstream * weight


@emitted
def _cross_row(code, products, row_at, column, dt, sums, first, last):
    """Add a row of products to the sums of columns, and add up those that cross the token."""
    total = Variable(code.vector(0))
    with code.loop(first, last, LANES) as s:
        column[s] = column[s] + products[row_at + s]
        total.set(column[s].fma(dt[s], total.get()))
    sums[code.index(0)] = total.get()


@inline
def _padded(n, to):
    return -(-n // to) * to


@inline
def _tiled(n):
    """Rows that both products and transpositions may touch."""
    return max(_padded(n, ROWS), _padded(n, LANES))


@inline
def _span(t, back, count, pitch):
    """The columns, in complete vectors, that the tile of rows from t on reads of a row of weights, and the tokens."""
    if back:
        return t // LANES * LANES, pitch, t, count
    end = min(t + ROWS, count)
    return 0, _padded(end, LANES), 0, end


@emitted
def _scaled(code, rows, width, block, t, at, row, factors, scaled):
    """Read rows of `width` numbers, each times its factor, into rows of `block`."""
    with code.loop(0, rows) as i:
        factor = factors.spread(i)
        with code.loop(0, width, LANES) as n:
            scaled[i * block + n] = t.load(at + i * row + n, width - n) * factor


@emitted
def _exponentials(code, count, logs):
    with code.loop(0, count, LANES) as t:
        logs[t] = logs[t].below(-126, 0, exp2(logs[t]))


@kernel
def _across(decay, step, rate, back, count, entering, leaving):
    """The decay over a chunk of `count` tokens. Writes the decays of what enters it up to each token, and from each
    token to its end: exponentials of sums, as rounded decays, multiplied over thousands of tokens, would drift.
    """
    total, after = np.float32(0), np.float32(0)
    for i in range(count):
        t, from_end = (count - 1 - i, i) if back else (i, count - 1 - i)
        leaving[from_end] = after
        total += step[t] * rate if decay[t] > 0 else _BLOCKED
        after += step[from_end] * rate if decay[from_end] > 0 else _BLOCKED
        entering[t] = total
    _exponentials((count, entering))
    _exponentials((count, leaving))
    return entering[0 if back else count - 1]


@kernel
def _add_to_state(state, across, weighted, x, count, states):
    """state (n, P) across the chunk, plus the products of the weighted B and x."""
    for i in range(states):
        for v in range(state.shape[1]):
            state[i, v] *= across
    for i in range(0, states, ROWS):
        _multiply(weighted, i, 1, weighted.shape[1], x, 0, count, state, i, 0, state.shape[1])


@kernel
def forward(
    first, last, x, x_strides, B, B_strides, C, C_strides, G, decay, step, rates, D, initial, backwards, shape,
    with_states, y, final,
):  # fmt: skip
    """y (b, l, h, p), and the final states (k, b, h, p, n) unless that is empty. An item is a head of an image. G (j b
    c, q, pitch): the scores.
    """
    sets, length, p, n = shape
    directions, images, heads, chunks, q = decay.shape
    pitch, P, N = G.shape[2], _padded(p, WIDTH), _padded(n, WIDTH)
    rows, states, width = _tiled(q), _tiled(n), N + LANES
    X, W, row, sums = zeros(rows, P), zeros(ROWS, pitch), zeros(1, pitch), zeros(ROWS, P)
    entered, weighted, state = zeros(rows, width), zeros(rows, width), zeros(states, P)
    entering, leaving = zeros(1, pitch)[0], zeros(1, pitch)[0]
    flat_y = y.reshape(-1)
    for item in range(first, last):
        image, h = item // heads, item % heads
        for k in range(directions):
            j, back = min(k, sets - 1), backwards[k]
            for i in range(n):
                for v in range(p):
                    state[i, v] = initial[k, image, h, v, i] if len(initial) else np.float32(0)
            for i in range(chunks):
                c = chunks - 1 - i if back else i
                m, start = (j * images + image) * chunks + c, c * q
                count = min(q, length - start)
                d, dt = decay[k, image, h, c], step[k, image, h, c]
                x_at = j * x_strides[0] + image * x_strides[1] + start * x_strides[2] + h * x_strides[3]
                read_rows((count, p, P, x, x_at, x_strides[2], X))
                if with_states:
                    across = _across(d, dt, rates[k, h], back, count, entering, leaving)
                    at = j * C_strides[0] + (image * chunks + c) * C_strides[1]
                    _scaled((count, n, width, C, at, C_strides[2], entering, entered))
                row[:] = np.float32(0)
                tiles = -(-count // ROWS)
                for tile in range(tiles):
                    t0 = (tiles - 1 - tile if back else tile) * ROWS
                    end = min(t0 + ROWS, count)
                    low, high, begin, stop = _span(t0, back, count, pitch)
                    for r in range(end - t0):
                        t = end - 1 - r if back else t0 + r
                        _weigh_row((W, (t - t0) * pitch, G, (m * q + t) * pitch, row, d[t], low, high))
                        row[0, t] = dt[t]
                        W[t - t0, t] += G[m, t, t] * dt[t] + D[k, h]
                    y_at = ((image * length + start + t0) * heads + h) * p
                    sums[:] = np.float32(0)
                    if k > 0:
                        read_rows((end - t0, p, P, flat_y, y_at, heads * p, sums))
                    _multiply(W, 0, pitch, 1, X, begin, stop, sums, 0, 0, P)
                    if with_states:
                        _multiply(entered, t0 * width, width, 1, state, 0, n, sums, 0, 0, P)
                    write_rows((end - t0, p, P, sums, flat_y, y_at, heads * p))
                if with_states and (i < chunks - 1 or len(final)):
                    leaving[:q] *= dt
                    at = j * B_strides[0] + (image * chunks + c) * B_strides[1]
                    _scaled((count, n, width, B, at, B_strides[2], leaving, weighted))
                    _add_to_state(state, across, weighted, X, count, n)
            if len(final):
                for i in range(n):
                    for v in range(p):
                        final[k, image, h, v, i] = state[i, v]


@kernel
def _within(
    m, q, G, dG, d, dt, skip, back, count, p, X_T, DY, W, dW, products, row, column, steps, lanes, ddt, dlog
):  # fmt: skip
    """A chunk's weights W, and the gradients of what made them: adds to dG, writes ddt and the gradients of the
    logarithms of decays, and returns that of D.
    """
    pitch = G.shape[2]
    row[:] = np.float32(0)
    column[:] = np.float32(0)
    steps[0, :q] = dt
    trace = np.float32(0)
    tiles = -(-count // ROWS)
    for tile in range(tiles):
        t0 = (tiles - 1 - tile if back else tile) * ROWS
        end = min(t0 + ROWS, count)
        low, high, _, _ = _span(t0, back, count, pitch)
        for r in range(ROWS):
            dW[r, low:high] = np.float32(0)
        _multiply(DY, t0 * DY.shape[1], DY.shape[1], 1, X_T, 0, p, dW, 0, low, high)
        for r in range(end - t0):
            t = end - 1 - r if back else t0 + r
            at, from_at, scores_at = t * W.shape[1], (t - t0) * dW.shape[1], (m * q + t) * pitch
            _unweigh_row((dW, from_at, G, dG, scores_at, row, steps, d[t], W, products, at, low, high))
            row[0, t] = np.float32(1)
            diagonal = dW[t - t0, t]
            W[t, t] += G[m, t, t] * dt[t] + skip
            dG[m, t, t] += diagonal * dt[t]
            ddt[t] = diagonal * G[m, t, t]
            trace += diagonal
    # the decay of token t is a factor of all products from its side of it to the other
    for i in range(count):
        t = i if back else count - 1 - i
        edge = t // LANES * LANES
        low, high = (edge, pitch) if back else (0, edge + LANES)
        steps[0, t] = np.float32(0)
        _cross_row((products, t * W.shape[1], column, steps, lanes, low, high))
        dlog[t] = sum_lanes(lanes)
        ddt[t] += column[0, t]
    return trace


@emitted
def _transpose(code, rows, columns, block, t, pitch, turned):
    """Transpose rows of `block` numbers into rows of `pitch`, both up to a multiple of LANES."""
    with code.loop(0, rows, LANES) as r, code.loop(0, columns, LANES) as column:
        lines = [t[(r + i) * block + column] for i in range(LANES)]
        size = 1
        while size < LANES:  # swap the squares of that size that are beside the diagonal
            for i in range(LANES):
                if not i & size:
                    upper, lower = lines[i], lines[i + size]
                    lines[i] = upper.shuffle(lower, [n if not n & size else LANES + n - size for n in range(LANES)])
                    lines[i + size] = upper.shuffle(
                        lower, [n + size if not n & size else LANES + n for n in range(LANES)]
                    )
            size *= 2
        for i, line in enumerate(lines):
            turned[(column + i) * pitch + r] = line


@emitted
def _dot(code, count, left, right, lanes):
    """The lanes of a sum of `count` products, a multiple of LANES."""
    total = Variable(code.vector(0))
    with code.loop(0, count, LANES) as n:
        total.set(left[n].fma(right[n], total.get()))
    lanes[code.index(0)] = total.get()


@emitted
def _to_inputs(code, count, sums, at, decay, factor, t, t_at, dt, dt_at, lanes):
    """What B or C of a token receives through a state: adds to its gradient, and writes the lanes of the gradient of
    the logarithm of the decay between the token and the state.
    """
    total = Variable(code.vector(0))
    with code.loop(0, count, LANES) as n:
        upstream = sums[at + n] * decay
        dt.store(dt_at + n, upstream.fma(factor, dt.load(dt_at + n, count - n)), count - n)
        total.set(upstream.fma(t.load(t_at + n, count - n), total.get()))
    lanes[code.index(0)] = total.get()


@kernel
def backward(
    first, last, x, x_strides, B, B_strides, C, C_strides, dy, G, decay, step, rates, D, initial, backwards, shape,
    with_states, dfinal, dx, dx_strides, dG, dB, dC, ddt, dlog, dD, of_used, of_left, dacross, dinitial,
):  # fmt: skip
    """The gradients: dx (j, b, l, h, p); of the scores dG (g, j b c, q, pitch); what B and C receive through states, dB
    and dC (g, j b c, q, n); of dt and of the logarithms of decays inside chunks (k, b, h, c, q), and of D (k, b, h,
    c); of the logarithms of `entering`, `leaving` and `across`; dinitial (k, b, h, p, n). Those of states are empty
    unless there are states. An item is a group of heads of one of the j b sets of x, B and C, so that sums over heads
    have one order.
    """
    sets, length, p, n = shape
    directions, images, heads, chunks, q = decay.shape
    groups, pitch, P, N = len(dG), G.shape[2], _padded(p, WIDTH), _padded(n, WIDTH)
    rows, states, wide, width, span = _tiled(q), _tiled(n), pitch + LANES, N + LANES, max(P, N)
    X, DY, X_T, sums = zeros(rows, P), zeros(rows, P), zeros(P, wide), zeros(ROWS, span)
    W, products, dW = zeros(rows, wide), zeros(rows, wide), zeros(ROWS, wide)
    row, column, steps, lanes = zeros(1, pitch), zeros(1, pitch), zeros(1, pitch), zeros(1, LANES)
    entered, weighted, factors = zeros(rows, width), zeros(rows, width), zeros(1, pitch)[0]
    into, out_of = zeros(1, pitch)[0], zeros(1, pitch)[0]
    before, after, turned = zeros(chunks * states if with_states else 0, P), zeros(states, P), zeros(P, N)
    for item in range(first, last):
        group, s = item % groups, item // groups
        j, image = s // images, s % images
        dG[group, s * chunks : (s + 1) * chunks] = np.float32(0)
        if with_states:
            dB[group, s * chunks : (s + 1) * chunks] = np.float32(0)
            dC[group, s * chunks : (s + 1) * chunks] = np.float32(0)
        for h in range(heads * group // groups, heads * (group + 1) // groups):
            for k in range(directions):
                if sets > 1 and k != j:
                    continue
                back, x_at = backwards[k], j * x_strides[0] + image * x_strides[1] + h * x_strides[3]
                dx_image = j * dx_strides[0] + image * dx_strides[1] + h * dx_strides[3]
                if with_states:
                    for i in range(n):
                        for v in range(p):
                            before[i, v] = initial[k, image, h, v, i] if len(initial) else np.float32(0)
                            after[i, v] = dfinal[k, image, h, v, i] if len(dfinal) else np.float32(0)
                    for i in range(chunks - 1):
                        c = chunks - 1 - i if back else i
                        count = min(q, length - c * q)
                        read_rows((count, p, P, x, x_at + c * q * x_strides[2], x_strides[2], X))
                        at = j * B_strides[0] + (image * chunks + c) * B_strides[1]
                        across = _across(
                            decay[k, image, h, c], step[k, image, h, c], rates[k, h], back, count, into, out_of
                        )
                        factors[:q] = out_of[:q] * step[k, image, h, c]
                        _scaled((count, n, width, B, at, B_strides[2], factors, weighted))
                        state = before[(i + 1) * states : (i + 2) * states]
                        state[:] = before[i * states : (i + 1) * states]
                        _add_to_state(state, across, weighted, X, count, n)
                for i in range(chunks - 1, -1, -1):
                    c = chunks - 1 - i if back else i
                    m, start = s * chunks + c, c * q
                    count = min(q, length - start)
                    dt = step[k, image, h, c]
                    read_rows((count, p, P, x, x_at + start * x_strides[2], x_strides[2], X))
                    read_rows((count, p, P, dy, ((image * length + start) * heads + h) * p, heads * p, DY))
                    _transpose((count, p, P, X, wide, X_T))
                    dD[k, image, h, c] = _within(
                        m, q, G, dG[group], decay[k, image, h, c], dt, D[k, h], back, count, p, X_T, DY, W, dW,
                        products, row, column, steps, lanes, ddt[k, image, h, c], dlog[k, image, h, c],
                    )  # fmt: skip
                    if with_states:
                        across = _across(
                            decay[k, image, h, c], step[k, image, h, c], rates[k, h], back, count, into, out_of
                        )
                        C_at = j * C_strides[0] + (image * chunks + c) * C_strides[1]
                        B_at = j * B_strides[0] + (image * chunks + c) * B_strides[1]
                        factors[:q] = out_of[:q] * dt
                        _scaled((count, n, width, C, C_at, C_strides[2], into, entered))
                        _scaled((count, n, width, B, B_at, B_strides[2], factors, weighted))
                        state = before[i * states : (i + 1) * states]
                        _dot((n * P, state, after, lanes))
                        dacross[k, image, h, c] = sum_lanes(lanes) * across
                    for t0 in range(0, count, ROWS):
                        end = min(t0 + ROWS, count)
                        begin, stop = (0, end) if back else (t0, count)
                        dx_at = dx_image + (start + t0) * dx_strides[2]
                        sums[:] = np.float32(0)
                        if sets == 1 and k > 0:
                            read_rows((end - t0, p, span, dx, dx_at, dx_strides[2], sums))
                        _multiply(W, t0, 1, W.shape[1], DY, begin, stop, sums, 0, 0, P)
                        if with_states:
                            _multiply(weighted, t0 * width, width, 1, after, 0, n, sums, 0, 0, P)
                        write_rows((end - t0, p, span, sums, dx, dx_at, dx_strides[2]))
                    if with_states:
                        _transpose((n, p, P, state, N, turned))
                        for t0 in range(0, count, ROWS):
                            sums[:] = np.float32(0)
                            _multiply(DY, t0 * P, P, 1, turned, 0, p, sums, 0, 0, N)
                            for t in range(t0, min(t0 + ROWS, count)):
                                at, dC_at = C_at + t * C_strides[2], ((group * dC.shape[1] + m) * q + t) * n
                                _to_inputs((n, sums, (t - t0) * span, into[t], np.float32(1), C, at, dC, dC_at, lanes))
                                of_used[k, image, h, c, t] = sum_lanes(lanes)
                        _transpose((n, p, P, after, N, turned))
                        for t0 in range(0, count, ROWS):
                            sums[:] = np.float32(0)
                            _multiply(X, t0 * P, P, 1, turned, 0, p, sums, 0, 0, N)
                            for t in range(t0, min(t0 + ROWS, count)):
                                at, dB_at = B_at + t * B_strides[2], ((group * dB.shape[1] + m) * q + t) * n
                                _to_inputs((n, sums, (t - t0) * span, out_of[t], dt[t], B, at, dB, dB_at, lanes))
                                of_left[k, image, h, c, t] = sum_lanes(lanes)
                        if i > 0 or len(dinitial):
                            _add_to_state(after, across, entered, DY, count, n)
                if len(dinitial):
                    for i in range(n):
                        for v in range(p):
                            dinitial[k, image, h, v, i] = after[i, v]
