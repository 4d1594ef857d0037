// int8 and int4: a number is low + scale * code, with low and scale for each group of numbers.
//
// Keys have channels that are large in every token, so a group is one channel over up to 32 tokens;
// values have none, so a group is up to 32 channels of one token (KIVI, arXiv 2402.02750).
// A plane is low [groups] and scale [groups] in float16, then codes [block_size, width]; for int4
// the codes of tokens 2 i and 2 i + 1 share a byte, the former in its lower half.
#include "wide.h"

namespace penstock {
namespace {

inline Word code(Float value, Float low, Float inverse, float levels) {
    const Float place = min(max((value - low) * inverse, splat(0.f)), splat(levels));
    return (Word) __builtin_convertvector(place + 0.5f, Int);
}

// Codes of one unit of channels over all tokens of the group, from `values` [tokens, UNIT].
template <int BITS>
inline void store_codes(const Float* values, int64_t num_tokens, Range range, uint8_t* codes,
                        int64_t width) {
    constexpr float levels = (1 << BITS) - 1;
    if constexpr (BITS == 8) {
        for (int64_t t = 0; t < num_tokens; t++)
            store_bytes(codes + t * width, code(values[t], range.low, range.inverse, levels));
    } else {
        for (int64_t t = 0; t < num_tokens; t += 2) {
            const Word first = code(values[t], range.low, range.inverse, levels);
            const Word second = code(values[t + 1], range.low, range.inverse, levels);
            store_bytes(codes + t / 2 * width, first | second << 4);
        }
    }
}

// UNITS units of channels over the tokens of one group, the first of each at `from`.
template <int UNITS, class T, int BITS>
inline void encode_strip(const T* from, int64_t width, int64_t num_tokens, float16* lows,
                         float16* scales, uint8_t* codes) {
    Float values[UNITS][GROUP], low[UNITS], high[UNITS];
    for (int u = 0; u < UNITS; u++) low[u] = high[u] = load(from + u * UNIT);
    for (int64_t t = 0; t < num_tokens; t++) {
        for (int u = 0; u < UNITS; u++) {
            const T* place = from + t * width + u * UNIT;
            // The strip after the next one: no hardware sees so many streams.
            __builtin_prefetch(place + 2 * UNITS * UNIT);
            values[u][t] = load(place);
            low[u] = min(low[u], values[u][t]), high[u] = max(high[u], values[u][t]);
        }
    }
    for (int u = 0; u < UNITS; u++) {
        const Range range =
            settle(low[u], high[u], (1 << BITS) - 1, lows + u * UNIT, scales + u * UNIT, UNIT);
        store_codes<BITS>(values[u], num_tokens, range, codes + u * UNIT, width);
    }
}

template <class T, int BITS>
void encode_keys(const Shape& shape, const Plane& plane, const T* rows, uint8_t* encoded) {
    const int64_t width = shape.width, group = plane.group;
    float16* lows = (float16*)encoded;
    float16* scales = lows + plane.num_groups;
    uint8_t* codes = encoded + 4 * plane.num_groups;
    for (int64_t start = 0; start < shape.block_size; start += group) {
        const T* from = rows + start * width;
        uint8_t* to = codes + start * width * BITS / 8;
        const int64_t first = start / group * width;
        int64_t c = 0;
#if defined(PENSTOCK_AVX512) || defined(PENSTOCK_AVX2)
        while (group % 4 == 0 && c + PACK <= width) {
            const int64_t count = min(CHUNK, (width - c) / PACK * PACK);
            encode_key_rows<T, BITS>(from + c, width, count, group, lows + first + c,
                                     scales + first + c, to + c);
            c += count;
        }
#endif
        for (; c + 32 <= width; c += 32)
            encode_strip<32 / UNIT, T, BITS>(from + c, width, group, lows + first + c,
                                             scales + first + c, to + c);
        if (c < width)
            encode_strip<16 / UNIT, T, BITS>(from + c, width, group, lows + first + c,
                                             scales + first + c, to + c);
    }
}

// What the groups of a plane are encoded or decoded with, as floats: a run of them at a time.
struct Parameters {
    alignas(LINE) float low[CHUNK], scale[CHUNK];

    void read(const float16* lows, const float16* scales, int64_t count) {
        for (int64_t i = 0; i < count; i += UNIT) {
            store(low + i, load_some(lows + i, count - i));
            store(scale + i, load_some(scales + i, count - i));
        }
    }

#if defined(PENSTOCK_AVX2)
    // Of each sixteen those at even places first, and then those at odd ones, as `Split` has them.
    void apart(int64_t count) {
        for (int64_t i = 0; i + SIXTEEN <= count; i += SIXTEEN) {
            for (float* from : {low + i, scale + i}) {
                const Split numbers = split(load(from), load(from + UNIT));
                store(from, numbers.even), store(from + UNIT, numbers.odd);
            }
        }
    }
#endif

