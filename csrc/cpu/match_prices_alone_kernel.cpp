// The CPU kernels of dmm::match_prices where templates may stay alone: a file of its own, or what GCC inlines into the other
// would change.
#include "match_prices_solver.h"

namespace dmm::DMM_ISA {

template <typename T, Lanes lanes>
using AnyTemplatePrices = PricesSolver<T, lanes, true>;

extern const MatchKernels prices_alone_kernels = kernels_of<AnyTemplatePrices>();

}  // namespace dmm::DMM_ISA
