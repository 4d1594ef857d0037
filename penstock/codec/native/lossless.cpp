// Lossless: the byte with the exponent is coded by how often each occurs in the block, the others
// are kept as they are: mantissas of KV are noise.
//
// An entropy coder, rANS (arXiv 1311.2540), with 12 bits of probability, 32 lanes of 32-bit states
// and a stream of 16-bit words: symbol i belongs to lane i % 32, so that many independent chains of
// dependencies are under way, and vectors of them where the machine can gather. Encoding runs
// backwards, so that decoding reads forwards.
//
//   uint32 length   of all of it, in bytes
//   uint32 S        symbols that occur; 0: the block follows as it is
//   uint8  symbols [S], uint16 frequencies [S], uint32 states [32]
//   the other bytes: uint8 [n]; for float32 uint16 [n] and uint8 [n]
//   uint16 words
#include "methods.h"

namespace penstock {
namespace {

constexpr int64_t LANES = 32, HEADER = 8;
constexpr uint32_t PROBABILITY_BITS = 12, TOTAL = 1 << PROBABILITY_BITS, LOWEST = 1 << 16;

struct Frequencies {
    uint32_t of[256] = {};

    // Scales counts so that they add up to TOTAL and none that occurs is 0.
    void scale(const uint32_t* counts, int64_t num_symbols) {
        int64_t sum = 0;
        for (int i = 0; i < 256; i++) {
            of[i] = (uint64_t)counts[i] * TOTAL / num_symbols;
            if (counts[i] && !of[i]) of[i] = 1;
            sum += of[i];
        }
        for (int64_t excess = sum - TOTAL; excess;) {
            int most = 0;
            for (int i = 1; i < 256; i++)
                if (of[i] > of[most]) most = i;
            const int64_t change = excess < of[most] / 2 ? excess : of[most] / 2;
            of[most] -= change, excess -= change;
        }
    }
};

// The exponent first: sign and mantissa of bfloat16 and float32 are brought together below it. Of
// float16 the upper byte holds the whole exponent anyhow.
template <class Bits, int ROTATE>
void split(const uint8_t* block, int64_t n, uint8_t* symbols, uint8_t* rest) {
    constexpr int WIDTH = 8 * sizeof(Bits);
    for (int64_t i = 0; i < n; i++) {
        Bits bits;
        memcpy(&bits, block + i * sizeof bits, sizeof bits);
        if (ROTATE) bits = bits << 1 | bits >> (WIDTH - 1);
        symbols[i] = bits >> (WIDTH - 8);
        if constexpr (sizeof(Bits) == 2) {
            rest[i] = bits;
        } else {
            const uint16_t low = bits;
            memcpy(rest + 2 * i, &low, 2);
            rest[2 * n + i] = bits >> 16;
        }
    }
}

template <class Bits, int ROTATE>
void join(const uint8_t* symbols, const uint8_t* rest, int64_t n, uint8_t* block) {
    constexpr int WIDTH = 8 * sizeof(Bits);
    for (int64_t i = 0; i < n; i++) {
        Bits bits = (Bits)symbols[i] << (WIDTH - 8);
        if constexpr (sizeof(Bits) == 2) {
            bits |= rest[i];
        } else {
            uint16_t low;
            memcpy(&low, rest + 2 * i, 2);
            bits |= low | (Bits)rest[2 * n + i] << 16;
        }
        if (ROTATE) bits = bits >> 1 | bits << (WIDTH - 1);
        memcpy(block + i * sizeof bits, &bits, sizeof bits);
    }
}

void split_block(const Shape& shape, const uint8_t* block, uint8_t* symbols, uint8_t* rest) {
    const auto run = shape.dtype == 0   ? split<uint32_t, 1>
                     : shape.dtype == 1 ? split<uint16_t, 1>
                                        : split<uint16_t, 0>;
    run(block, num_elements(shape), symbols, rest);
}

void join_block(const Shape& shape, const uint8_t* symbols, const uint8_t* rest, uint8_t* block) {
    const auto run = shape.dtype == 0   ? join<uint32_t, 1>
                     : shape.dtype == 1 ? join<uint16_t, 1>
                                        : join<uint16_t, 0>;
    run(symbols, rest, num_elements(shape), block);
}

// Where a symbol's slots are, for encoding.
inline uint32_t coding(uint32_t frequency, uint32_t start) {
    return (frequency - 1) << PROBABILITY_BITS | start;
}

// Writes the words of LANES symbols before `end` and returns the first.
inline uint16_t* encode_lanes(const uint8_t* symbols, const uint32_t* codings, uint32_t* states,
                              int64_t num_lanes, uint16_t* end) {
    for (int64_t lane = num_lanes - 1; lane >= 0; lane--) {
        const uint32_t found = codings[symbols[lane]];
        const uint32_t frequency = (found >> PROBABILITY_BITS) + 1;
        uint32_t state = states[lane];
        // No branch: whether a state is full is as good as random.
        const uint32_t is_full = state >> 20 >= frequency;
        end[-1] = state;
        end -= is_full;
        state >>= 16 * is_full;
        const uint32_t quotient = state / frequency;
        states[lane] = state + (found & (TOTAL - 1)) + quotient * (TOTAL - frequency);
    }
    return end;
}

#if defined(PENSTOCK_AVX512)
// The same for sixteen lanes at once.
inline uint16_t* encode_vector(const uint8_t* symbols, const uint32_t* codings, __m512i& state,
                               uint16_t* end) {
    const __m512i symbol = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)symbols));
    const __m512i found = _mm512_i32gather_epi32(symbol, codings, 4);
    const __m512i one = _mm512_set1_epi32(1), total = _mm512_set1_epi32(TOTAL);
    const __m512i frequency = _mm512_add_epi32(_mm512_srli_epi32(found, PROBABILITY_BITS), one);
    const __mmask16 full = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(state, 20), frequency);
    const __m512i words = _mm512_maskz_compress_epi32(full, state);
    const int count = __builtin_popcount(full);
    end -= count;
    // Not a store of all sixteen: below `end` there may be nothing.
    _mm512_mask_cvtepi32_storeu_epi16(end, (1u << count) - 1, words);
    state = _mm512_mask_srli_epi32(state, full, state, 16);
    // The quotient has 20 bits, so float's 24 are off by one at most, either way.
    __m512i quotient = _mm512_cvttps_epu32(
        _mm512_div_ps(_mm512_cvtepu32_ps(state), _mm512_cvtepi32_ps(frequency)));
    const __m512i rest = _mm512_sub_epi32(state, _mm512_mullo_epi32(quotient, frequency));
    const __mmask16 is_high = _mm512_cmplt_epi32_mask(rest, _mm512_setzero_si512());
    const __mmask16 is_low = _mm512_cmpge_epi32_mask(rest, frequency);
    quotient = _mm512_mask_sub_epi32(quotient, is_high, quotient, one);
    quotient = _mm512_mask_add_epi32(quotient, is_low, quotient, one);
    const __m512i start = _mm512_and_si512(found, _mm512_set1_epi32(TOTAL - 1));
    const __m512i gap = _mm512_mullo_epi32(quotient, _mm512_sub_epi32(total, frequency));
    state = _mm512_add_epi32(_mm512_add_epi32(state, start), gap);
    return end;
}
#endif

