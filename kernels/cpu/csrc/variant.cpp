// The table of one variant's primitives, for dispatch.cpp.
#include "primitives.h"

// Whose primitives without products a variant has.
#ifdef PDARTS_AMX
#define PDARTS_PLAIN avx512bf16
#else
#define PDARTS_PLAIN PDARTS_VARIANT
#endif

namespace pdarts {

#define PDARTS_STRING(x) #x
#define PDARTS_NAME(x) PDARTS_STRING(x)

namespace PDARTS_VARIANT {
extern const Variant table;
const Variant table = {PDARTS_NAME(PDARTS_VARIANT), PDARTS_WIDTH,
                       {fan_out, mid, PDARTS_PLAIN::affine, PDARTS_PLAIN::mix,
                        PDARTS_PLAIN::reduce, mid_backward, fan_in},
                       PDARTS_PLAIN::draw};
}  // namespace PDARTS_VARIANT

}  // namespace pdarts
