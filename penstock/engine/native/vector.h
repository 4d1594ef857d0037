// Vectors of 32-bit lanes as wide as the machine's, and the few operations on them that the
// kernels need. Everything is GCC and Clang vector extensions; the two places where an instruction
// set has something better (bfloat16 dot products, transposition) say so under #ifdef.
//
// A "word" is 32 bits of a row: one float, or two neighbouring bfloat16 numbers. Rows are
// multiplied word by word, which is what lets one matrix kernel serve both types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace penstock {

// ROWS x VECTORS accumulators and VECTORS + 1 operands fit the register file of each machine.
#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 4;
#endif
constexpr int ROWS = 6;
constexpr int PANEL = LANES * VECTORS;

typedef float Float __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t Word __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t Half __attribute__((vector_size(LANES * 2), aligned(2)));

struct bf16 {
    uint16_t bits;
};

// UNIT elements make a word.
template <class T>
struct Element;
template <>
struct Element<float> {
    static constexpr int UNIT = 1;
};
template <>
struct Element<bf16> {
    static constexpr int UNIT = 2;
};

// Combining a scalar with a zero vector is the form that compilers turn into one broadcast.
inline Word splat_word(uint32_t value) {
    return Word{} | value;
}
inline Float splat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (Float)splat_word(bits);
}

inline Int iota() {
    Int result;
    for (int i = 0; i < LANES; i++) result[i] = i;
    return result;
}

inline float widen(float value) {
    return value;
}
inline float widen(bf16 value) {
    const uint32_t word = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &word, 4);
    return result;
}

inline Float load(const float* from) {
    return *(const Float*)from;
}
inline Word widen_halves(const void* from) {
#if defined(__AVX512F__)
    return (Word)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#else
    return __builtin_convertvector(*(const Half*)from, Word);
#endif
}
inline Float load(const bf16* from) {
    return (Float)(widen_halves(from) << 16);
}
inline Word load_words(const uint32_t* from) {
    return *(const Word*)from;
}

// The first `count` elements, and zeros where they are fewer than LANES.
template <class T>
inline Float load_some(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T lanes[LANES] = {};
    memcpy(lanes, from, count * sizeof(T));
    return load(lanes);
}

// Rounds to the nearest, ties to even.
inline void store(float* to, Float value) {
    *(Float*)to = value;
}
inline void store(bf16* to, Float value) {
#if defined(__AVX512BF16__)
    *(__m256i_u*)to = (__m256i)_mm512_cvtneps_pbh((__m512)value);
#else
    Word bits = (Word)value;
    bits += 0x7fffu + ((bits >> 16) & 1u);
    *(Half*)to = __builtin_convertvector(bits >> 16, Half);
#endif
}
template <class T>
inline void store_some(T* to, Float value, int64_t count) {
    if (count >= LANES) return store(to, value);
    T lanes[LANES];
    store(lanes, value);
    memcpy(to, lanes, count * sizeof(T));
}
template <class T>
inline Float rounded(Float value) {
    T lanes[LANES];
    store(lanes, value);
    return load(lanes);
}
template <>
inline Float rounded<float>(Float value) {
    return value;
}

inline Float max(Float a, Float b) {
    return a > b ? a : b;
}

inline float sum(Float v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

inline float largest(Float v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float result = v[0];
    for (int i = 1; i < LANES; i++) result = result > v[i] ? result : v[i];
    return result;
#endif
}

// sum + a * b for words: one product, or the two products of a pair of bfloat16.
template <class T>
inline Float dot(Float total, Word a, Word b);
template <>
inline Float dot<float>(Float total, Word a, Word b) {
    return total + (Float)a * (Float)b;
}
template <>
inline Float dot<bf16>(Float total, Word a, Word b) {
#if defined(__AVX512BF16__)
    return (Float)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
    total += (Float)(a << 16) * (Float)(b << 16);
    return total + (Float)(a & 0xffff0000u) * (Float)(b & 0xffff0000u);
#endif
}
// 2^x for any x; 0 below the smallest normal number. Relative error 2e-7.
inline Float exp2(Float x) {
    const Float whole = (x + 12582912.f) - 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
    const Float rest = x - whole;
    Float value = splat(1.5403530e-4f);
    value = value * rest + 1.3333558e-3f;
    value = value * rest + 9.6181291e-3f;
    value = value * rest + 5.5504109e-2f;
    value = value * rest + 2.4022651e-1f;
    value = value * rest + 6.9314718e-1f;
    value = value * rest + 1.0f;
    const Int exponent = (Int)(x + 12582912.f) << 23;
    const Int bits = (Int)value + exponent;
    return (Float)(bits & (x > -126.f));
}

constexpr float LOG2_E = 1.4426950408889634f;

inline Float exp(Float x) {
    x = x < 87.f ? x : splat(87.f);
    return exp2(x * LOG2_E);
}

// Absolute error 1e-7.
inline Float tanh(Float x) {
    return 1.f - 2.f / (exp(2.f * x) + 1.f);
}

// The elements of two neighbouring slots, 2 * LANES of each, as words (for float: of the first
// alone). They come in an order of the machine's choosing, which `restore` undoes for what was
// summed in it.
inline void interleave(const float* first, const float*, Word& low, Word& high) {
    low = (Word)load(first), high = (Word)load(first + LANES);
}
inline void interleave(const bf16* first, const bf16* second, Word& low, Word& high) {
#if defined(__AVX512BW__)
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    low = (Word)_mm512_unpacklo_epi16(a, b), high = (Word)_mm512_unpackhi_epi16(a, b);
#else
    low = widen_halves(first) | widen_halves(second) << 16;
    high = widen_halves(first + LANES) | widen_halves(second + LANES) << 16;
#endif
}
template <class T>
inline void restore(float* sums) {
#if defined(__AVX512BW__)
    if constexpr (Element<T>::UNIT == 2) {
        const __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
        const __m512i first =
            _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        _mm512_storeu_ps(sums, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(sums + 16, _mm512_permutex2var_ps(low, second, high));
    }
#else
    (void)sums;
#endif
}

// to[word * stride + i] = row i's word, for LANES rows of `words` words each (at most LANES).
inline void transpose(const uint32_t* const* rows, int words, uint32_t* to, int stride) {
#if defined(__AVX512F__)
    const __mmask16 wanted = words >= 16 ? 0xffff : (1u << words) - 1;
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(wanted, rows[i]);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
    for (int i = 0; i < words; i++) _mm512_storeu_si512(to + i * stride, r[i]);
#else
    for (int word = 0; word < words; word++)
        for (int i = 0; i < LANES; i++) to[word * stride + i] = rows[i][word];
#endif
}

}  // namespace penstock
