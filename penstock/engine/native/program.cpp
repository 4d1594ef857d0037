// Runs a recorded decoder: one operation after the other, over registers that hold rows.
#include "operations.h"

namespace penstock {

// As `Code` in program.py.
enum Code : int32_t {
    EMBED,
    EMBED_PACKED,
    NORM,
    ADD,
    ADD_NORM,
    LINEAR,
    HEADS,
    ATTEND,
    ACTIVATE,
    SELECT_ROWS,
    CAP,
    APPLY,
};

// `inputs` and `outputs` are numbers of registers. `width` is that of the (first) output's row.
// `on_selected` says that the rows are those which need logits, not all of the batch.
struct Operation {
    int32_t code, dtype;
    int32_t inputs[2], outputs[2];
    const void* spec;
    int64_t width;
    float scale, softcap;
    int32_t kind, gated, on_selected, reserved;
};

static void run_one(const Operation& op, const Batch& batch, void* const* registers) {
    const int64_t rows = op.on_selected ? batch.num_logits_rows : batch.num_rows;
    const void* x = registers[op.inputs[0]];
    const void* x2 = registers[op.inputs[1]];
    void* y = registers[op.outputs[0]];
    switch (op.code) {
        case EMBED:
            return embed(op.spec, batch.token_ids, rows, op.width, op.scale, op.dtype, y);
        case EMBED_PACKED:
            return embed_packed(*(const Linear*)op.spec, batch.token_ids, rows, op.scale, y);
        case NORM:
            return norm(*(const Norm*)op.spec, x, rows, op.width, op.dtype, y);
        case ADD:
            return add(x, x2, op.scale, rows * op.width, op.dtype, y);
        case ADD_NORM:
            return add_norm(*(const Norm*)op.spec, x, x2, op.scale, rows, op.width, op.dtype, y,
                            registers[op.outputs[1]]);
        case LINEAR:
            return linear(*(const Linear*)op.spec, x, rows, y);
        case HEADS:
            return heads(*(const Heads*)op.spec, batch, x, y);
        case ATTEND:
            return attend(*(const Attention*)op.spec, batch, x, op.width, y);
        case ACTIVATE:
            return activate(x, rows, op.width, op.kind, op.gated, op.dtype, y);
        case SELECT_ROWS:
            return select_rows(x, batch.logits_rows, batch.num_logits_rows,
                               op.width * (op.dtype == BFLOAT16 ? 2 : 4), y);
        case CAP:
            return cap(x, rows * op.width, op.scale, op.softcap, op.dtype, (float*)y);
    }
}

}  // namespace penstock

using namespace penstock;

// Runs operations from `first` on, and returns the number of the one it stopped at: `count` when
// all are done, or an APPLY, which is Python's to run.
extern "C" int64_t penstock_run(const Operation* operations, int64_t first, int64_t count,
                                const Batch* batch, void* const* registers) {
    for (int64_t i = first; i < count; i++) {
        if (operations[i].code == APPLY) return i;
        run_one(operations[i], *batch, registers);
    }
    return count;
}

extern "C" void penstock_linear(const Linear* layer, const void* x, int64_t rows, void* y) {
    linear(*layer, x, rows, y);
}

extern "C" void penstock_rows(const Linear* layer, const int64_t* ids, int64_t rows, void* to) {
    embed_packed(*layer, ids, rows, 1.f, to);
}

extern "C" void penstock_attend(const Attention* layer, const Batch* batch, const void* query,
                                int64_t query_stride, void* output) {
    attend(*layer, *batch, query, query_stride, output);
}

extern "C" void penstock_store(const Attention* layer, const void* key, int64_t key_stride,
                               const void* value, int64_t value_stride, const int64_t* slots,
                               int64_t rows) {
    store(*layer, key, key_stride, value, value_stride, slots, rows);
}

// Bytes of each struct, in the order of `structs.SIZED`: what Python mirrors must not drift.
extern "C" void penstock_sizes(int64_t* sizes) {
    const int64_t all[] = {sizeof(Linear), sizeof(Norm),  sizeof(Attention),
                           sizeof(Heads),  sizeof(Batch), sizeof(Operation)};
    memcpy(sizes, all, sizeof(all));
}