    // Settles `count` groups of values that follow one another; `scale` is then the inverse.
    template <class T>
    void measure(const T* values, int64_t group, int64_t count, float levels, float16* lows,
                 float16* scales) {
        for (int64_t done = 0; done < count; done += UNIT) {
            const int64_t some = count - done < UNIT ? count - done : UNIT;
            Float low_of[UNIT] = {}, high_of[UNIT] = {};
            for (int64_t i = 0; i < some; i++, values += group) {
                low_of[i] = high_of[i] = load(values);
                for (int64_t c = UNIT; c < group; c += UNIT) {
                    low_of[i] = min(low_of[i], load(values + c));
                    high_of[i] = max(high_of[i], load(values + c));
                }
            }
            const Range range =
                settle(smallest_of(low_of), largest_of(high_of), levels, lows + done, scales + done,
                       some);
            store(low + done, range.low), store(scale + done, range.inverse);
        }
    }

    // The numbers of the codes of a unit whose parameters are at `i`; a scale has so few digits
    // that the product is exact, and one rounding is as good as two.
    template <bool IS_KEY>
    Float decode(Word codes, int64_t i) const {
        return decode<IS_KEY>(__builtin_convertvector((Int)codes, Float), i);
    }
    template <bool IS_KEY>
    Float decode(Float number, int64_t i) const {
        if constexpr (IS_KEY) return multiply_add(load(scale + i), number, load(low + i));
        return multiply_add(splat(scale[i]), number, splat(low[i]));
    }
};

// Tokens whose groups fit, an even number if there is more than one.
inline int64_t tokens_at_once(int64_t row_groups) {
    const int64_t fit = CHUNK / row_groups;
    return fit < 2 ? 1 : fit & ~1;
}

template <class T, int BITS>
void encode_values(const Shape& shape, const Plane& plane, const T* rows, uint8_t* encoded) {
    constexpr int64_t ROWS = 8 / BITS;
    constexpr float levels = (1 << BITS) - 1;
    const int64_t width = shape.width, group = plane.group, row_groups = width / group;
    float16* lows = (float16*)encoded;
    float16* scales = lows + plane.num_groups;
#if defined(PENSTOCK_AVX512) || defined(PENSTOCK_AVX2)
    if (group == GROUP && row_groups % UNIT == 0) {
        for (int64_t t = 0; t < shape.block_size; t += ROWS)
            encode_value_rows<T, BITS>(rows + t * width, width, lows + t * row_groups,
                                       scales + t * row_groups,
                                       encoded + 4 * plane.num_groups + t / ROWS * width);
        return;
    }
#endif
    const int64_t at_once = tokens_at_once(row_groups);
    Parameters parameters;
    for (int64_t start = 0; start < shape.block_size; start += at_once) {
        const int64_t tokens = min(at_once, shape.block_size - start);
        parameters.measure(rows + start * width, group, tokens * row_groups, levels,
                           lows + start * row_groups, scales + start * row_groups);
        for (int64_t t = 0; t < tokens; t += ROWS) {
            const T* from = rows + (start + t) * width;
            uint8_t* to = encoded + 4 * plane.num_groups + (start + t) / ROWS * width;
            for (int64_t j = 0; j < row_groups; j++) {
                for (int64_t c = j * group; c < (j + 1) * group; c += UNIT) {
                    Word word{};
                    for (int64_t r = 0; r < ROWS; r++) {
                        const int64_t i = (t + r) * row_groups + j;
                        word |= code(load(from + r * width + c), splat(parameters.low[i]),
                                     splat(parameters.scale[i]), levels)
                                << (4 * r);
                    }
                    store_bytes(to + c, word);
                }
            }
        }
    }
}

// A unit of codes, of int4 those in the lower or the upper halves of the bytes.
template <int BITS, bool IS_UPPER>
inline Word codes_of(const uint8_t* codes) {
    const Word word = load_bytes(codes);
    if constexpr (BITS == 8) return word;
    return IS_UPPER ? word >> 4 : word & 15u;
}

// One row of codes, of int4 one of its two, whose parameters begin at `first`.
template <class T, int BITS, bool IS_KEY, bool IS_UPPER>
inline void decode_half(const Parameters& parameters, int64_t first, int64_t group,
                        const uint8_t* codes, T* to, int64_t size, Sink sink) {
    const int shift = IS_KEY ? 0 : group == 32 ? 5 : 4;
    const auto unit = [&](int64_t c) {
        return parameters.decode<IS_KEY>(codes_of<BITS, IS_UPPER>(codes + c), first + (c >> shift));
    };
    int64_t c = 0;
#if defined(PENSTOCK_AVX2)
    if constexpr (std::is_same_v<T, bfloat16>) {
        constexpr int64_t odd = IS_KEY ? UNIT : 0;  // see `apart`
        for (; c + SIXTEEN <= size; c += SIXTEEN) {
            const Split number = numbers_of<BITS, IS_UPPER>(codes + c);
            const int64_t i = first + (c >> shift);
            sink.put(to + c,
                     round_to_bfloat16({parameters.decode<IS_KEY>(number.even, i),
                                        parameters.decode<IS_KEY>(number.odd, i + odd)}));
        }
    }
#endif
    for (; c + 2 * UNIT <= size; c += 2 * UNIT) {
        __builtin_prefetch(codes + c + AHEAD, 0, 2);  // measured: this far, and not all the way up
        sink.put(to + c, unit(c), unit(c + UNIT));
    }
    if (c < size) store(to + c, unit(c));
}

template <class T, int BITS, bool IS_KEY>
inline void decode_row(const Parameters& parameters, int64_t first, int64_t group,
                       const uint8_t* codes, bool is_upper, T* to, int64_t size, Sink sink) {
    if (is_upper)
        decode_half<T, BITS, IS_KEY, true>(parameters, first, group, codes, to, size, sink);
    else
        decode_half<T, BITS, IS_KEY, false>(parameters, first, group, codes, to, size, sink);
}

template <class T, int BITS>
void decode_keys(const Shape& shape, const Plane& plane, const uint8_t* encoded, T* rows,
                 Sink sink) {
    const int64_t width = shape.width, group = plane.group;
    const float16* lows = (const float16*)encoded;
    const float16* scales = lows + plane.num_groups;
    const uint8_t* codes = encoded + 4 * plane.num_groups;
    Parameters parameters;
    for (int64_t start = 0; start < shape.block_size; start += group) {
        for (int64_t c = 0; c < width; c += CHUNK) {
            const int64_t size = min(CHUNK, width - c), first = start / group * width + c;
            parameters.read(lows + first, scales + first, size);
#if defined(PENSTOCK_AVX2)
            if constexpr (std::is_same_v<T, bfloat16>) parameters.apart(size);
#endif
            for (int64_t t = start; t < start + group; t++)
                decode_row<T, BITS, true>(parameters, 0, group,
                                          codes + t * BITS / 8 * width + c, t * BITS % 8 != 0,
                                          rows + t * width + c, size, sink);
        }
    }
}

template <class T, int BITS>
void decode_values(const Shape& shape, const Plane& plane, const uint8_t* encoded, T* rows,
                   Sink sink) {
    const int64_t width = shape.width, row_groups = width / plane.group;
    const float16* lows = (const float16*)encoded;
    const float16* scales = lows + plane.num_groups;
    const uint8_t* codes = encoded + 4 * plane.num_groups;
    const int64_t at_once = tokens_at_once(row_groups);
    Parameters parameters;
    for (int64_t start = 0; start < shape.block_size; start += at_once) {
        const int64_t end = min(start + at_once, shape.block_size);
        parameters.read(lows + start * row_groups, scales + start * row_groups,
                        (end - start) * row_groups);
        for (int64_t t = start; t < end; t++)
            decode_row<T, BITS, false>(parameters, (t - start) * row_groups, plane.group,
                                       codes + t * BITS / 8 * width, t * BITS % 8 != 0,
                                       rows + t * width, width, sink);
    }
}

template <int BITS>
int64_t encoded_bytes(const Shape& shape) {
    const int64_t pair = Plane(shape, BITS, true).bytes + Plane(shape, BITS, false).bytes;
    return shape.num_planes / 2 * pair;
}

template <int BITS>
int64_t encode(const Shape& shape, const uint8_t* block, uint8_t* encoded, Scratch&) {
    const int64_t elements = shape.block_size * shape.width;
    uint8_t* to = encoded;
    with_type(shape, [&](auto* type) {
        auto* rows = (decltype(type))block;
        for (int64_t i = 0; i < shape.num_planes; i++, rows += elements) {
            const Plane plane(shape, BITS, i % 2 == 0);
            using T = std::remove_pointer_t<decltype(type)>;
            (plane.is_key ? encode_keys<T, BITS> : encode_values<T, BITS>)(shape, plane, rows, to);
            to += plane.bytes;
        }
    });
    return to - encoded;
}

template <int BITS>
bool decode(const Shape& shape, const uint8_t* encoded, int64_t, uint8_t* block, Sink sink,
            Scratch&) {
    const int64_t elements = shape.block_size * shape.width;
    with_type(shape, [&](auto* type) {
        auto* rows = (decltype(type))block;
        for (int64_t i = 0; i < shape.num_planes; i++, rows += elements) {
            const Plane plane(shape, BITS, i % 2 == 0);
            using T = std::remove_pointer_t<decltype(type)>;
            (plane.is_key ? decode_keys<T, BITS> : decode_values<T, BITS>)(shape, plane, encoded,
                                                                           rows, sink);
            encoded += plane.bytes;
        }
    });
    return true;
}

}  // namespace

const Method kInt8{encoded_bytes<8>, encode<8>, decode<8>};
const Method kInt4{encoded_bytes<4>, encode<4>, decode<4>};

}  // namespace penstock
