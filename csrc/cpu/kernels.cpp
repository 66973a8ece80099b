// All CPU kernels for one instruction set. The build compiles this file once for each, with DETR_INSTRUCTION_SET its
// name. Everything has internal linkage, so that no function compiled for one set can be linked into another.
#include "matching_union.h"
#include "set_loss.h"

namespace detr::cpu {

#define DETR_NAME_(x) #x
#define DETR_NAME(x) DETR_NAME_(x)

extern const Kernels DETR_INSTRUCTION_SET;
const Kernels DETR_INSTRUCTION_SET = {
    DETR_NAME(DETR_INSTRUCTION_SET),
    assign<float>,
    assign<double>,
    matching_cost<float>,
    matching_cost<double>,
    match<float>,
    match<double>,
    set_loss<float>,
    set_loss<double>,
    scale_gradients<float>,
    scale_gradients<double>,
    unite,
};

}  // namespace detr::cpu
