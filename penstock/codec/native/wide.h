// AVX2 and AVX-512: four units at a time, whose codes fill a vector, where narrowing each unit by
// itself would leave most of the work to shuffles. With AVX2 bfloat16 is made of numbers at even and
// at odd places apart: what is rounded is a half of a word then, and the two go together without
// crossing lanes.
#pragma once

#include "affine.h"

#if defined(PENSTOCK_AVX512) || defined(PENSTOCK_AVX2)
namespace penstock {
namespace {

constexpr int64_t PACK = 4 * UNIT;  // channels whose codes fill a vector

// Where a number lies among the levels, which may be below zero; not a number is below zero too,
// as the smaller of two is the second where they do not compare.
inline Int place_of(Float value, Float low, Float inverse, Float levels) {
    const Float place = min(levels, (value - low) * inverse) + 0.5f;
#if defined(PENSTOCK_AVX512)
    return (Int)_mm512_cvttps_epi32((__m512)place);
#else
    return (Int)_mm256_cvttps_epi32((__m256)place);
#endif
}

// Four units of places as bytes; what is below zero is zero.
inline Word pack_places(Int a, Int b, Int c, Int d) {
#if defined(PENSTOCK_AVX512)
    const __m512i ab = _mm512_packs_epi32((__m512i)a, (__m512i)b),
                  cd = _mm512_packs_epi32((__m512i)c, (__m512i)d);
    return (Word)_mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
        _mm512_packus_epi16(ab, cd));
#else
    const __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b),
                  cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    return (Word)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd),
                                             _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
}

// Stores codes of PACK channels; of int4 two tokens, the first in the lower halves of the bytes.
template <int BITS, class Places>
inline void store_places(uint8_t* to, Places places_of) {
    Word bytes = places_of(0);
    if constexpr (BITS == 4) bytes |= places_of(1) << 4;
    std::memcpy(to, &bytes, sizeof bytes);
}

#if defined(PENSTOCK_AVX2)
constexpr int64_t SIXTEEN = 2 * UNIT;

// Sixteen numbers, those at even places and those at odd ones.
struct Split {
    Float even, odd;
};

inline Split split(Float first, Float second) {
    const __m256 a = (__m256)first, b = (__m256)second;
    const auto in_order = [](__m256 mixed) {
        return (Float)_mm256_permute4x64_pd((__m256d)mixed, 0xd8);
    };
    return {in_order(_mm256_shuffle_ps(a, b, 0x88)), in_order(_mm256_shuffle_ps(a, b, 0xdd))};
}

// Sixteen codes, of int4 those in the lower or the upper halves of the bytes, as numbers.
template <int BITS, bool IS_UPPER>
inline Split numbers_of(const uint8_t* codes) {
    __m256i shorts = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
    if constexpr (BITS == 4)
        shorts = IS_UPPER ? _mm256_srli_epi16(shorts, 4)
                          : _mm256_and_si256(shorts, _mm256_set1_epi16(15));
    const __m256i even = _mm256_and_si256(shorts, _mm256_set1_epi32(0xffff));
    return {(Float)_mm256_cvtepi32_ps(even),
            (Float)_mm256_cvtepi32_ps(_mm256_srli_epi32(shorts, 16))};
}

// To the nearest, ties to even, as `store` does it.
inline __m256i round_to_bfloat16(Split numbers) {
    const auto rounded = [](Float value) {
        const Word bits = (Word)value;
        return bits + 0x7fffu + ((bits >> 16) & 1u);
    };
    return _mm256_blend_epi16((__m256i)(rounded(numbers.even) >> 16),
                              (__m256i)rounded(numbers.odd), 0xaa);
}

