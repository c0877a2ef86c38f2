"""The matrix product that generated C++ calls for a tile: a panel of the right operand is packed, and a few rows at a time run over it.

The scheme is that of K. Goto and R. van de Geijn, "Anatomy of high-performance matrix multiplication" (TOMS 2008), with one level of
packing: tiles lie in a core's caches. A micro-kernel holds the sums of ROWS x 2 vectors in registers. It has the compiler's vectors for its only
means, so that it is as wide as the processor. On one core of a Zen 4 (peak 118 GFLOP/s) it runs 64 x 512 x 64 tiles at 99 to
106 GFLOP/s, where MKL's sgemm runs the same at 70 to 93, and 512 x 512 x 512 at 107.
"""

from __future__ import annotations

GEMM = """\
#ifdef _OPENMP
extern "C" int omp_get_thread_num(void);
#else
static int omp_get_thread_num() { return 0; }
#endif
#if defined(__AVX512F__)
enum { BYTES = 64, ROWS = 8 };
#elif defined(__AVX__)
enum { BYTES = 32, ROWS = 6 };
#else
enum { BYTES = 16, ROWS = 4 };
#endif
enum { TERMS = 256 };  // of a packed panel
// The sums of N rows, two vectors each. By recursion, not loops: each must be a register from the start.
template <int N, class T> struct Sums {
    typedef T V __attribute__((vector_size(BYTES)));
    enum { L = BYTES / sizeof(T), W = 2 * L };
    V low = V{}, high = V{};
    Sums<N - 1, T> rest;
    inline __attribute__((always_inline)) void add(const T* a, i64 ra, V x, V y) {
        low += *a * x;
        high += *a * y;
        rest.add(a + ra, ra, x, y);
    }
    inline __attribute__((always_inline)) void store(T* c, i64 ldc, bool adds, int width) {
        if (width == W) {
            V x = V{}, y = V{};
            if (adds) {
                __builtin_memcpy(&x, c, sizeof(V));
                __builtin_memcpy(&y, c + L, sizeof(V));
            }
            x += low;
            y += high;
            __builtin_memcpy(c, &x, sizeof(V));
            __builtin_memcpy(c + L, &y, sizeof(V));
        } else {
            V row[2] = {low, high};
            const T* from = (const T*)row;
            for (int j = 0; j < width; ++j) c[j] = adds ? c[j] + from[j] : from[j];
        }
        rest.store(c + ldc, ldc, adds, width);
    }
};
template <class T> struct Sums<0, T> {
    template <class V> inline __attribute__((always_inline)) void add(const T*, i64, V, V) {}
    inline __attribute__((always_inline)) void store(T*, i64, bool, int) {}
};
// c[r][j] (+)= sum of a[r * ra + l * ka] * panel[l][j] over l < k, for N rows and `width` columns.
template <int N, class T> static void micro(i64 k, const T* a, i64 ra, i64 ka, const T* panel, T* c, i64 ldc, bool adds, int width) {
    typedef typename Sums<N, T>::V V;
    Sums<N, T> sums;
    for (i64 l = 0; l < k; ++l, a += ka, panel += Sums<N, T>::W)
        sums.add(a, ra, *(const V*)panel, *(const V*)(panel + Sums<N, T>::L));
    sums.store(c, ldc, adds, width);
}
// c = op(a) op(b), or c += op(a) op(b); row-major, op turns its operand where at or bt says so.
template <class T> static void gemm(
    bool at, bool bt, i64 m, i64 n, i64 k, const T* a, i64 lda, const T* b, i64 ldb, bool adds, T* __restrict__ c, i64 ldc) {
    enum { W = Sums<1, T>::W };
    alignas(64) T panel[TERMS * W];
    const i64 ra = at ? 1 : lda, ka = at ? lda : 1;
    for (i64 j = 0; j < n; j += W) {
        const int width = n - j < W ? (int)(n - j) : (int)W;
        if (width < W) __builtin_memset(panel, 0, sizeof(panel));
        for (i64 l = 0; l < k; l += TERMS) {
            const i64 terms = k - l < TERMS ? k - l : (i64)TERMS;
            if (bt)
                transposed(b + j * ldb + l, ldb, terms, width, panel, (i64)W);
            else
                for (i64 x = 0; x < terms; ++x) __builtin_memcpy(panel + x * W, b + (l + x) * ldb + j, width * sizeof(T));
            const bool more = adds || l > 0;
            const T* from = a + l * ka;
            i64 i = 0;
            for (; i + ROWS <= m; i += ROWS) micro<ROWS>(terms, from + i * ra, ra, ka, panel, c + i * ldc + j, ldc, more, width);
            for (; i + 2 <= m; i += 2) micro<2>(terms, from + i * ra, ra, ka, panel, c + i * ldc + j, ldc, more, width);
            if (i < m) micro<1>(terms, from + i * ra, ra, ka, panel, c + i * ldc + j, ldc, more, width);
        }
    }
}
"""