// Writes words before `end` and returns the first.
uint16_t* encode_symbols(const uint8_t* symbols, int64_t n, const uint32_t* codings,
                         uint32_t* states, uint16_t* end) {
    int64_t i = n / LANES * LANES;
    end = encode_lanes(symbols + i, codings, states, n - i, end);
#if defined(PENSTOCK_AVX512)
    __m512i low = _mm512_loadu_si512(states), high = _mm512_loadu_si512(states + 16);
    while ((i -= LANES) >= 0) {
        end = encode_vector(symbols + i + 16, codings, high, end);
        end = encode_vector(symbols + i, codings, low, end);
    }
    _mm512_storeu_si512(states, low), _mm512_storeu_si512(states + 16, high);
#else
    while ((i -= LANES) >= 0) end = encode_lanes(symbols + i, codings, states, LANES, end);
#endif
    return end;
}

// What a slot says: the symbol, its frequency less 1, and how far the slot is from its start.
inline uint32_t entry(uint32_t symbol, uint32_t frequency, uint32_t offset) {
    return symbol << 24 | (frequency - 1) << PROBABILITY_BITS | offset;
}

inline uint32_t take(const uint32_t* table, uint32_t state, uint8_t* symbol) {
    const uint32_t found = table[state % TOTAL];
    *symbol = found >> 24;
    return ((found >> PROBABILITY_BITS & (TOTAL - 1)) + 1) * (state >> PROBABILITY_BITS) +
           (found & (TOTAL - 1));
}

