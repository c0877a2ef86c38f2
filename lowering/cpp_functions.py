"""The text of the scalar functions that generated C++ calls, by name, and what the texts under other names provide.

Sources. exp: reduction to |r| <= ln2/2 and a minimax polynomial (Muller, Elementary Functions, chapter 11), fitted here.
float log, tanh, sin, cos: S. Moshier, Cephes (public domain). double log: fdlibm, e_log.c (K. C. Ng). float erf: N. Juffa,
"my_erff" (public, 2012). log1p: W. Kahan's correction (Higham, Accuracy and Stability, 1.14.1). Halves: F. Giesen,
"Float->half variants" (public domain).
"""

from __future__ import annotations

# Name -> the definitions under that name, for float and for double where both are vector code.
PIECES = {
    "bits": """\
INLINE int bits(float x) { return __builtin_bit_cast(int, x); }
INLINE i64 bits(double x) { return __builtin_bit_cast(i64, x); }
INLINE float real(int x) { return __builtin_bit_cast(float, x); }
INLINE double real(i64 x) { return __builtin_bit_cast(double, x); }
INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
INLINE float with_sign(float size, float of) { return __builtin_copysignf(size, of); }
""",
    "half": """\
INLINE float from_f16(u16 h) {
    const u32 scaled = (u32)bits(real((int)((u32)(h & 0x7fff) << 13)) * real(0x77800000));
    const u32 whole = scaled | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
    return real((int)(whole | (u32)(h & 0x8000) << 16));
}
INLINE u16 to_f16(float x) {
    const u32 b = (u32)bits(x), size = b & 0x7fffffffu;
    const u32 small = (u32)bits(real((int)size) + real(0x3f000000)) - 0x3f000000u;
    const u32 normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    const u32 large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const u32 found = size >= 0x47800000u ? large : size < 0x38800000u ? small : normal;
    return (u16)(found | (b >> 16 & 0x8000u));
}
""",
    "brain": """\
INLINE float from_bf16(u16 h) { return real((int)((u32)h << 16)); }
INLINE u16 to_bf16(float x) {
    const u32 b = (u32)bits(x);
    return (u16)(x != x ? 0x7fc0u : (b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}
""",
    # -- exp and what is made of it. `part` holds exp(x) = 2^n (1 + tail); n is read from the low bits of a rounded sum.
    "exp_tail": """\
template <class T> INLINE T exp_tail(T r) {  // exp(r) - 1 for |r| <= ln2 / 2
    T q = fma(0.0013950489f, r, 0.0083688896f);
    q = fma(q, r, 0.0416662058f);
    q = fma(q, r, 0.1666651884f);
    q = fma(q, r, 0.5000000095f);
    return fma(q, r * r, r);
}
INLINE double exp_tail(double r) {
    double q = fma(2.5117097450105702e-08, r, 2.7631297480465034e-07);
    q = fma(q, r, 2.755721882607682e-06);
    q = fma(q, r, 2.4801489887876493e-05);
    q = fma(q, r, 0.00019841269914386964);
    q = fma(q, r, 0.0013888888947077083);
    q = fma(q, r, 0.0083333333333087);
    q = fma(q, r, 0.04166666666651513);
    q = fma(q, r, 0.16666666666666696);
    q = fma(q, r, 0.5000000000000013);
    return fma(q, r * r, r);
}
template <class T> INLINE T clamped(T x, T lo, T hi) {  // a NaN stays; each line is one instruction
    const T above = lo > x ? lo : x;
    return hi < above ? hi : above;
}
template <class T> INLINE T nearest(T x, float by, typename integer_of<T>::type& n) {  // x * by as a whole number, in both types
    const T sum = fma(x, by, 12582912.0f);
    n = bits(sum) - 0x4b400000;
    return sum - 12582912.0f;
}
INLINE double nearest(double x, double by, i64& n) {
    const double sum = fma(x, by, 6755399441055744.0);
    n = bits(sum) - 0x4338000000000000LL;
    return sum - 6755399441055744.0;
}
template <class I> INLINE auto power_of_two(I n) -> decltype(real(n)) { return real((n + 127) << 23); }
INLINE double power_of_two(i64 n) { return real((n + 1023) << 52); }
template <class T> INLINE T exp_rest(T x, T n) { return fma(n, -1.42860677e-6f, fma(n, -0.693145752f, x)); }
INLINE double exp_rest(double x, double n) { return fma(n, -1.90821492927058770002e-10, fma(n, -6.93147180369123816490e-01, x)); }
template <class T> INLINE T scaled(T tail, T, typename integer_of<T>::type n) {  // in two steps, so that neither factor overflows
    const auto half = n >> 1;
    return fma(tail, power_of_two(half), power_of_two(half)) * power_of_two(n - half);
}
INLINE double scaled(double tail, double, i64 n) {
    const i64 half = n >> 1;
    return fma(tail, power_of_two(half), power_of_two(half)) * power_of_two(n - half);
}
""",
    "exp": """\
template <class T> INLINE T exp(T x) {
    const T c = clamped(x, T(-104.0f), T(89.0f));
    typename integer_of<T>::type n;
    const T whole = nearest(c, 1.44269504f, n);
    return scaled(exp_tail(exp_rest(c, whole)), whole, n);
}
INLINE double exp(double x) {
    const double c = clamped(x, -746.0, 710.0);
    i64 n;
    const double whole = nearest(c, 1.4426950408889634, n);
    return scaled(exp_tail(exp_rest(c, whole)), whole, n);
}
""",
    "exp2": """\
template <class T> INLINE T exp2(T x) {
    const T c = clamped(x, T(-151.0f), T(129.0f));
    typename integer_of<T>::type n;
    const T whole = nearest(c, 1.0f, n);
    return scaled(exp_tail((c - whole) * 0.693147181f), whole, n);
}
INLINE double exp2(double x) {
    const double c = clamped(x, -1076.0, 1025.0);
    i64 n;
    const double whole = nearest(c, 1.0, n);
    return scaled(exp_tail((c - whole) * 0.6931471805599453), whole, n);
}
""",
    "expm1": """\
template <class T> INLINE T expm1(T x) {
    const T c = clamped(x, T(-60.0f), T(89.0f));
    typename integer_of<T>::type n;
    const T r = exp_rest(c, nearest(c, 1.44269504f, n)), s = power_of_two(n - 1);
    return choose(x == 0.0f, x, 2.0f * fma(s, exp_tail(r), s - 0.5f));
}
INLINE double expm1(double x) {
    const double c = clamped(x, -60.0, 710.0);
    i64 n;
    const double r = exp_rest(c, nearest(c, 1.4426950408889634, n)), s = power_of_two(n - 1);
    return x == 0.0 ? x : 2.0 * fma(s, exp_tail(r), s - 0.5);
}
""",
    # -- log: x = m 2^e with m around 1
    "log_parts": """\
template <class T> INLINE T log_mantissa(T x, T& e) {
    const auto tiny = x < 1.17549435e-38f;
    const auto b = bits(choose(tiny, x * 8388608.0f, x));
    const auto k = (b - 0x3f3504f3) >> 23;
    e = T(k) - choose(tiny, T(23.0f), T(0.0f));
    return real(b - (k << 23));
}
INLINE double log_mantissa(double x, double& e) {
    const bool tiny = x < 2.2250738585072014e-308;
    const i64 b = bits(tiny ? x * 4503599627370496.0 : x);
    const i64 k = (b - 0x3fe6a09e667f3bcdLL) >> 52;
    e = (double)k - (tiny ? 52.0 : 0.0);
    return real(b - (k << 52));
}
template <class T> INLINE T log_tail(T f) {  // log(1 + f) - f + f^2 / 2
    T p = fma(7.0376836292e-2f, f, -1.1514610310e-1f);
    p = fma(p, f, 1.1676998740e-1f);
    p = fma(p, f, -1.2420140846e-1f);
    p = fma(p, f, 1.4249322787e-1f);
    p = fma(p, f, -1.6668057665e-1f);
    p = fma(p, f, 2.0000714765e-1f);
    p = fma(p, f, -2.4999993993e-1f);
    p = fma(p, f, 3.3333331174e-1f);
    return p * f * (f * f);
}
INLINE double log_tail(double f) {
    const double s = f / (2.0 + f), z = s * s;
    double p = fma(1.479819860511658591e-01, z, 1.531383769920937332e-01);
    p = fma(p, z, 1.818357216161805012e-01);
    p = fma(p, z, 2.222219843214978396e-01);
    p = fma(p, z, 2.857142874366239149e-01);
    p = fma(p, z, 3.999999999940941908e-01);
    p = fma(p, z, 6.666666666666735130e-01);
    return s * fma(p, z, 0.5 * f * f);
}
template <class T> INLINE T log_special(T x, T y) {  // what the formula does not give: log of 0, of infinity, of less than 0
    const T positive = choose(x == T(__builtin_inf()), x, choose(x >= T(0), y, T(__builtin_nan(""))));
    return choose(x == T(0), T(-__builtin_inf()), positive);
}
""",
    "log": """\
template <class T> INLINE T log(T x) {
    T e;
    const T f = log_mantissa(x, e) - 1.0f;
    const T y = fma(e, -2.12194440e-4f, log_tail(f));
    return log_special(x, fma(e, 0.693359375f, f + fma(-0.5f * f, f, y)));
}
INLINE double log(double x) {
    double e;
    const double f = log_mantissa(x, e) - 1.0;
    const double y = fma(e, 1.90821492927058770002e-10, log_tail(f));
    return log_special(x, fma(e, 6.93147180369123816490e-01, f + fma(-0.5 * f, f, y)));
}
""",
    "log2": """\
template <class T> INLINE T log2(T x) {
    T e;
    const T f = log_mantissa(x, e) - 1.0f;
    const T y = fma(-0.5f * f, f, log_tail(f));
    return log_special(x, fma(f, 1.4426950f, e) + fma(y, 1.4426950f, f * 1.92596298e-8f));
}
INLINE double log2(double x) {
    double e;
    const double f = log_mantissa(x, e) - 1.0;
    const double y = fma(-0.5 * f, f, log_tail(f));
    return log_special(x, fma(f, 1.4426950408889634, e) + fma(y, 1.4426950408889634, f * 2.0355273740931033e-17));
}
""",
    "log1p": """\
template <class T> INLINE T log1p(T x) {
    const T u = T(1) + x;
    const T y = log(u) + (x - (u - T(1))) / u;
    return choose((x == T(-1)) | (x == T(__builtin_inf())), log(u), choose(x == T(0), x, y));
}
""",
    "pow": """\
INLINE double pow_size(double a, double b) { return exp(b * log(a < 0 ? -a : a)); }
INLINE float pow(float a, float b) {
    const float half = b * 0.5f;
    const bool whole = __builtin_floorf(b) == b, odd = whole & (__builtin_floorf(half) != half);
    const float size = (float)pow_size((double)a, (double)b);
    const float value = a < 0.0f ? (whole ? (odd ? -size : size) : (a == -__builtin_inff() ? size : __builtin_nanf(""))) : size;
    const bool one = (b == 0.0f) | (a == 1.0f) | ((a == -1.0f) & (__builtin_fabsf(b) == __builtin_inff()));
    return one ? 1.0f : value;
}
INLINE double pow(double a, double b) { return __builtin_pow(a, b); }
INLINE i64 pow(i64 a, i64 b) {
    i64 value = 1;
    for (i64 n = b; n > 0; n >>= 1, a *= a) value *= n & 1 ? a : 1;
    return b < 0 ? (a == 1 ? 1 : a == -1 ? (b & 1 ? -1 : 1) : 0) : value;
}
""",
    "tanh": """\
template <class T> INLINE T tanh(T x) {
    const T size = abs(x), z = x * x;
    T p = fma(-5.70498872745e-3f, z, 2.06390887954e-2f);
    p = fma(p, z, -5.37397155531e-2f);
    p = fma(p, z, 1.33314422036e-1f);
    p = fma(p, z, -3.33332819422e-1f);
    const T large = with_sign(1.0f - 2.0f / (exp(2.0f * size) + 1.0f), x);
    return choose(size < 0.625f, fma(p * z, x, x), large);
}
INLINE double tanh(double x) {
    const double size = __builtin_fabs(x), z = x * x;
    const double p = fma(fma(-9.64399179425052238628e-1, z, -9.92877231001918586564e1), z, -1.61468768441708447952e3);
    const double q = fma(fma(z + 1.12811678491632931402e2, z, 2.23548839060100448583e3), z, 4.84406305325125486048e3);
    const double large = __builtin_copysign(1.0 - 2.0 / (exp(2.0 * size) + 1.0), x);
    return size < 0.625 ? fma(x * z, p / q, x) : large;
}
""",
    "erf": """\
template <class T> INLINE T erf(T x) {
    const T t = abs(x), s = x * x;
    T r = fma(-1.72853470e-5f, t, 3.83197126e-4f);
    const T u = fma(-3.88396438e-3f, t, 2.42546219e-2f);
    r = fma(r, s, u);
    r = fma(r, t, -1.06777877e-1f);
    r = fma(r, t, -6.34846687e-1f);
    r = fma(r, t, -1.28717512e-1f);
    const T large = with_sign(1.0f - exp(choose(t > 4.0f, T(-17.5f), fma(r, t, -t))), x);
    T p = fma(-5.96761703e-4f, s, 4.99119423e-3f);
    p = fma(p, s, -2.67681349e-2f);
    p = fma(p, s, 1.12819925e-1f);
    p = fma(p, s, -3.76125336e-1f);
    p = fma(p, s, 1.28379166e-1f);
    return choose(t > 0.927734375f, large, fma(p, x, x));
}
INLINE double erf(double x) { return __builtin_erf(x); }
""",
    # -- sin and cos: the quarter turn is taken off in double, where 2^50 still has whole quarters; above, 2^e mod 2 pi from a table.
    "turn": """\
static const double turns[79] = {@TURNS@};
INLINE float quarter(float x, i64& quadrant) {
    const int b = bits(x), e = b >> 23 & 255;
    const int place = e >= 177 ? e - 177 : 0;
    const double whole = (double)((b & 0x7fffff) | 0x800000);
    const double large = (b < 0 ? -whole : whole) * turns[place];
    const double y = e >= 177 ? large : (double)x;
    const double n = nearest(y, 0.6366197723675814, quadrant);
    return (float)fma(n, -6.123233995736766e-17, fma(n, -1.5707963267948966, y));
}
INLINE float sine(float r) {
    const float z = r * r;
    return fma(fma(fma(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f), z * r, r);
}
INLINE float cosine(float r) {
    const float z = r * r;
    return fma(fma(fma(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f), z * z, fma(-0.5f, z, 1.0f));
}
""",
    "sin": """\
INLINE float sin(float x) {
    i64 q;
    const float r = quarter(x, q);
    const float y = q & 1 ? cosine(r) : sine(r);
    return x == 0.0f ? x : q & 2 ? -y : y;
}
INLINE double sin(double x) { return __builtin_sin(x); }
""",
    "cos": """\
INLINE float cos(float x) {
    i64 q;
    const float r = quarter(x, q);
    const float y = q & 1 ? sine(r) : cosine(r);
    return (q + 1) & 2 ? -y : y;
}
INLINE double cos(double x) { return __builtin_cos(x); }
""",
    "sqrt": """\
INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
INLINE double sqrt(double x) { return __builtin_sqrt(x); }
""",
    "rsqrt": """\
INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
INLINE double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
""",
    "floor": """\
INLINE float floor(float x) { return __builtin_floorf(x); }
INLINE double floor(double x) { return __builtin_floor(x); }
""",
    "round": """\
INLINE float round(float x) { return __builtin_rintf(x); }
INLINE double round(double x) { return __builtin_rint(x); }
""",
    "ceil": """\
INLINE float ceil(float x) { return __builtin_ceilf(x); }
INLINE double ceil(double x) { return __builtin_ceil(x); }
""",
    "abs": """\
INLINE float abs(float x) { return __builtin_fabsf(x); }
INLINE double abs(double x) { return __builtin_fabs(x); }
INLINE i64 abs(i64 x) { return x < 0 ? -x : x; }
""",
    "sign": "template <class T> INLINE T sign(T x) { return T(int(T(0) < x) - int(x < T(0))); }\n",
    # A NaN on either side is the result, as in torch.
    "maximum": "template <class T> INLINE T maximum(T a, T b) { return (b > a) | (b != b) ? b : a; }\n",
    "minimum": "template <class T> INLINE T minimum(T a, T b) { return (b < a) | (b != b) ? b : a; }\n",
    # Towards minus infinity, as Python's. For floats c10::div_floor_floating's rule, which keeps a // b consistent with a % b.
    "mod": """\
INLINE i64 mod(i64 a, i64 b) { const i64 m = a % b; return m != 0 && (m < 0) != (b < 0) ? m + b : m; }
INLINE float mod(float a, float b) { const float m = __builtin_fmodf(a, b); return m != 0 && (m < 0) != (b < 0) ? m + b : m; }
INLINE double mod(double a, double b) { const double m = __builtin_fmod(a, b); return m != 0 && (m < 0) != (b < 0) ? m + b : m; }
""",
    "floordiv": """\
INLINE i64 floordiv(i64 a, i64 b) { const i64 q = a / b; return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q; }
template <class T> INLINE T floordiv(T a, T b) {
    if (b == 0) return a / b;
    const T m = __builtin_fmod(a, b);
    const T d = (a - m) / b - (m != 0 && (b < 0) != (m < 0) ? T(1) : T(0));
    const T f = floor(d);
    return d == 0 ? T(__builtin_copysign(0.0, a / b)) : d - f > T(0.5) ? f + 1 : f;
}
""",
    "mix": """\
INLINE i64 hashed(i64 h) {
    h = (h ^ (h >> 16)) * 73244475 & 4294967295LL;
    h = (h ^ (h >> 16)) * 73244475 & 4294967295LL;
    return h ^ (h >> 16);
}
INLINE i64 folded(i64 x) { return ((x & 4294967295LL) + (x >> 32 & 4294967295LL) * 73244475) & 4294967295LL; }
INLINE i64 mix(i64 a, i64 b) { return hashed((hashed(folded(a)) + folded(b)) & 4294967295LL); }
INLINE float rand(i64 key) { return float(hashed(folded(key)) >> 8) / 16777216.0f; }
""",
}  # fmt: skip

PROVIDES = {
    "mix": ("mix", "rand", "hashed", "folded"),
    "bits": ("bits", "real", "fma", "with_sign"),
    "half": ("from_f16", "to_f16"),
    "brain": ("from_bf16", "to_bf16"),
    "exp_tail": ("exp_tail", "clamped", "nearest", "power_of_two", "exp_rest", "scaled"),
    "log_parts": ("log_mantissa", "log_tail", "log_special"),
    "turn": ("quarter", "sine", "cosine"),
}
