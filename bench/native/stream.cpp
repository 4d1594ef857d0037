// What the codecs are measured against: as many bytes read and as many stored, and nothing computed.
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LINE = 64;
typedef int64_t Line __attribute__((vector_size(LINE)));

inline void put(uint8_t* to, const Line& line, bool is_around) {
#if defined(__AVX512F__)
    if (is_around) return _mm512_stream_si512((__m512i*)to, (__m512i)line);
#elif defined(__AVX2__)
    __m256i halves[2];
    std::memcpy(halves, &line, LINE);
    if (is_around) {
        _mm256_stream_si256((__m256i*)to, halves[0]);
        return _mm256_stream_si256((__m256i*)to + 1, halves[1]);
    }
#endif
    std::memcpy(to, &line, LINE);
}

}  // namespace

// Both in order and in step, whole lines; `is_around` the cache if the machine can.
extern "C" void stream(const uint8_t* source, int64_t read_bytes, uint8_t* destination,
                       int64_t stored_bytes, int64_t is_around) {
    Line sum{};
    int64_t read = 0;
    for (int64_t stored = 0; stored + LINE <= stored_bytes; stored += LINE) {
        for (; read * stored_bytes < read_bytes * stored && read + LINE <= read_bytes;
             read += LINE) {
            Line line;
            std::memcpy(&line, source + read, LINE);
            __builtin_prefetch(source + read + 4096, 0, 2);
            sum ^= line;
        }
        put(destination + stored, sum, is_around);
    }
}
