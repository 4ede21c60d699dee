// The CPU kernels of dmm::match where every template takes a proposal.
#include "match_solver.h"

namespace dmm::DMM_ISA {

template <typename T, Lanes lanes>
using EveryTemplate = Solver<T, lanes, false>;

extern const MatchKernels match_kernels = kernels_of<EveryTemplate>();

}  // namespace dmm::DMM_ISA
