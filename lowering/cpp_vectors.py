"""The C++ text of explicit vectors of float: their types, their memory, the loops over them, and what the math of cpp_functions needs.

Loops that a compiler vectorises by itself lose what it cannot see: a maximum is two comparisons and a selection where the processor has
one instruction, sums that should stay in registers go through memory, an exponent is put together by eight integer operations instead
of one. Softmax over 4096 x 1024 numbers on one core of a Zen 4 (GCC 12): 2.4 ms before, 1.5 ms with these.

Full<K> and Rest<K> are a vector's place: the K-th of the partial results beside each other, all elements or the first few. Elements
beyond the end are neither read nor written.
"""

from __future__ import annotations

# What generated names keep clear of.
NAMES = """
    Float Int Mask Half Full Rest Parts Divisor floats unaligned ints bytes halves WIDTH PARTS EXACT_REST FUSED EACH
    at choose along ends larger smaller widened narrowed past_caches whole rest vectors integer_of
"""

TYPES = """\
#define INLINE_MEMBER inline __attribute__((always_inline))
#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif
enum { PARTS = LANES / WIDTH };
typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef float unaligned __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int ints __attribute__((vector_size(4 * WIDTH)));
typedef u8 bytes __attribute__((vector_size(WIDTH), aligned(1)));
typedef u16 halves __attribute__((vector_size(2 * WIDTH), aligned(2)));
struct Half {  // of either kind
    halves v;
};
struct Mask {
    ints v;
    INLINE_MEMBER Mask(ints v) : v(v) {}
    INLINE_MEMBER Mask(bool b) : v(ints{} - (int)b) {}
};
struct Int {
    ints v;
    INLINE_MEMBER Int() {}
    INLINE_MEMBER Int(ints v) : v(v) {}
    INLINE_MEMBER Int(int x) : v(x - ints{}) {}
    INLINE_MEMBER Int(i64 x) : Int(x < -0x7fffffff ? -0x7fffffff : x > 0x7fffffff ? 0x7fffffff : (int)x) {}  // compares as it did
};
struct Float {
    floats v;
    INLINE_MEMBER Float() {}
    INLINE_MEMBER Float(floats v) : v(v) {}
    INLINE_MEMBER Float(float x) : v(x - floats{}) {}
    INLINE_MEMBER explicit Float(double x) : Float((float)x) {}
    INLINE_MEMBER explicit Float(int x) : Float((float)x) {}
    INLINE_MEMBER explicit Float(Int x) : v(__builtin_convertvector(x.v, floats)) {}
};
template <> struct integer_of<Float> { typedef Int type; };
INLINE Float operator+(Float a, Float b) { return a.v + b.v; }
INLINE Float operator-(Float a, Float b) { return a.v - b.v; }
INLINE Float operator*(Float a, Float b) { return a.v * b.v; }
INLINE Float operator/(Float a, Float b) { return a.v / b.v; }
INLINE Float operator-(Float a) { return -a.v; }
INLINE Mask operator==(Float a, Float b) { return (ints)(a.v == b.v); }
INLINE Mask operator!=(Float a, Float b) { return (ints)(a.v != b.v); }
INLINE Mask operator<(Float a, Float b) { return (ints)(a.v < b.v); }
INLINE Mask operator<=(Float a, Float b) { return (ints)(a.v <= b.v); }
INLINE Mask operator>(Float a, Float b) { return (ints)(a.v > b.v); }
INLINE Mask operator>=(Float a, Float b) { return (ints)(a.v >= b.v); }
INLINE Mask operator&(Mask a, Mask b) { return a.v & b.v; }
INLINE Mask operator|(Mask a, Mask b) { return a.v | b.v; }
INLINE Mask operator!(Mask a) { return ~a.v; }
INLINE Mask operator==(Mask a, Mask b) { return ~(a.v ^ b.v); }
INLINE Mask operator!=(Mask a, Mask b) { return a.v ^ b.v; }
INLINE Mask operator==(Int a, Int b) { return a.v == b.v; }
INLINE Mask operator!=(Int a, Int b) { return a.v != b.v; }
INLINE Mask operator<(Int a, Int b) { return a.v < b.v; }
INLINE Mask operator<=(Int a, Int b) { return a.v <= b.v; }
INLINE Mask operator>(Int a, Int b) { return a.v > b.v; }
INLINE Mask operator>=(Int a, Int b) { return a.v >= b.v; }
INLINE Int operator-(Int a) { return -a.v; }
INLINE Int operator*(Int a, Int b) { return a.v * b.v; }
INLINE Int operator+(Int a, Int b) { return a.v + b.v; }
INLINE Int operator-(Int a, Int b) { return a.v - b.v; }
INLINE Int operator<<(Int a, int n) { return a.v << n; }
INLINE Int operator>>(Int a, int n) { return a.v >> n; }
INLINE Int along(i64 first, int step) {
    ints k{};
    for (int n = 0; n < WIDTH; ++n) k[n] = n;
    return (int)first + step * k;
}
INLINE Float choose(Mask c, Float a, Float b) { return c.v ? a.v : b.v; }
"""

