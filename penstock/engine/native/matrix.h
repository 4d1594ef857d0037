// The one matrix kernel: up to ROWS rows times a panel of up to PANEL columns. Linear layers,
// query x key and probabilities x value all run on it.
//
// A panel holds its columns side by side, word after word: [words, PANEL], so that a step of the
// loop reads VECTORS whole vectors, and multiplies them by one broadcast word of each row.
#pragma once

#include "vector.h"

namespace penstock {

enum class Start { ZERO, SUM };

// result[m] (+)= sum over w of rows[m][w] * panel[w], `stride` words from row to row, for M rows
// and V vectors of columns. `scale`, when given, multiplies what was in result beforehand, row by
// row. The order of summation depends on nothing but `words`: a row's result does not depend on the
// rows that it is computed with.
template <class T, int M, int V>
inline void multiply(Start start, const uint32_t* rows, int64_t stride, const uint32_t* panel,
                     int64_t words, float* result, int64_t result_stride, const float* scale) {
    Float total[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            total[m][v] =
                start == Start::ZERO ? Float{} : load(result + m * result_stride + v * LANES);
            if (scale) total[m][v] *= scale[m];
        }
    for (int64_t w = 0; w < words; w++) {
        Word columns[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) columns[v] = load_words(panel + w * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Word broadcast = splat_word(rows[m * stride + w]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) total[m][v] = dot<T>(total[m][v], broadcast, columns[v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(result + m * result_stride + v * LANES, total[m][v]);
}

template <class T, int V>
inline void multiply_rows(int count, Start start, const uint32_t* rows, int64_t stride,
                          const uint32_t* panel, int64_t words, float* result,
                          int64_t result_stride, const float* scale) {
    switch (count) {
#define CASE(M)                                                                             \
    case M:                                                                                 \
        multiply<T, M, V>(start, rows, stride, panel, words, result, result_stride, scale); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}

// How many of `rows` rows to multiply next: as even a division as possible into tiles of up to
// ROWS, because a tile of one or two rows waits for its own sums.
inline int next_rows(int64_t rows) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    return (rows + tiles - 1) / tiles;
}

// As `multiply`, for any number of rows up to ROWS and of columns up to PANEL. Writes whole
// vectors.
template <class T>
void multiply_panel(int count, int columns, Start start, const uint32_t* rows, int64_t stride,
                    const uint32_t* panel, int64_t words, float* result, int64_t result_stride,
                    const float* scale = nullptr) {
    switch ((columns + LANES - 1) / LANES) {
        case 1:
            return multiply_rows<T, 1>(count, start, rows, stride, panel, words, result,
                                       result_stride, scale);
        case 2:
            return multiply_rows<T, 2>(count, start, rows, stride, panel, words, result,
                                       result_stride, scale);
        case 3:
            if constexpr (VECTORS > 2)
                return multiply_rows<T, 3>(count, start, rows, stride, panel, words, result,
                                           result_stride, scale);
            break;
        default:
            if constexpr (VECTORS > 2)
                return multiply_rows<T, 4>(count, start, rows, stride, panel, words, result,
                                           result_stride, scale);
    }
}

}  // namespace penstock
