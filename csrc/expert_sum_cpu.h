// The sum of a row's N vectors, as they are or made orthonormal (MOORE). A row's numbers stay in the first-level cache.
#pragma once
#include <cmath>

#include "mix.h"
#include "workspace.h"

namespace d2r_fast::D2R_ISA {

template <typename T>
T dot(int64_t n, const T* a, const T* b) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

// y += factor x
template <typename T>
void add_scaled(int64_t n, T factor, const T* x, T* y) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) y[d] += factor * x[d];
}

// basis [N,D] of v [N,D] by classical Gram-Schmidt; coefficient [i N + j] = <v_i, b_j>, length [i] = |r_i|.
template <typename T>
void orthonormal(const ExpertSumArgs<T>& s, const T* v, T* basis, T* coefficient, T* length) {
  for (int64_t i = 0; i < s.n_experts; ++i) {
    T* r = basis + i * s.width;
    std::copy_n(v + i * s.width, s.width, r);
    for (int64_t j = 0; j < i; ++j) {
      const T c = dot(s.width, v + i * s.width, basis + j * s.width);
      coefficient[i * s.n_experts + j] = c;
      add_scaled(s.width, -c, basis + j * s.width, r);
    }
    length[i] = std::sqrt(dot(s.width, r, r));
    const T scale = 1 / (length[i] + s.norm_epsilon);
#pragma omp simd
    for (int64_t d = 0; d < s.width; ++d) r[d] *= scale;
  }
}

// A thread's memory for one row.
template <typename T>
struct Basis {
  T *b, *d_b, *coefficient, *length;
  explicit Basis(const ExpertSumArgs<T>& s) {
    const int64_t n = s.n_experts, line = s.orthogonal ? n * s.width : 0, square = s.orthogonal ? n * n : 0;
    Workspace& workspace = Workspace::of_this_thread();
    workspace.reserve(sizeof(T) * (2 * line + square + n) + 4 * 64);
    b = workspace.take<T>(line), d_b = workspace.take<T>(line);
    coefficient = workspace.take<T>(square), length = workspace.take<T>(n);
  }
};

template <typename T>
void expert_sum(const ExpertSumArgs<T>& s, int64_t n_rows, T* y) {
  const Basis<T> basis(s);
  for (int64_t row = 0; row < n_rows; ++row) {
    const T* v = s.v + row * s.n_experts * s.width;
    if (s.orthogonal) {
      orthonormal(s, v, basis.b, basis.coefficient, basis.length);
      v = basis.b;
    }
    mix(s.n_experts, s.width, s.weight + row * s.n_experts, v, y + row * s.width, [](auto sum) { return sum; });
  }
}

template <typename T>
void expert_sum_backward(const ExpertSumArgs<T>& s, int64_t n_rows, const T* d_y, T* d_v, T* d_weight) {
  const int64_t n = s.n_experts, width = s.width, line = n * width;
  const Basis<T> basis(s);
  std::fill_n(d_v, n_rows * line, T(0));
  for (int64_t row = 0; row < n_rows; ++row, d_y += width, d_v += line, d_weight += n) {
    const T *v = s.v + row * line, *weight = s.weight + row * n;
    if (!s.orthogonal) {
      mix_backward(n, width, d_y, weight, v, d_weight, d_v);
      continue;
    }
    T *b = basis.b, *d_b = basis.d_b;
    orthonormal(s, v, b, basis.coefficient, basis.length);
    std::fill_n(d_b, line, T(0));
    mix_backward(n, width, d_y, weight, b, d_weight, d_b);
    for (int64_t i = n - 1; i >= 0; --i) {
      // Through the division by |r| + eps: d_b becomes the gradient of r. A norm of 0 has no slope.
      T* d_r = d_b + i * width;
      const T norm = basis.length[i] + s.norm_epsilon;
      const T along = basis.length[i] == 0 ? T(0) : dot(width, d_r, b + i * width) * norm / basis.length[i];
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) d_r[d] = (d_r[d] - along * b[i * width + d]) / norm;
      T* d_v_i = d_v + i * width;
      add_scaled(width, T(1), d_r, d_v_i);
      for (int64_t j = 0; j < i; ++j) {
        const T d_c = -dot(width, d_r, b + j * width);
        add_scaled(width, d_c, b + j * width, d_v_i);
        add_scaled(width, d_c, v + i * width, d_b + j * width);
        add_scaled(width, -basis.coefficient[i * n + j], d_r, d_b + j * width);
      }
    }
  }
}

}  // namespace d2r_fast::D2R_ISA
