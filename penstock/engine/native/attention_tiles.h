// Attention of many query rows: keys and values are packed into panels once per tile, a chunk of
// the context at a time, and all rows are multiplied by them six at a time.
#pragma once

#include "attention.h"
#include "matrix.h"

namespace penstock {

constexpr int CHUNK =
    256;  // slots per chunk: packed keys and values stay in the second-level cache
constexpr int TILE_ROWS = 192;  // query rows that share a packed chunk

template <class T>
struct TileMemory {
    const T* keys[CHUNK];
    const T* values[CHUNK];
    T* query;                // [rows, head_dim]
    float* sums;             // [rows, padded head_dim]
    Running* running;        // [rows]
    uint32_t* key_panels;    // [CHUNK / PANEL, head_dim / UNIT, PANEL]
    uint32_t* value_panels;  // [padded head_dim / PANEL, CHUNK / UNIT, PANEL]
    float* scores;           // [ROWS, CHUNK]
    T* probabilities;        // [ROWS, CHUNK]
    int padded;              // head_dim rounded up to whole panels

    TileMemory(Scratch& scratch, int rows, int head_dim) {
        padded = (head_dim + PANEL - 1) / PANEL * PANEL;
        scratch.reserve((size_t)rows * (padded * 8 + 16) +
                        (size_t)CHUNK * (2 * padded + 2 * ROWS) * 4 + 8 * 64);
        query = scratch.take<T>((size_t)rows * head_dim);
        sums = scratch.take<float>((size_t)rows * padded);
        running = scratch.take<Running>(rows);
        key_panels = scratch.take<uint32_t>((size_t)CHUNK * padded);
        value_panels = scratch.take<uint32_t>((size_t)CHUNK * padded);
        scores = scratch.take<float>(ROWS * CHUNK);
        probabilities = scratch.take<T>(ROWS * CHUNK);
    }
};

// Columns [from, to) of the chunk are packed, and zeros up to whole panels on both sides: what lies
// in slots that nobody sees must not be read, because 0 x NaN is NaN.
template <class T>
static void pack_keys(TileMemory<T>& memory, int from, int to, int head_dim) {
    alignas(64) static const uint32_t zeros[256] = {};
    const int words = head_dim / Element<T>::UNIT;
    for (int column = from / PANEL * PANEL; column < (to + PANEL - 1) / PANEL * PANEL;
         column += LANES) {
        uint32_t* panel = memory.key_panels + column / PANEL * words * PANEL + column % PANEL;
        const uint32_t* rows[LANES];
        for (int i = 0; i < LANES; i++) {
            const bool wanted = column + i >= from && column + i < to;
            rows[i] = wanted ? (const uint32_t*)memory.keys[column + i] : zeros;
        }
        for (int word = 0; word < words; word += LANES) {
            transpose(rows, std::min(LANES, words - word), panel + word * PANEL, PANEL);
            for (int i = 0; i < LANES; i++) rows[i] += LANES;
        }
    }
}

template <class T>
static void pack_values(TileMemory<T>& memory, int from, int to, int head_dim) {
    constexpr int UNIT = Element<T>::UNIT;
    static const T zeros[256] = {};
    for (int column = from / UNIT * UNIT; column < to; column += UNIT) {
        const T* first = column >= from ? memory.values[column] : zeros;
        const T* second = column + UNIT - 1 < to ? memory.values[column + UNIT - 1] : zeros;
        uint32_t* word = memory.value_panels + column / UNIT * PANEL;
        for (int d = 0; d < head_dim; d += LANES)
            *(Word*)(word + d / PANEL * (CHUNK / UNIT) * PANEL + d % PANEL) =
                pair_up(first + d, second + d);
    }
}

// One chunk for up to ROWS rows. `base` is the slot of the chunk's column 0; columns [from, to) are
// packed.
template <class T>
static void attend_rows(const Context& context, const Tile& tile, TileMemory<T>& memory, int row,
                        int count, int base, int from, int to) {
    constexpr int UNIT = Element<T>::UNIT;
    const int head_dim = context.layer.head_dim, words = head_dim / UNIT;
    to = std::min(to, context.last(tile, row + count - 1) + 1 - base);
    from = std::max(from, context.first(tile, row) - base);
    if (to <= from) return;
    const int begin = from / PANEL * PANEL, end = (to + PANEL - 1) / PANEL * PANEL;
    const T* query = memory.query + (size_t)row * head_dim;
    for (int column = begin; column < end; column += PANEL)
        multiply_panel<T>(count, PANEL, Start::ZERO, (const uint32_t*)query, words,
                          memory.key_panels + (size_t)column * words, words, memory.scores + column,
                          CHUNK);
    float rescale[ROWS];
    for (int i = 0; i < count; i++) {
        const int first = std::max(from, context.first(tile, row + i) - base) - begin;
        const int last = std::min(to, context.last(tile, row + i) + 1 - base) - begin;
        rescale[i] =
            softmax_row(context.layer, memory.scores + i * CHUNK + begin, end - begin, first, last,
                        memory.running[row + i], memory.probabilities + i * CHUNK + begin);
    }
    const int first_word = from / UNIT, last_word = (to + UNIT - 1) / UNIT;
    for (int d = 0; d < head_dim; d += PANEL)
        multiply_panel<T>(
            count, std::min(PANEL, head_dim - d), Start::SUM,
            (const uint32_t*)memory.probabilities + first_word, CHUNK / UNIT,
            memory.value_panels + ((size_t)d / PANEL * (CHUNK / UNIT) + first_word) * PANEL,
            last_word - first_word, memory.sums + (size_t)row * memory.padded + d, memory.padded,
            rescale);
}

template <class T>
static void attend_tile(const Context& context, const Tile& tile, Scratch& scratch) {
    const int rows = tile.count * context.group_size(), head_dim = context.layer.head_dim;
    TileMemory<T> memory(scratch, rows, head_dim);
    memset(memory.sums, 0, sizeof(float) * rows * memory.padded);
    for (int row = 0; row < rows; row++) {
        memcpy(memory.query + (size_t)row * head_dim, context.query_row<T>(tile, tile.head, row),
               sizeof(T) * head_dim);
        memory.running[row] = start_running(context, tile, tile.head, row);
    }
    for (int base = tile.begin / CHUNK * CHUNK; base < tile.end; base += CHUNK) {
        const int from = std::max(tile.begin - base, 0), to = std::min(tile.end - base, CHUNK);
        context.locate(tile, base + from, base + to, memory.keys + from, memory.values + from);
        pack_keys(memory, from, to, head_dim);
        pack_values(memory, from, to, head_dim);
        for (int row = 0; row < rows; row += ROWS)
            attend_rows(context, tile, memory, row, std::min(ROWS, rows - row), base, from, to);
    }
    for (int row = 0; row < rows; row++) {
        const float factor = memory.running[row].sum > 0 ? 1.f / memory.running[row].sum : 0.f;
        T* to = context.output_row<T>(tile, tile.head, row);
        for (int d = 0; d < head_dim; d += LANES)
            store(to + d, load(memory.sums + (size_t)row * memory.padded + d) * factor);
    }
}

}  // namespace penstock
