// The owner's side of TCP: one thread for each connection, which sends blocks straight out of the
// regions and never takes Python's interpreter lock: an owner that computes serves all the same.
//
// A thread for each connection and no epoll: a peer has a few streams, an idle thread costs its
// stack alone, and a blocking send of many vectors is what the kernel does best. Python has accepted
// and authenticated a socket before it comes here. Nothing of a request is believed: its size, its
// epoch and every run are checked before the first byte leaves.
//
// A region may be read encoded, too: its rows are made here while they are sent, with digests that
// let the reader tell what was wrong in memory from what went wrong on the way.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "api.h"
#include "wire.h"
#include "xxh3.h"

namespace penstock {
namespace {

constexpr size_t kHeardMax = 4096;
constexpr auto kRequestLimit = std::chrono::seconds(60);  // from header to last byte, per MAX bytes
constexpr uint64_t kBytesPerReadMax = uint64_t{1} << 36;
constexpr uint64_t kEncodedAtOnce = 1 << 18;  // bytes: still in the cache when they are sent

using Encode = void (*)(int64_t method, const void* shape, const uint8_t* pool, const int64_t* ids,
                        int64_t num_blocks, uint8_t* encoded, int64_t stride, int64_t* lengths);

struct Encoder {
    Encode encode;
    int64_t method;
    std::vector<uint8_t> shape;
    uint64_t block_bytes;  // in the pool
    uint64_t row_bytes;
};

struct Region {
    const uint8_t* bytes;              // of the pool
    uint64_t num_bytes;                // as they are sent
    const Encoder* encoder = nullptr;  // of rows that are made when they are read
};

struct Connection {
    int socket;
    std::thread thread;
    std::atomic<bool> is_over{false};
};

// What one connection's thread works with; vectors keep their room from request to request.
struct Exchange {
    int socket = -1;
    uint8_t body[4096 - sizeof(RequestHeader)];
    size_t num_received = 0;
    std::vector<Run> runs;
    std::vector<iovec> vectors;
    std::vector<uint8_t> rows;
    std::vector<int64_t> ids, lengths;
};

class Server {
   public:
    Server(uint64_t epoch, int64_t silence_ms, int64_t connections_max)
        : epoch_(epoch), silence_ms_(silence_ms), connections_max_(connections_max) {}
    ~Server();
    int64_t add(Region region);
    int64_t add_encoded(int64_t region, Encoder encoder);
    int64_t serve(int socket);
    int64_t heard(uint8_t* text);
    void counts(int64_t* counts) const;

   private:
    void run(Connection* connection);
    bool answer(Exchange& exchange);
    bool answer_read(Exchange& exchange, const RequestHeader& request);
    bool answer_notify(Exchange& exchange, const RequestHeader& request);
    static bool send_encoded(Exchange& exchange, const Region& region, Clock::time_point limit);
    static void make_rows(Exchange& exchange, const Region& region, uint64_t first, uint64_t count);
    static int64_t receive_body(const Exchange& exchange, void* body, size_t size);
    Status check(const RequestHeader& request, const std::vector<Run>& runs, Region& region,
                 uint64_t& num_bytes) const;
    bool refuse(int socket, const RequestHeader& request, Status status);
    bool reply(int socket, const RequestHeader& request, Status status);
    void reap();

