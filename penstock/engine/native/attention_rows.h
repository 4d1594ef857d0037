// Attention of a few query rows (decode): every key and value is used by these rows only, so nothing
// is packed; keys and values are read where they lie, once, and the next ones prefetched meanwhile.
#pragma once

#include "attention.h"

namespace penstock {

constexpr int FEW_ROWS = 8;
constexpr int SPAN = 64;  // slots per round of the online softmax

// The `words` (at most LANES) of a row, and zeros.
static inline Word load_some(const uint32_t* from, int words) {
#if defined(__AVX512F__)
    return (Word)_mm512_maskz_loadu_epi32(words >= 16 ? 0xffff : (1u << words) - 1, from);
#else
    (void)words;  // head_dim is a multiple of 16, so a vector is never partly filled
    return load_words(from);
#endif
}

// Returns the vector whose lane i is the sum of the lanes of partial[i].
static inline Float sum_each(const Float* partial) {
#if defined(__AVX512F__)
    __m512 a[8];
    for (int i = 0; i < 8; i++) {
        const __m512 x = (__m512)partial[i], y = (__m512)partial[i + 8];
        a[i] = _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xee);
    }
    for (int i = 0; i < 4; i++)
        a[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88) + _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    for (int i = 0; i < 2; i++)
        a[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44) + _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    const __m512 total = _mm512_shuffle_ps(a[0], a[1], 0x88) + _mm512_shuffle_ps(a[0], a[1], 0xdd);
    // Lane by lane, `total` now holds the sums of 0 2 1 3, 8 10 9 11, 4 6 5 7, 12 14 13 15.
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (Float)_mm512_permutexvar_ps(order, total);
#else
    Float result;
    for (int i = 0; i < LANES; i++) result[i] = sum(partial[i]);
    return result;
#endif
}

static inline void prefetch_row(const void* row, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)row + i, 0, 3);
}

// scores[r][i] = query row r x keys[i], for i in [begin, end), whole vectors.
template <class T, int R>
static void score_rows(const uint32_t* query, int words, const T* const* keys,
                       const T* const* upcoming, int bytes, int begin, int end,
                       float (*scores)[SPAN]) {
    const int padded = (words + LANES - 1) / LANES * LANES;
    for (int first = begin; first < end; first += LANES) {
        Float partial[R][LANES];
        for (int i = 0; i < LANES; i += 2) {
            const uint32_t* even = (const uint32_t*)keys[first + i];
            const uint32_t* odd = (const uint32_t*)keys[first + i + 1];
            prefetch_row(upcoming[first + i], bytes);
            prefetch_row(upcoming[first + i + 1], bytes);
            Float total[2][R] = {};
            for (int word = 0; word < padded; word += LANES) {
                const Word a = load_some(even + word, words - word);
                const Word b = load_some(odd + word, words - word);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const Word q = load_words(query + r * padded + word);
                    total[0][r] = dot<T>(total[0][r], q, a);
                    total[1][r] = dot<T>(total[1][r], q, b);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) partial[r][i] = total[0][r], partial[r][i + 1] = total[1][r];
        }
        for (int r = 0; r < R; r++) store(scores[r] + first, sum_each(partial[r]));
    }
}

