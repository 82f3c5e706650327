// Compiled once for every instruction set; D2R_ISA names it.
#include "elementwise_cpu.h"
#include "expert_sum_cpu.h"
#include "layer_chain_cpu.h"
#include "module_levels_cpu.h"
#include "network_cpu.h"

namespace d2r_fast::D2R_ISA {

template <typename T, typename Products>
constexpr Kernels<T> kKernels = {
    &Products::packed_bytes,
    &Products::pack_weight,
    &forward<T, Products>,
    &backward<T, Products>,
    &linear_forward<T, Products>,
    &linear_backward<T, Products>,
    &select_routes<T>,
    &select_routes_backward<T>,
    &network_forward<T, Products>,
    &network_backward<T, Products>,
    &chain_forward<T, Products>,
    &chain_backward<T, Products>,
    &expert_sum<T>,
    &expert_sum_backward<T>,
    &levels_forward<T, Products>,
    &levels_backward<T, Products>,
    &gates_forward<T, Products>,
    &gates_backward<T, Products>,
    &gumbel,
    &squared_norm<T>,
    &adam<T>,
};

const KernelSet& kernel_set() {
  static const KernelSet set = {kKernels<float, PlainProducts<float>>, kKernels<double, PlainProducts<double>>,
                                kKernels<float, Bf16Products>};
  return set;
}

}  // namespace d2r_fast::D2R_ISA