    const uint64_t epoch_;
    const int64_t silence_ms_;
    const int64_t connections_max_;
    mutable std::shared_mutex regions_lock_;
    std::vector<Region> regions_;
    std::list<Encoder> encoders_;
    std::mutex connections_lock_;
    std::list<Connection> connections_;
    std::mutex heard_lock_;
    std::deque<std::string> heard_;
    std::atomic<int64_t> reads_{0}, bytes_{0}, notifications_{0};
    std::array<std::atomic<int64_t>, kStatuses> refusals_{};
};

Server::~Server() {
    {
        std::lock_guard lock(connections_lock_);
        for (Connection& connection : connections_)
            if (!connection.is_over) shutdown(connection.socket, SHUT_RDWR);
    }
    for (Connection& connection : connections_) {
        connection.thread.join();
        close(connection.socket);
    }
}

int64_t Server::add(Region region) {
    std::unique_lock lock(regions_lock_);
    regions_.push_back(region);
    return static_cast<int64_t>(regions_.size()) - 1;
}

int64_t Server::add_encoded(int64_t region, Encoder encoder) {
    std::unique_lock lock(regions_lock_);
    const Region& plain = regions_.at(region);
    const uint64_t num_rows = plain.num_bytes / encoder.block_bytes;
    encoders_.push_back(std::move(encoder));
    const Encoder& kept = encoders_.back();
    regions_.push_back({plain.bytes, num_rows * kept.row_bytes, &kept});
    return static_cast<int64_t>(regions_.size()) - 1;
}

int64_t Server::serve(int socket) {
    std::lock_guard lock(connections_lock_);
    reap();
    if (static_cast<int64_t>(connections_.size()) >= connections_max_) return -1;
    set_timeout(socket, SO_RCVTIMEO, silence_ms_);
    set_timeout(socket, SO_SNDTIMEO, silence_ms_);
    Connection& connection = connections_.emplace_back();
    connection.socket = socket;
    try {
        connection.thread = std::thread([this, &connection] { run(&connection); });
    } catch (const std::system_error&) {
        connections_.pop_back();
        return -1;
    }
    return 0;
}

// Sockets are closed here and nowhere else, so that none is shut down after its number is reused.
void Server::reap() {
    for (auto it = connections_.begin(); it != connections_.end();) {
        if (!it->is_over) {
            ++it;
            continue;
        }
        it->thread.join();
        close(it->socket);
        it = connections_.erase(it);
    }
}

void Server::run(Connection* connection) {
    Exchange exchange;
    exchange.socket = connection->socket;
    while (answer(exchange)) {
    }
    shutdown(connection->socket, SHUT_RDWR);
    connection->is_over = true;
}

// Answers one request; false when the connection is to end.
bool Server::answer(Exchange& exchange) {
    RequestHeader request;
    const int socket = exchange.socket;
    // Header and a few runs come in one system call. More than one request cannot have come: a
    // reader waits for the reply.
    iovec vectors[2] = {{&request, sizeof request}, {exchange.body, sizeof exchange.body}};
    int64_t received;
    do {
        // Between requests a peer may be silent for as long as it lives; keepalive finds out.
        received = receive_some(socket, vectors, 2, sizeof request);
    } while (received == kLate && vectors[0].iov_len == sizeof request);
    if (received < 0) return false;
    exchange.num_received = static_cast<size_t>(received) - sizeof request;
    if (request.magic != kMagic || request.zero != 0) return refuse(socket, request, kMalformed);
    if (request.op == kRead) return answer_read(exchange, request);
    if (request.op == kNotify) return answer_notify(exchange, request);
    return refuse(socket, request, kMalformed);
}

// Takes in what is left of a request's body; returns 0 or an outcome.
int64_t Server::receive_body(const Exchange& exchange, void* body, size_t size) {
    if (exchange.num_received > size) return kNonsense;
    std::memcpy(body, exchange.body, exchange.num_received);
    if (exchange.num_received == size) return 0;
    return receive_bytes(exchange.socket, static_cast<uint8_t*>(body) + exchange.num_received,
                         size - exchange.num_received, Clock::now() + kRequestLimit);
}

bool Server::answer_read(Exchange& exchange, const RequestHeader& request) {
    const int socket = exchange.socket;
    if (request.count == 0 || request.count > kRunsMax) return refuse(socket, request, kMalformed);
    exchange.runs.resize(request.count);
    const int64_t wrong =
        receive_body(exchange, exchange.runs.data(), request.count * sizeof(Run));
    if (wrong == kNonsense) return refuse(socket, request, kMalformed);
    if (wrong) return false;
    Region region{};
    uint64_t num_bytes = 0;
    const Status status = check(request, exchange.runs, region, num_bytes);
    if (status != kOk) return refuse(socket, request, status);
    ReplyHeader header{kMagic, kOk, request.id, num_bytes, {}};
    auto& vectors = exchange.vectors;
    vectors.clear();
    vectors.push_back({&header, sizeof header});
    // A slow link may take long for much: 1 s more for each 4 MiB.
    const auto limit = Clock::now() + kRequestLimit + std::chrono::seconds(num_bytes >> 22);
    if (region.encoder) {
        if (!send_encoded(exchange, region, limit)) return false;
    } else {
        for (const Run& run : exchange.runs)
            vectors.push_back({const_cast<uint8_t*>(region.bytes + run.first_byte), run.num_bytes});
        if (send_all(socket, vectors.data(), vectors.size(), limit) != 0) return false;
    }
    ++reads_;
    bytes_ += static_cast<int64_t>(num_bytes);
    return true;
}

// Sends what `exchange.vectors` has, then the runs' part of the rows, some rows at a time: while the
// kernel sends some, the next are made. Streams share bytes, so a run may begin and end in a row.
bool Server::send_encoded(Exchange& exchange, const Region& region, Clock::time_point limit) {
    const uint64_t row_bytes = region.encoder->row_bytes;
    const uint64_t at_once = std::max<uint64_t>(1, kEncodedAtOnce / row_bytes);
    exchange.rows.resize(at_once * row_bytes);
    for (const Run& run : exchange.runs) {
        const uint64_t end = run.first_byte + run.num_bytes;
        for (uint64_t at = run.first_byte; at < end;) {
            const uint64_t row = at / row_bytes, base = row * row_bytes;
            const uint64_t count = std::min(at_once, (end - base + row_bytes - 1) / row_bytes);
            make_rows(exchange, region, row, count);
            const uint64_t stop = std::min(end - base, count * row_bytes);
            exchange.vectors.push_back({exchange.rows.data() + (at - base), stop - (at - base)});
            if (send_all(exchange.socket, exchange.vectors.data(), exchange.vectors.size(), limit))
                return false;
            exchange.vectors.clear();
            at = base + stop;
        }
    }
    return true;
}

void Server::make_rows(Exchange& exchange, const Region& region, uint64_t first, uint64_t count) {
    const Encoder& encoder = *region.encoder;
    const uint64_t content = encoder.row_bytes - 2 * sizeof(uint64_t);
    exchange.ids.resize(count), exchange.lengths.resize(count);
    for (uint64_t i = 0; i < count; ++i) exchange.ids[i] = static_cast<int64_t>(first + i);
    uint8_t* rows = exchange.rows.data();
    encoder.encode(encoder.method, encoder.shape.data(), region.bytes, exchange.ids.data(), count,
                   rows, encoder.row_bytes, exchange.lengths.data());
    for (uint64_t i = 0; i < count; ++i) {
        uint8_t* row = rows + i * encoder.row_bytes;
        const uint8_t* block = region.bytes + exchange.ids[i] * encoder.block_bytes;
        const uint64_t digests[2] = {xxh3(block, encoder.block_bytes), xxh3(row, content)};
        std::memcpy(row + content, digests, sizeof digests);
    }
}

Status Server::check(const RequestHeader& request, const std::vector<Run>& runs, Region& region,
                     uint64_t& num_bytes) const {
    if (request.epoch != epoch_) return kWrongEpoch;
    {
        std::shared_lock lock(regions_lock_);
        if (request.region >= regions_.size()) return kNoRegion;
        region = regions_[request.region];
    }
    num_bytes = 0;
    for (const Run& run : runs) {
        // In this order nothing overflows: no run is longer than the region.
        if (run.num_bytes == 0 || run.num_bytes > region.num_bytes ||
            run.first_byte > region.num_bytes - run.num_bytes)
            return kOutOfBounds;
        num_bytes += run.num_bytes;
    }
    if (num_bytes > kBytesPerReadMax) return kOutOfBounds;
    return kOk;
}

bool Server::answer_notify(Exchange& exchange, const RequestHeader& request) {
    const int socket = exchange.socket;
    if (request.count == 0 || request.count > kTextMax) return refuse(socket, request, kMalformed);
    std::string text(request.count, '\0');
    const int64_t wrong = receive_body(exchange, text.data(), text.size());
    if (wrong == kNonsense) return refuse(socket, request, kMalformed);
    if (wrong) return false;
    if (request.epoch != epoch_) return refuse(socket, request, kWrongEpoch);
    {
        std::lock_guard lock(heard_lock_);
        if (heard_.size() < kHeardMax) {
            heard_.push_back(std::move(text));
            ++notifications_;
            text.clear();
        }
    }
    return text.empty() ? reply(socket, request, kOk) : refuse(socket, request, kBusy);
}

bool Server::refuse(int socket, const RequestHeader& request, Status status) {
    ++refusals_[status];
    reply(socket, request, status);
    return false;  // the end of the connection tells the reader not to wait for blocks
}

bool Server::reply(int socket, const RequestHeader& request, Status status) {
    ReplyHeader header{kMagic, status, request.id, 0, {}};
    iovec vector{&header, sizeof header};
    return send_all(socket, &vector, 1, Clock::now() + kRequestLimit) == 0;
}

int64_t Server::heard(uint8_t* text) {
    std::lock_guard lock(heard_lock_);
    if (heard_.empty()) return -1;
    const auto size = static_cast<int64_t>(heard_.front().size());
    std::memcpy(text, heard_.front().data(), size);
    heard_.pop_front();
    return size;
}

void Server::counts(int64_t* counts) const {
    counts[0] = reads_;
    counts[1] = bytes_;
    counts[2] = notifications_;
    for (uint32_t status = 1; status < kStatuses; ++status) counts[2 + status] = refusals_[status];
}

}  // namespace
}  // namespace penstock

