// Weighted sums of a row's vectors, and their gradient.
#pragma once
#include "vectors.h"

namespace d2r_fast::D2R_ISA {

// x = sum_k p_k m_k over n sources of `width` numbers, which lie one after another.
template <typename T, typename Then>
void mix(int64_t n, int64_t width, const T* p, const T* m, T* x, const Then& then) {
  using V = Lanes<T>;
  int64_t d = 0;
  for (; d + kLanes<T> <= width; d += kLanes<T>) {
    V sum = p[0] * load<V>(m + d);
    for (int64_t k = 1; k < n; ++k) sum += p[k] * load<V>(m + k * width + d);
    store(x + d, then(sum));
  }
  for (; d < width; ++d) {
    T sum = p[0] * m[d];
    for (int64_t k = 1; k < n; ++k) sum += p[k] * m[k * width + d];
    x[d] = then(sum);
  }
}

// A NaN stays one.
constexpr auto kRelu = [](auto x) { return x < 0 ? decltype(x){} : x; };

// From d_x: d_m_k += p_k d_x, d_p_k = <d_x, m_k>.
template <typename T>
void mix_backward(int64_t n, int64_t width, const T* d_x, const T* p, const T* m, T* d_p, T* d_m) {
  for (int64_t k = 0; k < n; ++k, m += width, d_m += width) {
    const T p_k = p[k];
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) {
      d_m[d] += p_k * d_x[d];
      sum += d_x[d] * m[d];
    }
    d_p[k] = sum;
  }
}

}  // namespace d2r_fast::D2R_ISA
