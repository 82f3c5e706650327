// Route selection on the CPU: host side of select_routes_cpu.h.
#include "operations.h"
#include "parallel.h"

namespace d2r_fast {
namespace {

struct RouteRows {
  int64_t n_nets, n_rows;
  RouteSizes size;
  int64_t n_logits;  // R
};

RouteRows route_rows(const Tensor& index) {
  const RouteRows s{index.size(0), index.size(1), {index.size(2), index.size(3)}, index.size(2) * (index.size(2) + 1) / 2};
  check_routes(s.size.n_modules, s.size.n_kept);
  return s;
}

}  // namespace

void select_routes(Tensor logits, Tensor temperature, Tensor noise, Tensor given, bool resrouting, Tensor index, Tensor gate,
                   Tensor flow, Tensor active) {
  const RouteRows s = route_rows(index);
  const int64_t rows = s.n_nets * s.n_rows, routes = index.numel();
  check_numel("logits", logits, rows * s.n_logits);
  check_numel("index", index, routes);
  check_numel("gate", gate, routes);
  check_numel("flow", flow, routes);
  check_numel("active", active, rows);
  const bool sampled = noise.numel() > 0, is_given = given.numel() > 0;
  if (sampled) check_numel("noise", noise, rows * s.n_logits);
  if (sampled) check_numel("temperature", temperature, s.n_rows);
  if (is_given) check_numel("given", given, routes);
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(false);
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      const int64_t row = net * s.n_rows + first, slot = row * s.size.n_modules * s.size.n_kept;
      const RouteArgs<T> args{s.size,
                              const_data<T>(logits) + row * s.n_logits,
                              sampled ? const_data<T>(temperature) + first : nullptr,
                              sampled ? const_data<T>(noise) + row * s.n_logits : nullptr,
                              is_given ? const_data<int32_t>(given) + slot : nullptr,
                              resrouting,
                              data<int32_t>(index) + slot,
                              data<T>(gate) + slot,
                              data<bool>(flow) + slot,
                              data<int32_t>(active) + row};
      kernel.select_routes(args, n_rows);
    });
  });
}

void select_routes_backward(Tensor d_gate, Tensor index, Tensor gate, Tensor d_logits) {
  const RouteRows s = route_rows(index);
  check_numel("d_gate", d_gate, index.numel());
  check_numel("index", index, index.numel());
  check_numel("gate", gate, index.numel());
  check_numel("d_logits", d_logits, s.n_nets * s.n_rows * s.n_logits);
  with_dtype(d_gate, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(false);
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      const int64_t row = net * s.n_rows + first, slot = row * s.size.n_modules * s.size.n_kept;
      kernel.select_routes_backward(s.size, const_data<T>(d_gate) + slot, const_data<int32_t>(index) + slot,
                                    const_data<T>(gate) + slot, data<T>(d_logits) + row * s.n_logits, n_rows);
    });
  });
}

}  // namespace d2r_fast
