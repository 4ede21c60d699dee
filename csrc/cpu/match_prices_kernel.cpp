// The CPU kernels of dmm::match_prices where every template takes a proposal.
#include "match_prices_solver.h"

namespace dmm::DMM_ISA {

template <typename T, Lanes lanes>
using EveryTemplatePrices = PricesSolver<T, lanes, false>;

extern const MatchKernels prices_kernels = kernels_of<EveryTemplatePrices>();

}  // namespace dmm::DMM_ISA