# Of a pair where one is NaN the processor's instructions give the second.
MATH = """\
#if defined(__AVX__)
INLINE Float larger(Float a, Float b) { floats y; __asm__("vmaxps %2, %1, %0" : "=v"(y) : "v"(a.v), "v"(b.v)); return y; }
INLINE Float smaller(Float a, Float b) { floats y; __asm__("vminps %2, %1, %0" : "=v"(y) : "v"(a.v), "v"(b.v)); return y; }
#else
INLINE Float larger(Float a, Float b) { return choose(a > b, a, b); }
INLINE Float smaller(Float a, Float b) { return choose(a < b, a, b); }
#endif
INLINE Float maximum(Float a, Float b) { return choose(b != b, b, larger(b, a)); }
INLINE Float minimum(Float a, Float b) { return choose(b != b, b, smaller(b, a)); }
INLINE Float clamped(Float x, Float lo, Float hi) { return smaller(hi, larger(lo, x)); }
INLINE Int bits(Float x) { return (ints)x.v; }
INLINE Float real(Int x) { return (floats)x.v; }
INLINE Float fma(Float a, Float b, Float c) { return a.v * b.v + c.v; }  // one operation: the module is compiled so
INLINE Float abs(Float x) { return (floats)((ints)x.v & 0x7fffffff); }
INLINE Float sign(Float x) { return choose(x > 0.0f, 1.0f, 0.0f) - choose(x < 0.0f, 1.0f, 0.0f); }
INLINE Float with_sign(Float size, Float of) { return (floats)(((ints)size.v & 0x7fffffff) | ((ints)of.v & (int)0x80000000)); }
#if defined(__AVX512F__)
INLINE Float scaled(Float tail, Float n, Int) {
    floats y;
    const floats whole = tail.v + 1.0f;
    __asm__("vscalefps %2, %1, %0" : "=v"(y) : "v"(whole), "v"(n.v));
    return y;
}
INLINE Float sqrt(Float x) { floats y; __asm__("vsqrtps %1, %0" : "=v"(y) : "v"(x.v)); return y; }
INLINE Float floor(Float x) { floats y; __asm__("vrndscaleps $9, %1, %0" : "=v"(y) : "v"(x.v)); return y; }
INLINE Float ceil(Float x) { floats y; __asm__("vrndscaleps $10, %1, %0" : "=v"(y) : "v"(x.v)); return y; }
INLINE Float round(Float x) { floats y; __asm__("vrndscaleps $8, %1, %0" : "=v"(y) : "v"(x.v)); return y; }
#elif defined(__AVX__)
INLINE Float sqrt(Float x) { floats y; __asm__("vsqrtps %1, %0" : "=x"(y) : "x"(x.v)); return y; }
INLINE Float floor(Float x) { floats y; __asm__("vroundps $9, %1, %0" : "=x"(y) : "x"(x.v)); return y; }
INLINE Float ceil(Float x) { floats y; __asm__("vroundps $10, %1, %0" : "=x"(y) : "x"(x.v)); return y; }
INLINE Float round(Float x) { floats y; __asm__("vroundps $8, %1, %0" : "=x"(y) : "x"(x.v)); return y; }
#else
#define EACH(name, function) INLINE Float name(Float x) { for (int k = 0; k < WIDTH; ++k) x.v[k] = function(x.v[k]); return x; }
EACH(sqrt, __builtin_sqrtf)
EACH(floor, __builtin_floorf)
EACH(ceil, __builtin_ceilf)
EACH(round, __builtin_rintf)
#endif
// x / s for many x: a division takes as long as ten products. The quotient by the reciprocal is off by a unit in the last place; what it
// leaves of x says by how much (P. Markstein, IA-64 and Elementary Functions, chapter 8). What is left has bits 2^-48 below x: where x is
// below 2^-101 they are below the smallest number, and the last bit may be the other one. An infinite quotient leaves no number, and stands.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
enum { EXACT_REST = FUSED };
#else
enum { EXACT_REST = 0 };
#endif
struct Divisor {
    float s, reciprocal;
    bool plain;
    INLINE_MEMBER explicit Divisor(float s) : s(s), reciprocal(1.0f / s) {
        const float size = __builtin_fabsf(s);
        plain = EXACT_REST & size > 1e-37f & size < 1e37f;
    }
};
INLINE Float operator/(Float x, Divisor by) {
    if (!by.plain) return x / Float(by.s);
    const floats q = x.v * by.reciprocal, left = x.v - q * by.s, y = q + left * by.reciprocal;
    return choose(Float(y) == Float(y), y, q);
}
INLINE Float rsqrt(Float x) { return 1.0f / sqrt(x); }
"""

