// The CPU kernels of dmm::match where templates may stay alone: a file of its own, or what GCC inlines into the other would
// change.
#include "match_solver.h"

namespace dmm::DMM_ISA {

template <typename T, Lanes lanes>
using AnyTemplate = Solver<T, lanes, true>;

extern const MatchKernels match_alone_kernels = kernels_of<AnyTemplate>();

}  // namespace dmm::DMM_ISA
