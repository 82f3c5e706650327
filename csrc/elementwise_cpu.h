// What an update does to long arrays of numbers, one piece after another: Gumbel noise, squared norms, Adam.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "vectors.h"

namespace d2r_fast::D2R_ISA {

inline double log_of_positive(double x) { return std::log(x); }

// Of a normal number, within 2 units in the last place.
inline Lanes<float> log_of_positive(Lanes<float> x) {
  using V = Lanes<float>;
  using Bits = Lanes<int32_t>;
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)), so that the logarithm of m is small where that of x is.
  const Bits offset = std::bit_cast<Bits>(x) - 0x3F3504F3;
  const Bits exponent = offset >> 23;
  const V m = std::bit_cast<V>((offset & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const V e = __builtin_convertvector(exponent, V);
  V p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const V square = m * m;
  V y = p * m * square + e * -2.12194440e-4f;
  y = y - square * 0.5f;
  return m + y + e * 0.693359375f;
}

// -log(-log u) for n uniform numbers u in [0, 1), in place; 0 counts as the smallest normal number.
inline void gumbel(double* u, int64_t n) {
  for (int64_t j = 0; j < n; ++j) u[j] = -std::log(-std::log(std::max(u[j], std::numeric_limits<double>::min())));
}
inline void gumbel(float* u, int64_t n) {
  using V = Lanes<float>;
  const V smallest = V{} + std::numeric_limits<float>::min();
  // -log u is no less than half of float32's epsilon, so it is a normal number, too.
  const auto transform = [&](V x) { return -log_of_positive(-log_of_positive(x < smallest ? smallest : x)); };
  int64_t j = 0;
  for (; j + kLanes<float> <= n; j += kLanes<float>) store(u + j, transform(load<V>(u + j)));
  if (j == n) return;
  float rest[kLanes<float>];
  std::fill_n(rest, kLanes<float>, 0.5f);
  std::copy_n(u + j, n - j, rest);
  store(rest, transform(load<V>(rest)));
  std::copy_n(rest, n - j, u + j);
}

// In float64, so that neither order nor length shows.
template <typename T>
double squared_norm(const T* x, int64_t n) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += 256) {
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = begin; j < std::min(n, begin + 256); ++j) part += x[j] * x[j];
    sum += static_cast<double>(part);
  }
  return sum;
}

template <typename T>
void adam(const AdamPiece<T>& piece, const AdamConstants<T>& c, T scale, T step_size) {
  const auto [values, gradient, first, second, targets, n] = piece;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T g = gradient[j] * scale;
    const T m = first[j] + (g - first[j]) * (1 - c.beta1);
    const T v = second[j] * c.beta2 + g * g * (1 - c.beta2);
    first[j] = m;
    second[j] = v;
    values[j] -= step_size * m / (std::sqrt(v) * c.second_scale + c.eps);
  }
  if (!targets) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) targets[j] += (values[j] - targets[j]) * c.target_rate;
}

}  // namespace d2r_fast::D2R_ISA
