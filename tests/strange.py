"""Programs that something got wrong once, made small: NAME -> Case. The comment says what was wrong, or what is strange about it."""

from __future__ import annotations

from tests.corpus import Case

STRANGE: dict[str, Case] = {
    # -- versions of a tensor: their order, sizes and dtypes
    "update_between": Case(  # a kernel with the whole write of U moved behind the write of its diagonal
        """
        def update_between(A[i,j], B[i,j], c[i]) -> Z[i,j], T[i,j]:
            T[i,j] = exp(A[i,j])
            U[i,j] = T[i,j] * B[i,j]
            U[i,i] += c[i]
            Z[i,j] = U[i,j] + T[i,j]
        """,
        {"A": (5, 5), "B": (5, 5), "c": (5,)},
    ),
    "update_between_rows": Case(
        """
        def update_between_rows(A[i,j], B[i,j], c[i]) -> Z[i,j], T[i]:
            T[i] += exp(A[i,j])
            U[i,j] = T[i] * B[i,j]
            for i in 0:2:  U[i,i+1] += c[i]
            Z[i,j] = U[i,j] + T[i]
        """,
        {"A": (5, 5), "B": (5, 5), "c": (5,)},
    ),
    "contrastive": Case(  # the diagonal again, in the second derivative; and a Python number that lost digits among float64 tensors
        """
        n[i] += X[i,d] ** 2
        m[j] += Y[j,d] ** 2
        S[i,j] += X[i,d] * Y[j,d]
        C[i,j] = S[i,j] / sqrt(n[i] * m[j])
        L[i] = logsumexp[j](C[i,j] / tau) - C[i,i] / tau
        """,
        {"X": (5, 3), "Y": (5, 3)},
        scalars={"tau": 0.7},
    ),
    "older_settles": Case(  # the part that is added knows only from the older version how long i is
        "def older_settles(x[n], y[m], z[p]) -> T[m,n]:\n    T[j,i] = x[i] * y[j]\n    T[j,i] += y[j] + z[k]",
        {"x": (5,), "y": (7,), "z": (3,)},
    ),
    "one_by_one": Case(  # a version of an output has the size that the signature gives the output
        """
        def one_by_one(x[n]) -> Y[n]:
            Y[i] = x[i]
            for i in 1:3:  Y[i] = 2 * x[i]
            for i in 2:5:  Y[i] += x[i-2]
        """,
        {"x": (7,)},
    ),
    "versions_crossed": Case(
        """
        def versions_crossed(x[n]) -> Y[n], Z[n]:
            Y[i] = x[i]
            Z[i] = Y[i] * Y[i]
            for i in 1:3:  Y[i] = 2 * Z[i]
            Z[i] += Y[i]
        """,
        {"x": (7,)},
    ),
    "block_diagonal": Case(  # the zeros that `=` writes into a cotangent reached beyond the block
        """
        def block_diagonal(A[n,n], B[m,m]) -> Y[n+m,n+m]:
            for i in 0:size(A, 0), j in 0:size(A, 1):  Y[i,j] = A[i,j]
            Y[i+size(A, 0),j+size(A, 0)] = B[i,j]
        """,
        {"A": (2, 2), "B": (3, 3)},
    ),
    "stacked_squared": Case(
        """
        def stacked_squared(a[n,d], b[m,d]) -> Y[n+m,d]:
            for i in 0:size(a, 0):  Y[i,d] = a[i,d]
            Y[i+size(a, 0),d] = b[i,d]
            Y[i,d] = Y[i,d] * Y[i,d]
        """,
        {"a": (5, 3), "b": (2, 3)},
    ),
    "all_operators": Case(
        "Y[i] = x[i]; Y[i] += A[i,j]; Y[i] *= 2.0; Y[i] max= B[i,j]; Y[i] min= 3.0", {"x": (5,), "A": (5, 7), "B": (5, 3)}
    ),
    "filled_then_added": Case("for i in 0:5: Y[i] = 1.0\nY[j] += x[j]", {"x": (5,)}),
    "input_twice": Case("x[i] = x[i] * 2\ny[i] = x[i] + 1\nx[i] = y[i] * x[i]\nz += x[i]", {"x": (5,)}),
    # -- places
    "trace_of_powers": Case("Y[i,j] += A[i,k] * A[k,j]; Z[i,j] += Y[i,k] * Y[k,j]; t += Z[i,i]", {"A": (4, 4)}),
    "one_place": Case("def one_place(i0, x[n]) -> y: y = x[i0] * 2", {"x": (5,)}, scalars={"i0": 3}),  # wrote into the argument
    "fixed_places": Case("Y[i] = x[0] * x[i] + x[1]; s = Y[0] * Y[2]", {"x": (5,)}),
    "settled_by_target": Case(  # the gradient of a product: k is settled by what is written alone
        "Y[j] = prod[k](1 + 0.3 * tanh(y[clamp(j-2)] * W[2-k,clamp(j+1)]) + B[j,k])", {"y": (7,), "W": (3, 7), "B": (7, 3)}
    ),
    "product_of_products": Case(  # kernels that wait for each other
        "t = prod[k](prod[j](W[pad(k-1),j]) * W[k,2])", {"W": (3, 7)}
    ),
    "walked_target": Case(  # the gradient of B: a loop over the places that are written was missing
        """
        def walked_target(B[m,p], x[n], y[m], z[p]) -> T[p,n], U[p,m]:
            U[k,j] = y[j] + z[k]
            T[k,i] max= B[pad(j-1),k] + x[i] + y[j] + z[k]
        """,
        {"B": (7, 3), "x": (5,), "y": (7,), "z": (3,)},
    ),
    "ties_of_quotients": Case(  # one kernel divided, another multiplied by the reciprocal, so that no term equalled the maximum
        "T[k] max= sin(D[i,i]) * (y[6-j] / (1.5 + (0.1 * k) ** 2)) + x[i] + y[j] + z[k]", {"D": (5, 5), "x": (5,), "y": (7,), "z": (3,)}
    ),
    "shift_by_scalar": Case("def shift_by_scalar(k, x[n]) -> Y[n]: Y[i] = x[pad(i-k)] + x[clamp(i+k)]", {"x": (7,)}, scalars={"k": 2}),
    "roll": Case("def roll(x[n]) -> Y[n]: Y[i] = x[(i+2) % size(x, 0)]", {"x": (7,)}),
    "unroll": Case("def unroll(x[n], y[n]) -> Y[n]: Y[(i+2) % size(x, 0)] = x[i] * y[i]", {"x": (7,), "y": (7,)}),
    "fold": Case("def fold(X[n,r]) -> Y[n+2]: Y[i+r] += X[i,r]", {"X": (7, 3)}),
    "transposed_convolution": Case("def transposed(X[n], W[r]) -> Y[2*n+1]: Y[2*i+r] += X[i] * W[r]", {"X": (5,), "W": (3,)}),
    "interleave": Case("def interleave(a[n], b[n]) -> Y[2*n]:\n    Y[2*i] = a[i]\n    Y[2*i+1] = b[i]", {"a": (5,), "b": (5,)}),
    "neighbours": Case(
        """
        def neighbours(A[n,m]) -> Y[n,m], Z[n,m]:
            B[i,j] = A[i,j] * A[i,j]
            Y[i,j] = B[i,pad(j-1)] + B[pad(i+1),j]
            Z[i,j] = B[clamp(i-1),clamp(j+1)] * Y[i,j]
        """,
        {"A": (5, 7)},
    ),
    "rotary": Case(
        """
        def rotary(X[t,d], f[h]) -> Y[t,d]:
            for t, h:  Y[t,2*h] = X[t,2*h] * cos(t * f[h]) - X[t,2*h+1] * sin(t * f[h])
            for t, h:  Y[t,2*h+1] = X[t,2*h] * sin(t * f[h]) + X[t,2*h+1] * cos(t * f[h])
        """,
        {"X": (5, 6), "f": (3,)},
    ),
    "pool_two": Case(
        "def pool(X[c,y,x]) -> Y: for c, y in 0:size(X, 1)//2, x in 0:size(X, 2)//2, r in 0:2, q in 0:2:  Y[c,y,x] max= X[c,2*y+r,2*x+q]",
        {"X": (3, 6, 4)},
    ),
    "gather_twice": Case("Y[i] = E[F[ids[i]],1]", {"E": (5, 3), "F": (7,), "ids": (4,)}, ints={"F": (0, 5), "ids": (0, 7)}),
    "gather_pairs": Case("Y[i] = A[ids[i],jds[i]] + A[ids[i],i]", {"A": (5, 4), "ids": (4,), "jds": (4,)}, ints={"ids": (0, 5), "jds": (0, 4)}),
    "scatter_after": Case(
        """
        def scatter_after(dst[e], w[e], X[n,d]) -> Y[n,d]:
            M[e,d] = w[e] * X[dst[e],d]
            Y[dst[e],d] += tanh(M[e,d])
            Y[n,d] = Y[n,d] / 2
        """,
        {"dst": (7,), "w": (7,), "X": (5, 3)},
        ints={"dst": (0, 5)},
    ),
    "segment_softmax": Case(
        """
        def segment_softmax(s[e], x[e], V) -> P[e]:
            E[e] = exp(x[e])
            for v in 0:V:  Z[v] = 0.0
            Z[s[e]] += E[e]
            P[e] = E[e] / Z[s[e]]
        """,
        {"s": (9,), "x": (9,)},
        ints={"s": (0, 4)},
        scalars={"V": 4},
    ),
    "experts": Case(
        "def experts(X[n,d], g[n], W[e,d,f]) -> Y[n,f]: Y[n,f] += X[n,d] * W[g[n],d,f]",
        {"X": (5, 3), "g": (5,), "W": (4, 3, 2)},
        ints={"g": (0, 4)},
    ),
    # -- conditions and reductions inside expressions
    "where_in_max": Case(  # the reference read `a if c else b if best is None ..` from the wrong end
        "Y[k] = max[i in 0:5](where(D[i,i] > 0, D[i,i], A[pad(i-1),1])) + z[k]", {"D": (5, 5), "A": (5, 7), "z": (3,)}
    ),
    "many_conditions": Case(  # a comparison of two scalars took the operands' dtype in the interpreter
        "Y[i] += where(D[i,j] > E[i,j] and 4 >= i and -i + 4 < 5, x[i], 0)", {"D": (40, 40), "E": (40, 40), "x": (40,)}
    ),
    "softmax_in_softmax": Case(  # what is compared for equality was made a second time, a little differently
        "T[j] min= softmax[i](softmax[k](y[j] + z[k]) + x[i])", {"x": (5,), "y": (7,), "z": (3,)}
    ),
    "two_softmaxes": Case("Y[i,j] = softmax[i](A[i,j]) * softmax[j](A[i,j])", {"A": (5, 7)}),
    "nested_three": Case("Y[i] = x[i] + sum[j](A[i,j] * max[k](B[j,k] - x[i]))", {"x": (5,), "A": (5, 7), "B": (7, 3)}),
    "partial_ranges": Case("Y[i] = sum[j in 0:3](A[i,j]) + sum[j in 1:size(A, 1)-1](A[i,j] ** 2)", {"A": (5, 7)}),
    "inits": Case("Y[j] = max[i](A[i,j], init=0.0) + min[i](A[i,j], init=x[j])", {"A": (5, 7), "x": (7,)}),
    "compared_with_max": Case("m[i] max= A[i,j]; Y[i,j] = where(A[i,j] == m[i], A[i,j], 0)", {"A": (5, 7)}),
    "branches": Case("Y[i] = where(x[i] > 0, log(x[i]), sqrt(-x[i]))", {"x": (7,)}),
    "infinite_branch": Case("Y[i] = where(x[i] > 0, x[i], inf); m min= Y[i]", {"x": (7,)}),
    "mean_and_deviation": Case("mu = mean[i](x[i]); sd = sqrt(var[i](x[i])); Y[i] = (x[i] - mu) / sd", {"x": (7,)}),
    "sinkhorn": Case(
        "K[i,j] = exp(-abs(x[i] - y[j])); u[i] += K[i,j] * b[j]; v[i] = 1 / u[i]; w[j] += K[i,j] * v[i]; Y[i,j] = v[i] * K[i,j] / w[j]",
        {"x": (5,), "y": (7,), "b": (7,)},
        positive=frozenset({"b"}),
    ),
    # -- numbers, names, dtypes
    "float_division": Case("Y[i] = x[i] % 0.7 + (x[i] // 0.3)", {"x": (7,)}),  # Triton has no // of floats
    "integer_division": Case(
        "Y[i] = a[i] / b[i] + a[i] // b[i] - a[i] % b[i] + a[i] ** 2", {"a": (7,), "b": (7,)}, ints={"a": (-9, 9), "b": (1, 5)}
    ),
    "python_words": Case("A.grad[i] = B.grad[i] * 2; lambda[i] = A.grad[i] + class[i]", {"B.grad": (5,), "class": (5,)}),
    "module_names": Case("torch[i] = math[i] * run[i]; tl = torch[0] + pid", {"math": (5,), "run": (5,), "pid": ()}),
    "index_numbers": Case("Y[i,j] = sin(i * w[j]) + cos(j * 1.5)\nY[i,j] += x[i,j]", {"w": (3,), "x": (5, 3)}),
    "counts": Case("Y[i] += a[i,j] > 0; Z[i] max= a[i,j]; W[i] *= a[i,j]", {"a": (5, 3)}, ints={"a": (-4, 4)}),
    "truths": Case("c[i] max= x[i,j] > 0.5; d[i] min= x[i,j] > -0.5; e[i] *= x[i,j] > 0; f[i] += x[i,j] > 0", {"x": (5, 7)}),
    "powers": Case("Y[i,j] = x[i] ** 3 - x[j] ** -2 + 2.0 ** x[i]", {"x": (5,)}),
    "zero_d_inputs": Case("def f(x, y, v[n]) -> Y[n], z:\n    z = x * y\n    Y[i] = v[i] * z / x", {"x": (), "v": (5,)}, scalars={"y": 2.0}),
    "sign_and_stop": Case("Y[i] = where(y > 0, x[i], y * x[i]) * stop_gradient(x[i]) + sign(x[i])", {"x": (5,), "y": ()}),
}
