// A tanh-squashed normal policy's action and its log probability, on the CPU (d2r_fast/ops/squashed_normal.py).
#include <cmath>
#include <numbers>

#include "host.h"
#include "operations.h"
#include "parallel.h"

namespace d2r_fast {
namespace {

constexpr double kLeastLogStd = -20, kMostLogStd = 2, kEdge = 1e-6;
constexpr int64_t kRowsAtOnce = 256;

// Rows [B,width] that may lie further apart than they are wide, as columns of a wider matrix do.
int64_t row_stride_of(const char* name, const Tensor& rows, ScalarType dtype, int64_t n_rows, int64_t width) {
  check(rows.scalar_type() == dtype && rows.dim() == 2 && rows.size(0) == n_rows && rows.size(1) == width, name,
        ": expected [", n_rows, ", ", width, "] of ", torch::headeronly::toString(dtype), ", got ", shape_text(rows.sizes()),
        " of ", torch::headeronly::toString(rows.scalar_type()));
  check(width <= 1 || rows.stride(1) == 1, name, ": expected rows of adjacent numbers");
  return rows.stride(0);
}

struct PolicySizes {
  int64_t n_rows, n_actions;
};

PolicySizes policy_sizes(const Tensor& out, const Tensor& noise) {
  check(noise.dim() == 2, "noise: expected [B,A], got ", shape_text(noise.sizes()));
  const PolicySizes s{noise.size(0), noise.size(1)};
  check_tensor("out", out, out.scalar_type(), {s.n_rows, 2 * s.n_actions});
  check_tensor("noise", noise, out.scalar_type(), {s.n_rows, s.n_actions});
  return s;
}

template <typename Body>
void for_rows(int64_t n_rows, const Body& body) {
  for_each_block((n_rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t block) {
    for (int64_t row = block * kRowsAtOnce; row < std::min(n_rows, (block + 1) * kRowsAtOnce); ++row) body(row);
  });
}

}  // namespace

Tensor squashed_normal(Tensor out, Tensor noise, Tensor action) {
  const PolicySizes s = policy_sizes(out, noise);
  const int64_t stride = row_stride_of("action", action, out.scalar_type(), s.n_rows, s.n_actions);
  Tensor logp = fresh(out, {s.n_rows});
  with_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    const T *out_of = const_data<T>(out), *noise_of = const_data<T>(noise);
    T *action_of = data<T>(action), *logp_of = data<T>(logp);
    for_rows(s.n_rows, [=](int64_t row) {
      const T *mean = out_of + row * 2 * s.n_actions, *raw = mean + s.n_actions, *n = noise_of + row * s.n_actions;
      T *a = action_of + row * stride, sum = 0;
      for (int64_t j = 0; j < s.n_actions; ++j) {
        const T log_std = std::clamp(raw[j], T(kLeastLogStd), T(kMostLogStd));
        a[j] = std::tanh(mean[j] + std::exp(log_std) * n[j]);
        sum += T(-0.5) * n[j] * n[j] - log_std - T(0.5 * std::log(2 * std::numbers::pi)) - std::log(1 - a[j] * a[j] + T(kEdge));
      }
      logp_of[row] = sum;
    });
  });
  return logp;
}

Tensor squashed_normal_backward(Tensor d_action, Tensor d_logp, Tensor out, Tensor noise, Tensor action) {
  const PolicySizes s = policy_sizes(out, noise);
  const ScalarType real = out.scalar_type();
  const int64_t stride = row_stride_of("action", action, real, s.n_rows, s.n_actions);
  const int64_t d_stride = row_stride_of("d_action", d_action, real, s.n_rows, s.n_actions);
  check_tensor("d_logp", d_logp, real, {s.n_rows});
  Tensor d_out = fresh(out, {s.n_rows, 2 * s.n_actions});
  with_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    const T *out_of = const_data<T>(out), *noise_of = const_data<T>(noise), *action_of = const_data<T>(action);
    const T *d_action_of = const_data<T>(d_action), *d_logp_of = const_data<T>(d_logp);
    T* d_out_of = data<T>(d_out);
    for_rows(s.n_rows, [=](int64_t row) {
      const T *raw = out_of + (2 * row + 1) * s.n_actions, *n = noise_of + row * s.n_actions;
      const T *a = action_of + row * stride, *d_a = d_action_of + row * d_stride;
      T *d_mean = d_out_of + row * 2 * s.n_actions, *d_raw = d_mean + s.n_actions;
      const T d_sum = d_logp_of[row];
      for (int64_t j = 0; j < s.n_actions; ++j) {
        const T slope = 1 - a[j] * a[j];
        d_mean[j] = (d_a[j] + d_sum * 2 * a[j] / (slope + T(kEdge))) * slope;
        const bool clamped = !(raw[j] >= T(kLeastLogStd) && raw[j] <= T(kMostLogStd));
        d_raw[j] = clamped ? T(0) : d_mean[j] * std::exp(raw[j]) * n[j] - d_sum;
      }
    });
  });
  return d_out;
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("squashed_normal", TORCH_BOX(&squashed_normal));
  m.impl("squashed_normal_backward", TORCH_BOX(&squashed_normal_backward));
}

}  // namespace d2r_fast