// sums[r][d, d + V * LANES) = that * rescale[r] + probabilities[r] x values, over words [from, to).
template <class T, int R, int V>
static void add_values(const T (*probabilities)[SPAN], const T* const* values,
                       const T* const* upcoming, int from, int to, const float* rescale, int d,
                       float* sums, int stride) {
    constexpr int UNIT = Element<T>::UNIT;
    Float total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            total[r][v] = load(sums + r * stride + d + v * LANES) * rescale[r];
    for (int word = from; word < to; word++) {
        const T* first = values[word * UNIT] + d;
        const T* second = values[word * UNIT + UNIT - 1] + d;
        prefetch_row(upcoming[word * UNIT] + d, V * LANES * sizeof(T));
        prefetch_row(upcoming[word * UNIT + UNIT - 1] + d, V * LANES * sizeof(T));
        Word value[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) value[v] = pair_up(first + v * LANES, second + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Word weight = splat_word(((const uint32_t*)probabilities[r])[word]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) total[r][v] = dot<T>(total[r][v], weight, value[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(sums + r * stride + d + v * LANES, total[r][v]);
}

// Where one slot's key and value lie, for the slots of a span and one more: a pair's second half.
template <class T> struct Addresses {
    const T* keys[SPAN + 2];
    const T* values[SPAN + 2];
};

// Fills in the addresses of the span from slot `base` on; columns outside the tile's slots repeat
// ones inside, so that they are valid (their probability is 0).
template <class T>
static void locate_span(const Context& context, const Tile& tile, int base, Addresses<T>& span) {
    const int from = std::max(tile.begin - base, 0), to = std::min(tile.end - base, SPAN);
    context.locate(tile, base + from, base + to, span.keys + from, span.values + from);
    for (int i = 0; i < from; i++) span.keys[i] = span.keys[from], span.values[i] = span.values[from];
    for (int i = to; i < SPAN; i++) span.keys[i] = span.keys[to - 1], span.values[i] = span.values[to - 1];
}

template <class T, int R>
static void add_span(const T (*probabilities)[SPAN], const Addresses<T>& span,
                     const Addresses<T>& next, int from, int to, const float* rescale, int head_dim,
                     float* sums) {
    constexpr int UNIT = Element<T>::UNIT, V = R <= ROWS ? VECTORS : VECTORS / 2;
    const int first = from / UNIT, last = (to + UNIT - 1) / UNIT;
    int d = 0;
    for (; d + V * LANES <= head_dim; d += V * LANES)
        add_values<T, R, V>(probabilities, span.values, next.keys, first, last, rescale, d, sums, head_dim);
    for (; d < head_dim; d += LANES)
        add_values<T, R, 1>(probabilities, span.values, next.keys, first, last, rescale, d, sums, head_dim);
}

// Leaves the unnormalised sums [R, head_dim] and the state of the softmax.
template <class T, int R>
static void attend_few_rows(const Context& context, const Tile& tile, Scratch& scratch,
                            Running* running, float* sums) {
    const int head_dim = context.layer.head_dim, words = head_dim / Element<T>::UNIT;
    const int padded = (words + LANES - 1) / LANES * LANES;
    scratch.reserve((size_t)R * padded * 4 + 64);
    uint32_t* query = scratch.take<uint32_t>((size_t)R * padded);
    memset(query, 0, (size_t)R * padded * 4);
    memset(sums, 0, sizeof(float) * R * head_dim);
    for (int r = 0; r < R; r++) {
        memcpy(query + r * padded, context.query_row<T>(tile, r), sizeof(T) * head_dim);
        running[r] = start_running(context, tile, r);
    }
    alignas(64) float scores[R][SPAN];
    alignas(64) T probabilities[R][SPAN];
    Addresses<T> spans[2];
    int base = tile.begin / SPAN * SPAN;
    locate_span(context, tile, base, spans[0]);
    for (int which = 0; base < tile.end; base += SPAN, which ^= 1) {
        const Addresses<T>& span = spans[which];
        const int from = std::max(tile.begin - base, 0), to = std::min(tile.end - base, SPAN);
        const int begin = from / LANES * LANES, end = (to + LANES - 1) / LANES * LANES;
        score_rows<T, R>(query, words, span.keys, span.values, sizeof(T) * head_dim, begin, end, scores);
        float rescale[R];
        for (int r = 0; r < R; r++) {
            const int first = std::max(from, context.first(tile, r) - base);
            const int last = std::min(to, context.last(tile, r) + 1 - base);
            rescale[r] = softmax_row(context.layer, scores[r] + begin, end - begin, first - begin,
                                     last - begin, running[r], probabilities[r] + begin);
        }
        Addresses<T>& next = spans[which ^ 1];
        if (base + SPAN < tile.end) locate_span(context, tile, base + SPAN, next);
        else next = span;
        add_span<T, R>(probabilities, span, next, from, to, rescale, head_dim, sums);
    }
}

}  // namespace penstock
