// The table of one variant's primitives, for dispatch.cpp.
#include "primitives.h"

namespace pdarts {

#define PDARTS_STRING(x) #x
#define PDARTS_NAME(x) PDARTS_STRING(x)

namespace PDARTS_VARIANT {
extern const Variant table;
const Variant table = {PDARTS_NAME(PDARTS_VARIANT), PDARTS_WIDTH,
                       {fan_out, mid, affine, mix, reduce, mid_backward, fan_in},
                       draw};
}  // namespace PDARTS_VARIANT

}  // namespace pdarts
