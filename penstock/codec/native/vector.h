// As many floats at a time as the machine's vectors hold, and what turns the elements of KV blocks
// into them and back. GCC and Clang vector extensions; intrinsics where compilers make too little
// of them.
//
// The numpy reference does the same sums in the same order, and a compiler that made one rounding
// out of two would make another code of a number half way between two: hence no contraction.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace penstock {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define PENSTOCK_AVX512
constexpr int64_t UNIT = 16;
#elif defined(__AVX2__) && defined(__F16C__)
#define PENSTOCK_AVX2
constexpr int64_t UNIT = 8;
#else
constexpr int64_t UNIT = 4;
#endif
constexpr int64_t LINE = 64;

typedef float Float __attribute__((vector_size(UNIT * 4), aligned(4)));
typedef int32_t Int __attribute__((vector_size(UNIT * 4), aligned(4)));
typedef uint32_t Word __attribute__((vector_size(UNIT * 4), aligned(4)));
typedef uint16_t Short __attribute__((vector_size(UNIT * 2), aligned(2)));
typedef uint8_t Byte __attribute__((vector_size(UNIT), aligned(1)));

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Zero is taken away and not added: then there is nothing to compute, for one of the two zeros
// neither, and the compiler loads and spreads in one.
inline Float splat(float value) {
    return value - Float{};
}
inline Float min(Float a, Float b) {
#if defined(PENSTOCK_AVX512)
    return (Float)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(PENSTOCK_AVX2)
    return (Float)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}
