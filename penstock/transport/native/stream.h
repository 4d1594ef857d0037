// Copies around the cache, for what nobody reads soon: a store that need not read its line first
// saves a third of the memory traffic. Where there are no such stores it is a memcpy.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

constexpr int64_t kLine = 64;

inline void stream_line(uint8_t* to, const uint8_t* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
    for (int i = 0; i < kLine; i += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
    for (int i = 0; i < kLine; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
}

// Copies `size` bytes around the cache; `next` will be read after it, `ahead` bytes of it at once.
inline void stream(uint8_t* to, const uint8_t* from, int64_t size, const uint8_t* next = nullptr,
                   int64_t ahead = 0) {
    const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
    if (size < head + kLine) {
        std::memcpy(to, from, size);
        return;
    }
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + 4 * kLine <= size; i += 4 * kLine) {
        if (i < ahead)
            for (int64_t j = 0; j < 4; ++j)
                _mm_prefetch(reinterpret_cast<const char*>(next + i + j * kLine), _MM_HINT_T0);
        for (int64_t j = 0; j < 4; ++j) stream_line(to + i + j * kLine, from + i + j * kLine);
    }
    for (; i + kLine <= size; i += kLine) stream_line(to + i, from + i);
    std::memcpy(to + i, from + i, size - i);
}

// Streamed stores are not ordered with what the caller does next: this comes after the last.
inline void end_stream() { _mm_sfence(); }

#else

inline void stream(uint8_t* to, const uint8_t* from, int64_t size, const uint8_t* = nullptr,
                   int64_t = 0) {
    std::memcpy(to, from, size);
}

inline void end_stream() {}

#endif
