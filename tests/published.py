"""Programs that other systems publish, or that their users ask for, in this notation: NAME -> Case."""

from __future__ import annotations

from tests.corpus import Case

PUBLISHED: dict[str, Case] = {
    # -- images and signals
    "conv2d_pad": Case(
        "Y[n,o,x,y] += X[n,c,pad(2*x+r-1,1,1),pad(y+s-1,1,1)] * W[o,c,r,s]",
        {"X": (2, 3, 7, 5), "W": (2, 3, 3, 3)},
    ),
    "conv3d": Case(
        "Y[o,x,y,z] += X[c,x+r,y+s,2*z+2*t] * W[o,c,r,s,t]",
        {"X": (2, 4, 4, 7), "W": (2, 2, 2, 3, 2)},
    ),
    "clampblur2": Case(
        "def b(X[n,m]) -> Y[n,m]: for i, j, r in 0:3, s in 0:3: Y[i,j] += X[clamp(i+r-1),clamp(j+s-1)] / 9",
        {"X": (5, 4)},
    ),
    "box": Case(
        "def b(X[n,m]) -> Y[n,m]: for i, j, r in 0:3, s in 0:3: Y[i,j] += X[pad(i+r-1),pad(j+s-1)] / 9",
        {"X": (5, 4)},
    ),
    "mirror2": Case(
        "def mir(X[n], k) -> Y: for i in 0:size(X,0)+2*k: Y[i] = X[size(X,0)-1-maximum(size(X,0)-1-maximum(i-k,k-i), maximum(i-k,k-i)-size(X,0)+1)]",
        {"X": (5,)},
        scalars={"k": 2},
    ),
    "repeat2": Case(
        "def repeat(X[n], k) -> Y: for i in 0:size(X,0)*k:  Y[i] = X[i//k] * X[i%size(X,0)]",
        {"X": (5,)},
        scalars={"k": 3},
    ),
    "downsample": Case(
        "def dn(X[n]) -> Y: for i in 0:size(X,0)//2: Y[i] = (X[2*i] + X[2*i+1]) / 2",
        {"X": (7,)},
    ),
    "maxpool2d": Case(
        "for c, x in 0:3, y in 0:2, r in 0:3, s in 0:2: Y[c,x,y] max= X[c,2*x+r,2*y+s]",
        {"X": (2, 7, 5)},
    ),
    "avgpool": Case(
        "for c, x in 0:3, y in 0:2, r in 0:3, s in 0:2: Y[c,x,y] += X[c,2*x+r,2*y+s] / 6",
        {"X": (2, 7, 5)},
    ),
    "minpool": Case(
        "for x in 0:3, r in 0:3: Y[x] min= X[2*x+r]",
        {"X": (7,)},
    ),
    "prodpool": Case(
        "for x in 0:3, r in 0:3: Y[x] *= X[2*x+r]",
        {"X": (7,)},
    ),
    "fir_stride4": Case(
        "Y[x] += X[4*x+3*r] * W[r]",
        {"X": (23,), "W": (5,)},
    ),
    "grouped_conv": Case(
        "Y[n,g,o,x] += X[n,g,c,x+r] * W[g,o,c,r]",
        {"X": (2, 2, 3, 5), "W": (2, 2, 3, 3)},
    ),
    "convt2d": Case(
        "def ct(X[n,c,x,y], W[c,o,r,s]) -> Y[n,o,2*x+r-2,2*y+s-2]: Y[n,o,2*x+r,2*y+s] += X[n,c,x,y] * W[c,o,r,s]",
        {"X": (2, 3, 3, 2), "W": (3, 2, 2, 2)},
    ),
    "im2col": Case(
        "def im(X[c,n], W[k]) -> Y: for c, x in 0:size(X,1)-2, r in 0:3: Y[c,r,x] = X[c,x+r]",
        {"X": (2, 6), "W": (3,)},
    ),
    "col2im": Case(
        "def im(Z[c,r,x]) -> Y[c,x+r-1]: Y[c,x+r] += Z[c,r,x]",
        {"Z": (2, 3, 4)},
    ),
    "pixel_shuffle": Case(
        "def ps(X[c,a,b,h,w]) -> Y[c,h*a,w*b]: Y[c,h*size(X,1)+a,w*size(X,2)+b] = X[c,a,b,h,w]",
        {"X": (2, 2, 3, 2, 2)},
    ),
    "laplace": Case(
        "def lap(u[n,m]) -> Y[n,m]: Y[i,j] = u[pad(i-1),j] + u[pad(i+1),j] + u[i,pad(j-1)] + u[i,pad(j+1)] - 4*u[i,j]",
        {"u": (4, 5)},
    ),
    "corr": Case(
        "def c(x[n], y[n]) -> Y[2*n-1]: for k in 0:2*n-1, i: Y[k] += x[i] * y[pad(i+k-n+1)]",
        {"x": (4,), "y": (4,)},
    ),
    "polymul": Case(
        "def pm(a[n], b[m]) -> c[n+m-1]: c[i+j] += a[i] * b[j]",
        {"a": (4,), "b": (3,)},
    ),
    "circ": Case(
        "def circ(x[n], w[n]) -> Y[n]: Y[i] += x[(i-k) % size(x,0)] * w[k]",
        {"x": (5,), "w": (5,)},
    ),
    # -- tensor algebra
    "khatri_rao": Case(
        "def kr(A[i,r], B[j,r]) -> Y[i*j,r]: Y[i*size(B,0)+j,r] = A[i,r] * B[j,r]",
        {"A": (3, 2), "B": (4, 2)},
    ),
    "kron": Case(
        "def kron(A[i,j], B[k,l]) -> Y[i*k,j*l]: Y[i*size(B,0)+k,j*size(B,1)+l] = A[i,j] * B[k,l]",
        {"A": (3, 2), "B": (2, 4)},
    ),
    "tt4": Case(
        "y += A[i,a] * B[a,j,b] * C[b,k,c] * D[c,l] * x[i,j,k,l]",
        {"A": (3, 2), "B": (2, 4, 3), "C": (3, 5, 2), "D": (2, 3), "x": (3, 4, 5, 3)},
    ),
    "cp": Case(
        "T[i,j,k] += A[i,r] * B[j,r] * C[k,r]",
        {"A": (3, 2), "B": (4, 2), "C": (5, 2)},
    ),
    "bilin": Case(
        "Y[b,o] += X[b,i] * W[o,i,j] * Z[b,j]",
        {"X": (3, 2), "W": (4, 2, 3), "Z": (3, 3)},
    ),
    "xiikjj": Case(
        "Y[i,j,k] = x[i,i,k,j,j]",
        {"x": (3, 3, 2, 4, 4)},
    ),
    "matpow": Case(
        "Y[i,j] += A[i,k] * A[k,l] * A[l,j]",
        {"A": (4, 4)},
    ),
    "toeplitz2": Case(
        "def toep(c[n]) -> T[n,n]: T[i,j] = c[maximum(i-j,j-i)]",
        {"c": (4,)},
    ),
    "hankel": Case(
        "H[i,j] = c[i+j] * w[j]",
        {"c": (7,), "w": (3,)},
    ),
    "two_reads": Case(
        "Y[i] += A[i,j] * A[j,i] + A[i,i]",
        {"A": (4, 4)},
    ),
    "norms": Case(
        "l1[i] += abs(X[i,j]); l2[i] = sqrt(sum[j](X[i,j]**2)); li[i] max= abs(X[i,j]); lp[i] = sum[j](abs(X[i,j])**3) ** (1/3)",
        {"X": (4, 5)},
    ),
    # -- norms and attention
    "groupnorm_flat": Case(
        """
        def gn(X[n,c,h], w[c], b[c], k) -> Y[n,c,h]:
            for n, g in 0:size(X,1)//k, d in 0:k, h: M[n,g] += X[n,g*k+d,h] / (k*size(X,2))
            for n, g in 0:size(X,1)//k, d in 0:k, h: V[n,g] += (X[n,g*k+d,h] - M[n,g])**2 / (k*size(X,2))
            Y[n,c,h] = (X[n,c,h] - M[n,c//k]) * rsqrt(V[n,c//k] + 1e-5) * w[c] + b[c]
        """,
        {"X": (2, 6, 4), "w": (6,), "b": (6,)},
        scalars={"k": 3},
    ),
    "groupnorm_expr": Case(
        "Y[n,g,c,h] = (X[n,g,c,h] - mean[c,h](X[n,g,c,h])) * rsqrt(var[c,h](X[n,g,c,h]) + 1e-5) * w[g,c]",
        {"X": (2, 2, 3, 4), "w": (2, 3)},
    ),
    "lse_hand": Case(
        "m[i] max= X[i,j]; s[i] += exp(X[i,j]-m[i]); Y[i] = m[i] + log(s[i])",
        {"X": (4, 5)},
    ),
    "tanh_hand": Case(
        "Y[i] = (exp(x[i]) - exp(-x[i])) / (exp(x[i]) + exp(-x[i]))",
        {"x": (5,)},
    ),
    "cube": Case(
        "Y[i] = x[i] ** 3",
        {"x": (5,)},
    ),
    "relpos": Case(
        """
        def rel(Q[h,i,d], K[h,j,d], V[h,j,e], R[r,d]) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d] + Q[h,i,d] * R[i-j+size(K,1)-1,d]
            P[h,i,j] = softmax[j](S[h,i,j])
            O[h,i,e] += P[h,i,j] * V[h,j,e]
        """,
        {"Q": (2, 4, 3), "K": (2, 5, 3), "V": (2, 5, 2), "R": (8, 3)},
    ),
    "relbias": Case(
        """
        def rel(Q[h,i,d], K[h,j,d], V[h,j,e], b[h,r]) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            P[h,i,j] = softmax[j](S[h,i,j] + b[h,clamp(i-j+2)])
            O[h,i,e] += P[h,i,j] * V[h,j,e]
        """,
        {"Q": (2, 4, 3), "K": (2, 5, 3), "V": (2, 5, 2), "b": (2, 5)},
    ),
    "causal_bias": Case(
        """
        def f(Q[h,i,d], K[h,j,d], V[h,j,e], slope[h]) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            P[h,i,j] = softmax[j](where(i >= j, S[h,i,j] + (j - i) * slope[h], -inf))
            O[h,i,e] += P[h,i,j] * V[h,j,e]
        """,
        {"Q": (2, 5, 3), "K": (2, 5, 3), "V": (2, 5, 2), "slope": (2,)},
    ),
    "banded": Case(
        "Y[i] += where(abs(i-j) <= 1, A[i,j] * x[j], 0)",
        {"A": (5, 5), "x": (5,)},
    ),
    "second_max": Case(
        "Y[i] = max[j](where(j == argmax[k](X[i,k]), -inf, X[i,j]))",
        {"X": (4, 3)},
    ),
    # -- gathers and scatters
    "hist": Case(
        "def hist(x[n], bins) -> H[bins]: H[x[i]] += 1",
        {"x": (9,)},
        ints={"x": (0, 4)},
        scalars={"bins": 4},
    ),
    "hist_w": Case(
        "def hist(x[n], w[n], bins) -> H[bins]: H[x[i]] += w[i]",
        {"x": (9,), "w": (9,)},
        ints={"x": (0, 4)},
        scalars={"bins": 4},
    ),
    "hist_float2": Case(
        """
        def hist(x[n], w[n], bins) -> H[bins]:
            b[i] = int64(floor(x[i]*2)) + 2
            H[clamp(b[i])] += w[i] * x[i]
        """,
        {"x": (9,), "w": (9,)},
        scalars={"bins": 4},
    ),
    "emb_sum": Case(
        "Y[b,d] += E[ids[b,t],d] * w[b,t]",
        {"E": (7, 3), "ids": (2, 5), "w": (2, 5)},
        ints={"ids": (0, 7)},
    ),
    "three_index": Case(
        "Y[b] += A[i0[b],i1[b],i2[b]] * w[b]",
        {"A": (3, 4, 2), "i0": (6,), "i1": (6,), "i2": (6,), "w": (6,)},
        ints={"i0": (0, 3), "i1": (0, 4), "i2": (0, 2)},
    ),
    "gather_affine": Case(
        "Y[b,r] = X[2*p[b]+r] * w[r]",
        {"X": (9,), "p": (4,), "w": (3,)},
        ints={"p": (0, 4)},
    ),
    "moe": Case(
        """
        def moe(X[n,d], W[e,d,f], r[n,k], g[n,k]) -> Y[n,f]:
            Y[n,f] += g[n,k] * X[n,d] * W[r[n,k],d,f]
        """,
        {"X": (4, 3), "W": (3, 3, 2), "r": (4, 2), "g": (4, 2)},
        ints={"r": (0, 3)},
    ),
    "moe_route": Case(
        """
        def moe(X[n,d], R[e,d], W[e,d,f]) -> Y[n,f]:
            L[n,e] += X[n,d] * R[e,d]
            P[n,e] = softmax[e](L[n,e])
            a[n] = argmax[e](L[n,e])
            H[n,f] += X[n,d] * W[a[n],d,f]
            Y[n,f] = P[n,a[n]] * tanh(H[n,f])
        """,
        {"X": (5, 3), "R": (4, 3), "W": (4, 3, 2)},
    ),
    "moe_dispatch": Case(
        """
        def moe(X[n,d], slot[n], W[e,d,f], E, C) -> Y[n,f]:
            for e in 0:E, c in 0:C, d in 0:size(X,1): B[e,c,d] = 0.0
            B[slot[n]//C,slot[n]%C,d] = X[n,d]
            H[e,c,f] += B[e,c,d] * W[e,d,f]
            Y[n,f] = H[slot[n]//C,slot[n]%C,f]
        """,
        {"X": (4, 3), "slot": (4,), "W": (3, 3, 2)},
        ints={"slot": (0, 6)},
        scalars={"E": 3, "C": 2},
        values={"slot": [0, 4, 5, 2]},
    ),
    "gnn_mean": Case(
        """
        def g(src[e], dst[e], X[n,d], deg[n]) -> Y[n,d]:
            Y[dst[e],d] += X[src[e],d] / deg[dst[e]]
        """,
        {"src": (7,), "dst": (7,), "X": (4, 3), "deg": (4,)},
        ints={"src": (0, 4), "dst": (0, 4)},
        positive=frozenset({"deg"}),
    ),
    "gnn_attn": Case(
        """
        def g(src[e], dst[e], X[n,d], a[d], b[d]) -> Y[n,d]:
            s[e] += X[src[e],d] * a[d] + X[dst[e],d] * b[d]
            for v in 0:size(X,0): m[v] = -1e30
            m[dst[e]] max= s[e]
            w[e] = exp(s[e] - stop_gradient(m[dst[e]]))
            for v in 0:size(X,0): z[v] = 1e-9
            z[dst[e]] += w[e]
            Y[dst[e],d] += w[e] / z[dst[e]] * X[src[e],d]
        """,
        {"src": (7,), "dst": (7,), "X": (4, 3), "a": (3,), "b": (3,)},
        ints={"src": (0, 4), "dst": (0, 4)},
    ),
    "gnn_max": Case(
        """
        def g(src[e], dst[e], X[n,d]) -> Y[n,d]:
            Y[n,d] = 0.0
            Y[dst[e],d] max= X[src[e],d] * 2
        """,
        {"src": (7,), "dst": (7,), "X": (4, 3)},
        ints={"src": (0, 4), "dst": (0, 4)},
    ),
    "seg_min": Case(
        "def g(dst[e], x[e,d], N) -> Y[N,d]: Y[dst[e],d] min= x[e,d]",
        {"dst": (7,), "x": (7, 2)},
        ints={"dst": (0, 3)},
        scalars={"N": 3},
        values={"dst": [0, 1, 2, 0, 1, 2, 1]},
    ),
    "seg_prod2": Case(
        "def g(dst[e], x[e,d], N) -> Y[N,d]: Y[dst[e],d] *= x[e,d]",
        {"dst": (7,), "x": (7, 2)},
        ints={"dst": (0, 3)},
        scalars={"N": 4},
    ),
    "scatter_set_then": Case(
        """
        def s(p[e], m[e], b[n]) -> Z[n]:
            b[n] = b[n] * 3
            Z[n] = b[n]
            b[p[e]] = m[e] ** 2
            Z[n] += b[n] * b[n]
        """,
        {"p": (3,), "m": (3,), "b": (5,)},
        ints={"p": (0, 5)},
        values={"p": [4, 0, 2]},
    ),
    "scatter2d": Case(
        "def s(p[e], q[e], x[e], N, M) -> Y[N,M]: Y[p[e],q[e]] += x[e]",
        {"p": (6,), "q": (6,), "x": (6,)},
        ints={"p": (0, 4), "q": (0, 3)},
        scalars={"N": 4, "M": 3},
    ),
    "scatter_gather": Case(
        "def s(p[e], q[e], X[n,d], N) -> Y[N,d]: Y[p[e],d] += X[q[e],d] * X[p[e],d]",
        {"p": (6,), "q": (6,), "X": (4, 2)},
        ints={"p": (0, 4), "q": (0, 4)},
        scalars={"N": 4},
    ),
    # -- caches, packed rows, packed numbers
    "kv_attend": Case(
        """
        def kv(C[b,s,d], K[b,t,d], pos[b], q[b,d]) -> C[b,s,d], O[b,d]:
            C[b,pos[b]+t,d] = K[b,t,d]
            S[b,s] += q[b,d] * C[b,s,d]
            P[b,s] = softmax[s](where(s < pos[b] + size(K,1), S[b,s], -inf))
            O[b,d] += P[b,s] * C[b,s,d]
        """,
        {"C": (2, 6, 3), "K": (2, 2, 3), "pos": (2,), "q": (2, 3)},
        ints={"pos": (0, 4)},
        values={"pos": [1, 3]},
    ),
    "paged": Case(
        """
        def paged(C[p,k,d], page[b,m], len[b], q[b,d], T) -> O[b,d]:
            for b, j in 0:T, d: S[b,j] += q[b,d] * C[page[b,j//2],j%2,d]
            P[b,j] = softmax[j](where(j < len[b], S[b,j], -inf))
            O[b,d] += P[b,j] * C[page[b,j//2],j%2,d]
        """,
        {"C": (5, 2, 3), "page": (2, 3), "len": (2,), "q": (2, 3)},
        ints={"page": (0, 5), "len": (1, 6)},
        scalars={"T": 6},
        values={"len": [3, 6]},
    ),
    "paged_write": Case(
        "def pw(C[p,k,d], page[b,m], K[b,t,d], pos[b]) -> C[p,k,d]: C[page[b,(pos[b]+t)//2],(pos[b]+t)%2,d] = K[b,t,d]",
        {"C": (6, 2, 3), "page": (2, 3), "K": (2, 2, 3), "pos": (2,)},
        ints={"pos": (0, 4), "page": (0, 6)},
        values={"pos": [1, 3], "page": [[0, 1, 2], [3, 4, 5]]},
    ),
    "int4_group": Case(
        """
        def q4(X[n,k], Q[m,h], s[m,g]) -> Y[n,m]:
            for n, m, k:  Y[n,m] += X[n,k] * float32(bitwise_and(right_shift(Q[m,k//8], 4*(k%8)), 15) - 8) * s[m,k//4]
        """,
        {"X": (3, 16), "Q": (4, 2), "s": (4, 4)},
        ints={"Q": (0, 2147483647)},
    ),
    "dropout_mlp": Case(
        """
        def drop(X[n,k], W[k,m], seed) -> Y[n,m]:
            H[n,m] += X[n,k] * W[k,m]
            Y[n,m] = where(rand(seed, n, m) < 0.7, relu(H[n,m]) / 0.7, 0)
        """,
        {"X": (5, 4), "W": (4, 3)},
        scalars={"seed": 7},
    ),
    "rag_softmax_packed": Case(
        "def f(len[b], off[b], X[t]) -> P[t]: for b, j in 0:len[b]: P[off[b]+j] = softmax[j](X[off[b]+j])",
        {"len": (3,), "off": (3,), "X": (8,)},
        values={"len": [2, 1, 5], "off": [0, 2, 3]},
    ),
    "rag_packed_attn": Case(
        """
        def f(off[m], Q[n,d], K[n,d], V[n,e], seq[n]) -> O[n,e]:
            S[i,j] += Q[i,d] * K[j,d]
            P[i,j] = softmax[j](where(seq[i] == seq[j] and j <= i, S[i,j], -inf))
            O[i,e] += P[i,j] * V[j,e]
        """,
        {"off": (3,), "Q": (6, 2), "K": (6, 2), "V": (6, 2), "seq": (6,)},
        values={"off": [0, 2, 6], "seq": [0, 0, 1, 1, 1, 1]},
    ),
    "rag_to_padded": Case(
        "def f(len[b], off[b], X[t], N) -> Y[b,N]: for b in 0:size(len,0), j in 0:len[b]: Y[b,j] = X[off[b]+j] ** 2",
        {"len": (3,), "off": (3,), "X": (8,)},
        scalars={"N": 6},
        values={"len": [2, 1, 5], "off": [0, 2, 3]},
    ),
    "rag_out": Case(
        "def f(len[b], off[b], X[t], w[b]) -> Y[t]: for b, j in 0:len[b]: Y[off[b]+j] = X[off[b]+j] * w[b]",
        {"len": (3,), "off": (3,), "X": (8,), "w": (3,)},
        values={"len": [2, 1, 5], "off": [0, 2, 3]},
    ),
    "rag_attn": Case(
        """
        def f(len[b], Q[b,i,d], K[b,n,d], V[b,n,e]) -> O[b,i,e]:
            m[b,i] = max[j in 0:len[b]](sum[d](Q[b,i,d] * K[b,j,d]))
            s[b,i] = sum[j in 0:len[b]](exp(sum[d](Q[b,i,d] * K[b,j,d]) - m[b,i]))
            for b, i, j in 0:len[b], e:  O[b,i,e] += exp(sum[d](Q[b,i,d] * K[b,j,d]) - m[b,i]) / s[b,i] * V[b,j,e]
        """,
        {"len": (3,), "Q": (3, 2, 2), "K": (3, 6, 2), "V": (3, 6, 2)},
        values={"len": [2, 1, 5]},
    ),
    # -- recurrences
    "ema": Case(
        "def ema(x[n], a) -> y[n]: for ordered t: y[t] = a * y[pad(t-1)] + (1-a) * x[t]",
        {"x": (5,)},
        scalars={"a": 0.7},
    ),
    "horner": Case(
        "for ordered k:  p[k,i] = p[pad(k-1),i] * x[i] + c[k]",
        {"x": (5,), "c": (3,)},
    ),
    "running_max": Case(
        "for ordered t, b: m[t,b] = maximum(m[pad(t-1),b], X[t,b])",
        {"X": (5, 2)},
    ),
    "state_over": Case(
        """
        def s(X[t,i], W[i,j]) -> h[i]:
            for ordered t:
             for i:  g[i] = tanh(X[t,i] + sum[j](W[i,j] * h[j]))
             for i:  h[i] = g[i]
        """,
        {"X": (4, 2), "W": (2, 2)},
    ),
    "online_softmax": Case(
        """
        def o(X[n,t]) -> L[n]:
            for ordered t:
              for n:  m2[n,t] = maximum(where(t > 0, m2[n,pad(t-1)], -inf), X[n,t])
              for n:  s2[n,t] = where(t > 0, s2[n,pad(t-1)] * exp(m2[n,pad(t-1)] - m2[n,t]), 0.0) + exp(X[n,t] - m2[n,t])
            for n:  L[n] = m2[n,size(X,1)-1] + log(s2[n,size(X,1)-1])
        """,
        {"X": (2, 4)},
    ),
    "seq_len": Case(
        "def r(X[b,t,i], len[b], W[i,j]) -> H[b,t,i]: for ordered t, b, i: H[b,t,i] = where(t < len[b], tanh(X[b,t,i] + sum[j](W[i,j]*H[b,pad(t-1),j])), H[b,pad(t-1),i])",
        {"X": (2, 4, 2), "len": (2,), "W": (2, 2)},
        values={"len": [2, 4]},
    ),
    "power_iter": Case(
        """
        def p(A[n,n], v[n], k) -> v[n]:
            for ordered t in 0:k:
             for i:  w[i] = sum[j](A[i,j]*v[j])
             for i:  v[i] = w[i]
        """,
        {"A": (3, 3), "v": (3,)},
        scalars={"k": 3},
    ),
}