#if defined(PENSTOCK_AVX512)
// Decodes sixteen lanes, where at least sixteen words are left; returns the words that remain.
inline const uint8_t* decode_vector(const uint32_t* table, __m512i& state, const uint8_t* words,
                                    uint8_t* symbols) {
    const __m512i last = _mm512_set1_epi32(TOTAL - 1);
    const __m512i found = _mm512_i32gather_epi32(_mm512_and_si512(state, last), table, 4);
    _mm_storeu_si128((__m128i*)symbols, _mm512_cvtepi32_epi8(_mm512_srli_epi32(found, 24)));
    const __m512i less_one = _mm512_and_si512(_mm512_srli_epi32(found, PROBABILITY_BITS), last);
    const __m512i quotient = _mm512_srli_epi32(state, PROBABILITY_BITS);
    const __m512i product =
        _mm512_mullo_epi32(_mm512_add_epi32(less_one, _mm512_set1_epi32(1)), quotient);
    state = _mm512_add_epi32(product, _mm512_and_si512(found, last));
    const __mmask16 low = _mm512_cmplt_epu32_mask(state, _mm512_set1_epi32(LOWEST));
    const __m512i some = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)words));
    const __m512i spread = _mm512_maskz_expand_epi32(low, some);
    state = _mm512_mask_or_epi32(state, low, _mm512_slli_epi32(state, 16), spread);
    return words + 2 * __builtin_popcount(low);
}
#endif

// Decodes LANES symbols, where there are at least as many words; returns the words that remain.
inline const uint8_t* decode_lanes(const uint32_t* table, uint32_t* states, const uint8_t* words,
                                   uint8_t* symbols) {
#if defined(PENSTOCK_AVX512)
    __m512i low = _mm512_loadu_si512(states), high = _mm512_loadu_si512(states + 16);
    words = decode_vector(table, low, words, symbols);
    words = decode_vector(table, high, words, symbols + 16);
    _mm512_storeu_si512(states, low), _mm512_storeu_si512(states + 16, high);
#else
    for (int64_t lane = 0; lane < LANES; lane++) {
        const uint32_t state = take(table, states[lane], symbols + lane);
        uint16_t word;
        memcpy(&word, words, 2);
        const uint32_t is_low = state < LOWEST;
        states[lane] = state << 16 * is_low | (word & -is_low);
        words += 2 * is_low;
    }
#endif
    return words;
}

// False when the words do not lead back to where encoding began.
bool decode_symbols(const uint32_t* table, uint32_t* states, const uint8_t* words,
                    int64_t num_words, uint8_t* symbols, int64_t n) {
    const uint8_t* const end = words + 2 * num_words;
    int64_t i = 0;
    for (; i + LANES <= n && end - words >= 2 * LANES; i += LANES)
        words = decode_lanes(table, states, words, symbols + i);
    for (; i < n; i++) {
        uint32_t state = take(table, states[i % LANES], symbols + i);
        if (state < LOWEST) {
            if (words == end) return false;
            uint16_t word;
            memcpy(&word, words, 2);
            words += 2;
            state = state << 16 | word;
        }
        states[i % LANES] = state;
    }
    for (int64_t lane = 0; lane < LANES; lane++)
        if (states[lane] != LOWEST) return false;
    return words == end;
}

int64_t rest_bytes(const Shape& shape) {
    return num_elements(shape) * (element_bytes(shape) - 1);
}

int64_t encoded_bytes(const Shape& shape) {
    return HEADER + block_bytes(shape);
}

int64_t finish(uint8_t* encoded, int64_t length, int64_t num_symbols) {
    const uint32_t header[2] = {(uint32_t)length, (uint32_t)num_symbols};
    memcpy(encoded, header, HEADER);
    return length;
}

