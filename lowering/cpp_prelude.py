"""The text that stands before the kernels of a C++ module, and what C++ calls the element types."""

from __future__ import annotations

from lowering import cpp_math, cpp_vectors
from tdsl.ops import OPS

# Partial sums side by side: four vectors of 512 bits of float32, which is what the latency of an addition asks for.
LANES = 64

STORAGE = {
    "bool": "u8",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "float16": "u16",
    "bfloat16": "u16",
    "float32": "float",
    "float64": "double",
}
REGISTER = {**STORAGE, "bool": "bool"}
HALVES = {"float16": "f16", "bfloat16": "bf16"}
# What C++ and the text below keep for themselves.
_WORDS = """
    alignas alignof and asm auto bool break case catch char class const constexpr continue decltype default delete do double else enum
    explicit export extern false float for friend goto if inline int long mutable namespace new noexcept not nullptr operator or private
    protected public register return short signed sizeof static struct switch template this throw true try typedef typeid typename union
    unsigned using virtual void volatile while xor main
    u8 i8 u16 i16 u32 i32 u64 i64 integers threads pid lane lanes folded halve fill transposed exchange exchanges indices counted
    huge madvise gemm micro scratch memory omp_get_thread_num Sums TERMS ROWS BYTES
    INLINE LANES
"""
KEYWORDS = frozenset(_WORDS.split()) | frozenset(cpp_vectors.NAMES.split()) | cpp_math.NAMES | OPS.keys()
HELPERS = f"""\
enum {{ LANES = {LANES} }};
// body(c, lane) for c in [first, last): LANES of them at a time.
template <class Body> INLINE void lanes(i64 first, i64 last, Body body) {{
    i64 c = first;
    for (; c + LANES <= last; c += LANES) {{
        #pragma omp simd
        for (int lane = 0; lane < LANES; ++lane) body(c + lane, lane);
    }}
    const int rest = (int)(last - c);
    #pragma omp simd
    for (int lane = 0; lane < rest; ++lane) body(c + lane, lane);
}}
template <class T, class V> INLINE void fill(T* partial, V value) {{
    for (int lane = 0; lane < LANES; ++lane) partial[lane] = value;
}}
template <int WIDTH, class T, class Combine> INLINE void halve(T* partial, Combine combine) {{
    #pragma omp simd
    for (int lane = 0; lane < WIDTH; ++lane) partial[lane] = combine(partial[lane], partial[lane + WIDTH]);
    if constexpr (WIDTH > 1) halve<WIDTH / 2>(partial, combine);
}}
template <class T, class Combine> INLINE T folded(T* partial, Combine combine) {{
    halve<LANES / 2>(partial, combine);
    return partial[0];
}}
"""

# Memory that was just allocated is mapped as it is touched: by 2 MiB where a kernel writes a large tensor, or every 4 KiB is an interrupt.
HUGE = """\
#ifdef __linux__
extern "C" int madvise(void*, unsigned long, int);
static void huge(const void* start, i64 bytes) {
    const u64 page = 1 << 21, first = ((u64)start + page - 1) & ~(page - 1), last = ((u64)start + (u64)bytes) & ~(page - 1);
    if (first < last) madvise((void*)first, last - first, 14);  // MADV_HUGEPAGE
}
#else
static void huge(const void*, i64) {}
#endif
"""


# A block is turned inside registers: each line of cache is read once, whole, so that rows a power of two apart do not push each other out.
TRANSPOSED = """\
template <int... I> struct indices {};
template <int N, int... I> struct counted : counted<N - 1, N - 1, I...> {};
template <int... I> struct counted<0, I...> { typedef indices<I...> type; };
template <int H, class V, int... I> INLINE void exchange(V& a, V& b, indices<I...>) {
    const V low = __builtin_shufflevector(a, b, ((I & H) ? 16 + I - H : I)...);
    b = __builtin_shufflevector(a, b, ((I & H) ? 16 + I : I + H)...);
    a = low;
}
template <int H, class V> INLINE void exchanges(V* rows) {
    for (int k = 0; k < 16; ++k)
        if (!(k & H)) exchange<H>(rows[k], rows[k + H], counted<16>::type());
    if constexpr (H > 1) exchanges<H / 2>(rows);
}
// to[r * width + c] = from[c * step + r] for r < rows, c < columns.
template <class T> static void transposed(const T* __restrict__ from, i64 step, i64 rows, i64 columns, T* __restrict__ to, i64 width) {
    typedef T V __attribute__((vector_size(16 * sizeof(T))));
    for (i64 c = 0; c < columns; c += 16)
        for (i64 r = 0; r < rows; r += 16) {
            if (c + 16 > columns || r + 16 > rows) {
                for (i64 x = r; x < rows && x < r + 16; ++x)
                    for (i64 y = c; y < columns && y < c + 16; ++y) to[x * width + y] = from[y * step + x];
                continue;
            }
            V block[16];
            for (int k = 0; k < 16; ++k) __builtin_memcpy(&block[k], from + (c + k) * step + r, sizeof(V));
            exchanges<8>(block);
            for (int k = 0; k < 16; ++k) __builtin_memcpy(to + (r + k) * width + c, &block[k], sizeof(V));
        }
}
"""
