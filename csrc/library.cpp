// Chooses the instruction set.
#include <atomic>
#include <vector>

#include "host.h"

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

}  // namespace d2r_fast

// For Python, through ctypes: number `at` of the instruction sets that this processor has, the fastest first; or null.
extern "C" __attribute__((visibility("default"))) const char* d2r_fast_isa(int at) {
  const auto& isas = d2r_fast::isas();
  return at >= 0 && at < static_cast<int>(isas.size()) ? isas[at].name : nullptr;
}

// SHA-256 of the sources that this was built from, to be found in the file: loading it would register its operations.
extern "C" __attribute__((visibility("default"))) const char d2r_fast_sources[] = "d2r_fast sources " D2R_SOURCES;

// Use number `at` from now on; 0, the fastest, is the default. Returns 0, or -1 if there is no such number.
extern "C" __attribute__((visibility("default"))) int d2r_fast_use_isa(int at) {
  const auto& isas = d2r_fast::isas();
  if (at < 0 || at >= static_cast<int>(isas.size())) return -1;
  d2r_fast::g_isa = &isas[at];
  return 0;
}
