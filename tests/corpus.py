"""Programs over the whole grammar, with shapes to run them on: NAME -> Case. Sizes are small, odd and mostly different from each other."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """text: the program. shapes: per tensor parameter. ints: integer parameters, with values in [lo, hi). scalars: Python numbers.

    positive: float parameters that must be above zero (logarithms, roots). values: integer parameters given in full.
    """

    text: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ints: dict[str, tuple[int, int]] = field(default_factory=dict)
    scalars: dict[str, float | int] = field(default_factory=dict)
    positive: frozenset[str] = frozenset()
    values: dict[str, list[int]] = field(default_factory=dict)


CORPUS: dict[str, Case] = {
    # -- contractions
    "lecture": Case("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]", {"A": (2, 5, 3), "B": (2, 7, 3)}),
    "matmul": Case("C[i,j] += A[i,k] * B[k,j]", {"A": (5, 3), "B": (3, 7)}),
    "matvec": Case("y[i] += A[i,k] * x[k]", {"A": (5, 3), "x": (3,)}),
    "dot": Case("s += x[i] * y[i]", {"x": (7,), "y": (7,)}),
    "outer": Case("Y[i,j] = x[i] * y[j]", {"x": (5,), "y": (3,)}),
    "trace": Case("t += A[i,i]", {"A": (5, 5)}),
    "diagonal": Case("d[i] = A[i,i]", {"A": (5, 5)}),
    "make_diagonal": Case("def make_diagonal(d[n]) -> D[n,n]: D[i,i] = d[i]", {"d": (5,)}),
    "transpose": Case("B[j,i] = A[i,j]", {"A": (5, 3)}),
    "gram": Case("G[i,j] += A[i,k] * A[j,k]", {"A": (5, 3)}),
    "three": Case("Y[i,l] += A[i,j] * B[j,k] * C[k,l]", {"A": (3, 5), "B": (5, 7), "C": (7, 2)}),
    "bilinear": Case("y[b] += x[b,i] * W[i,j] * z[b,j]", {"x": (3, 5), "W": (5, 7), "z": (3, 7)}),
    "tucker": Case("T[i,j,k] += G[p,q,r] * A[i,p] * B[j,q] * C[k,r]", {"G": (2, 3, 2), "A": (5, 2), "B": (3, 3), "C": (7, 2)}),
    "batched": Case("Y[b,h,i,j] += A[b,h,i,k] * B[b,h,k,j]", {"A": (2, 3, 5, 3), "B": (2, 3, 3, 7)}),
    "row_sum": Case("s[i] += A[i,j]", {"A": (5, 7)}),
    "total": Case("s += A[i,j]", {"A": (5, 7)}),
    "product": Case("p[i] *= A[i,j]", {"A": (5, 3)}),
    "row_max": Case("m[i] max= A[i,j]", {"A": (5, 7)}),
    "row_min": Case("m[i] min= A[i,j]", {"A": (5, 7)}),
    "max_plus": Case("C[i,j] max= A[i,k] + B[k,j]", {"A": (5, 3), "B": (3, 7)}),
    "sqdist": Case("D[i,j] += (X[i,k] - Y[j,k]) ** 2", {"X": (5, 3), "Y": (7, 3)}),
    "square_power": Case("Y[i,j] += A[i,k] * B[j,k] ** 2", {"A": (5, 3), "B": (7, 3)}),
    "broadcast_add": Case("Y[i,j] = A[i,j] + b[j]", {"A": (5, 7), "b": (7,)}),
    # -- layers
    "linear": Case(
        """
        def linear(X[n,k], W[m,k], b[m]) -> Y[n,m]:
            Z[n,m] += X[n,k] * W[m,k]
            Y[n,m] = gelu(Z[n,m] + b[m])
        """,
        {"X": (5, 3), "W": (7, 3), "b": (7,)},
    ),
    "residual": Case(
        "Z[n,m] += X[n,k] * W[k,m]; Y[n,m] = relu(Z[n,m] + b[m]) + R[n,m]", {"X": (5, 3), "W": (3, 7), "b": (7,), "R": (5, 7)}
    ),
    "rewriting": Case("Y[i,j] += A[i,k] * B[k,j]\nY[i,j] = Y[i,j] + c[j]\nY[i,j] = tanh(Y[i,j])", {"A": (5, 3), "B": (3, 7), "c": (7,)}),
    "accumulate_twice": Case("Y[i] += A[i,k]\nY[i] += B[i,k]", {"A": (5, 3), "B": (5, 7)}),
    "old_version": Case("Y[i] = 2 * x[i]\nZ[i] = Y[i] + 1\nY[i] = Y[i] * Z[i]", {"x": (5,)}),
    "rewrite_input": Case("def step(w[i], g[i], lr) -> w: w[i] = w[i] - lr * g[i]", {"w": (5,), "g": (5,)}, scalars={"lr": 0.1}),
    "partial_write": Case("def set_head(x[n], y[m]) -> x[n]: for i in 0:3:  x[i] = y[i]", {"x": (5,), "y": (3,)}),
    "swiglu": Case(
        "G[n,f] += X[n,d] * W[d,f]; U[n,f] += X[n,d] * V[d,f]; H[n,f] = silu(G[n,f]) * U[n,f]; Y[n,d] += H[n,f] * O[f,d]",
        {"X": (3, 5), "W": (5, 7), "V": (5, 7), "O": (7, 5)},
    ),
    "kernel_sum": Case("D[i,j] += (x[i,k] - y[j,k]) ** 2; O[i,d] += exp(-D[i,j]) * b[j,d]", {"x": (5, 3), "y": (7, 3), "b": (7, 2)}),
    # -- softmax and norms
    "softmax": Case("P[i,j] = softmax[j](X[i,j])", {"X": (5, 7)}),
    "softmax_two": Case("P[b,i,j] = softmax[i, j](X[b,i,j])", {"X": (2, 3, 5)}),
    "softmax_by_hand": Case("m[i] max= X[i,j]; E[i,j] = exp(X[i,j] - m[i]); s[i] += E[i,j]; P[i,j] = E[i,j] / s[i]", {"X": (5, 7)}),
    "softmax_stopped": Case(
        "m[i] max= X[i,j]; E[i,j] = exp(X[i,j] - stop_gradient(m[i])); s[i] += E[i,j]; P[i,j] = E[i,j] / s[i]", {"X": (5, 7)}
    ),
    "softmax_base_two": Case(
        "m[i] max= X[i,j]; s[i] += exp2(1.4426950408889634 * (X[i,j] - m[i])); P[i,j] = exp2(1.4426950408889634 * (X[i,j] - m[i])) / s[i]",
        {"X": (5, 7)},
    ),
    "log_softmax": Case("L[i,j] = X[i,j] - logsumexp[k](X[i,k])", {"X": (5, 7)}),
    "cross_entropy": Case(
        """
        def cross_entropy(X[n,d], W[v,d], t[n]) -> loss:
            Z[n,v] += X[n,d] * W[v,d]
            L[n] = logsumexp[v](Z[n,v]) - Z[n,t[n]]
            loss += L[n] / size(X, 0)
        """,
        {"X": (5, 3), "W": (7, 3), "t": (5,)},
        ints={"t": (0, 7)},
    ),
    "layernorm": Case(
        """
        def layernorm(X[n,d], g[d], b[d]) -> Y[n,d]:
            Y[n,d] = (X[n,d] - mean[e](X[n,e])) * rsqrt(var[e](X[n,e]) + 1e-05) * g[d] + b[d]
        """,
        {"X": (5, 7), "g": (7,), "b": (7,)},
    ),
    "layernorm_by_hand": Case(
        """
        def layernorm(X[n,d], g[d], b[d], eps) -> Y:
            M[n] += X[n,d] / size(X, 1)
            V[n] += (X[n,d] - M[n]) ** 2 / size(X, 1)
            Y[n,d] = (X[n,d] - M[n]) / sqrt(V[n] + eps) * g[d] + b[d]
        """,
        {"X": (5, 7), "g": (7,), "b": (7,)},
        scalars={"eps": 1e-5},
    ),
    "rmsnorm": Case("Y[n,d] = X[n,d] * rsqrt(mean[e](X[n,e] ** 2) + 1e-06) * g[d]", {"X": (5, 7), "g": (7,)}),
    "rmsnorm_by_hand": Case("S[n] += X[n,d] * X[n,d]\nY[n,d] = X[n,d] / sqrt(S[n] / size(X, 1) + 1e-6)", {"X": (5, 7)}),
    "standardise": Case("Y[i] = (x[i] - mean[j](x[j])) / sqrt(var[j](x[j]))", {"x": (7,)}),
    # -- attention
    "attention": Case(
        """
        def attention(Q[h,i,d], K[h,j,d], V[h,j,e], scale) -> O[h,i,e]:                  # with a signature
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            P[h,i,j]  = softmax[j](scale * S[h,i,j])
            O[h,i,e] += P[h,i,j] * V[h,j,e]
        """,
        {"Q": (2, 5, 3), "K": (2, 7, 3), "V": (2, 7, 4)},
        scalars={"scale": 0.5},
    ),
    "attention_bare": Case(
        "S[h,i,j] += Q[h,i,d] * K[h,j,d]; P[h,i,j] = softmax[j](S[h,i,j]); O[h,i,e] += P[h,i,j] * V[h,j,e]",
        {"Q": (2, 5, 3), "K": (2, 7, 3), "V": (2, 7, 4)},
    ),
    "attention_causal": Case(
        """
        def causal(Q[h,i,d], K[h,j,d], V[h,j,e], scale) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            P[h,i,j] = softmax[j](where(j <= i, scale * S[h,i,j], -inf))
            O[h,i,e] += P[h,i,j] * V[h,j,e]
        """,
        {"Q": (2, 5, 3), "K": (2, 7, 3), "V": (2, 7, 4)},
        scalars={"scale": 0.5},
    ),
    "attention_window": Case(
        """
        def window(Q[h,i,d], K[h,j,d], V[h,j,e], bias[h], w) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            T[h,i,j] = 30.0 * tanh(S[h,i,j] / 30.0) - bias[h] * abs(i - j)
            P[h,i,j] = softmax[j](where(j <= i and i - j < w, T[h,i,j], -inf))
            O[h,i,e] += P[h,i,j] * V[h,j,e]
        """,
        {"Q": (2, 5, 3), "K": (2, 7, 3), "V": (2, 7, 4), "bias": (2,)},
        scalars={"w": 3},
    ),
    "attention_grouped": Case(
        """
        def grouped(Q[h,i,d], K[g,j,d], V[g,j,e], n) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h//n,j,d]
            P[h,i,j] = softmax[j](S[h,i,j])
            O[h,i,e] += P[h,i,j] * V[h//n,j,e]
        """,
        {"Q": (4, 5, 3), "K": (2, 7, 3), "V": (2, 7, 4)},
        scalars={"n": 2},
    ),
    # -- masks, index values, casts
    "causal_mask": Case("Y[i,j] = where(j <= i, A[i,j], 0.0)", {"A": (5, 7)}),
    "triangle": Case("s[i] += where(j < i and not j == 0 or i == 2, A[i,j], -A[i,j])", {"A": (5, 7)}),
    "positions": Case("Y[i,j] = A[i,j] + 0.5 * i - j", {"A": (5, 3)}),
    "alternate": Case("Y[i] = x[i] * where(i % 2 == 0, 1, -1)", {"x": (7,)}),
    "casts": Case("Y[i] = float64(bool(x[i] > 0)) + float32(int32(3.5 * x[i])) / 2", {"x": (5,)}),
    "integers": Case("c[i] += int64(a[i,j] // 3 + a[i,j] % 3)", {"a": (5, 7)}, ints={"a": (-9, 9)}),
    "bits": Case("b[i] = bitwise_xor(bitwise_and(a[i], 6), left_shift(a[i], 1))", {"a": (5,)}, ints={"a": (0, 9)}),
    "booleans": Case("Y[i] = where(isnan(x[i]) or x[i] != x[i], True, x[i] >= 0)", {"x": (5,)}),
    "unary_minus": Case("Y[i] = -x[i] ** 2 + (-x[i]) ** 2 - -1 * 2 ** -1", {"x": (5,)}),
    "functions": Case(
        "Y[i] = sigmoid(x[i]) + softplus(x[i]) * erf(x[i]) - log1p(abs(x[i])) + maximum(x[i], 0.1) * minimum(sin(x[i]), cos(x[i]))",
        {"x": (5,)},
    ),
    "logarithms": Case("Y[i] = log(x[i]) + log2(x[i]) * sqrt(x[i]) - rsqrt(x[i]) + expm1(x[i])", {"x": (5,)}, positive=frozenset({"x"})),
    # -- reductions inside expressions
    "centred": Case("Y[i,j] = X[i,j] - sum[j](X[i,j]) / size(X, 1)", {"X": (5, 7)}),
    "nested": Case("Y[i] = max[j](X[i,j] + sum[k](W[j,k] * x[k]))", {"X": (5, 7), "W": (7, 3), "x": (3,)}),
    "hiding": Case("Y[i] = x[i] * sum[i](x[i])", {"x": (5,)}),
    "init": Case("def prefix_max(X[n,m]) -> Y[n]: Y[i] = max[j in 0:i](X[i,j], init=-1.5)", {"X": (5, 7)}),
    "argmax": Case("a[i] = argmax[j](X[i,j]); b[i] = argmin[j](X[i,j])", {"X": (5, 7)}),
    "pick_argmax": Case("a[i] = argmax[j](X[i,j]); Y[i] = X[i,a[i]]", {"X": (5, 7)}),
    "spread": Case("Y[i] = max[j](X[i,j]) - min[j](X[i,j]) + prod[j](X[i,j])", {"X": (5, 3)}),
    "reduce_two": Case("y[b] = sum[i, j](X[b,i,j] ** 2)", {"X": (2, 3, 5)}),
    # -- affine subscripts, ranges, edges
    "conv": Case("Y[n,x] += X[n,x+r] * W[r]", {"X": (2, 11), "W": (3,)}),
    "conv_strided": Case("Y[n,o,x] += X[n,c,2*x+r-1+1] * W[o,c,r]", {"X": (2, 3, 11), "W": (2, 3, 3)}),
    "conv_padded": Case("for x in 0:7:  Y[x] += X[pad(x+r-1)] * W[r]", {"X": (7,), "W": (3,)}),
    "conv_same": Case("Y[x] += X[pad(x+r-1, 1, 1)] * W[r]", {"X": (7,), "W": (3,)}),
    "conv2d": Case("Y[n,o,y,x] += X[n,c,y+r,x+q] * W[o,c,r,q]", {"X": (2, 3, 7, 5), "W": (2, 3, 3, 2)}),
    "conv_dilated": Case("Y[x] += X[x+2*r] * W[r]", {"X": (11,), "W": (3,)}),
    "blur": Case("Y[i] = (X[clamp(i-1)] + X[i] + X[clamp(i+1)]) / 3", {"X": (7,)}),
    "difference": Case("def difference(x[n]) -> d[n-1]: for i in 0:size(x, 0)-1:  d[i] = x[i+1] - x[i]", {"x": (7,)}),
    "shift": Case("def shift(X[i]) -> Y[i]: Y[i] = X[pad(i-2)]", {"X": (7,)}),
    "flip": Case("Y[i] = X[size(X,0)-1-i] + 0 * X[i]", {"X": (7,)}),
    "pool": Case("Y[i] max= X[2*i+r] + 0 * w[r]", {"X": (11,), "w": (3,)}),
    "upsample": Case("def upsample(x[n]) -> Y[2*n]: for i in 0:2*size(x, 0):  Y[i] = x[i//2]", {"x": (5,)}),
    "concatenate": Case(
        "def concatenate(a[n], b[m]) -> Y[n+m]:\n    for i in 0:size(a, 0):  Y[i] = a[i]\n    Y[j+size(a, 0)] = b[j]",
        {"a": (5,), "b": (3,)},
    ),
    "block": Case(
        "for i, j in 0:3:\n    S[i] += A[i,j]\n    for k in 1:size(B, 1):\n        T[i,j] += B[i,k]\nY[i] = S[i] + T[i,0]",
        {"A": (5, 3), "B": (5, 7)},
    ),
    "constant_fill": Case("def fill(n, m) -> Y[n,m]: for i in 0:n, j in 0:m:  Y[i,j] = 1.5", scalars={"n": 5, "m": 3}),
    "iota": Case("def iota(n) -> Y[n]: for i in 0:n:  Y[i] = i", scalars={"n": 5}),
    "scatter_padded": Case("def spill(x[n]) -> Y[n]: Y[pad(i+1)] = x[i]", {"x": (5,)}),
    # -- gather, scatter, ragged
    "gather": Case("Y[b,t,d] = E[ids[b,t],d]", {"E": (7, 3), "ids": (2, 5)}, ints={"ids": (0, 7)}),
    "scatter": Case(
        "def count(dst[e], m[e,d], N) -> Y[N,d]: Y[dst[e],d] += m[e,d]", {"dst": (7,), "m": (7, 3)}, ints={"dst": (0, 5)}, scalars={"N": 5}
    ),
    "scatter_max": Case(
        "def top(dst[e], m[e], base[n]) -> Y[n]:\n    Y[n] = base[n]\n    Y[dst[e]] max= m[e]",
        {"dst": (7,), "m": (7,), "base": (5,)},
        ints={"dst": (0, 5)},
    ),
    "graph": Case(
        "def graph(src[e], dst[e], X[n,d], W[d,f]) -> Y[n,f]:\n    H[n,f] += X[n,d] * W[d,f]\n    Y[dst[e],f] += H[src[e],f]",
        {"src": (7,), "dst": (7,), "X": (5, 3), "W": (3, 2)},
        ints={"src": (0, 5), "dst": (0, 5)},
    ),
    "ragged": Case(
        "for b, j in 0:len[b]:  Y[b] += X[off[b]+j]",
        {"len": (3,), "off": (3,), "X": (9,)},
        values={"len": [2, 0, 5], "off": [0, 2, 3]},
        ints={"len": (0, 5), "off": (0, 4)},
    ),
    "ragged_softmax": Case(
        """
        for b, j in 0:len[b]:  m[b] max= X[off[b]+j]
        for b, j in 0:len[b]:  s[b] += exp(X[off[b]+j] - m[b])
        L[b] = m[b] + log(s[b])
        """,
        {"len": (3,), "off": (3,), "X": (9,)},
        values={"len": [2, 1, 5], "off": [0, 2, 3]},
        ints={"len": (1, 5), "off": (0, 4)},
    ),
    "permute": Case(
        "def permute(p[i], x[i]) -> Y[i]: Y[p[i]] = x[i]", {"p": (5,), "x": (5,)}, values={"p": [3, 0, 4, 1, 2]}, ints={"p": (0, 5)}
    ),
    # -- recurrences
    "cumulative": Case("for ordered t, b:  Y[b,t] = Y[b,pad(t-1)] + X[b,t]", {"X": (3, 7)}),
    "suffix": Case("for reversed t, b:  Y[b,t] = 0.5 * Y[b,pad(t+1)] + X[b,t]", {"X": (3, 7)}),
    "rnn": Case("for ordered t, b, i: H[b,t,i] = tanh(X[b,t,i] + sum[j](W[i,j] * H[b,pad(t-1),j]))", {"X": (2, 5, 3), "W": (3, 3)}),
    "lstm": Case(
        """
        def lstm(X[b,t,g,k], W[g,k,j]) -> h[b,t,k]:
            for ordered t:
                for b, g, k:  z[b,t,g,k] = X[b,t,g,k] + sum[j](W[g,k,j] * h[b,pad(t-1),j])
                for b, k:
                    c[b,t,k] = sigmoid(z[b,t,0,k]) * c[b,pad(t-1),k] + sigmoid(z[b,t,1,k]) * tanh(z[b,t,2,k])
                    h[b,t,k] = sigmoid(z[b,t,3,k]) * tanh(c[b,t,k])
        """,
        {"X": (2, 5, 4, 3), "W": (4, 3, 3)},
    ),
    "two_orders": Case(
        """
        for ordered i in 1:size(A, 0), ordered j in 1:size(A, 1):  P[i,j] = A[i,j] + maximum(P[i-1,j], P[i,j-1])
        Y[i,j] = P[i,j] + 0 * A[i,j]
        """,
        {"A": (5, 3)},
    ),
    "horner": Case("for ordered k:  p[k,i] = p[pad(k-1),i] * x[i] + c[k]", {"x": (5,), "c": (3,)}),
    # -- names, scalars, sizes
    "dotted": Case("A.grad[i,k] += Y.grad[i,j] * B[k,j]", {"Y.grad": (5, 7), "B": (3, 7)}),
    "scalars": Case("Y[i] = alpha * x[i] + beta", {"x": (5,)}, scalars={"alpha": 2.0, "beta": -1}),
    "zero_d": Case("n += x[i] ** 2; Y[i] = x[i] / sqrt(n)", {"x": (5,)}),
    "only_scalars": Case("z = a * b + 1", scalars={"a": 2.0, "b": 3.0}),
    "square_header": Case("def square(A[n,n], x[n]) -> y[n]: y[i] += A[i,j] * x[j]", {"A": (5, 5), "x": (5,)}),
    "agree_by_name": Case("def agree(x[n], y[n]) -> a, b:\n    a += x[i]\n    b += y[i]", {"x": (5,), "y": (5,)}),
    "two_results": Case("def two(A[i,j]) -> m[i], s:\n    m[i] max= A[i,j]\n    s += A[i,j]", {"A": (5, 3)}),
    "measured": Case("def measured(x[n], y[m]) -> Y: Y[i] = x[i] * size(y, 0)", {"x": (5,), "y": (3,)}),
    "unused": Case("def unused(x[n], y[m,n], s) -> Y[n]: Y[i] = 2 * x[i]", {"x": (5,), "y": (3, 5)}, scalars={"s": 1.0}),
    "infinite": Case("m[i] = maximum(x[i], -inf) + 1e+30 / inf", {"x": (5,)}),
}
