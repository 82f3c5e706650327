// Route selection on the CPU: host side of select_routes_cpu.h.
#include "operations.h"
#include "parallel.h"
#include "route_checks.h"

namespace d2r_fast {
namespace {

// `index` says E, B, N and K.
Sizes route_sizes(const Tensor& index) {
  check(index.dim() == 4, "index: expected [E,B,N,K], got ", shape_text(index.sizes()));
  const Sizes s{index.size(0), index.size(1), index.size(2), index.size(3), 0, false};
  check_routes(s.n_modules, s.n_kept);
  return s;
}

int64_t n_logits(const Sizes& s) { return s.n_modules * (s.n_modules + 1) / 2; }

}  // namespace

void select_routes(Tensor logits, std::optional<Tensor> temperature, std::optional<Tensor> noise, std::optional<Tensor> given,
                   bool resrouting, Tensor index, Tensor gate, Tensor flow, Tensor active) {
  const Sizes s = route_sizes(index);
  const ScalarType real = logits.scalar_type();
  check_tensor("logits", logits, real, {s.n_nets, s.n_rows, n_logits(s)});
  check_tensor("index", index, ScalarType::Int, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("gate", gate, real, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("flow", flow, ScalarType::Bool, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("active", active, ScalarType::Int, {s.n_nets, s.n_rows});
  check(noise.has_value() == temperature.has_value(), "temperature: expected one where there is noise, and none elsewhere");
  if (noise) check_tensor("noise", *noise, real, {s.n_nets, s.n_rows, n_logits(s)});
  if (temperature) check_tensor("temperature", *temperature, real, {s.n_rows});
  GivenRoutes given_routes(given, s, data<int32_t>(index));
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(false);
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      const int64_t row = net * s.n_rows + first, slot = row * s.n_modules * s.n_kept;
      if (!given_routes.take(row, n_rows)) return;
      const RouteArgs<T> args{{s.n_modules, s.n_kept},
                              const_data<T>(logits) + row * n_logits(s),
                              noise ? const_data<T>(*temperature) + first : nullptr,
                              noise ? const_data<T>(*noise) + row * n_logits(s) : nullptr,
                              given_routes.any(),
                              resrouting,
                              data<int32_t>(index) + slot,
                              data<T>(gate) + slot,
                              data<bool>(flow) + slot,
                              data<int32_t>(active) + row};
      kernel.select_routes(args, n_rows);
    });
  });
  given_routes.require_legal();
}

void select_routes_backward(Tensor d_gate, Tensor index, Tensor gate, Tensor d_logits) {
  const Sizes s = route_sizes(index);
  const ScalarType real = d_gate.scalar_type();
  check_tensor("d_gate", d_gate, real, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("index", index, ScalarType::Int, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("gate", gate, real, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("d_logits", d_logits, real, {s.n_nets, s.n_rows, n_logits(s)});
  with_dtype(d_gate, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(false);
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      const int64_t row = net * s.n_rows + first, slot = row * s.n_modules * s.n_kept;
      kernel.select_routes_backward({s.n_modules, s.n_kept}, const_data<T>(d_gate) + slot, const_data<int32_t>(index) + slot,
                                    const_data<T>(gate) + slot, data<T>(d_logits) + row * n_logits(s), n_rows);
    });
  });
}

}  // namespace d2r_fast
