// Attention in bfloat16: a file of its own, so that both types are compiled at the same time.
#include "attention_plan.h"

namespace penstock {

template void attend_all<bf16>(const Context&);

}  // namespace penstock
