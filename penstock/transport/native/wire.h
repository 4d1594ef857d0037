// The wire after the handshake: little-endian headers of fixed size, then runs or bytes. Mirrored
// by `wire.py`, which also has the handshake.
//
//   read    RequestHeader(op 1, count = runs), count x Run      -> ReplyHeader, num_bytes of them
//   notify  RequestHeader(op 2, count = bytes), count bytes     -> ReplyHeader
//
// After a reply whose status is not 0 the owner ends the connection.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace penstock {

constexpr uint32_t kMagic = 0x32534e50;  // "PNS2"
constexpr uint32_t kRunsMax = 1 << 16;
constexpr uint32_t kTextMax = 1 << 16;
constexpr int kVectorsMax = 1024;  // IOV_MAX of Linux

enum Op : uint16_t { kRead = 1, kNotify = 2 };
enum Status : uint32_t { kOk, kWrongEpoch, kNoRegion, kOutOfBounds, kMalformed, kBusy, kStatuses };
enum Outcome : int64_t { kLost = -1, kLate = -2, kNonsense = -3, kRefused = -100 };

struct RequestHeader {
    uint32_t magic;
    uint16_t op;
    uint16_t zero;
    uint64_t epoch;
    uint32_t region;
    uint32_t count;
    uint64_t id;
};
// Of a region's bytes, so that several streams can share even a single block.
struct Run {
    uint64_t first_byte;
    uint64_t num_bytes;
};
// As long as a cache line, so that what follows lies in the kernel's buffers as it does in the pool:
// a copy between places that are aligned alike is quicker.
struct ReplyHeader {
    uint32_t magic;
    uint32_t status;
    uint64_t id;
    uint64_t num_bytes;
    uint8_t zeros[40];
};
static_assert(sizeof(RequestHeader) == 32 && sizeof(Run) == 16 && sizeof(ReplyHeader) == 64);
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire is little-endian");

using Clock = std::chrono::steady_clock;

inline void set_timeout(int socket, int option, int64_t milliseconds) {
    timeval limit{milliseconds / 1000, (milliseconds % 1000) * 1000};
    setsockopt(socket, SOL_SOCKET, option, &limit, sizeof limit);
}

// Sends or receives everything that `vectors` describe, which it uses up. Returns 0 or an outcome.
// The socket blocks, with time-outs that bound each silence; `deadline` bounds the sum.
template <typename Transfer>
int64_t move_all(Transfer transfer, iovec* vectors, size_t count, Clock::time_point deadline) {
    while (count && !vectors->iov_len) ++vectors, --count;
    while (count) {
        msghdr message{};
        message.msg_iov = vectors;
        message.msg_iovlen = count < kVectorsMax ? count : kVectorsMax;
        const ssize_t moved = transfer(&message);
        if (moved == 0) return kLost;
        if (moved < 0) {
            if (errno == EINTR) continue;
            return errno == EAGAIN || errno == EWOULDBLOCK ? kLate : kLost;
        }
        size_t left = moved;
        while (count && left >= vectors->iov_len) left -= vectors->iov_len, ++vectors, --count;
        if (!count) break;
        vectors->iov_base = static_cast<uint8_t*>(vectors->iov_base) + left;
        vectors->iov_len -= left;
        if (Clock::now() > deadline) return kLate;
    }
    return 0;
}

inline int64_t send_all(int socket, iovec* vectors, size_t count, Clock::time_point deadline) {
    return move_all([&](msghdr* m) { return sendmsg(socket, m, MSG_NOSIGNAL); }, vectors, count,
                    deadline);
}

inline int64_t receive_all(int socket, iovec* vectors, size_t count, Clock::time_point deadline) {
    return move_all([&](msghdr* m) { return recvmsg(socket, m, MSG_WAITALL); }, vectors, count,
                    deadline);
}

inline int64_t receive_bytes(int socket, void* bytes, size_t count, Clock::time_point deadline) {
    iovec vector{bytes, count};
    return receive_all(socket, &vector, 1, deadline);
}

// Receives at least `least` bytes into what the vectors describe, and as many more as have come: a
// small answer is one system call. Returns the bytes or an outcome.
inline int64_t receive_some(int socket, iovec* vectors, size_t count, size_t least) {
    size_t received = 0;
    while (true) {
        msghdr message{};
        message.msg_iov = vectors;
        message.msg_iovlen = count < kVectorsMax ? count : kVectorsMax;
        const ssize_t moved = recvmsg(socket, &message, 0);
        if (moved == 0) return kLost;
        if (moved < 0) {
            if (errno == EINTR) continue;
            return errno == EAGAIN || errno == EWOULDBLOCK ? kLate : kLost;
        }
        received += moved;
        if (received >= least) return static_cast<int64_t>(received);
        // Only the first vector can be incomplete here: it is the one that `least` asks for.
        vectors->iov_base = static_cast<uint8_t*>(vectors->iov_base) + moved;
        vectors->iov_len -= moved;
    }
}

}  // namespace penstock
