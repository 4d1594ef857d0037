// How the work of one call is divided among threads, and the division undone.
//
// Source: splitting a long context and merging the parts as in Flash-Decoding (Dao, Haziza, Massa,
// Sizov 2023).
#pragma once

#include <memory>
#include <vector>

#include "attention_rows.h"
#include "attention_tiles.h"
#include "operations.h"

namespace penstock {

// Where a long context is cut. It depends on nothing but the context, threads or no threads, so
// that a row's result does not depend on its batch or its machine's load.
constexpr int PART_SLOTS = 1024;
constexpr int64_t PARALLEL_PRODUCTS_MIN = 1 << 18;  // some 20 us; waking threads may cost as much

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
// in its own order; with more threads than that keeps busy they take fewer. The parts of one tile
// lie side by side.
struct Plan {
    std::vector<Tile> tiles;
    int heads_per_tile;
    int64_t part_rows = 0;
    int64_t products = 0;  // of a query's element and a key's, all told

    Plan(const Context& context, int threads) {
        const int64_t sequences = std::max<int64_t>(1, context.batch.num_sequences);
        const int heads = context.layer.num_kv_heads;
        const int64_t wanted = threads > 1 ? 2 * threads : 1;
        heads_per_tile = std::max<int64_t>(1, std::min<int64_t>(heads, heads * sequences / wanted));
        for (int sequence = 0; sequence < context.batch.num_sequences; sequence++)
            add(context, sequence);
    }

    void add(const Context& context, int sequence) {
        const Batch& batch = context.batch;
        const int first = batch.query_start[sequence], last = batch.query_start[sequence + 1];
        const int position = batch.kv_len[sequence] - (last - first), group = context.group_size();
        const int heads = context.layer.num_kv_heads, step = std::max(1, TILE_ROWS / group);
        // The last rows of a long chunk are few, too, but are computed as the others are: what a
        // chunk computes does not depend on where it ends.
        const bool is_few = (last - first) * group <= FEW_ROWS;
        for (int token = first; token < last; token += step) {
            const int count = std::min(step, last - token), rows = count * group;
            const int heads_step = is_few ? heads_per_tile : 1;
            for (int head = 0; head < heads; head += heads_step) {
                const int head_end = std::min(heads, head + heads_step);
                const int token_position = position + token - first;
                Tile tile{sequence, head, head_end, token, count, token_position,
                          0,        0,    -1,       0,     is_few};
                tile.begin = context.first(tile, 0);
                tile.end = context.last(tile, rows - 1) + 1;
                const int64_t all_rows = (int64_t)rows * (head_end - head);
                products += (tile.end - tile.begin) * all_rows * context.layer.head_dim;
                if (is_few)
                    split(tile, all_rows);
                else
                    tiles.push_back(tile);
            }
        }
    }

    void split(const Tile& tile, int64_t rows) {
        const int first = tile.begin / PART_SLOTS, last = (tile.end - 1) / PART_SLOTS;
        if (first == last) return tiles.push_back(tile);
        for (int i = first; i <= last; i++) {
            Tile part = tile;
            part.begin = std::max(tile.begin, i * PART_SLOTS);
            part.end = std::min(tile.end, (i + 1) * PART_SLOTS);
            part.part = i - first;
            part.storage = part_rows;
            part_rows += rows;
            tiles.push_back(part);
        }
    }
};

// What the parts of split tiles leave behind, a row each.
struct Parts {
    std::unique_ptr<Running[]> running;
    std::unique_ptr<float[]> sums;
    int head_dim;
    Parts(const Plan& plan, int head_dim)
        : running(new Running[plan.part_rows]),
          sums(new float[plan.part_rows * head_dim]),
          head_dim(head_dim) {}
    Running* running_of(const Tile& tile) const {
        return running.get() + tile.storage;
    }
    float* sums_of(const Tile& tile) const {
        return sums.get() + tile.storage * head_dim;
    }
};

template <class T>
static void attend_one(const Context& context, const Tile& tile, const Parts& parts) {
    static thread_local Scratch scratch;
    const int rows = tile.count * context.group_size(), head_dim = context.layer.head_dim;
    if (!tile.is_few) return attend_tile<T>(context, tile, scratch);
    const size_t all = (size_t)rows * (tile.head_end - tile.head), padded = head_dim + LANES;
    scratch.reserve(all * (2 * padded * 4 + sizeof(Running)) + 3 * 64);
    uint32_t* query = scratch.take<uint32_t>(all * padded);
    if (tile.part >= 0)
        return attend_few<T>(context, tile, query, parts.running_of(tile), parts.sums_of(tile));
    float* sums = scratch.take<float>(all * head_dim);
    Running* running = scratch.take<Running>(all);
    attend_few<T>(context, tile, query, running, sums);
    write_rows<T>(context, tile, running, sums);
}

// Merges the parts that begin at tile `first` into that tile's storage and writes the result;
// returns the tile after the last of them.
template <class T>
static size_t write_parts(const Context& context, const Plan& plan, const Parts& parts,
                          size_t first) {
    const Tile& tile = plan.tiles[first];
    const int rows = tile.count * context.group_size() * (tile.head_end - tile.head);
    size_t i = first + 1;
    for (; i < plan.tiles.size() && plan.tiles[i].part > 0; i++)
        merge(rows, parts.head_dim, parts.running_of(tile), parts.sums_of(tile),
              parts.running_of(plan.tiles[i]), parts.sums_of(plan.tiles[i]));
    write_rows<T>(context, tile, parts.running_of(tile), parts.sums_of(tile));
    return i;
}

template <class T>
void attend_all(const Context& context) {
    const Plan plan(context, num_threads());
    const Parts parts(plan, context.layer.head_dim);
#pragma omp parallel for schedule(dynamic, 1) if (plan.products > PARALLEL_PRODUCTS_MIN)
    for (size_t i = 0; i < plan.tiles.size(); i++) attend_one<T>(context, plan.tiles[i], parts);
    for (size_t i = 0; plan.part_rows && i < plan.tiles.size();)
        i = plan.tiles[i].part == 0 ? write_parts<T>(context, plan, parts, i) : i + 1;
}

}  // namespace penstock
