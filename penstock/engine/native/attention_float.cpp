// Attention in float32: a file of its own, so that both types are compiled at the same time.
#include "attention_plan.h"

namespace penstock {

template void attend_all<float>(const Context&);

}  // namespace penstock
