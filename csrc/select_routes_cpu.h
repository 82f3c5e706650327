// Route selection: one pass over the packed logits, as many rows at once as a vector register has lanes.
#pragma once
#include <bit>
#include <cmath>

#include "tile_product.h"

namespace d2r_fast::D2R_ISA {

inline Vector<double> exp_of_non_positive(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// Within 2 units in the last place; 0 where the result would be denormal.
inline Vector<float> exp_of_non_positive(Vector<float> x) {
  using V = Vector<float>;
  using Bits = Vector<int32_t>;
  const V shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, kept in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Bits scale = (std::bit_cast<Bits>(shifted) - 0x4B400000 + 127) << 23;
  const V y = p * std::bit_cast<V>(scale);
  return x < -87.0f ? V{} : y;
}

template <typename T>
void select_routes(const RouteArgs<T>& args, int64_t n_rows) {
  using V = Vector<T>;
  constexpr int kGroup = kLanes<T>;
  const auto [n_modules, n_kept] = args.size;
  const int64_t n_logits = n_modules * (n_modules + 1) / 2;
  V logits[kMaxModules * (kMaxModules + 1) / 2], scores[kMaxModules * (kMaxModules + 1) / 2];

  for (int64_t begin = 0; begin < n_rows; begin += kGroup) {
    // A group past the end repeats its last row; only rows inside are written.
    const int64_t inside = std::min<int64_t>(kGroup, n_rows - begin);
    for (int lane = 0; lane < kGroup; ++lane) {
      const int64_t row = begin + std::min<int64_t>(lane, inside - 1);
      const T* from = args.logits + row * n_logits;
      for (int64_t j = 0; j < n_logits; ++j) logits[j][lane] = from[j];
      if (!args.noise) continue;
      // In the order of logits / tau + noise: no division, so no overflow at a tiny tau.
      const T* noise = args.noise + row * n_logits;
      const T temperature = args.temperature[row];
      for (int64_t j = 0; j < n_logits; ++j) scores[j][lane] = from[j] + temperature * noise[j];
    }
    const V* ranked = args.noise ? scores : logits;
    uint32_t picked[kMaxModules][kGroup] = {};

    for (int64_t i = 1; i <= n_modules; ++i) {
      const int64_t kept = std::min(n_kept, i), slot = (i - 1) * n_kept;
      const V* logit = logits + i * (i - 1) / 2;
      const V* score = ranked + i * (i - 1) / 2;
      V best[kMaxModules], source[kMaxModules], chosen[kMaxModules];  // sources as floats: they fit exactly
      if (args.given) {
        for (int64_t k = 0; k < kept; ++k)
          for (int lane = 0; lane < kGroup; ++lane) {
            const int64_t row = begin + std::min<int64_t>(lane, inside - 1);
            const int32_t at = args.index[row * n_modules * n_kept + slot + k];
            source[k][lane] = static_cast<T>(at);
            chosen[k][lane] = logit[at][lane];
          }
      } else {
        // Insertion into the list of the best so far: the first `kept` fill it, so sources differ whatever the scores.
        for (int64_t j = 0; j < i; ++j) {
          V v = score[j], at = V{} + static_cast<T>(j), l = logit[j];
          for (int64_t k = 0; k < std::min(j, kept); ++k) {
            const auto better = v > best[k];
            const V v_out = better ? best[k] : v, at_out = better ? source[k] : at, l_out = better ? chosen[k] : l;
            best[k] = better ? v : best[k];
            source[k] = better ? at : source[k];
            chosen[k] = better ? l : chosen[k];
            v = v_out, at = at_out, l = l_out;
          }
          if (j < kept) best[j] = v, source[j] = at, chosen[j] = l;
        }
      }

      V top = chosen[0], sum{};
      for (int64_t k = 1; k < kept; ++k) top = chosen[k] > top ? chosen[k] : top;
      V gate[kMaxModules];
      for (int64_t k = 0; k < kept; ++k) sum += gate[k] = exp_of_non_positive(chosen[k] - top);
      for (int64_t k = 0; k < kept; ++k) gate[k] /= sum;

      V share[kMaxModules];  // of the kept sources among all i, times i + 1
      if (args.resrouting) {
        V all_top = logit[0], all_sum{};
        for (int64_t j = 1; j < i; ++j) all_top = logit[j] > all_top ? logit[j] : all_top;
        for (int64_t j = 0; j < i; ++j) all_sum += exp_of_non_positive(logit[j] - all_top);
        for (int64_t k = 0; k < kept; ++k)
          share[k] = exp_of_non_positive(chosen[k] - all_top) / all_sum * static_cast<T>(i + 1);
      }

      for (int64_t k = 0; k < n_kept; ++k)
        for (int lane = 0; lane < inside; ++lane) {
          const int64_t to = (begin + lane) * n_modules * n_kept + slot + k;
          const bool used = k < kept;
          const int32_t at = used ? static_cast<int32_t>(source[k][lane]) : 0;
          args.index[to] = at;
          args.gate[to] = used ? gate[k][lane] : T(0);
          args.flow[to] = used && (!args.resrouting || share[k][lane] > 1);
          if (used) picked[i - 1][lane] |= 1u << at;
        }
    }

    for (int lane = 0; lane < inside; ++lane) {
      uint32_t active = picked[n_modules - 1][lane];
      for (int64_t module = n_modules - 1; module > 0; --module)
        if (active >> module & 1) active |= picked[module - 1][lane];
      args.active[begin + lane] = static_cast<int32_t>(active);
    }
  }
}

// Softmax over the kept sources; every other logit gets zero.
template <typename T>
void select_routes_backward(const RouteSizes& size, const T* d_gate, const int32_t* index, const T* gate, T* d_logits,
                            int64_t n_rows) {
  const auto [n_modules, n_kept] = size;
  const int64_t n_logits = n_modules * (n_modules + 1) / 2;
  for (int64_t row = 0; row < n_rows; ++row) {
    T* to = d_logits + row * n_logits;
    std::fill_n(to, n_logits, T(0));
    for (int64_t i = 1; i <= n_modules; to += i++) {
      const int64_t slot = (row * n_modules + i - 1) * n_kept, kept = std::min(n_kept, i);
      T mean = 0;
      for (int64_t k = 0; k < kept; ++k) mean += gate[slot + k] * d_gate[slot + k];
      for (int64_t k = 0; k < kept; ++k) to[index[slot + k]] = gate[slot + k] * (d_gate[slot + k] - mean);
    }
  }
}

}  // namespace d2r_fast::D2R_ISA
