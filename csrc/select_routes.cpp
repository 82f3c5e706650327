// Route selection on the CPU: host side of select_routes_cpu.h.
#include "operations.h"

namespace d2r_fast {
namespace {

Sizes route_sizes(const Tensor& index) {
  const Sizes s{index.size(0), index.size(1), index.size(2), index.size(3), 0, false};
  check_sizes(s);
  return s;
}

// Rows that a thread should get at least; a row of 16 modules takes about half a microsecond.
constexpr int64_t kRouteGrain = 64;

}  // namespace

void select_routes(Tensor logits, Tensor temperature, Tensor noise, Tensor given, bool resrouting, Tensor index, Tensor gate,
                   Tensor flow, Tensor active) {
  const Sizes s = route_sizes(index);
  const int64_t rows = s.n_nets * s.n_rows, n_logits = s.n_modules * (s.n_modules + 1) / 2, routes = index.numel();
  check_numel("logits", logits, rows * n_logits);
  check_numel("index", index, routes);
  check_numel("gate", gate, routes);
  check_numel("flow", flow, routes);
  check_numel("active", active, rows);
  const bool sampled = noise.numel() > 0, is_given = given.numel() > 0;
  if (sampled) check_numel("noise", noise, rows * n_logits);
  if (sampled) check_numel("temperature", temperature, s.n_rows);
  if (is_given) check_numel("given", given, routes);
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    const RouteArgs<T> args{s,
                            const_data<T>(logits),
                            sampled ? const_data<T>(temperature) : nullptr,
                            sampled ? const_data<T>(noise) : nullptr,
                            is_given ? const_data<int32_t>(given) : nullptr,
                            resrouting,
                            data<int32_t>(index),
                            data<T>(gate),
                            data<bool>(flow),
                            data<int32_t>(active)};
    const Kernels<T>& kernel = kernels<T>(false);
    torch::stable::parallel_for(0, rows, kRouteGrain,
                                [&](int64_t begin, int64_t end) { kernel.select_routes(args, begin, end - begin); });
  });
}

void select_routes_backward(Tensor d_gate, Tensor index, Tensor gate, Tensor d_logits) {
  const Sizes s = route_sizes(index);
  const int64_t rows = s.n_nets * s.n_rows;
  check_numel("d_gate", d_gate, index.numel());
  check_numel("index", index, index.numel());
  check_numel("gate", gate, index.numel());
  check_numel("d_logits", d_logits, rows * (s.n_modules * (s.n_modules + 1) / 2));
  with_dtype(d_gate, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(false);
    torch::stable::parallel_for(0, rows, kRouteGrain, [&](int64_t begin, int64_t end) {
      kernel.select_routes_backward(s, const_data<T>(d_gate), const_data<int32_t>(index), const_data<T>(gate),
                                    data<T>(d_logits), begin, end - begin);
    });
  });
}

}  // namespace d2r_fast