int64_t encode(const Shape& shape, const uint8_t* block, uint8_t* encoded, Scratch& scratch) {
    const int64_t n = num_elements(shape), rest_size = rest_bytes(shape);
    scratch.symbols.resize(n + rest_size);
    scratch.words.resize(n + 1);
    uint8_t *symbols = scratch.symbols.data(), *rest = symbols + n;
    split_block(shape, block, symbols, rest);
    // Four tables, for the same symbol comes again before it has been counted.
    uint32_t counts[4][256] = {};
    for (int64_t i = 0; i < n; i++) counts[i % 4][symbols[i]]++;
    for (int i = 0; i < 256; i++) counts[0][i] += counts[1][i] + counts[2][i] + counts[3][i];
    Frequencies frequencies;
    frequencies.scale(counts[0], n);
    uint32_t codings[256] = {};
    uint8_t used[256];
    uint16_t scaled[256];
    int64_t num_used = 0;
    for (uint32_t i = 0, start = 0; i < 256; i++) {
        const uint32_t frequency = frequencies.of[i];
        if (!frequency) continue;
        codings[i] = coding(frequency, start);
        start += frequency;
        used[num_used] = i, scaled[num_used++] = frequency;
    }
    uint32_t states[LANES];
    for (uint32_t& state : states) state = LOWEST;
    uint16_t* const end = scratch.words.data() + n + 1;
    const uint16_t* words = encode_symbols(symbols, n, codings, states, end);
    const int64_t words_size = (end - words) * 2;
    const int64_t length = HEADER + 3 * num_used + (int64_t)sizeof states + rest_size + words_size;
    if (length >= encoded_bytes(shape)) {
        memcpy(encoded + HEADER, block, block_bytes(shape));
        return finish(encoded, encoded_bytes(shape), 0);
    }
    uint8_t* to = encoded + HEADER;
    const auto append = [&](const void* from, int64_t size) { memcpy(to, from, size), to += size; };
    append(used, num_used);
    append(scaled, 2 * num_used);
    append(states, sizeof states);
    append(rest, rest_size);
    append(words, words_size);
    return finish(encoded, length, num_used);
}

// False when frequencies do not add up to TOTAL.
bool read_table(const uint8_t* symbols, int64_t num_symbols, uint32_t* table) {
    uint32_t start = 0;
    for (int64_t i = 0; i < num_symbols; i++) {
        uint16_t frequency;
        memcpy(&frequency, symbols + num_symbols + 2 * i, 2);
        if (frequency == 0 || frequency > TOTAL - start) return false;
        for (uint32_t j = 0; j < frequency; j++) table[start + j] = entry(symbols[i], frequency, j);
        start += frequency;
    }
    return start == TOTAL;
}

bool decode(const Shape& shape, const uint8_t* encoded, int64_t size, uint8_t* block, Sink,
            Scratch& scratch) {
    uint32_t header[2];
    if (size < HEADER) return false;
    memcpy(header, encoded, HEADER);
    const int64_t length = header[0], num_symbols = header[1];
    if (length > size || length > encoded_bytes(shape) || num_symbols > 256) return false;
    if (num_symbols == 0) {
        if (length != encoded_bytes(shape)) return false;
        memcpy(block, encoded + HEADER, block_bytes(shape));
        return true;
    }
    uint32_t states[LANES], table[TOTAL];
    const int64_t rest_size = rest_bytes(shape), n = num_elements(shape);
    const int64_t fixed = HEADER + 3 * num_symbols + (int64_t)sizeof states + rest_size;
    if (length < fixed || (length - fixed) % 2) return false;
    if (!read_table(encoded + HEADER, num_symbols, table)) return false;
    const uint8_t* from = encoded + HEADER + 3 * num_symbols;
    memcpy(states, from, sizeof states);
    from += sizeof states;
    scratch.symbols.resize(n);
    uint8_t* symbols = scratch.symbols.data();
    if (!decode_symbols(table, states, from + rest_size, (length - fixed) / 2, symbols, n))
        return false;
    join_block(shape, symbols, from, block);
    return true;
}

}  // namespace

const Method kLossless{encoded_bytes, encode, decode};

}  // namespace penstock
