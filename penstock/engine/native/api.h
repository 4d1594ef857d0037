// What Python hands over: plain structs, mirrored field by field in `structs.py`.
#pragma once

#include <cstdint>

namespace penstock {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

// A packed weight (see linear.cpp). `bias` is [out_features] or null.
struct Linear {
    const void* weight;
    const float* bias;
    int64_t in_features, out_features;
    int32_t dtype, out_dtype;
};

// `weight` and `bias` are [width] or null. `kind` as in NormKind.
struct Norm {
    const float* weight;
    const float* bias;
    float eps;
    int32_t kind;
};

// Paged attention of one layer. Strides are in elements; the last dimension is contiguous.
struct Attention {
    void* key_cache;
    void* value_cache;
    const float* sinks;
    int64_t key_block_stride, key_slot_stride, key_head_stride;
    int64_t value_block_stride, value_slot_stride, value_head_stride;
    int32_t num_heads, num_kv_heads, head_dim, block_size, group, window, dtype;
    float scale, softcap;
};

// What happens to a QKV row: see HeadsSpec.
struct Heads {
    const Attention* attention;
    const Norm* query_norm;
    const Norm* key_norm;
    const float* cos;
    const float* sin;
    int32_t rotary_dim, interleaved, norm_weight_per_head, norm_spans_heads, norm_after_rotary;
};

constexpr int MAX_GROUPS = 8;

// A step, as in penstock/engine/batch.py.
struct Batch {
    const int64_t* token_ids;
    const int64_t* positions;
    const int32_t* query_start;
    const int32_t* kv_len;
    const int64_t* logits_rows;
    const int64_t* slots[MAX_GROUPS];
    const int32_t* block_tables[MAX_GROUPS];
    int64_t table_strides[MAX_GROUPS];
    int64_t num_rows, num_sequences, num_logits_rows;
};

}  // namespace penstock
