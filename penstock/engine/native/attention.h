// What the two ways of computing attention share: one query tile's view of a sequence's KV, the
// online softmax, and scratch memory.
//
// Source: online softmax as in FlashAttention (Dao 2022).
//
// Scores are kept in base 2 (the scale includes log2 e), so that a probability is one exp2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>

#include "api.h"
#include "vector.h"

namespace penstock {

// Queries of `count` consecutive tokens of a sequence, for KV heads [head, head_end). The rows of
// one KV head go token by token, and within a token over the query heads that share the KV head.
// Row r sees slots [first(r), last(r)].
struct Tile {
    int32_t sequence, head, head_end, first_token, count;
    int32_t position;    // of the first token: the slot that it is stored in
    int32_t begin, end;  // slots that some row sees, within this tile's part of the context
    int32_t part;        // number of the part, or -1 when the tile has the whole context
    int64_t storage;     // of a part: the row of `Parts` at which its results begin
    bool is_few;         // few rows, so computed as in attention_rows.h
};

struct Context {
    const Attention& layer;
    const Batch& batch;
    const void* query;
    int64_t query_stride;
    void* output;

    int group_size() const {
        return layer.num_heads / layer.num_kv_heads;
    }
    int last(const Tile& tile, int row) const {
        return tile.position + row / group_size();
    }
    int first(const Tile& tile, int row) const {
        return layer.window ? std::max(0, last(tile, row) - layer.window + 1) : 0;
    }
    template <class T>
    const T* query_row(const Tile& tile, int kv_head, int row) const {
        const int head = kv_head * group_size() + row % group_size();
        return (const T*)query + (tile.first_token + row / group_size()) * query_stride +
               (int64_t)head * layer.head_dim;
    }
    template <class T>
    T* output_row(const Tile& tile, int kv_head, int row) const {
        const int head = kv_head * group_size() + row % group_size();
        return (T*)output +
               ((int64_t)(tile.first_token + row / group_size()) * layer.num_heads + head) *
                   layer.head_dim;
    }
    // Fills keys[i] and values[i] with the addresses of slots begin..end - 1 of the tile's first
    // head.
    template <class T>
    void locate(const Tile& tile, int begin, int end, const T** keys, const T** values) const {
        const int32_t* table =
            batch.block_tables[layer.group] + tile.sequence * batch.table_strides[layer.group];
        const T* key_base = (const T*)layer.key_cache + tile.head * layer.key_head_stride;
        const T* value_base = (const T*)layer.value_cache + tile.head * layer.value_head_stride;
        for (int slot = begin; slot < end;) {
            const int64_t block = table[slot / layer.block_size];
            int offset = slot % layer.block_size;
            for (; offset < layer.block_size && slot < end; offset++, slot++) {
                *keys++ =
                    key_base + block * layer.key_block_stride + offset * layer.key_slot_stride;
                *values++ = value_base + block * layer.value_block_stride +
                            offset * layer.value_slot_stride;
            }
        }
    }
};

// attention_plan.h, compiled in attention_bf16.cpp and attention_float.cpp.
template <class T>
void attend_all(const Context& context);

// Per-row state of the online softmax.
struct Running {
    float maximum, sum;
};

inline Running start_running(const Context& context, const Tile& tile, int kv_head, int row) {
    // Where the context is split, the sink is counted in its first part only.
    if (!context.layer.sinks || tile.part > 0) return {-INFINITY, 0.f};
    const int group = context.group_size();
    return {context.layer.sinks[kv_head * group + row % group] * LOG2_E, 1.f};
}

// Turns scores[0, columns) into probabilities of type T, 0 outside [from, to), and returns what the
// row's earlier sums are to be multiplied by. `columns` is a multiple of LANES.
template <class T>
inline float softmax_row(const Attention& layer, float* scores, int columns, int from, int to,
                         Running& row, T* probabilities) {
    if (to <= from) {
        for (int i = 0; i < columns; i += LANES) store(probabilities + i, Float{});
        return 1.f;
    }
    const float scale = layer.scale * LOG2_E;
    const float cap = layer.softcap * LOG2_E,
                inner = layer.softcap ? layer.scale / layer.softcap : 0;
    Float highest = splat(-INFINITY);
    for (int i = 0; i < columns; i += LANES) {
        Float value = load(scores + i);
        value = layer.softcap ? cap * tanh(value * inner) : value * scale;
        if (i < from || i + LANES > to) {
            const Int column = iota() + i;
            value = (column >= from) & (column < to) ? value : splat(-INFINITY);
        }
        store(scores + i, value);
        highest = max(highest, value);
    }
    const float maximum = std::max(row.maximum, largest(highest));
    Float total{};
    for (int i = 0; i < columns; i += LANES) {
        const Float value = exp2(load(scores + i) - maximum);
        total += value;
        store(probabilities + i, value);
    }
    const float rescale = exp2(splat(row.maximum - maximum))[0];
    row = {maximum, row.sum * rescale + sum(total)};
    return rescale;
}

// The values of UNIT neighbouring slots, element by element: a word each.
inline Word pair_up(const float* first, const float*) {
    return (Word)load(first);
}
inline Word pair_up(const bf16* first, const bf16* second) {
    return widen_halves(first) | widen_halves(second) << 16;
}

// Memory of one thread, kept from call to call and grown as needed.
class Scratch {
  public:
    ~Scratch() {
        free(memory_);
    }
    // Starts a new round in which `take` hands out at most `bytes`.
    void reserve(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        free(memory_);
        size_ = (bytes + 63) & ~size_t(63);
        memory_ = (char*)aligned_alloc(64, size_);
        if (!memory_) throw std::bad_alloc();
    }
    template <class T>
    T* take(size_t count) {
        T* result = (T*)(memory_ + used_);
        used_ += (count * sizeof(T) + 63) & ~size_t(63);
        return result;
    }

  private:
    char* memory_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

}  // namespace penstock
