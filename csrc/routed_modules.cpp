// The routed modules on the CPU: host side of routed_modules_cpu.h.
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "host.h"
#include "parallel.h"
#include "route_checks.h"

namespace d2r_fast {
namespace {

// Rows one after another, each with a line for every active module: the line at which each begins, and how many there are.
std::vector<int64_t> begin_lines(const Sizes& s, const int32_t* active) {
  std::vector<int64_t> begin(s.n_nets * s.n_rows + 1);
  for (size_t row = 0; row + 1 < begin.size(); ++row) begin[row + 1] = begin[row] + count_lines(active[row], s.n_modules);
  return begin;
}

// Fresh memory of this size comes page by page from the system; asked for in large pages it comes 512 times less often.
// Only for the part that is used, from the tensor's first byte: the rest then takes no memory.
void prefer_large_pages(const Tensor& tensor, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLargePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (begin + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Sizes sizes_of(const Tensor& rows, const Tensor& index, bool residual) {
  check(rows.dim() == 3, "h0: expected [E,B,D], got ", shape_text(rows.sizes()));
  check(index.dim() == 4, "routes.index: expected [E,B,N,K], got ", shape_text(index.sizes()));
  const Sizes s{rows.size(0), rows.size(1), index.size(2), index.size(3), rows.size(2), residual};
  check_routes(s.n_modules, s.n_kept);
  check_width("D", s.width);
  return s;
}

void check_inputs(const Sizes& s, ScalarType real, const Tensor& weight, const Tensor& index, const Tensor& gate,
                  const Tensor& active) {
  check_tensor("weight", weight, real, {s.n_nets, s.n_modules - 1, s.width, s.width});
  check_tensor("routes.index", index, ScalarType::Int, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("routes.gate", gate, real, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("routes.active", active, ScalarType::Int, {s.n_nets, s.n_rows});
}

// mixed, and for backward, if `keep`, h and opened. Both have room for E*N*B lines of D numbers, but only those of active
// modules are stored, row by row from the start: memory past the last is never touched, and where the system hands out pages
// on demand it is never taken.
std::tuple<Tensor, Tensor, Tensor> routed_modules(Tensor h0, Tensor weight, Tensor bias, Tensor index, Tensor gate,
                                                  Tensor /*flow*/, Tensor active, bool residual, Precision precision,
                                                  bool keep) {
  h0 = readable(h0), weight = readable(weight), bias = readable(bias);
  index = readable(index), gate = readable(gate), active = readable(active);
  const Sizes s = sizes_of(h0, index, residual);
  const ScalarType real = h0.scalar_type();
  check_tensor("h0", h0, real, {s.n_nets, s.n_rows, s.width});
  check_inputs(s, real, weight, index, gate, active);
  check_tensor("bias", bias, real, {s.n_nets, s.n_modules - 1, s.width});
  Tensor mixed = fresh(h0, {s.n_nets, s.n_rows, s.width});
  Tensor h = fresh(h0, {s.n_nets, s.n_modules, s.n_rows, s.width}, keep);
  Tensor opened = fresh(h0, {s.n_nets, s.n_modules, s.n_rows, s.width}, keep, ScalarType::Bool);
  std::atomic<bool> all_fit = true;
  with_dtype(h0, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const auto begin = keep ? begin_lines(s, const_data<int32_t>(active)) : std::vector<int64_t>();
    if (keep) prefer_large_pages(h, begin.back() * s.width * sizeof(T));
    if (keep) prefer_large_pages(opened, begin.back() * s.width * sizeof(bool));
    const auto panels = pack_weights(kernel, const_data<T>(weight), s.n_nets * (s.n_modules - 1), s.width, s.width, false);
    const ForwardArgs<T> args{s,
                              const_data<T>(h0),
                              panels.get(),
                              const_data<T>(bias),
                              const_data<int32_t>(index),
                              const_data<T>(gate),
                              const_data<int32_t>(active),
                              keep ? begin.data() : nullptr,
                              keep ? data<T>(h) : nullptr,
                              keep ? data<bool>(opened) : nullptr,
                              data<T>(mixed)};
    for_each_row_block(s.n_nets, s.n_rows, [&](int64_t net, int64_t first, int64_t n_rows) {
      for (int64_t row = net * s.n_rows + first; row < net * s.n_rows + first + n_rows; ++row)
        if (!fits_active(args.index + row * s.n_modules * s.n_kept, args.active[row], s.n_modules, s.n_kept)) {
          all_fit = false;
          return;
        }
      kernel.forward(args, net, first, n_rows);
    });
  });
  if (!all_fit) require_active(const_data<int32_t>(index), const_data<int32_t>(active), s);
  return {mixed, h, opened};
}

// The routes are those that a forward pass has checked. d_weight and d_bias come empty unless `to_weight`.
std::tuple<Tensor, Tensor, Tensor, Tensor> routed_modules_backward(Tensor d_mixed, Tensor weight, Tensor h, Tensor opened,
                                                                   Tensor index, Tensor gate, Tensor flow, Tensor active,
                                                                   bool residual, Precision precision, bool to_weight) {
  d_mixed = readable(d_mixed), weight = readable(weight), h = readable(h), opened = readable(opened);
  index = readable(index), gate = readable(gate), flow = readable(flow), active = readable(active);
  const Sizes s = sizes_of(d_mixed, index, residual);
  const ScalarType real = d_mixed.scalar_type();
  check_tensor("d_mixed", d_mixed, real, {s.n_nets, s.n_rows, s.width});
  check_inputs(s, real, weight, index, gate, active);
  check_tensor("routes.flow", flow, ScalarType::Bool, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  check_tensor("h", h, real, {s.n_nets, s.n_modules, s.n_rows, s.width});
  check_tensor("opened", opened, ScalarType::Bool, {s.n_nets, s.n_modules, s.n_rows, s.width});
  Tensor d_h0 = fresh(d_mixed, {s.n_nets, s.n_rows, s.width});
  Tensor d_weight = fresh(d_mixed, {s.n_nets, s.n_modules - 1, s.width, s.width}, to_weight);
  Tensor d_bias = fresh(d_mixed, {s.n_nets, s.n_modules - 1, s.width}, to_weight);
  Tensor d_gate = fresh(d_mixed, {s.n_nets, s.n_rows, s.n_modules, s.n_kept});
  with_dtype(d_mixed, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>(precision);
    const auto panels = pack_weights(kernel, const_data<T>(weight), s.n_nets * (s.n_modules - 1), s.width, s.width, true);
    const auto begin = begin_lines(s, const_data<int32_t>(active));
    const BackwardArgs<T> args{s,
                               const_data<T>(d_mixed),
                               panels.get(),
                               const_data<int32_t>(index),
                               const_data<T>(gate),
                               const_data<bool>(flow),
                               const_data<int32_t>(active),
                               begin.data(),
                               const_data<T>(h),
                               const_data<bool>(opened),
                               data<T>(d_h0),
                               data<T>(d_gate)};
    const int64_t biases = (s.n_modules - 1) * s.width;  // of one network
    const std::vector<Gradient<T>> gradients{{to_weight ? data<T>(d_weight) : nullptr, biases * s.width},
                                             {to_weight ? data<T>(d_bias) : nullptr, biases}};
    const auto cost = [&](int64_t net, int64_t row) { return count_lines(args.active[net * s.n_rows + row], s.n_modules); };
    const auto run = [&](int64_t net, int64_t first, int64_t n_rows, T* const* sums) {
      kernel.backward(args, net, first, n_rows, sums[0], sums[1]);
    };
    sum_over_rows(s.n_nets, s.n_rows, s.n_rows, gradients, cost, run);
  });
  return {d_h0, d_weight, d_bias, d_gate};
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("routed_modules", TORCH_BOX(&routed_modules));
  m.impl("routed_modules_backward", TORCH_BOX(&routed_modules_backward));
}

}  // namespace
}  // namespace d2r_fast