LOOPS = """\
#if defined(__AVX512F__)
INLINE unsigned short ends(int count) { return (unsigned short)((1u << count) - 1); }
#elif defined(__AVX2__)
INLINE ints ends(int count) { return ints{0, 1, 2, 3, 4, 5, 6, 7} < count; }
#endif
#if defined(__clang__)
INLINE void past_caches(floats* p, floats x) { __builtin_nontemporal_store(x, p); }
#elif defined(__AVX512F__)
INLINE void past_caches(floats* p, floats x) { __builtin_ia32_movntps512((float*)p, x); }
#elif defined(__AVX__)
INLINE void past_caches(floats* p, floats x) { __builtin_ia32_movntps256((float*)p, x); }
#else
INLINE void past_caches(floats* p, floats x) { *p = x; }
#endif
template <int K> struct Full {
    enum { part = K };
    INLINE_MEMBER Float load(const float* p) const { return (floats)*(const unaligned*)p; }
    INLINE_MEMBER void store(float* p, Float x) const { *(unaligned*)p = x.v; }
    INLINE_MEMBER void stream(float* p, Float x) const {
        if (((u64)p & (4 * WIDTH - 1)) == 0)
            past_caches((floats*)p, x.v);
        else
            store(p, x);
    }
    INLINE_MEMBER Float only(Float x, Float) const { return x; }
    INLINE_MEMBER Mask load(const u8* p) const { return __builtin_convertvector(*(const bytes*)p, ints) != 0; }
    INLINE_MEMBER void store(u8* p, Mask x) const { *(bytes*)p = __builtin_convertvector(-x.v, bytes); }
    INLINE_MEMBER Half load(const u16* p) const { return {*(const halves*)p}; }
    INLINE_MEMBER void store(u16* p, Half x) const { *(halves*)p = x.v; }
};
template <int K> struct Rest {
    enum { part = K };
    int count;
#if defined(__AVX512F__)
    INLINE_MEMBER Float load(const float* p) const {
        floats x;
        __asm__("vmovups %1, %0%{%2%}%{z%}" : "=v"(x) : "m"(*(const unaligned*)p), "Yk"(ends(count)));
        return x;
    }
    INLINE_MEMBER void store(float* p, Float x) const {
        __asm__("vmovups %1, %0%{%2%}" : "+m"(*(unaligned*)p) : "v"(x.v), "Yk"(ends(count)));
    }
    INLINE_MEMBER Float only(Float x, Float other) const {
        __asm__("vmovaps %1, %0%{%2%}" : "+v"(other.v) : "v"(x.v), "Yk"(ends(count)));
        return other;
    }
#elif defined(__AVX2__)
    INLINE_MEMBER Float load(const float* p) const {
        floats x;
        __asm__("vmaskmovps %1, %2, %0" : "=x"(x) : "m"(*(const unaligned*)p), "x"(ends(count)));
        return x;
    }
    INLINE_MEMBER void store(float* p, Float x) const {
        __asm__("vmaskmovps %1, %2, %0" : "+m"(*(unaligned*)p) : "x"(x.v), "x"(ends(count)));
    }
    INLINE_MEMBER Float only(Float x, Float other) const { return ends(count) ? x.v : other.v; }
#else
    INLINE_MEMBER Float load(const float* p) const {
        floats x{};
        for (int k = 0; k < count; ++k) x[k] = p[k];
        return x;
    }
    INLINE_MEMBER void store(float* p, Float x) const {
        for (int k = 0; k < count; ++k) p[k] = x.v[k];
    }
    INLINE_MEMBER Float only(Float x, Float other) const {
        for (int k = 0; k < count; ++k) other.v[k] = x.v[k];
        return other;
    }
#endif
    INLINE_MEMBER void stream(float* p, Float x) const { store(p, x); }
    INLINE_MEMBER Mask load(const u8* p) const {
        ints x{};
        for (int k = 0; k < count; ++k) x[k] = p[k];
        return x != 0;
    }
    INLINE_MEMBER void store(u8* p, Mask x) const {
        for (int k = 0; k < count; ++k) p[k] = x.v[k] != 0;
    }
    INLINE_MEMBER Half load(const u16* p) const {
        halves x{};
        for (int k = 0; k < count; ++k) x[k] = p[k];
        return {x};
    }
    INLINE_MEMBER void store(u16* p, Half x) const {
        for (int k = 0; k < count; ++k) p[k] = x.v[k];
    }
};
template <int K, int N, class Body> INLINE void whole(i64 c, Body& body) {
    body(c + K * WIDTH, Full<K>{});
    if constexpr (K + 1 < N) whole<K + 1, N>(c, body);
}
template <int K, int N, class Body> INLINE void rest(i64 c, i64 last, Body& body) {
    if (c >= last) return;
    body(c, Rest<K>{last - c < WIDTH ? (int)(last - c) : (int)WIDTH});
    if constexpr (K + 1 < N) rest<K + 1, N>(c + WIDTH, last, body);
}
// body(c, place) for c in [first, last): N vectors at a time.
template <int N, class Body> INLINE void vectors(i64 first, i64 last, Body body) {
    i64 c = first;
    for (; c + N * WIDTH <= last; c += N * WIDTH) whole<0, N>(c, body);
    rest<0, N>(c, last, body);
}
// Partial results side by side. By recursion, not loops: each must be a register from the start.
struct Parts {
    Float of[PARTS];
    INLINE_MEMBER Parts(float value) { fill<0>(value); }
    INLINE_MEMBER Float& operator[](int k) { return of[k]; }
    template <int K> INLINE_MEMBER void fill(Float value) {
        of[K] = value;
        if constexpr (K + 1 < PARTS) fill<K + 1>(value);
    }
    template <int N, int K, class Combine> INLINE_MEMBER void merge(Combine combine) {
        of[K] = combine(of[K], of[K + N]);
        if constexpr (K + 1 < N) merge<N, K + 1>(combine);
        else if constexpr (N > 1) merge<N / 2, 0>(combine);
    }
};
template <class Combine> INLINE float folded(Parts& parts, Combine combine) {
    parts.merge<PARTS / 2, 0>(combine);
    alignas(64) float last[WIDTH];
    *(floats*)last = parts.of[0].v;
    return halve<WIDTH / 2>(last, combine), last[0];
}
"""

