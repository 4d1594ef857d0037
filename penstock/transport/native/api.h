// What Python may call, and the words of the wire. All functions keep their hands off the interpreter.
//
// A span is three int64: source block, destination block, number of blocks. Callers have checked
// spans against both sides; the server checks again what comes over a wire.
#pragma once

#include <cstdint>

extern "C" {

// Copies spans between two pools in this process's memory; returns the bytes.
int64_t penstock_copy(const uint8_t* source, uint8_t* destination, int64_t block_bytes,
                      const int64_t* spans, int64_t num_spans);

// Blocks of one side of a cutting: [tokens, heads, head_dim] in every plane. Mirrored by
// `library.Side`, with the dtypes numbered as there.
struct penstock_side {
    uint8_t* blocks;
    int64_t block_size;
    int64_t num_heads;   // in its blocks
    int64_t first_head;  // in its blocks, of those that both sides hold
    int64_t dtype;
};

// How staged blocks become ours; `library.Cutting`.
struct penstock_cutting {
    penstock_side theirs, ours;
    int64_t num_planes;  // keys and values of every layer
    int64_t num_heads;   // that both sides hold
    int64_t head_dim;
};

// A piece is five int64: staged block, slot in it, our block, slot in it, number of tokens.
void penstock_cut(const penstock_cutting* cutting, const int64_t* pieces, int64_t num_pieces);

// One read of a peer's region. Mirrored by `library.Reading`.
struct penstock_reading {
    const int32_t* streams;  // connected, authenticated sockets
    int64_t num_streams;
    uint64_t epoch;  // of the peer, as its descriptor says
    int64_t region;
    uint8_t* destination;
    int64_t block_bytes;
    const int64_t* spans;
    int64_t num_spans;
    // The longest wait in all: this, and what the bytes take at the slowest rate that is borne. The
    // sockets' time-outs bound each silence.
    int64_t patience_ms;
    int64_t bytes_per_ms_min;
};

// Returns the bytes that landed, or a negative outcome (wire.h); then the streams are of no use any
// more.
int64_t penstock_read(const penstock_reading* reading);

// Sends one notification and waits for the peer's word; outcomes as above, 0 when it was taken.
int64_t penstock_notify(int32_t stream, uint64_t epoch, const uint8_t* text, int64_t num_bytes,
                        int64_t deadline_ms);

// The owner's side: threads of its own serve reads from the regions.
void* penstock_server_new(uint64_t epoch, int64_t silence_ms, int64_t connections_max);
int64_t penstock_server_add(void* server, const uint8_t* blocks, int64_t num_blocks,
                            int64_t block_bytes);
// Lets a region that was added be read encoded as well, as a region of its own with rows instead of
// blocks; returns its index. `encode` is the codecs' `penstock_encode`, which is given `method`, the
// `shape_bytes` bytes at `shape`, and rows of `row_bytes`: the encoded block, and in the last 16
// bytes digests (xxh3) of the block as it is in the region and of the row before them.
int64_t penstock_server_add_encoded(void* server, int64_t region, const void* encode,
                                    int64_t method, const uint8_t* shape, int64_t shape_bytes,
                                    int64_t block_bytes, int64_t row_bytes);
// Takes the socket over; returns 0, or -1 and leaves it alone when there are too many.
int64_t penstock_server_serve(void* server, int32_t socket);
// Takes one notification out: its bytes, or -1 when there is none. `text` has room for the longest.
int64_t penstock_server_heard(void* server, uint8_t* text);
// Fills `counts`: reads, bytes, notifications, then refusals by status 1..5.
void penstock_server_counts(void* server, int64_t* counts);
// Ends every connection and waits until no thread reads a region any more.
void penstock_server_delete(void* server);
}
