// Paged attention over a strided block-major pool, and the writing of keys and values into it.
#include "attention.h"

#include "operations.h"

namespace penstock {

template <class T>
static void store_rows(const Attention& layer, const T* key, int64_t key_stride, const T* value,
                       int64_t value_stride, const int64_t* slots, int64_t rows) {
    for (int64_t row = 0; row < rows; row++)
        if (slots[row] >= 0)
            store_slot(layer, key + row * key_stride, value + row * value_stride, slots[row]);
}

void attend(const Attention& layer, const Batch& batch, const void* query, int64_t query_stride,
            void* output) {
    const Context context{layer, batch, query, query_stride, output};
    if (layer.dtype == BFLOAT16)
        attend_all<bf16>(context);
    else
        attend_all<float>(context);
}

void store(const Attention& layer, const void* key, int64_t key_stride, const void* value,
           int64_t value_stride, const int64_t* slots, int64_t rows) {
    if (layer.dtype == BFLOAT16)
        store_rows(layer, (const bf16*)key, key_stride, (const bf16*)value, value_stride, slots,
                   rows);
    else
        store_rows(layer, (const float*)key, key_stride, (const float*)value, value_stride, slots,
                   rows);
}

}  // namespace penstock
