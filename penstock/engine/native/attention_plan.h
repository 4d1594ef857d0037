// How the work of one call is divided among threads, and the division undone.
//
// Source: splitting a long context and merging the parts as in Flash-Decoding (Dao, Haziza, Massa,
// Sizov 2023).
#pragma once

#include <vector>

#include "attention_rows.h"
#include "attention_tiles.h"
#include "operations.h"

namespace penstock {

constexpr int PART_SLOTS_MIN = 256;  // a shorter part is not worth merging

template <class T>
static void attend_few(const Context& context, const Tile& tile, uint32_t* query, Running* running,
                       float* sums) {
    switch (tile.count * context.group_size()) {
#define CASE(R) \
    case R:     \
        return attend_few_rows<T, R>(context, tile, query, running, sums);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

template <class T>
static void write_rows(const Context& context, const Tile& tile, const Running* running,
                       const float* sums) {
    const int head_dim = context.layer.head_dim, rows = tile.count * context.group_size();
    for (int i = 0; i < (tile.head_end - tile.head) * rows; i++) {
        const float factor = running[i].sum > 0 ? 1.f / running[i].sum : 0.f;
        T* to = context.output_row<T>(tile, tile.head + i / rows, i % rows);
        for (int d = 0; d < head_dim; d += LANES)
            store(to + d, load(sums + i * head_dim + d) * factor);
    }
}

// Adds the second part of a context to the first.
static void merge(int rows, int head_dim, Running* running, float* sums, const Running* more,
                  const float* more_sums) {
    for (int row = 0; row < rows; row++) {
        const float maximum = std::max(running[row].maximum, more[row].maximum);
        if (maximum == -INFINITY) continue;
        const float a = exp2f(running[row].maximum - maximum),
                    b = exp2f(more[row].maximum - maximum);
        running[row] = {maximum, running[row].sum * a + more[row].sum * b};
        for (int d = row * head_dim; d < (row + 1) * head_dim; d += LANES)
            store(sums + d, load(sums + d) * a + load(more_sums + d) * b);
    }
}

// The work of one call. Few-row tiles take all heads of a sequence at once, so that memory is read
// in its own order; with more threads than that keeps busy they take fewer heads, and in the end a
// part of the context each. The parts of one tile lie side by side.
struct Plan {
    std::vector<Tile> tiles;
    int heads_per_tile, parts = 1;

    Plan(const Context& context, int threads) {
        const int64_t sequences = std::max<int64_t>(1, context.batch.num_sequences);
        const int heads = context.layer.num_kv_heads;
        const int64_t wanted = threads > 1 ? 2 * threads : 1;
        heads_per_tile = std::max<int64_t>(1, std::min<int64_t>(heads, heads * sequences / wanted));
        if (heads * sequences < wanted)
            parts = (wanted + heads * sequences - 1) / (heads * sequences);
        for (int sequence = 0; sequence < context.batch.num_sequences; sequence++)
            add(context, sequence);
    }

    void add(const Context& context, int sequence) {
        const Batch& batch = context.batch;
        const int first = batch.query_start[sequence], last = batch.query_start[sequence + 1];
        const int position = batch.kv_len[sequence] - (last - first), group = context.group_size();
        const int heads = context.layer.num_kv_heads, step = std::max(1, TILE_ROWS / group);
        for (int token = first; token < last; token += step) {
            const int count = std::min(step, last - token);
            const bool is_few = count * group <= FEW_ROWS;
            const int heads_step = is_few ? heads_per_tile : 1;
            for (int head = 0; head < heads; head += heads_step) {
                const int head_end = std::min(heads, head + heads_step);
                Tile tile{sequence, head, head_end, token, count, position + token - first,
                          0,        0,    -1};
                tile.begin = context.first(tile, 0);
                tile.end = context.last(tile, count * group - 1) + 1;
                if (is_few)
                    split(tile);
                else
                    tiles.push_back(tile);
            }
        }
    }

    void split(Tile tile) {
        const int slots = tile.end - tile.begin, count = std::min(parts, slots / PART_SLOTS_MIN);
        if (count < 2) return tiles.push_back(tile);
        const int begin = tile.begin, step = (slots / count + SPAN_MAX - 1) / SPAN_MAX * SPAN_MAX;
        for (tile.part = 0; begin + tile.part * step < begin + slots; tile.part++) {
            Tile part = tile;
            part.begin = begin + tile.part * step;
            part.end = std::min(part.begin + step, tile.end);
            tiles.push_back(part);
        }
    }
};

// What the parts of split tiles leave behind, one entry per tile. A split tile has one KV head.
struct Parts {
    std::vector<Running> running;
    std::vector<float> sums;
    int head_dim;
    Parts(const Plan& plan, int head_dim) : head_dim(head_dim) {
        if (plan.parts == 1) return;
        running.resize(plan.tiles.size() * FEW_ROWS);
        sums.resize(plan.tiles.size() * FEW_ROWS * head_dim);
    }
    Running* running_of(size_t i) {
        return running.data() + i * FEW_ROWS;
    }
    float* sums_of(size_t i) {
        return sums.data() + i * FEW_ROWS * head_dim;
    }
};

template <class T>
static void attend_one(const Context& context, const Plan& plan, size_t i, Parts& parts) {
    static thread_local Scratch scratch;
    const Tile& tile = plan.tiles[i];
    const int rows = tile.count * context.group_size(), head_dim = context.layer.head_dim;
    if (rows > FEW_ROWS) return attend_tile<T>(context, tile, scratch);
    const size_t all = (size_t)rows * (tile.head_end - tile.head), padded = head_dim + LANES;
    scratch.reserve(all * (2 * padded * 4 + sizeof(Running)) + 3 * 64);
    uint32_t* query = scratch.take<uint32_t>(all * padded);
    if (tile.part >= 0)
        return attend_few<T>(context, tile, query, parts.running_of(i), parts.sums_of(i));
    float* sums = scratch.take<float>(all * head_dim);
    Running* running = scratch.take<Running>(all);
    attend_few<T>(context, tile, query, running, sums);
    write_rows<T>(context, tile, running, sums);
}

template <class T>
void attend_all(const Context& context) {
    const Plan plan(context, num_threads());
    Parts parts(plan, context.layer.head_dim);
#pragma omp parallel for schedule(dynamic, 1) if (plan.tiles.size() > 1)
    for (size_t i = 0; i < plan.tiles.size(); i++) attend_one<T>(context, plan, i, parts);
    if (plan.parts == 1) return;
    for (size_t i = 0, first = 0; i < plan.tiles.size(); i++) {
        const Tile& tile = plan.tiles[i];
        if (tile.part < 0) continue;
        if (tile.part == 0)
            first = i;
        else
            merge(tile.count * context.group_size(), context.layer.head_dim,
                  parts.running_of(first), parts.sums_of(first), parts.running_of(i),
                  parts.sums_of(i));
        const bool is_last = i + 1 == plan.tiles.size() || plan.tiles[i + 1].part <= 0;
        if (is_last) write_rows<T>(context, tile, parts.running_of(first), parts.sums_of(first));
    }
}

}  // namespace penstock
