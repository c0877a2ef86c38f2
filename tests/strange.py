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
    "partial_maximum": Case(  # the gradient of `max=` into some elements of an older version
        """
        def partial_maximum(m[e], dst[e], base[n], b[k]) -> Y[n]:
            Y[n] = 2 * base[n]
            Y[dst[e]] max= m[e]
            for i in 0:3:  Y[i+1] max= b[i]
            for i in 0:2:  Y[i] min= b[i]
        """,
        {"m": (7,), "dst": (7,), "base": (5,), "b": (3,)},
        ints={"dst": (0, 5)},
    ),
    "partial_product": Case(
        """
        def partial_product(m[e,d], dst[e], base[n,d], b[k]) -> Y[n,d]:
            Y[n,d] = 2 * base[n,d]
            Y[dst[e],d] *= m[e,d]
            for i in 0:3, d in 0:2:  Y[i+1,d] *= b[i]
        """,
        {"m": (7, 2), "dst": (7,), "base": (5, 2), "b": (3,)},
        ints={"dst": (0, 4)},
    ),
    "mixed_updates": Case(  # a sum, a maximum and a write of one version: each takes what stands there
        """
        def mixed_updates(x[n], p[e], v[e]) -> Y[n]:
            Y[i] = x[i]
            Y[p[e]] += v[e]
            Y[p[e]] max= 0.5 * v[e]
            for i in 1:3:  Y[i] = x[i] ** 2
            Y[p[e]] += v[e] ** 2
        """,
        {"x": (5,), "p": (6,), "v": (6,)},
        ints={"p": (0, 5)},
    ),
    "kept_states": Case(  # every step overwrites what the gradient needs
        """
        def kept_states(X[t,i], A[i,j]) -> Y[t,i], p[i]:
            for ordered t:
                for i:  s[i] += X[t,i] * s[i] + 1
                for i:  p[i] *= X[t,i]
                for i, j:  Y[t,i] += A[i,j] * s[j] ** 2
        """,
        {"X": (4, 2), "A": (2, 2)},
    ),
    "update_after_steps": Case(  # the gradient of the loop read what had been written after it
        """
        def update_after_steps(x[n], b[m]) -> T[n]:
            for ordered k in 0:5:  T[k] = T[pad(k-2)] * sin(x[k]) + x[k]
            for k in 0:2:  T[k+1] += b[k]
        """,
        {"x": (5,), "b": (3,)},
    ),
    "update_of_steps": Case(  # a sum of its own, equal to what a step adds to an older value, was taken for that value
        """
        def update_of_steps(x[i], y[j]) -> T1[j], T2[k]:
            T1[j] = y[j]
            for reversed k in 0:2:  T2[k] = tanh(T2[pad(k+1)] + prod[i](1 + 0.3 * tanh(x[i]) + 0.1 * x[i]))
        """,
        {"x": (4,), "y": (3,)},
    ),
    "no_steps": Case(  # what only a step makes was deleted after a loop without steps
        """
        def no_steps(A[n,m], y[m], z[p]) -> T0, T1:
            T0[k] = z[k] * A[1,1]
            for ordered k in 0:0:  T1[k] = 0.5 * T1[pad(k-2)] + erf(prod[j](1 + 0.3 * tanh(y[j]) + 0.1 * y[j]))
        """,
        {"A": (4, 5), "y": (5,), "z": (3,)},
    ),
    "versions_of_a_step": Case(  # a sum of a step at computed places, and its next version, in the second derivative
        "def f(B[m,p], z[p]) -> T1[j]: for ordered j in 0:1:  T1[j] = 0.5 * T1[pad(j-1)] + prod[k](1 + 0.3 * tanh(B[k,(k+1)%1]) + 0.1 * z[k])",
        {"B": (1, 1), "z": (1,)},
    ),
    "cholesky": Case(  # a statement of a step reads what another one of the step wrote of the same tensor
        """
        def cholesky(A[n,n]) -> L[n,n]:
            for ordered j in 0:size(A, 0):
                L[j,j] = sqrt(10 + A[j,j] - sum[k in 0:j](L[j,k] ** 2))
                for i in j+1:size(A, 0):  L[i,j] = (A[i,j] - sum[k in 0:j](L[i,k] * L[j,k])) / L[j,j]
        """,
        {"A": (5, 5)},
    ),
    "triangular_solve": Case(
        """
        def solve(U[n,n], b[n]) -> x[n]:
            for reversed i in 0:size(U, 0):
                x[i] = (b[i] - sum[j in i+1:size(U, 0)](U[i,j] * x[j])) / (2 + U[i,i] ** 2)
        """,
        {"U": (5, 5), "b": (5,)},
    ),
    "sizes_in_a_step": Case(  # the first write tells the size, whatever else is known sooner
        "for ordered t in 0:3:\n    B[t,k] = 0.5 * A[t,k]\n    S[k] += tanh(B[t,k])\n    S[1] += A[t,0]\nY[k] = S[k] ** 2", {"A": (3, 5)}
    ),
    "places_that_nothing_reaches": Case(  # code looked there all the same
        """
        def over_nothing(x[n], A[n,m]) -> T[n]:
            T[i] = x[i]
            for i in 4:5, k in 0:0:  T[i+2] max= A[i,k] * x[9]
            for i in 4:5, k in 0:0:  T[i+2] += A[i+3,k] * x[i+1]
        """,
        {"x": (5,), "A": (5, 7)},
    ),
    "longer_each_step": Case(
        """
        def prefixes(x[n]) -> M[n]:
            M[i] = x[i]
            for ordered k in 0:size(x, 0):
                for i in 0:k:  M[i] = tanh(M[i] * x[k])
        """,
        {"x": (5,)},
    ),
    "elimination": Case(  # in place: its gradient needs what each step overwrites
        """
        def lu(A[n,n]) -> M[n,n]:
            M[i,j] = A[i,j] + where(i == j, 5, 0)
            for ordered k in 0:size(A, 0):
                for i in k+1:size(A, 0):  M[i,k] = M[i,k] / M[k,k]
                for i in k+1:size(A, 0), j in k+1:size(A, 0):  M[i,j] = M[i,j] - M[i,k] * M[k,j]
        """,
        {"A": (5, 5)},
    ),
    "turn_of_one": Case(  # a remainder by 1 does not move
        "Y[i,j] = A[i,j] * D[0-i,(j+1)%1] + B[clamp(p[j]+1),(i+1)%1]",
        {"A": (1, 5), "D": (1, 1), "B": (4, 1), "p": (5,)},
        ints={"p": (0, 4)},
    ),
    "turned_totals": Case(  # a C++ compiler lost terms
        "for i in 0:5, j in 0:7:  t += where(A[i,(j+5)%7] > z[0], 1.5, c)", {"A": (5, 7), "z": (3,), "c": ()}
    ),
    "beside_an_edge": Case(  # a pad was lost where an index turned into a remainder
        "def beside_an_edge(x[n], w[n]) -> T[n]: for i in 0:5:  T[i] += sin(x[pad(i-1)]) * x[(i+4)%5] * w[i]",
        {"x": (5,), "w": (5,)},
    ),
    "ties_of_numbers": Case(  # the minimum of a Python number lost digits in memory, among float64 tensors
        """
        T1 min= mean[j](A[4,j] * A[4,j] + 0.1 * y[j]) * min[i in 0:5](u) + z[k]
        T2[i,k] = 0 * (x[i] + z[k])
        for i in 0:4, k in 0:1:  T2[i,k] = minimum(x[i], 0.1 * i)
        T1 max= where(0.1 * j > 0, x[2], y[j]) + y[j]
        """,
        {"A": (5, 2), "x": (5,), "y": (2,), "z": (1,)},
        scalars={"u": 0.7},
    ),
    "newton": Case(
        """
        def newton(a[n], k) -> x[n]:
            x[i] = 1 + 0 * a[i]
            for ordered t in 0:k, i:  x[i] = 0.5 * (x[i] + a[i] / x[i])
        """,
        {"a": (4,)},
        scalars={"k": 3},
        positive=frozenset({"a"}),
    ),
    # -- places
    "tree": Case(  # a parent's row is read while a row is written
        "def tree(X[t,d], parent[t]) -> H[t,d]: for ordered t, d: H[t,d] = tanh(X[t,d] + H[pad(parent[t]),d])",
        {"X": (5, 2), "parent": (5,)},
        values={"parent": [-1, 0, 0, 2, 1]},
    ),
    "children": Case(
        "def children(X[t,d], c[t,j]) -> H[t,d]: for ordered t, d: H[t,d] = X[t,d] * X[t,0] + sum[j](sin(H[pad(c[t,j]),d]))",
        {"X": (5, 2), "c": (5, 2)},
        values={"c": [[-1, -1], [0, -1], [0, 1], [1, 2], [3, 0]]},
    ),
    "paged": Case(  # the scores have no size but that of the pages
        """
        def paged(C[p,k,d], page[b,m], len[b], q[b,d]) -> O[b,d]:
            for b, j in 0:len[b]:  m[b] max= sum[d](q[b,d] * C[page[b,j//2],j%2,d])
            for b, j in 0:len[b]:  z[b] += exp(sum[d](q[b,d] * C[page[b,j//2],j%2,d]) - m[b])
            for b, j in 0:len[b], e:  O[b,e] += exp(sum[d](q[b,d] * C[page[b,j//2],j%2,d]) - m[b]) / z[b] * C[page[b,j//2],j%2,e]
        """,
        {"C": (5, 2, 3), "page": (2, 3), "len": (2,), "q": (2, 3)},
        values={"len": [3, 6]},
        ints={"page": (0, 5)},
    ),
    "lengths_elsewhere": Case(  # the length of the inner range depends on an index that its terms do not have
        "Y[k,i] += sum[j in 0:len[i]](abs(0.1 * j) * y[j]) + x[i] + z[k]",
        {"len": (3,), "x": (3,), "y": (7,), "z": (2,)},
        ints={"len": (0, 8)},
    ),
    "short_diagonal": Case(  # the sum for the diagonal is shorter than the tensor that it is added to
        """
        def short_diagonal(B[n,n], C[n,n], len[i]) -> Y[i]:
            for i, j in 0:len[i]:  Y[i] += sin(B[j,j])
            for i in 0:2, k in 0:3:  Y[i] += C[1,k] * C[k,k]
        """,
        {"B": (5, 5), "C": (5, 5), "len": (3,)},
        ints={"len": (0, 6)},
    ),
    "padded_page": Case(  # the reference read `0 <= a if c else b < n` from the wrong end
        "def padded_page(p[n], x[m], N) -> Y[N]: for i in 0:6:  Y[pad(p[pad(i-1)])] += x[i]",
        {"p": (5,), "x": (6,)},
        ints={"p": (-1, 5)},
        scalars={"N": 4},
    ),
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
    "ties_of_products": Case(  # one kernel rounded a product before it was added to, another did not
        "T[k,j] min= maximum(softplus(0.1 * j - c), softmax[i](A[4-i,j] + x[i]) - 0.1 * k) + x[i] * y[j] + z[k] * x[i]",
        {"A": (5, 7), "x": (5,), "y": (7,), "z": (3,), "c": ()},
    ),
    "ties_of_functions": Case(  # torch's functions round in another way at the end of a vector
        """
        T0[k] = 2 - W[k,2] * y[1] + z[k]
        T1[j] += maximum(T0[k], -1.5) + y[j] + z[k]
        T2[i,k] max= softplus(where(j != 1 or k > 0, C[i,k], u)) + (x[i] * z[k] - softmax[j](T1[j] + y[j])) + y[j] + x[i] + z[k]
        """,
        {"C": (5, 3), "W": (3, 7), "x": (5,), "y": (7,), "z": (3,)},
        scalars={"u": 0.7},
    ),
    "ties_of_a_number": Case(  # a number over a tensor was a reciprocal and a product in one kernel, a quotient in another
        "T[j,i] min= (0.1 * j - C[4-i,k]) * B[clamp(j-1),k] * (u / (1.5 + W[k,j] ** 2)) + x[i] + y[j] + z[k]",
        {"B": (7, 3), "C": (5, 3), "W": (3, 7), "x": (5,), "y": (7,), "z": (3,)},
        scalars={"u": 0.7},
    ),
    "ties_of_lengths": Case(
        "for i, j in 0:len[i]:  T[i] max= tanh(A[i,j]) * x[i]", {"A": (4, 5), "len": (4,), "x": (4,)}, ints={"len": (1, 6)}
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
    "narrow_counts": Case(
        """
        def narrow_counts(p[e], x[e], N) -> a[N], b[N], c[N], d[N], f[N]:
            a[p[e]] += int8(1)
            b[p[e]] max= int16(x[e])
            c[p[e]] max= x[e] > 0
            d[p[e]] min= x[e] > 0
            f[p[e]] *= x[e] > 0
        """,
        {"p": (6,), "x": (6,)},
        ints={"p": (0, 4), "x": (-9, 9)},
        scalars={"N": 5},
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
    "rounded_to_int8": Case("s[i] = max[j](abs(A[i,j])) / 127; Y[i,j] = round(A[i,j] / s[i]) * s[i] + round(0.5 * j - 1) * A[i,j]", {"A": (5, 7)}),
    "softmax_of_itself": Case(  # of the older values, whatever has been written
        "T[i] = maximum(y[1], x[4-i]) + x[i]; T[i] = softmax[i](T[i] * x[i]) * T[i]", {"x": (5,), "y": (3,)}
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
    "scores_of_differences": Case(  # the second derivative has one sum twice, which C++ added up two times
        """
        def scores_of_differences(Q[h,i,d], K[h,j,d], V[h,j,e], slope[h]) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            P[h,i,j] = softmax[j](where(i >= j, S[h,i,j] + (j - i) * slope[h], -inf))
            O[h,i,e] += P[h,i,j] * V[h,j,e]
        """,
        {"Q": (2, 5, 3), "K": (2, 5, 3), "V": (2, 5, 2), "slope": (2,)},
    ),
    "compressed_rows": Case(  # the second derivative: a version without a size
        "def rows(off[m], X[n], x[k], B[b], col[n]) -> Y[b]: for b in 0:size(B, 0), j in off[b]:off[b+1]:  Y[b] += X[j] * x[col[j]]",
        {"off": (4,), "X": (9,), "x": (4,), "B": (3,), "col": (9,)},
        values={"off": [0, 2, 2, 9]},
        ints={"col": (0, 4)},
    ),
    "step_numbers": Case(  # the number of a step is no tensor
        """
        def step_numbers(W[k,j], x[i], e[n]) -> T[j,i], U[n]:
            for ordered j in 0:5, i:  T[j,i] = tanh(T[pad(j-1),i] + 0.1 * i - W[j//2,(j+3)%5] + W[clamp(j-3),j])
            for ordered n:  U[n] = U[pad(n-1)] + e[n]
        """,
        {"W": (3, 5), "x": (4,), "e": (0,)},
    ),
    "steps_of_a_tensor": Case(
        "def steps(X[t,i], n) -> H[t,i]: for ordered t in 1:n, i:  H[t,i] = X[t,i] * H[t-1,i] + 1", {"X": (4, 2), "n": ()}, values={"n": 3}
    ),
    "updates_of_one_step": Case(  # several sums of a step are one memory under several names, which C++ took for apart
        """
        def updates(y[j], x[i], B[j,k], c) -> T[k,j]:
            for reversed k in 0:3, j:  T[k,j] = T[pad(k+1),j] * sigmoid(prod[i](1 + 0.3 * tanh(y[j]) + 0.1 * x[i]) - where(k != 1 or j > 0, B[j,k], c)) + 0.1
        """,
        {"y": (7,), "x": (5,), "B": (7, 3), "c": ()},
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