using penstock::Server;

void* penstock_server_new(uint64_t epoch, int64_t silence_ms, int64_t connections_max) {
    return new Server(epoch, silence_ms, connections_max);
}
int64_t penstock_server_add(void* server, const uint8_t* blocks, int64_t num_blocks,
                            int64_t block_bytes) {
    return static_cast<Server*>(server)->add(
        {blocks, static_cast<uint64_t>(num_blocks * block_bytes)});
}
int64_t penstock_server_add_encoded(void* server, int64_t region, const void* encode,
                                    int64_t method, const uint8_t* shape, int64_t shape_bytes,
                                    int64_t block_bytes, int64_t row_bytes) {
    return static_cast<Server*>(server)->add_encoded(
        region, {reinterpret_cast<penstock::Encode>(const_cast<void*>(encode)), method,
                 std::vector<uint8_t>(shape, shape + shape_bytes),
                 static_cast<uint64_t>(block_bytes), static_cast<uint64_t>(row_bytes)});
}
int64_t penstock_server_serve(void* server, int32_t socket) {
    return static_cast<Server*>(server)->serve(socket);
}
int64_t penstock_server_heard(void* server, uint8_t* text) {
    return static_cast<Server*>(server)->heard(text);
}
void penstock_server_counts(void* server, int64_t* counts) {
    static_cast<Server*>(server)->counts(counts);
}
void penstock_server_delete(void* server) { delete static_cast<Server*>(server); }
