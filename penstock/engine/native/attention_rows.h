// Attention of a few query rows (decode): every key and value is used by these rows only, so
// nothing is packed; keys and values are read where they lie, once, and the next ones prefetched
// meanwhile.
#pragma once

#include "attention.h"

namespace penstock {

constexpr int FEW_ROWS = 8;
constexpr int SPAN_MAX = 128;  // slots per round of the online softmax
constexpr int64_t SPAN_BYTES =
    128 << 10;  // keys and values of a span; the next span is cached beside it

// The number of slots depends on the layer alone, so that results do not depend on the batch.
static inline int span_slots(const Attention& layer) {
    const int64_t slot_bytes =
        2 * layer.num_kv_heads * layer.head_dim * (layer.dtype == BFLOAT16 ? 2 : 4);
    int slots = SPAN_MAX;
    while (slots > 32 && slots * slot_bytes > SPAN_BYTES) slots /= 2;
    return slots;
}

// The `words` (at most LANES) of a row, and zeros.
static inline Word load_words_some(const uint32_t* from, int words) {
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
        a[i] =
            _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88) + _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
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

// Where one slot's key and value lie (of the tile's first head), for the slots of a span.
template <class T>
struct Addresses {
    const T* keys[SPAN_MAX];
    const T* values[SPAN_MAX];
    int count = 0;  // of the slots that are there

    // The span of `slots` slots from `base` on. Columns outside the tile's slots repeat ones
    // inside, so that they can be read; their probability is 0.
    void locate(const Context& context, const Tile& tile, int base, int slots) {
        const int from = std::max(tile.begin - base, 0), to = std::min(tile.end - base, slots);
        count = std::max(0, to);
        if (to <= from) return;
        context.locate(tile, base + from, base + to, keys + from, values + from);
        for (int i = 0; i < from; i++) keys[i] = keys[from], values[i] = values[from];
        for (int i = to; i < slots; i++) keys[i] = keys[to - 1], values[i] = values[to - 1];
    }
};

// Brings the next span into the cache while this one is computed on, a few lines at a time, in the
// order of memory, whatever the order of the computation. A machine's own prefetching does not see
// across blocks.
class Prefetcher {
  public:
    // `rows` are the slots' addresses, `bytes` the size of a slot, all heads; 0 prefetches nothing.
    template <class T>
    Prefetcher(const T* const* rows, int slots, int64_t bytes)
        : rows_((const char* const*)rows),
          end_of_rows_(rows_ + (bytes ? slots : 0)),
          bytes_(bytes) {
        start_row();
    }
    void fetch(int lines) {
        for (; lines > 0 && rows_ < end_of_rows_; lines--) {
            __builtin_prefetch(at_, 0, 2);
            at_ += 64;
            if (at_ >= end_) rows_++, start_row();
        }
    }

  private:
    void start_row() {
        if (rows_ < end_of_rows_) at_ = *rows_, end_ = at_ + bytes_;
    }
    const char *const *rows_, *const *end_of_rows_;
    const char *at_ = nullptr, *end_ = nullptr;
    int64_t bytes_;
};

// partial[r][i] = the products of query row r and key i, lane by lane, for N slots.
template <class T, int R, int N>
static inline void multiply_keys(const uint32_t* query, int words, int padded, const T* const* keys,
                                 int64_t offset, Float (*partial)[LANES]) {
    Float total[R][N] = {};
    for (int word = 0; word < words; word += LANES) {
        Word key[N];
        const bool is_whole = LANES <= 8 || words - word >= LANES;
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            const uint32_t* from = (const uint32_t*)(keys[i] + offset) + word;
            key[i] = is_whole ? load_words(from) : load_words_some(from, words - word);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Word q = load_words(query + r * padded + word);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) total[r][i] = dot<T>(total[r][i], q, key[i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) partial[r][i] = total[r][i];
}

// scores[r][i] = query row r x key i, for i in [begin, end), whole vectors.
template <class T, int R>
static void score_rows(const uint32_t* query, int words, const T* const* keys, int64_t offset,
                       Prefetcher& prefetcher, int begin, int end, float (*scores)[SPAN_MAX]) {
    // R x N accumulators, N keys and a query fit the register file.
    constexpr int N = R <= 4 && LANES > 8 ? 4 : 2;
    const int padded = (words + LANES - 1) / LANES * LANES;
    for (int first = begin; first < end; first += LANES) {
        Float partial[R][LANES];
        for (int i = 0; i < LANES; i += N) {
            prefetcher.fetch((N * words + 15) / 16);
            Float few[R][LANES];
            multiply_keys<T, R, N>(query, words, padded, keys + first + i, offset, few);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int j = 0; j < N; j++) partial[r][i + j] = few[r][j];
        }
        for (int r = 0; r < R; r++) store(scores[r] + first, sum_each(partial[r]));
    }
}

// sums[r][0, V * LANES) = that * rescale[r] + probabilities[r] x values, over words [from, to). The
// elements of sums are in the order of `interleave`, save where V is 1.
template <class T, int R, int V>
static void add_values(const T (*probabilities)[SPAN_MAX], const T* const* values, int64_t offset,
                       Prefetcher& prefetcher, int from, int to, const float* rescale, float* sums,
                       int stride) {
    constexpr int UNIT = Element<T>::UNIT;
    Float total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) total[r][v] = load(sums + r * stride + v * LANES) * rescale[r];
    for (int word = from; word < to; word++) {
        const T* first = values[word * UNIT] + offset;
        const T* second = values[word * UNIT + UNIT - 1] + offset;
        prefetcher.fetch((V * LANES + 15) / 16);
        Word value[V];
        if constexpr (V == 1) {
            value[0] = pair_up(first, second);
        } else {
#pragma GCC unroll 8
            for (int v = 0; v < V; v += 2)
                interleave(first + v * LANES, second + v * LANES, value[v], value[v + 1]);
        }
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
        for (int v = 0; v < V; v++) store(sums + r * stride + v * LANES, total[r][v]);
}

// One span of one KV head; columns [from, to) are there.
template <class T, int R>
struct FewRows {
    const Context& context;
    const Tile& tile;
    int words, padded, head_dim;
    alignas(64) float scores[R][SPAN_MAX];
    alignas(64) T probabilities[R][SPAN_MAX];

