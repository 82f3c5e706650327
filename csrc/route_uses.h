// Backward, source by source: what all routes that use a module's output hand back to it. A source pulls from its users,
// which have their gradients by then, so that nothing is zeroed first and nothing is read and written again.
#pragma once
#include <algorithm>

#include "kernels.h"
#include "vectors.h"

namespace d2r_fast::D2R_ISA {

// One route's use of a source.
template <typename T>
struct Use {
  const T* all;      // the gradient at the route's input, through its layer and its residual
  const T* to_relu;  // what of it may enter the source's ReLU layer
  T gate;
  T* d_gate;
};

// What one or two uses (kTwo) give their source, whose output is h: A, which enters its ReLU layer, S, which passes its
// residual (kResidual), and the gates' gradients. kFirst: A and S start here.
template <bool kResidual, bool kFirst, bool kTwo, typename T>
inline void pull_uses(const Use<T>& a, const Use<T>& b, const T* h, int64_t width, T* to_relu, T* to_residual) {
  const auto [all_a, relu_a, gate_a, d_gate_a] = a;
  const auto [all_b, relu_b, gate_b, d_gate_b] = b;
  const auto step = [&]<typename V>(int64_t j, V& dot_a, V& dot_b) {
    const V h_j = load<V>(h + j), at_a = load<V>(all_a + j);
    V relu = gate_a * load<V>(relu_a + j), rest = gate_a * at_a;
    dot_a += at_a * h_j;
    if constexpr (kTwo) {
      const V at_b = load<V>(all_b + j);
      relu += gate_b * load<V>(relu_b + j);
      rest += gate_b * at_b;
      dot_b += at_b * h_j;
    }
    store(to_relu + j, kFirst ? relu : relu + load<V>(to_relu + j));
    if constexpr (kResidual) store(to_residual + j, kFirst ? rest : rest + load<V>(to_residual + j));
  };
  Lanes<T> dot_a{}, dot_b{};
  T rest_a = 0, rest_b = 0;
  int64_t j = 0;
  for (; j + kLanes<T> <= width; j += kLanes<T>) step(j, dot_a, dot_b);
  for (; j < width; ++j) step(j, rest_a, rest_b);
  *d_gate_a = sum_of_lanes<T>(dot_a) + rest_a;
  if constexpr (kTwo) *d_gate_b = sum_of_lanes<T>(dot_b) + rest_b;
}

// A row's uses of each source as lists of slots: `last` [N] begins a source's, `before` [N*K] goes on, kNoSlot ends it.
constexpr int16_t kNoSlot = -1;
static_assert(kMaxModules * kMaxModules <= 1 << 15);

inline void list_uses(int32_t active, const int32_t* index, int64_t n_modules, int64_t n_kept, int16_t* last, int16_t* before) {
  std::fill_n(last, n_modules, kNoSlot);
  for (int64_t i = 1; i <= n_modules; ++i) {
    if (i < n_modules && !(static_cast<uint32_t>(active) >> i & 1)) continue;
    for (int64_t slot = (i - 1) * n_kept; slot < (i - 1) * n_kept + std::min(n_kept, i); ++slot) {
      before[slot] = last[index[slot]];
      last[index[slot]] = static_cast<int16_t>(slot);
    }
  }
}

// A, S and the gates' gradients of one source from all its uses; one without any, which no route reaches, gets zeros.
template <bool kResidual, typename T, typename UseAt>
inline void pull(int16_t slot, const int16_t* before, const UseAt& use_at, const T* h, int64_t width, T* to_relu,
                 T* to_residual) {
  if (slot == kNoSlot) {
    std::fill_n(to_relu, width, T(0));
    if (kResidual) std::fill_n(to_residual, width, T(0));
  }
  for (bool is_first = true; slot != kNoSlot; is_first = false) {
    const Use<T> a = use_at(slot);
    slot = before[slot];
    if (slot == kNoSlot) {
      const auto run = is_first ? pull_uses<kResidual, true, false, T> : pull_uses<kResidual, false, false, T>;
      return run(a, a, h, width, to_relu, to_residual);
    }
    const auto run = is_first ? pull_uses<kResidual, true, true, T> : pull_uses<kResidual, false, true, T>;
    run(a, use_at(slot), h, width, to_relu, to_residual);
    slot = before[slot];
  }
}

}  // namespace d2r_fast::D2R_ISA