#endif
// `count` channels, a multiple of PACK, over the tokens of one group. Row by row, first to measure
// and then, out of a nearer cache, to encode: memory is read and written in order, which is what it
// does fastest.
template <class T, int BITS>
void encode_key_rows(const T* from, int64_t width, int64_t count, int64_t num_tokens, float16* lows,
                     float16* scales, uint8_t* codes) {
    constexpr int64_t ROWS = 8 / BITS;
    constexpr float levels = (1 << BITS) - 1;
    alignas(LINE) float low[CHUNK], high[CHUNK];  // `high` becomes the inverse of the scale
    for (int64_t c = 0; c < count; c += UNIT) {
        const Float first = load(from + c);
        store(low + c, first), store(high + c, first);
    }
    for (int64_t t = 0; t < num_tokens; t += 4) {
        for (int64_t c = 0; c < count; c += UNIT) {
            const T* row = from + t * width + c;
            // The next rows: no hardware sees four streams across pages.
            for (int64_t r = 4; r < 8; r++) __builtin_prefetch(row + r * width);
            const Float a = load(row), b = load(row + width), d = load(row + 2 * width),
                        e = load(row + 3 * width);
            store(low + c, min(load(low + c), min(min(a, b), min(d, e))));
            store(high + c, max(load(high + c), max(max(a, b), max(d, e))));
        }
    }
    for (int64_t c = 0; c < count; c += UNIT) {
        const Range range =
            settle(load(low + c), load(high + c), levels, lows + c, scales + c, UNIT);
        store(low + c, range.low), store(high + c, range.inverse);
    }
    for (int64_t t = 0; t < num_tokens; t += ROWS) {
        for (int64_t c = 0; c < count; c += PACK) {
            store_places<BITS>(codes + t / ROWS * width + c, [&](int64_t r) {
                const T* row = from + (t + r) * width;
                const auto place = [&](int64_t i) {
                    return place_of(load(row + i), load(low + i), load(high + i), splat(levels));
                };
                return pack_places(place(c), place(c + UNIT), place(c + 2 * UNIT),
                                   place(c + 3 * UNIT));
            });
        }
    }
}

// A row of values, of int4 two, whose groups are 32 channels and a multiple of a unit: a unit of
// groups is measured and encoded while it is in registers and the nearest cache.
template <class T, int BITS>
void encode_value_rows(const T* from, int64_t width, float16* lows, float16* scales,
                       uint8_t* codes) {
    constexpr int64_t ROWS = 8 / BITS, UNITS = GROUP / UNIT;
    constexpr float levels = (1 << BITS) - 1;
    const int64_t row_groups = width / GROUP;
    for (int64_t j = 0; j < row_groups; j += UNIT) {
        alignas(LINE) float low[ROWS][UNIT], inverse[ROWS][UNIT];
        for (int64_t r = 0; r < ROWS; r++) {
            const int64_t first = r * row_groups + j;
            Float low_of[UNIT], high_of[UNIT];
            for (int64_t i = 0; i < UNIT; i++) {
                const T* group = from + (first + i) * GROUP;
                __builtin_prefetch(group + 2048);  // measured: two rows ahead
                low_of[i] = high_of[i] = load(group);
                for (int64_t u = 1; u < UNITS; u++) {
                    const Float unit = load(group + u * UNIT);
                    low_of[i] = min(low_of[i], unit), high_of[i] = max(high_of[i], unit);
                }
            }
            const Range range = settle(smallest_of(low_of), largest_of(high_of), levels,
                                       lows + first, scales + first, UNIT);
            store(low[r], range.low), store(inverse[r], range.inverse);
        }
        for (int64_t i = 0; i < UNIT; i += PACK / GROUP) {
            store_places<BITS>(codes + (j + i) * GROUP, [&](int64_t r) {
                const T* group = from + (r * row_groups + j + i) * GROUP;
                const auto place = [&](int64_t u) {
                    return place_of(load(group + u * UNIT), splat(low[r][i + u / UNITS]),
                                    splat(inverse[r][i + u / UNITS]), splat(levels));
                };
                return pack_places(place(0), place(1), place(2), place(3));
            });
        }
    }
}

}  // namespace
}  // namespace penstock
#endif
