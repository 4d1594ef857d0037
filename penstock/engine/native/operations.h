// Every operation of a decoder, as the interpreter calls it. Rows are contiguous; widths and
// strides are in elements. What each computes is said in penstock/engine/kernels/__init__.py.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "api.h"
#include "vector.h"

namespace penstock {

inline int num_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// linear.cpp
void linear(const Linear& layer, const void* x, int64_t rows, void* y);
void embed_packed(const Linear& layer, const int64_t* ids, int64_t rows, float scale, void* to);

// attention.cpp. `output` is [rows, num_heads, head_dim].
void attend(const Attention& layer, const Batch& batch, const void* query, int64_t query_stride,
            void* output);
void store(const Attention& layer, const void* key, int64_t key_stride, const void* value,
           int64_t value_stride, const int64_t* slots, int64_t rows);

// heads.cpp
void heads(const Heads& spec, const Batch& batch, const void* qkv, void* query);

// elementwise.cpp
void embed(const void* table, const int64_t* ids, int64_t rows, int64_t width, float scale,
           int32_t dtype, void* to);
void norm(const Norm& spec, const void* x, int64_t rows, int64_t width, int32_t dtype, void* y);
void add(const void* residual, const void* delta, float scale, int64_t count, int32_t dtype,
         void* total);
void add_norm(const Norm& spec, const void* residual, const void* delta, float scale, int64_t rows,
              int64_t width, int32_t dtype, void* total, void* normed);
void activate(const void* x, int64_t rows, int64_t width, int32_t kind, bool gated, int32_t dtype,
              void* y);
void select_rows(const void* x, const int64_t* rows, int64_t count, int64_t row_bytes, void* y);
void cap(const void* x, int64_t count, float scale, float softcap, int32_t dtype, float* y);

// One row of a norm: see NormKind.
enum NormKind : int32_t { RMS = 0, RMS_LLAMA = 1, LAYER = 2 };

template <class T>
inline void norm_row(const Norm& spec, const T* x, int64_t width, T* y) {
    float mean = 0;
    if (spec.kind == LAYER) {
        Float total{};
        for (int64_t i = 0; i < width; i += LANES) total += load_some(x + i, width - i);
        mean = sum(total) / width;
    }
    Float squares{};
    for (int64_t i = 0; i < width; i += LANES) {
        Float value = load_some(x + i, width - i) - mean;
        if (width - i < LANES) value = iota() < int32_t(width - i) ? value : Float{};
        squares += value * value;
    }
    const float factor = 1.f / sqrtf(sum(squares) / width + spec.eps);
    for (int64_t i = 0; i < width; i += LANES) {
        Float value = (load_some(x + i, width - i) - mean) * factor;
        if (spec.kind == RMS_LLAMA) value = rounded<T>(value);
        if (spec.weight) value *= load_some(spec.weight + i, width - i);
        if (spec.bias) value += load_some(spec.bias + i, width - i);
        store_some(y + i, value, width - i);
    }
}

template <class T>
inline void scale_row(T* x, int64_t width, float scale) {
    if (scale == 1.f) return;
    for (int64_t i = 0; i < width; i += LANES)
        store_some(x + i, load_some(x + i, width - i) * scale, width - i);
}

// Writes one token's keys and values, [num_kv_heads, head_dim] each, to its slot.
template <class T>
inline void store_slot(const Attention& layer, const T* key, const T* value, int64_t slot) {
    const int64_t block = slot / layer.block_size, offset = slot % layer.block_size;
    T* keys = (T*)layer.key_cache + block * layer.key_block_stride + offset * layer.key_slot_stride;
    T* values =
        (T*)layer.value_cache + block * layer.value_block_stride + offset * layer.value_slot_stride;
    for (int head = 0; head < layer.num_kv_heads; head++) {
        const size_t bytes = sizeof(T) * layer.head_dim;
        memcpy(keys + head * layer.key_head_stride, key + head * layer.head_dim, bytes);
        memcpy(values + head * layer.value_head_stride, value + head * layer.head_dim, bytes);
    }
}

// Rows worth dividing among threads: a thread should have a few microseconds of work.
inline bool is_large(int64_t elements) {
    return elements > 16384;
}

}  // namespace penstock
