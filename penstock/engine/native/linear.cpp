// Linear layers over packed weights, and the embedding lookup that reads rows back out of them.
//
// A packed weight [out, in] is [ceil(out / PANEL), in / UNIT, PANEL] words: a panel of output
// columns is one contiguous stream, read once for every six rows of input.
#include <algorithm>

#include "matrix.h"
#include "operations.h"

namespace penstock {

// Rows that share one accumulator: 192 x PANEL floats stay in the second-level cache.
constexpr int64_t ROWS_PER_BLOCK = 192;
// Words of a panel per pass when there are many rows: 1024 x PANEL words stay in the second-level
// cache. Streaming from there costs nothing measurable; blocks for the first level were up to 30 %
// slower, and so was every kind of prefetching.
constexpr int64_t WORDS_PER_BLOCK = 1024;

template <class Out>
static void write_row(const float* sums, const float* bias, int64_t columns, Out* to) {
    for (int64_t i = 0; i < columns; i += LANES) {
        Float value = load(sums + i);
        if (bias) value += load_some(bias + i, columns - i);
        store_some(to + i, value, columns - i);
    }
}

template <class T, class Out>
static void run_block(const Linear& layer, const uint32_t* x, int64_t x_stride, int64_t rows,
                      int64_t panel, Out* y, int64_t y_stride, float* sums) {
    const int64_t words = layer.in_features / Element<T>::UNIT;
    const uint32_t* weight = (const uint32_t*)layer.weight + panel * words * PANEL;
    const int64_t step = rows > ROWS ? WORDS_PER_BLOCK : words;
    for (int64_t first = 0; first < words; first += step)
        for (int64_t row = 0, count; row < rows; row += count) {
            count = next_rows(rows - row);
            multiply_panel<T>(count, PANEL, first ? Start::SUM : Start::ZERO,
                              x + row * x_stride + first, x_stride, weight + first * PANEL,
                              std::min(step, words - first), sums + row * PANEL, PANEL);
        }
    const int64_t column = panel * PANEL;
    const int64_t columns = std::min<int64_t>(PANEL, layer.out_features - column);
    const float* bias = layer.bias ? layer.bias + column : nullptr;
    for (int64_t row = 0; row < rows; row++)
        write_row(sums + row * PANEL, bias, columns, y + row * y_stride + column);
}

// Waking threads may cost 20 us: what one thread reads or multiplies in that time, it does alone.
static bool is_worth_threads(const Linear& layer, int64_t rows) {
    const int64_t weights = layer.out_features * layer.in_features;
    return weights > 1 << 19 || weights * rows > 1 << 21;
}

template <class T, class Out>
static void run_linear(const Linear& layer, const T* x, int64_t rows, Out* y) {
    const int64_t panels = (layer.out_features + PANEL - 1) / PANEL;
    const int64_t x_stride = layer.in_features / Element<T>::UNIT;
    const int64_t blocks = (rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
#pragma omp parallel if (is_worth_threads(layer, rows))
    {
        alignas(64) float sums[ROWS_PER_BLOCK * PANEL];
#pragma omp for schedule(static)
        for (int64_t item = 0; item < panels * blocks; item++) {
            const int64_t row = item / panels * ROWS_PER_BLOCK, panel = item % panels;
            run_block<T>(layer, (const uint32_t*)x + row * x_stride, x_stride,
                         std::min(ROWS_PER_BLOCK, rows - row), panel, y + row * layer.out_features,
                         layer.out_features, sums);
        }
    }
}

template <class T>
static void pack(const T* weight, int64_t out, int64_t in, uint32_t* packed) {
    const int64_t words = in / Element<T>::UNIT;
    const uint32_t zeros[LANES] = {};
#pragma omp parallel for schedule(static)
    for (int64_t column = 0; column < (out + PANEL - 1) / PANEL * PANEL; column += LANES)
        for (int64_t word = 0; word < words; word += LANES) {
            const uint32_t* rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] =
                    column + i < out ? (const uint32_t*)(weight + (column + i) * in) + word : zeros;
            uint32_t* to = packed + (column / PANEL * words + word) * PANEL + column % PANEL;
            transpose(rows, std::min<int64_t>(LANES, words - word), to, PANEL);
        }
}

// Reads rows of a packed weight back, times `scale`.
template <class T>
static void unpack_rows(const Linear& layer, const int64_t* ids, int64_t rows, float scale, T* to) {
    const int64_t words = layer.in_features / Element<T>::UNIT;
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        const uint32_t* from =
            (const uint32_t*)layer.weight + ids[row] / PANEL * words * PANEL + ids[row] % PANEL;
        uint32_t* result = (uint32_t*)(to + row * layer.in_features);
        for (int64_t word = 0; word < words; word++) result[word] = from[word * PANEL];
        scale_row(to + row * layer.in_features, layer.in_features, scale);
    }
}

void linear(const Linear& layer, const void* x, int64_t rows, void* y) {
    if (layer.dtype == FLOAT32)
        run_linear(layer, (const float*)x, rows, (float*)y);
    else if (layer.out_dtype == FLOAT32)
        run_linear(layer, (const bf16*)x, rows, (float*)y);
    else
        run_linear(layer, (const bf16*)x, rows, (bf16*)y);
}

void embed_packed(const Linear& layer, const int64_t* ids, int64_t rows, float scale, void* to) {
    if (layer.dtype == BFLOAT16)
        unpack_rows(layer, ids, rows, scale, (bf16*)to);
    else
        unpack_rows(layer, ids, rows, scale, (float*)to);
}

}  // namespace penstock

using namespace penstock;

extern "C" int64_t penstock_packed_words(int64_t out, int64_t in, int32_t dtype) {
    return (out + PANEL - 1) / PANEL * PANEL * (dtype == BFLOAT16 ? in / 2 : in);
}

extern "C" void penstock_pack(const void* weight, int64_t out, int64_t in, int32_t dtype,
                              void* packed) {
    if (dtype == BFLOAT16)
        pack((const bf16*)weight, out, in, (uint32_t*)packed);
    else
        pack((const float*)weight, out, in, (uint32_t*)packed);
}
