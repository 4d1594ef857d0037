// xxh3 with 64 bits of more than 240 bytes: the digest that `transfer/digest.py` takes, for threads
// that must not ask for the interpreter.
//
// Source: XXH3 (Yann Collet), as doc/xxhash_spec.md of Cyan4973/xxHash specifies it.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace penstock {

constexpr int64_t kDigestedMin = 241;  // of fewer bytes xxh3 is another function

namespace xxh3_detail {

constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime64_1 = 0x9E3779B185EBCA87;
constexpr int64_t kStripe = 64, kStripesPerPiece = 16, kPiece = kStripe * kStripesPerPiece;
alignas(64) constexpr uint8_t kSecret[193] =
    "\xb8\xfe\x6c\x39\x23\xa4\x4b\xbe\x7c\x01\x81\x2c\xf7\x21\xad\x1c\xde\xd4\x6d\xe9\x83\x90\x97"
    "\xdb\x72\x40\xa4\xa4\xb7\xb3\x67\x1f\xcb\x79\xe6\x4e\xcc\xc0\xe5\x78\x82\x5a\xd0\x7d\xcc\xff"
    "\x72\x21\xb8\x08\x46\x74\xf7\x43\x24\x8e\xe0\x35\x90\xe6\x81\x3a\x26\x4c\x3c\x28\x52\xbb\x91"
    "\xc3\x00\xcb\x88\xd0\x65\x8b\x1b\x53\x2e\xa3\x71\x64\x48\x97\xa2\x0d\xf9\x4e\x38\x19\xef\x46"
    "\xa9\xde\xac\xd8\xa8\xfa\x76\x3f\xe3\x9c\x34\x3f\xf9\xdc\xbb\xc7\xc7\x0b\x4f\x1d\x8a\x51\xe0"
    "\x4b\xcd\xb4\x59\x31\xc8\x9f\x7e\xc9\xd9\x78\x73\x64\xea\xc5\xac\x83\x34\xd3\xeb\xc3\xc5\x81"
    "\xa0\xff\xfa\x13\x63\xeb\x17\x0d\xdd\x51\xb7\xf0\xda\x49\xd3\x16\x55\x26\x29\xd4\x68\x9e\x2b"
    "\x16\xbe\x58\x7d\x47\xa1\xfc\x8f\xf8\xb8\xd1\x7a\xd0\x31\xce\x45\xcb\x3a\x8f\x95\x16\x04\x28"
    "\xaf\xd7\xfb\xca\xbb\x4b\x40\x7e";

inline uint64_t word(const uint8_t* at) {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

inline void add_stripe(uint64_t* sums, const uint8_t* data, const uint8_t* secret) {
#if defined(__AVX2__)  // compilers do not see that half words are multiplied: 3 times quicker
    for (int i = 0; i < 8; i += 4) {
        const auto at = [&](const void* from) {
            return _mm256_loadu_si256(static_cast<const __m256i*>(from));
        };
        const __m256i words = at(data + 8 * i), keyed = _mm256_xor_si256(words, at(secret + 8 * i));
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        const __m256i swapped = _mm256_shuffle_epi32(words, 0x4E);
        const __m256i sum = _mm256_add_epi64(_mm256_add_epi64(at(sums + i), swapped), product);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i), sum);
    }
    return;
#endif
    for (int i = 0; i < 8; ++i) {
        const uint64_t keyed = word(data + 8 * i) ^ word(secret + 8 * i);
        sums[i] += word(data + 8 * (i ^ 1)) + (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
}

inline uint64_t fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

}  // namespace xxh3_detail

// Returns the digest of `size` bytes, `kDigestedMin` or more.
inline uint64_t xxh3(const uint8_t* data, int64_t size) {
    using namespace xxh3_detail;
    uint64_t sums[8] = {0xC2B2AE3D,         kPrime64_1, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                        0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, kPrime32_1};
    const int64_t pieces = (size - 1) / kPiece;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t i = 0; i < kStripesPerPiece; ++i)
            add_stripe(sums, data + piece * kPiece + i * kStripe, kSecret + 8 * i);
        for (int i = 0; i < 8; ++i) {
            sums[i] ^= (sums[i] >> 47) ^ word(kSecret + 128 + 8 * i);
            sums[i] *= kPrime32_1;
        }
    }
    const int64_t rest = (size - 1 - pieces * kPiece) / kStripe;
    for (int64_t i = 0; i < rest; ++i)
        add_stripe(sums, data + pieces * kPiece + i * kStripe, kSecret + 8 * i);
    add_stripe(sums, data + size - kStripe, kSecret + 121);
    uint64_t digest = static_cast<uint64_t>(size) * kPrime64_1;
    for (int i = 0; i < 8; i += 2)
        digest += fold(sums[i] ^ word(kSecret + 11 + 8 * i), sums[i + 1] ^ word(kSecret + 19 + 8 * i));
    digest ^= digest >> 37;
    digest *= 0x165667919E3779F9;
    return digest ^ (digest >> 32);
}

}  // namespace penstock