VECTORS = TYPES + MATH + LOOPS

# What turns sixteen bits into floats and back, where a kernel calls it.
BRAIN = """\
#if defined(__AVX2__)
INLINE ints widened(halves h) { ints y; __asm__("vpmovzxwd %1, %0" : "=v"(y) : "v"(h)); return y; }
#else
INLINE ints widened(halves h) { return __builtin_convertvector(h, ints); }
#endif
#if defined(__AVX512F__)
INLINE halves narrowed(ints x) { halves y; __asm__("vpmovdw %1, %0" : "=v"(y) : "v"(x)); return y; }
#else
INLINE halves narrowed(ints x) { return __builtin_convertvector(x, halves); }
#endif
INLINE Float from_bf16(Half h) { return (floats)(widened(h.v) << 16); }
INLINE Half to_bf16(Float x) {
    const ints b = (ints)x.v, whole = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    return {narrowed(x.v != x.v ? ints{} + 0x7fc0 : whole)};
}
"""
HALF = """\
#if defined(__AVX512F__) || (defined(__AVX__) && defined(__F16C__))
INLINE Float from_f16(Half h) { floats y; __asm__("vcvtph2ps %1, %0" : "=v"(y) : "v"(h.v)); return y; }
INLINE Half to_f16(Float x) { Half y; __asm__("vcvtps2ph $0, %1, %0" : "=v"(y.v) : "v"(x.v)); return y; }
#else
INLINE Float from_f16(Half h) {
    floats y{};
    for (int k = 0; k < WIDTH; ++k) y[k] = from_f16((u16)h.v[k]);
    return y;
}
INLINE Half to_f16(Float x) {
    halves y{};
    for (int k = 0; k < WIDTH; ++k) y[k] = to_f16(x.v[k]);
    return {y};
}
#endif
"""