inline Float max(Float a, Float b) {
#if defined(PENSTOCK_AVX512)
    return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(PENSTOCK_AVX2)
    return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
inline int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline Float magnitude(Float value) {
    return (Float)((Word)value & 0x7fffffffu);
}

inline Float load(const float* from) {
    return *(const Float*)from;
}
inline Word widen(Short value) {
#if defined(PENSTOCK_AVX512)
    return (Word)_mm512_cvtepu16_epi32((__m256i)value);
#elif defined(PENSTOCK_AVX2)
    return (Word)_mm256_cvtepu16_epi32((__m128i)value);
#else
    return __builtin_convertvector(value, Word);
#endif
}
inline Float load(const bfloat16* from) {
    return (Float)(widen(*(const Short*)from) << 16);
}
inline Float load(const float16* from) {
#if defined(PENSTOCK_AVX512)
    return (Float)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(PENSTOCK_AVX2)
    return (Float)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    Float result;
    const _Float16* halves = (const _Float16*)from;
    for (int i = 0; i < UNIT; i++) result[i] = (float)halves[i];
    return result;
#endif
}

#if defined(PENSTOCK_AVX2)
inline __m128i narrow(Word value) {
    const __m256i words = (__m256i)value;
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#endif

// Rounds to the nearest, ties to even. Not with the processor's bfloat16 instructions, which take
// the smallest numbers for zero.
inline void store(float* to, Float value) {
    *(Float*)to = value;
}
inline void store(bfloat16* to, Float value) {
    Word bits = (Word)value;
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#if defined(PENSTOCK_AVX512)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(PENSTOCK_AVX2)
    _mm_storeu_si128((__m128i*)to, narrow(bits));
#else
    *(Short*)to = __builtin_convertvector(bits, Short);
#endif
}
inline void store(float16* to, Float value) {
#if defined(PENSTOCK_AVX512)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PENSTOCK_AVX2)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
    _Float16* halves = (_Float16*)to;
    for (int i = 0; i < UNIT; i++) halves[i] = (_Float16)value[i];
#endif
}
inline void store_bytes(uint8_t* to, Word value) {
#if defined(PENSTOCK_AVX512)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)value));
#elif defined(PENSTOCK_AVX2)
    const __m128i shorts = narrow(value);
    _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(shorts, shorts));
#else
    *(Byte*)to = __builtin_convertvector(value, Byte);
#endif
}
inline Word load_bytes(const uint8_t* from) {
#if defined(PENSTOCK_AVX512)
    return (Word)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(PENSTOCK_AVX2)
    return (Word)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    return __builtin_convertvector(*(const Byte*)from, Word);
#endif
}

// One rounding where the machine has that, else two: for products that are exact.
inline Float multiply_add(Float a, Float b, Float c) {
#if defined(PENSTOCK_AVX512)
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PENSTOCK_AVX2) && defined(__FMA__)
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline float smallest(Float value) {
#if defined(PENSTOCK_AVX512)
    return _mm512_reduce_min_ps((__m512)value);
#else
    float result = value[0];
    for (int i = 1; i < UNIT; i++) result = value[i] < result ? value[i] : result;
    return result;
#endif
}
inline float largest(Float value) {
#if defined(PENSTOCK_AVX512)
    return _mm512_reduce_max_ps((__m512)value);
#else
    float result = value[0];
    for (int i = 1; i < UNIT; i++) result = value[i] > result ? value[i] : result;
    return result;
#endif
}

// What is smallest or largest in each of UNIT units. With wide vectors halves of two are folded
// into one again and again, which is a third of the work of folding each by itself.
#if defined(PENSTOCK_AVX512)
template <class Pick>
inline Float fold(const Float* units, Pick pick) {
    __m512 pairs[8], quads[4], eights[2];
    for (int i = 0; i < 8; i++) {
        const __m512 a = (__m512)units[2 * i], b = (__m512)units[2 * i + 1];
        pairs[i] = pick(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
        quads[i] = pick((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    for (int i = 0; i < 2; i++) {
        const __m512 a = quads[2 * i], b = quads[2 * i + 1];
        eights[i] = pick(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    return (Float)pick(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}
#elif defined(PENSTOCK_AVX2)
template <class Pick>
inline Float fold(const Float* units, Pick pick) {
    __m256 pairs[4], quads[2];
    for (int i = 0; i < 4; i++) {
        const __m256 a = (__m256)units[2 * i], b = (__m256)units[2 * i + 1];
        pairs[i] = pick(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 2; i++) {
        const __m256d a = (__m256d)pairs[2 * i], b = (__m256d)pairs[2 * i + 1];
        quads[i] = pick((__m256)_mm256_unpacklo_pd(a, b), (__m256)_mm256_unpackhi_pd(a, b));
    }
    return (Float)pick(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                       _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}
#endif
#if defined(PENSTOCK_AVX512) || defined(PENSTOCK_AVX2)
inline Float smallest_of(const Float* units) {
    return fold(units, [](auto a, auto b) { return (decltype(a))min((Float)a, (Float)b); });
}
inline Float largest_of(const Float* units) {
    return fold(units, [](auto a, auto b) { return (decltype(a))max((Float)a, (Float)b); });
}
#else
inline Float smallest_of(const Float* units) {
    Float result{};
    for (int i = 0; i < UNIT; i++) result[i] = smallest(units[i]);
    return result;
}
inline Float largest_of(const Float* units) {
    Float result{};
    for (int i = 0; i < UNIT; i++) result[i] = largest(units[i]);
    return result;
}
#endif

// The first `count` of a unit, and what follows them as it is.
inline void store_some(float16* to, Float value, int64_t count) {
    if (count >= UNIT) return store(to, value);
    float16 some[UNIT];
    store(some, value);
    for (int64_t i = 0; i < count; i++) to[i] = some[i];
}
inline Float load_some(const float16* from, int64_t count) {
    if (count >= UNIT) return load(from);
    float16 some[UNIT] = {};
    for (int64_t i = 0; i < count; i++) some[i] = from[i];
    return load(some);
}

// Where decoded elements go: around the cache when there is more than fits into it, since a store
// that need not read its line first saves half of the memory traffic.
struct Sink {
    bool is_streaming;

#if defined(PENSTOCK_AVX512)
    void put(void* to, __m512i line) const {
        if (is_streaming)
            _mm512_stream_si512((__m512i*)to, line);
        else
            _mm512_storeu_si512(to, line);
    }
    // Two units of elements: one line of 16-bit ones, or two of float.
    void put(float* to, Float first, Float second) const {
        put(to, (__m512i)first), put(to + UNIT, (__m512i)second);
    }
    void put(bfloat16* to, Float first, Float second) const {
#if defined(__AVX512BF16__)
        // No decoded number is so small that this would take it for zero: scales are float16.
        put(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
        alignas(LINE) bfloat16 line[2 * UNIT];
        store(line, first), store(line + UNIT, second);
        put(to, _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256((__m256i*)line)),
                                   _mm256_load_si256((__m256i*)line + 1), 1));
#endif
    }
    void put(float16* to, Float first, Float second) const {
        const __m256i low = _mm512_cvtps_ph((__m512)first, _MM_FROUND_TO_NEAREST_INT);
        const __m256i high = _mm512_cvtps_ph((__m512)second, _MM_FROUND_TO_NEAREST_INT);
        put(to, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
#else
#if defined(PENSTOCK_AVX2)
    void put(void* to, __m256i half) const {
        if (is_streaming)
            _mm256_stream_si256((__m256i*)to, half);
        else
            _mm256_storeu_si256((__m256i*)to, half);
    }
#endif
    template <class T>
    void put(T* to, Float first, Float second) const {
#if defined(PENSTOCK_AVX2)
        if (is_streaming) {
            alignas(LINE) T line[2 * UNIT];
            store(line, first), store(line + UNIT, second);
            for (int64_t i = 0; i < (int64_t)sizeof line / 32; i++)
                _mm256_stream_si256((__m256i*)to + i, _mm256_load_si256((const __m256i*)line + i));
            return;
        }
#endif
        store(to, first), store(to + UNIT, second);
    }
#endif

    // Streamed stores are not ordered with what the caller does next: this comes after the last.
    void end() const {
#if defined(__x86_64__)
        if (is_streaming) _mm_sfence();
#endif
    }
};

}  // namespace penstock
