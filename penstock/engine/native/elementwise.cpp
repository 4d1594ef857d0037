// Operations that touch every element once: computed in float32, rounded once.
#include "operations.h"

namespace penstock {

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
static void with_type(int32_t dtype, F f) {
    if (dtype == BFLOAT16)
        f((bf16*)nullptr);
    else
        f((float*)nullptr);
}

template <class T>
static void add_row(const T* residual, const T* delta, float scale, int64_t width, T* total) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t count = width - i;
        store_some(total + i, load_some(residual + i, count) + scale * load_some(delta + i, count),
                   count);
    }
}

void embed(const void* table, const int64_t* ids, int64_t rows, int64_t width, float scale,
           int32_t dtype, void* to) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) if (is_large(rows * width))
        for (int64_t row = 0; row < rows; row++) {
            T* result = (T*)to + row * width;
            memcpy(result, (const T*)table + ids[row] * width, sizeof(T) * width);
            scale_row(result, width, scale);
        }
    });
}

void norm(const Norm& spec, const void* x, int64_t rows, int64_t width, int32_t dtype, void* y) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) if (is_large(rows * width))
        for (int64_t row = 0; row < rows; row++)
            norm_row(spec, (const T*)x + row * width, width, (T*)y + row * width);
    });
}

void add(const void* residual, const void* delta, float scale, int64_t count, int32_t dtype,
         void* total) {
    constexpr int64_t PIECE = 4096;
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) if (is_large(count))
        for (int64_t i = 0; i < count; i += PIECE)
            add_row((const T*)residual + i, (const T*)delta + i, scale,
                    count - i < PIECE ? count - i : PIECE, (T*)total + i);
    });
}

void add_norm(const Norm& spec, const void* residual, const void* delta, float scale, int64_t rows,
              int64_t width, int32_t dtype, void* total, void* normed) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) if (is_large(rows * width))
        for (int64_t row = 0; row < rows; row++) {
            T* to = (T*)total + row * width;
            add_row((const T*)residual + row * width, (const T*)delta + row * width, scale, width,
                    to);
            norm_row(spec, to, width, (T*)normed + row * width);
        }
    });
}

enum ActivationKind : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4 };

// Absolute error 2e-7. Source: Abramowitz and Stegun, 7.1.26.
static inline Float erf(Float x) {
    const Float size = x < 0.f ? -x : x, t = 1.f / (1.f + 0.3275911f * size);
    const Float series =
        ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
         0.254829592f) *
        t;
    const Float result = 1.f - series * exp(-size * size);
    return x < 0.f ? -result : result;
}

template <int KIND>
static inline Float bend(Float x) {
    if constexpr (KIND == SILU) return x / (1.f + exp(-x));
    if constexpr (KIND == GELU) return 0.5f * x * (1.f + erf(x * 0.70710678f));
    if constexpr (KIND == GELU_TANH)
        return 0.5f * x * (1.f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    const Float positive = max(x, Float{});
    return KIND == RELU ? positive : positive * positive;
}

template <class T, int KIND>
static void activate_rows(const T* x, int64_t rows, int64_t width, bool gated, T* y) {
#pragma omp parallel for schedule(static) if (is_large(rows * width))
    for (int64_t row = 0; row < rows; row++) {
        const T* gate = x + row * width * (gated ? 2 : 1);
        T* to = y + row * width;
        for (int64_t i = 0; i < width; i += LANES) {
            Float value = bend<KIND>(load_some(gate + i, width - i));
            if (gated) value *= load_some(gate + width + i, width - i);
            store_some(to + i, value, width - i);
        }
    }
}

void activate(const void* x, int64_t rows, int64_t width, int32_t kind, bool gated, int32_t dtype,
              void* y) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        switch (kind) {
#define CASE(KIND) \
    case KIND:     \
        return activate_rows<T, KIND>((const T*)x, rows, width, gated, (T*)y);
            CASE(SILU) CASE(GELU) CASE(GELU_TANH) CASE(RELU) CASE(RELU2)
#undef CASE
        }
    });
}

void select_rows(const void* x, const int64_t* rows, int64_t count, int64_t row_bytes, void* y) {
    for (int64_t i = 0; i < count; i++)
        memcpy((char*)y + i * row_bytes, (const char*)x + rows[i] * row_bytes, row_bytes);
}

void cap(const void* x, int64_t count, float scale, float softcap, int32_t dtype, float* y) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) if (is_large(count))
        for (int64_t i = 0; i < count; i += LANES) {
            Float value = load_some((const T*)x + i, count - i) * scale;
            if (softcap != 0) value = softcap * tanh(value * (1.f / softcap));
            store_some(y + i, value, count - i);
        }
    });
}

}  // namespace penstock
