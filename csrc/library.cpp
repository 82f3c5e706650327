// Registers the operations on torch's stable ABI, and chooses the instruction set.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <vector>

#include "operations.h"

namespace d2r_fast {
namespace {

// Those this processor has, the fastest first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas;
#if defined(D2R_HAS_avx512)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) isas.push_back({"avx512bf16", &avx512bf16::kernel_set()});
    if (avx512) isas.push_back({"avx512", &avx512::kernel_set()});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back({"avx2", &avx2::kernel_set()});
#endif
    isas.push_back({"baseline", &baseline::kernel_set()});
    return isas;
  }();
  return found;
}

std::atomic<const Isa*> g_isa = nullptr;

}  // namespace

const Isa& isa() {
  const Isa* chosen = g_isa.load();
  return chosen ? *chosen : isas().front();
}

namespace {

STABLE_TORCH_LIBRARY(d2r_fast_cpu, m) {
  m.def("routed_modules(Tensor h0, Tensor weight, Tensor bias, Tensor index, Tensor gate, Tensor active, bool residual, "
        "bool bf16, bool keep, Tensor(a!) mixed, Tensor(b!) h, Tensor(c!) opened) -> ()");
  m.def("routed_modules_backward(Tensor d_mixed, Tensor weight, Tensor index, Tensor gate, Tensor flow, Tensor active, "
        "Tensor h, Tensor opened, bool residual, bool bf16, bool to_weight, Tensor(a!) d_h0, Tensor(b!) d_weight, "
        "Tensor(c!) d_bias, Tensor(d!) d_gate) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor bias, bool relu, bool bf16, Tensor(a!) y) -> ()");
  m.def("linear_backward(Tensor d_y, Tensor x, Tensor weight, Tensor y, bool relu, bool bf16, bool to_x, bool to_weight, "
        "Tensor(a!) d_x, Tensor(b!) d_weight, Tensor(c!) d_bias) -> ()");
  m.def("select_routes(Tensor logits, Tensor? temperature, Tensor? noise, Tensor? given, bool resrouting, "
        "Tensor(a!) index, Tensor(b!) gate, Tensor(c!) flow, Tensor(d!) active) -> ()");
  m.def("select_routes_backward(Tensor d_gate, Tensor index, Tensor gate, Tensor(a!) d_logits) -> ()");
  m.def("network(Tensor x, Tensor task, Tensor[] parameters, Tensor? temperature, Tensor? noise, Tensor? given, "
        "bool residual, bool resrouting, bool bf16, bool keep, Tensor(a!) out, Tensor(b!) index, Tensor(c!) gate, "
        "Tensor(d!) flow, Tensor(e!) active, Tensor(f!) activations, Tensor(g!) h, Tensor(h!) opened) -> ()");
  m.def("network_backward(Tensor d_out, Tensor? to_gate, Tensor x, Tensor task, Tensor[] parameters, Tensor index, "
        "Tensor gate, Tensor flow, Tensor active, Tensor activations, Tensor h, Tensor opened, bool residual, bool bf16, "
        "bool to_x, Tensor(a!) d_x, Tensor(b!)[] d_parameters) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast_cpu, CPU, m) {
  m.impl("routed_modules", TORCH_BOX(&routed_modules));
  m.impl("routed_modules_backward", TORCH_BOX(&routed_modules_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("select_routes", TORCH_BOX(&select_routes));
  m.impl("select_routes_backward", TORCH_BOX(&select_routes_backward));
  m.impl("network", TORCH_BOX(&network));
  m.impl("network_backward", TORCH_BOX(&network_backward));
}

// Schemas and references of these are in d2r_fast/ops.
STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("gumbel_", TORCH_BOX(&gumbel_));
  m.impl("squashed_normal", TORCH_BOX(&squashed_normal));
  m.impl("squashed_normal_backward", TORCH_BOX(&squashed_normal_backward));
  m.impl("sac_losses", TORCH_BOX(&sac_losses));
  m.impl("optimiser_step", TORCH_BOX(&optimiser_step));
  m.impl("replay_rows", TORCH_BOX(&replay_rows));
}

}  // namespace
}  // namespace d2r_fast

// For Python, through ctypes: number `at` of the instruction sets that this processor has, the fastest first; or null.
extern "C" __attribute__((visibility("default"))) const char* d2r_fast_isa(int at) {
  const auto& isas = d2r_fast::isas();
  return at >= 0 && at < static_cast<int>(isas.size()) ? isas[at].name : nullptr;
}

// Use number `at` from now on; 0, the fastest, is the default. Returns 0, or -1 if there is no such number.
extern "C" __attribute__((visibility("default"))) int d2r_fast_use_isa(int at) {
  const auto& isas = d2r_fast::isas();
  if (at < 0 || at >= static_cast<int>(isas.size())) return -1;
  d2r_fast::g_isa = &isas[at];
  return 0;
}
