// Route selection on the CPU: host side of select_routes_cpu.h.
#include <tuple>

#include "host.h"
#include "parallel.h"
#include "route_checks.h"

namespace d2r_fast {
namespace {

Sizes route_sizes(const Tensor& rows, int64_t n_modules, int64_t n_kept) {
  const Sizes s{rows.size(0), rows.size(1), n_modules, n_kept, 0, false};
  check_routes(s.n_modules, s.n_kept);
  return s;
}

int64_t n_logits(const Sizes& s) { return s.n_modules * (s.n_modules + 1) / 2; }

// Illegal routes in `given` are refused.
std::tuple<Tensor, Tensor, Tensor, Tensor> select_routes(Tensor logits, std::optional<Tensor> temperature,
                                                         std::optional<Tensor> noise, std::optional<Tensor> given, int64_t k,
                                                         int64_t n_modules, bool resrouting) {
  const ScalarType real = logits.scalar_type();
  logits = readable(logits), temperature = readable(temperature, real), noise = readable(noise, real);
  check(logits.dim() == 3, "logits: expected [E,B,R], got ", shape_text(logits.sizes()));
  const Sizes s = route_sizes(logits, n_modules, k);
  check_tensor("logits", logits, real, {s.n_nets, s.n_rows, n_logits(s)});
  check(noise.has_value() == temperature.has_value(), "temperature: expected one where there is noise, and none elsewhere");
  if (noise) check_tensor("noise", *noise, real, {s.n_nets, s.n_rows, n_logits(s)});
  if (temperature) check_tensor("temperature", *temperature, real, {s.n_rows});
  const ChosenRoutes chosen = fresh_routes(s, logits);
  GivenRoutes given_routes(given, s, data<int32_t>(chosen.index));
  with_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>();
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      const int64_t row = net * s.n_rows + first, slot = row * s.n_modules * s.n_kept;
      if (!given_routes.take(row, n_rows, row)) return;
      const RouteArgs<T> args{{s.n_modules, s.n_kept},
                              const_data<T>(logits) + row * n_logits(s),
                              noise ? const_data<T>(*temperature) + first : nullptr,
                              noise ? const_data<T>(*noise) + row * n_logits(s) : nullptr,
                              given_routes.any(),
                              resrouting,
                              data<int32_t>(chosen.index) + slot,
                              data<T>(chosen.gate) + slot,
                              data<bool>(chosen.flow) + slot,
                              data<int32_t>(chosen.active) + row};
      kernel.select_routes(args, n_rows);
    });
  });
  given_routes.require_legal();
  return {chosen.gate, chosen.index, chosen.flow, chosen.active};
}

Tensor select_routes_backward(Tensor d_gate, Tensor index, Tensor gate) {
  d_gate = readable(d_gate), index = readable(index), gate = readable(gate);
  check(index.dim() == 4, "index: expected [E,B,N,K], got ", shape_text(index.sizes()));
  const Sizes s = route_sizes(index, index.size(2), index.size(3));
  const ScalarType real = d_gate.scalar_type();
  check_tensor("d_gate", d_gate, real, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("index", index, ScalarType::Int, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("gate", gate, real, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  Tensor d_logits = fresh(gate, {s.n_nets, s.n_rows, n_logits(s)});
  with_dtype(d_gate, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>();
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      const int64_t row = net * s.n_rows + first, slot = row * s.n_modules * s.n_kept;
      kernel.select_routes_backward({s.n_modules, s.n_kept}, const_data<T>(d_gate) + slot, const_data<int32_t>(index) + slot,
                                    const_data<T>(gate) + slot, data<T>(d_logits) + row * n_logits(s), n_rows);
    });
  });
  return d_logits;
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("select_routes", TORCH_BOX(&select_routes));
  m.impl("select_routes_backward", TORCH_BOX(&select_routes_backward));
}

}  // namespace
}  // namespace d2r_fast
