// What happens between the QKV product and attention: head norms, rotary embedding, and the writing
// of keys and values to their slots, row by row in one pass.
#include <algorithm>
#include <vector>

#include "operations.h"

namespace penstock {

// A row's query or key heads.
template <class T>
struct Section {
    const Heads& spec;
    const Norm* norm;
    int heads, head_dim;

    void normalise(T* x) const {
        if (spec.norm_spans_heads) return norm_row(*norm, x, heads * head_dim, x);
        for (int head = 0; head < heads; head++) {
            Norm own = *norm;
            const int64_t offset = spec.norm_weight_per_head ? (int64_t)head * head_dim : 0;
            if (own.weight) own.weight += offset;
            if (own.bias) own.bias += offset;
            norm_row(own, x + head * head_dim, head_dim, x + head * head_dim);
        }
    }

    void turn(T* x, int64_t position) const {
        const int half = spec.rotary_dim / 2;
        const float* cos = spec.cos + position * half;
        const float* sin = spec.sin + position * half;
        for (int head = 0; head < heads; head++, x += head_dim)
            if (spec.interleaved)
                turn_interleaved(x, half, cos, sin);
            else
                turn_halves(x, half, cos, sin);
    }

    static void turn_halves(T* x, int half, const float* cos, const float* sin) {
        for (int i = 0; i < half; i += LANES) {
            const int count = half - i;
            const Float a = load_some(x + i, count), b = load_some(x + half + i, count);
            const Float c = load_some(cos + i, count), s = load_some(sin + i, count);
            store_some(x + i, a * c - b * s, count);
            store_some(x + half + i, b * c + a * s, count);
        }
    }

    static void turn_interleaved(T* x, int half, const float* cos, const float* sin) {
        float first[256], second[256];
        for (int i = 0; i < half; i++) first[i] = widen(x[2 * i]), second[i] = widen(x[2 * i + 1]);
        float turned[512];
        for (int i = 0; i < half; i++) {
            turned[2 * i] = first[i] * cos[i] - second[i] * sin[i];
            turned[2 * i + 1] = second[i] * cos[i] + first[i] * sin[i];
        }
        for (int i = 0; i < 2 * half; i += LANES)
            store_some(x + i, load_some(turned + i, 2 * half - i), 2 * half - i);
    }

    void apply(T* x, int64_t position) const {
        if (norm && !spec.norm_after_rotary) normalise(x);
        if (spec.cos) turn(x, position);
        if (norm && spec.norm_after_rotary) normalise(x);
    }
};

template <class T>
static void run_heads(const Heads& spec, const Batch& batch, const T* qkv, T* query) {
    const Attention& layer = *spec.attention;
    const int64_t head_dim = layer.head_dim, query_width = layer.num_heads * head_dim;
    const int64_t key_width = layer.num_kv_heads * head_dim, width = query_width + 2 * key_width;
    const Section<T> queries{spec, spec.query_norm, layer.num_heads, layer.head_dim};
    const Section<T> keys{spec, spec.key_norm, layer.num_kv_heads, layer.head_dim};
    const int64_t* slots = batch.slots[layer.group];
#pragma omp parallel for schedule(static) if (is_large(batch.num_rows * width))
    for (int64_t row = 0; row < batch.num_rows; row++) {
        const T* from = qkv + row * width;
        T* to = query + row * query_width;
        memcpy(to, from, sizeof(T) * query_width);
        queries.apply(to, batch.positions[row]);
        if (slots[row] < 0) continue;
        static thread_local std::vector<T> key;
        key.assign(from + query_width, from + query_width + key_width);
        keys.apply(key.data(), batch.positions[row]);
        store_slot(layer, key.data(), from + query_width + key_width, slots[row]);
    }
}

void heads(const Heads& spec, const Batch& batch, const void* qkv, void* query) {
    if (spec.attention->dtype == BFLOAT16)
        run_heads(spec, batch, (const bf16*)qkv, (bf16*)query);
    else
        run_heads(spec, batch, (const float*)qkv, (float*)query);
}

}  // namespace penstock