    void attend(int head, const uint32_t* query, const Addresses<T>& span, int base, int from,
                int to, Prefetcher& keys, Prefetcher& values, Running* running, float* sums) {
        constexpr int UNIT = Element<T>::UNIT, V = R <= ROWS ? VECTORS : 2;
        const int begin = from / LANES * LANES, end = (to + LANES - 1) / LANES * LANES;
        const int64_t key_offset = (head - tile.head) * context.layer.key_head_stride;
        const int64_t value_offset = (head - tile.head) * context.layer.value_head_stride;
        score_rows<T, R>(query, words, span.keys, key_offset, keys, begin, end, scores);
        float rescale[R];
        for (int r = 0; r < R; r++) {
            const int first = std::max(from, context.first(tile, r) - base);
            const int last = std::min(to, context.last(tile, r) + 1 - base);
            rescale[r] = softmax_row(context.layer, scores[r] + begin, end - begin, first - begin,
                                     last - begin, running[r], probabilities[r] + begin);
        }
        const int first = from / UNIT, last = (to + UNIT - 1) / UNIT;
        int d = 0;
        for (; d + V * LANES <= head_dim; d += V * LANES)
            add_values<T, R, V>(probabilities, span.values, value_offset + d, values, first, last,
                                rescale, sums + d, head_dim);
        for (; d + 2 * LANES <= head_dim; d += 2 * LANES)
            add_values<T, R, 2>(probabilities, span.values, value_offset + d, values, first, last,
                                rescale, sums + d, head_dim);
        for (; d < head_dim; d += LANES)
            add_values<T, R, 1>(probabilities, span.values, value_offset + d, values, first, last,
                                rescale, sums + d, head_dim);
    }
};

// Puts the elements of each row's sums in their natural order.
template <class T>
static void restore_rows(float* sums, int rows, int head_dim) {
    for (int row = 0; row < rows; row++, sums += head_dim)
        for (int d = 0; d + 2 * LANES <= head_dim; d += 2 * LANES) restore<T>(sums + d);
}

// Leaves, for each KV head of the tile, the unnormalised sums [R, head_dim] and the softmax's
// state.
template <class T, int R>
static void attend_few_rows(const Context& context, const Tile& tile, uint32_t* query,
                            Running* running, float* sums) {
    const Attention& layer = context.layer;
    const int head_dim = layer.head_dim, words = head_dim / Element<T>::UNIT;
    const int padded = (words + LANES - 1) / LANES * LANES, heads = tile.head_end - tile.head;
    const int slots = span_slots(layer);
    // Heads that do not follow one another in memory are left to the machine.
    const int64_t bytes = (int64_t)heads * head_dim * sizeof(T);
    const int64_t key_bytes = layer.key_head_stride == head_dim ? bytes : 0;
    const int64_t value_bytes = layer.value_head_stride == head_dim ? bytes : 0;
    memset(query, 0, sizeof(uint32_t) * heads * R * padded);
    memset(sums, 0, sizeof(float) * heads * R * head_dim);
    for (int i = 0; i < heads * R; i++) {
        const int head = tile.head + i / R;
        memcpy(query + i * padded, context.query_row<T>(tile, head, i % R), sizeof(T) * head_dim);
        running[i] = start_running(context, tile, head, i % R);
    }
    FewRows<T, R> rows{context, tile, words, padded, head_dim, {}, {}};
    Addresses<T> spans[2];
    int base = tile.begin / slots * slots;
    spans[0].locate(context, tile, base, slots);
    for (int which = 0; base < tile.end; base += slots, which ^= 1) {
        const Addresses<T>&span = spans[which], &next = spans[which ^ 1];
        spans[which ^ 1].locate(context, tile, base + slots, slots);
        Prefetcher keys(next.keys, next.count, key_bytes);
        Prefetcher values(next.values, next.count, value_bytes);
        const int from = std::max(tile.begin - base, 0);
        for (int i = 0; i < heads; i++)
            rows.attend(tile.head + i, query + i * R * padded, span, base, from, span.count, keys,
                        values, running + i * R, sums + i * R * head_dim);
    }
    restore_rows<T>(sums, heads * R, head_dim);
}

}  // namespace penstock
