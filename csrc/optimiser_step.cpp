// One step of all networks' parameters on the CPU (d2r_fast/ops/optimiser_step.py has the equations).
#include <cmath>
#include <vector>

#include "host.h"
#include "parallel.h"

namespace d2r_fast {
namespace {

// A part of a segment, small enough that the cores share a large one evenly.
struct Piece {
  int64_t begin, n, network;
};

std::vector<Piece> split_segments(const int64_t* segments, int64_t n_segments) {
  constexpr int64_t kPiece = 1 << 14;
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < n_segments; ++i, segments += 3)
    for (int64_t at = segments[0]; at < segments[1]; at += kPiece)
      pieces.push_back({at, std::min(kPiece, segments[1] - at), segments[2]});
  return pieces;
}

Tensor optimiser_step(Tensor values, Tensor gradient, Tensor first, Tensor second, Tensor targets, Tensor step,
                      Tensor log_alpha, Tensor route_temp, Tensor segments, int64_t targets_begin,
                      std::vector<double> learning_rates, double beta1, double beta2, double eps, double max_norm,
                      double target_rate, double max_log_alpha) {
  const ScalarType real = values.scalar_type();
  check(values.dim() == 1 && segments.dim() == 2, "values, segments: expected [n] and [S,3], got ", shape_text(values.sizes()),
        " and ", shape_text(segments.sizes()));
  const int64_t n = values.size(0), n_segments = segments.size(0), n_networks = learning_rates.size();
  const int64_t n_targets = targets.numel(), n_tasks = log_alpha.numel();
  check_tensor("values", values, real, {n});
  check_tensor("gradient", gradient, real, {n});
  check_tensor("first", first, real, {n});
  check_tensor("second", second, real, {n});
  check_tensor("targets", targets, real, {n_targets});
  check_tensor("step", step, ScalarType::Long, {});
  check_tensor("log_alpha", log_alpha, real, {n_tasks});
  check_tensor("route_temp", route_temp, real, {n_tasks});
  check_tensor("segments", segments, ScalarType::Long, {n_segments, 3});
  check(targets_begin >= 0 && targets_begin + n_targets <= n, "targets_begin: expected 0..", n - n_targets, ", got ",
        targets_begin);
  const int64_t* table = const_data<int64_t>(segments);
  for (int64_t i = 0; i < n_segments; ++i)
    check(table[3 * i] >= 0 && table[3 * i] <= table[3 * i + 1] && table[3 * i + 1] <= n && table[3 * i + 2] >= 0 &&
              table[3 * i + 2] < n_networks,
          "segments[", i, "]: expected begin, end within 0..", n, " and a network below ", n_networks);
  Tensor norms = fresh(values, {n_networks});
  const std::vector<Piece> pieces = split_segments(table, n_segments);
  with_dtype(values, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>();
    std::vector<double> squares(pieces.size()), sums(n_networks, 0.0);
    for_each_block(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
      squares[i] = kernel.squared_norm(const_data<T>(gradient) + pieces[i].begin, pieces[i].n);
    });
    for (size_t i = 0; i < pieces.size(); ++i) sums[pieces[i].network] += squares[i];
    const auto number = static_cast<double>(++*data<int64_t>(step));
    std::vector<T> scales(n_networks), step_sizes(n_networks);
    for (int64_t network = 0; network < n_networks; ++network) {
      const T norm = static_cast<T>(std::sqrt(sums[network]));
      data<T>(norms)[network] = norm;
      const T scale = static_cast<T>(max_norm) / (norm + T(1e-6));
      scales[network] = scale > 1 ? T(1) : scale;  // NaN stays NaN
      step_sizes[network] = static_cast<T>(learning_rates[network] / (1 - std::pow(beta1, number)));
    }
    const AdamConstants<T> constants{static_cast<T>(beta1), static_cast<T>(beta2), static_cast<T>(eps),
                                     static_cast<T>(1 / std::sqrt(1 - std::pow(beta2, number))), static_cast<T>(target_rate)};
    for_each_block(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
      const auto [begin, length, network] = pieces[i];
      const bool followed = begin >= targets_begin && begin < targets_begin + n_targets;
      const AdamPiece<T> piece{data<T>(values) + begin, const_data<T>(gradient) + begin, data<T>(first) + begin,
                               data<T>(second) + begin, followed ? data<T>(targets) + begin - targets_begin : nullptr, length};
      kernel.adam(piece, constants, scales[network], step_sizes[network]);
    });
    T *alpha = data<T>(log_alpha), *temperature = data<T>(route_temp), sum = 0, least = 0;
    for (int64_t t = 0; t < n_tasks; ++t) {
      if (alpha[t] > T(max_log_alpha)) alpha[t] = T(max_log_alpha);
      least = t == 0 || alpha[t] < least ? alpha[t] : least;
    }
    for (int64_t t = 0; t < n_tasks; ++t) sum += temperature[t] = std::exp(least - alpha[t]);
    for (int64_t t = 0; t < n_tasks; ++t) temperature[t] = n_tasks * (temperature[t] / sum);
  });
  return norms;
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("optimiser_step", TORCH_BOX(&optimiser_step));
}

}  // namespace
}  // namespace d2r_fast
