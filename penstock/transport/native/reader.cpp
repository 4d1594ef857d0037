// The reader's side of TCP: asks for runs of bytes and receives them where they belong, over
// several streams at once, in one call.
//
// What adjoins at the source is one run of the request, what adjoins at the destination one vector
// of the receive, each on its own: a scattered copy of a contiguous source asks for one run. Streams
// share the bytes and not the blocks: one big block is read over all of them.
#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "api.h"
#include "wire.h"

namespace penstock {
namespace {

// A thread costs some ten microseconds, and so does a second stream's wake-up.
constexpr int64_t kBytesPerStreamMin = 1 << 20;
constexpr int64_t kLineBytes = 64;

// Reads of this process that are under way. Those at once share the streams that pay for one: they
// keep the cores busy by themselves, and more threads would only take turns.
std::atomic<int64_t> num_under_way{0};

struct UnderWay {
    const int64_t number = ++num_under_way;
    ~UnderWay() { --num_under_way; }
};

struct Part {
    std::vector<Run> runs;
    std::vector<iovec> vectors{iovec{}};  // the first is for the reply's header
    int64_t num_bytes = 0;

    explicit Part(size_t num_runs) {
        runs.reserve(std::min<size_t>(num_runs, kRunsMax));
        vectors.reserve(num_runs + 1);
    }

    void add(uint64_t from, uint8_t* to, int64_t size) {
        if (!runs.empty() && runs.back().first_byte + runs.back().num_bytes == from)
            runs.back().num_bytes += size;
        else
            runs.push_back({from, static_cast<uint64_t>(size)});
        if (vectors.size() > 1 &&
            static_cast<uint8_t*>(vectors.back().iov_base) + vectors.back().iov_len == to)
            vectors.back().iov_len += size;
        else
            vectors.push_back({to, static_cast<size_t>(size)});
        num_bytes += size;
    }
};

int64_t judge(const ReplyHeader& reply, const RequestHeader& request, uint64_t expected) {
    if (reply.magic != kMagic || reply.id != request.id || reply.status >= kStatuses)
        return kNonsense;
    if (reply.status != kOk) return kRefused - static_cast<int64_t>(reply.status);
    return reply.num_bytes == expected ? int64_t{0} : kNonsense;
}

int64_t read_part(int stream, const penstock_reading& reading, Part& part, uint64_t id,
                  Clock::time_point deadline) {
    RequestHeader request{kMagic, kRead, 0, reading.epoch, static_cast<uint32_t>(reading.region),
                          static_cast<uint32_t>(part.runs.size()), id};
    iovec out[2] = {{&request, sizeof request},
                    {part.runs.data(), part.runs.size() * sizeof(Run)}};
    if (const int64_t wrong = send_all(stream, out, 2, deadline)) return wrong;
    ReplyHeader reply{};
    part.vectors[0] = {&reply, sizeof reply};
    // Header and blocks in one call that waits for all: a refusal has no blocks, but is followed by
    // the end of the connection.
    const int64_t wrong = receive_all(stream, part.vectors.data(), part.vectors.size(), deadline);
    if (wrong && reply.status == kOk) return wrong;
    return judge(reply, request, static_cast<uint64_t>(part.num_bytes));
}

// Cuts the spans into parts: for each stream its share of the bytes, in requests of bounded size.
std::vector<std::vector<Part>> share_out(const penstock_reading& reading, int64_t num_bytes,
                                         int64_t num_streams) {
    std::vector<std::vector<Part>> shares(num_streams);
    // Cut between cache lines, so that what was aligned stays so.
    auto end_of = [&](int64_t stream) {
        return stream + 1 == num_streams ? num_bytes
                                         : num_bytes / num_streams * (stream + 1) & -kLineBytes;
    };
    int64_t stream = 0, done = 0;
    const auto usual = static_cast<size_t>(reading.num_spans / num_streams + 2);
    shares[0].emplace_back(usual);
    for (int64_t i = 0; i < reading.num_spans; ++i) {
        int64_t from = reading.spans[3 * i] * reading.block_bytes;
        uint8_t* to = reading.destination + reading.spans[3 * i + 1] * reading.block_bytes;
        int64_t left = reading.spans[3 * i + 2] * reading.block_bytes;
        while (left) {
            if (done == end_of(stream)) shares[++stream].emplace_back(usual);
            if (shares[stream].back().runs.size() == kRunsMax) shares[stream].emplace_back(usual);
            const int64_t size = std::min(left, end_of(stream) - done);
            shares[stream].back().add(static_cast<uint64_t>(from), to, size);
            from += size, to += size, left -= size, done += size;
        }
    }
    return shares;
}

int64_t read_share(int stream, const penstock_reading& reading, std::vector<Part>& share,
                   Clock::time_point deadline) {
    uint64_t id = 0;
    for (Part& part : share)
        if (const int64_t wrong = read_part(stream, reading, part, id++, deadline)) return wrong;
    return 0;
}

int64_t read(const penstock_reading& reading) {
    int64_t num_bytes = 0;
    for (int64_t i = 0; i < reading.num_spans; ++i)
        num_bytes += reading.spans[3 * i + 2] * reading.block_bytes;
    if (!num_bytes) return 0;
    const UnderWay under_way;
    const int64_t num_streams =
        std::clamp<int64_t>(std::min(num_bytes / kBytesPerStreamMin,
                                     reading.num_streams / under_way.number),
                            1, reading.num_streams);
    const auto deadline = Clock::now() + std::chrono::milliseconds(
                                               reading.patience_ms +
                                               num_bytes / reading.bytes_per_ms_min);
    auto shares = share_out(reading, num_bytes, num_streams);
    std::vector<int64_t> outcomes(num_streams, 0);
    auto work = [&](int64_t i) {
        const int stream = reading.streams[i];
        outcomes[i] = read_share(stream, reading, shares[i], deadline);
        // One that failed fails all: the others need not wait for their end.
        if (outcomes[i] < 0 && outcomes[i] > kRefused)
            for (int64_t j = 0; j < num_streams; ++j) shutdown(reading.streams[j], SHUT_RDWR);
    };
    std::vector<std::thread> threads;
    int64_t threaded = 1;
    try {
        for (; threaded < num_streams; ++threaded) threads.emplace_back(work, threaded);
    } catch (const std::system_error&) {
        // No more threads to be had: the rest is read here, one stream after the other.
    }
    work(0);
    for (int64_t i = threaded; i < num_streams; ++i) work(i);
    for (std::thread& thread : threads) thread.join();
    // A refusal says more than the lost streams that it or another failure caused.
    const int64_t worst = *std::min_element(outcomes.begin(), outcomes.end());
    return worst ? worst : num_bytes;
}

}  // namespace
}  // namespace penstock

int64_t penstock_read(const penstock_reading* reading) { return penstock::read(*reading); }

int64_t penstock_notify(int32_t stream, uint64_t epoch, const uint8_t* text, int64_t num_bytes,
                        int64_t deadline_ms) {
    using namespace penstock;
    const RequestHeader request{kMagic, kNotify, 0, epoch, 0, static_cast<uint32_t>(num_bytes), 0};
    iovec out[2] = {{const_cast<RequestHeader*>(&request), sizeof request},
                    {const_cast<uint8_t*>(text), static_cast<size_t>(num_bytes)}};
    const auto deadline = Clock::now() + std::chrono::milliseconds(deadline_ms);
    if (const int64_t wrong = send_all(stream, out, 2, deadline)) return wrong;
    ReplyHeader reply;
    if (const int64_t wrong = receive_bytes(stream, &reply, sizeof reply, deadline)) return wrong;
    return judge(reply, request, 0);
}
