// Every loss of multi-task SAC and its gradient, on the CPU (d2r_fast/ops/sac_losses.py has the equations).
#include <cmath>
#include <tuple>
#include <vector>

#include "host.h"
#include "operations.h"

namespace d2r_fast {
namespace {

// NaN wins, as in torch's amin.
template <typename T>
T smaller(T a, T b) {
  return b < a || std::isnan(b) ? b : a;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sac_losses(Tensor q, Tensor target_q, Tensor logp, Tensor reward, Tensor terminal,
                                              Tensor log_alpha, double gamma, double target_entropy, double max_task_loss,
                                              bool weighted, Tensor d_log_alpha) {
  const ScalarType real = q.scalar_type();
  check(target_q.dim() == 2, "target_q: expected [E,B], got ", shape_text(target_q.sizes()));
  check(log_alpha.dim() == 1, "log_alpha: expected [T], got ", shape_text(log_alpha.sizes()));
  const int64_t n_nets = target_q.size(0), n_rows = target_q.size(1), n_tasks = log_alpha.size(0);
  check(n_nets >= 1 && n_tasks >= 1 && n_rows % n_tasks == 0, "target_q: expected [E,B] with B a multiple of ", n_tasks,
        " tasks, got ", shape_text(target_q.sizes()));
  check_tensor("q", q, real, {n_nets, 2 * n_rows});
  check_tensor("target_q", target_q, real, {n_nets, n_rows});
  check_tensor("logp", logp, real, {2 * n_rows});
  check_tensor("reward", reward, real, {n_rows});
  check_tensor("terminal", terminal, real, {n_rows});
  check_tensor("log_alpha", log_alpha, real, {n_tasks});
  check_tensor("d_log_alpha", d_log_alpha, real, {n_tasks});
  Tensor losses = fresh(q, {6, n_tasks});
  Tensor d_q = fresh(q, {n_nets, 2 * n_rows}), d_logp = fresh(q, {n_rows});
  with_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const T* log_alpha_of = const_data<T>(log_alpha);
    const T *q_of = const_data<T>(q), *target_of = const_data<T>(target_q), *logp_of = const_data<T>(logp);
    const T *reward_of = const_data<T>(reward), *terminal_of = const_data<T>(terminal);
    T *d_q_of = data<T>(d_q), *d_logp_of = data<T>(d_logp), *d_log_alpha_of = data<T>(d_log_alpha);
    const auto q_at = [=](int64_t e, int64_t row) { return q_of[e * 2 * n_rows + row]; };
    const auto frozen_at = [=](int64_t e, int64_t row) { return q_at(e, n_rows + row); };
    const auto target_at = [=](int64_t e, int64_t row) { return target_of[e * n_rows + row]; };
    T least = log_alpha_of[0], sum = 0;
    for (int64_t t = 1; t < n_tasks; ++t) least = std::min(least, log_alpha_of[t]);
    for (int64_t t = 0; t < n_tasks; ++t) sum += std::exp(least - log_alpha_of[t]);
    const int64_t per_task = n_rows / n_tasks;
    for (int64_t t = 0; t < n_tasks; ++t) {
      const T alpha = std::exp(log_alpha_of[t]);
      const T weight = weighted ? n_tasks * (std::exp(least - log_alpha_of[t]) / sum) : T(1);
      const T mean = T(1) / per_task;
      T actor = 0, critic = 0, sum_logp = 0;
      for (int64_t row = t * per_task; row < (t + 1) * per_task; ++row) {
        T best = frozen_at(0, row), next = target_at(0, row);
        for (int64_t e = 1; e < n_nets; ++e) {
          best = smaller(best, frozen_at(e, row));
          next = smaller(next, target_at(e, row));
        }
        const T own_logp = logp_of[row];
        const T y = reward_of[row] +
                    T(gamma) * (1 - terminal_of[row]) * (next - alpha * logp_of[n_rows + row]);
        sum_logp += own_logp;
        actor += weight * (alpha * own_logp - best);
        for (int64_t e = 0; e < n_nets; ++e) {
          const T error = q_at(e, row) - y;
          critic += weight * error * error;
          d_q_of[e * 2 * n_rows + row] = 2 * weight * error;
        }
      }
      const T mean_logp = sum_logp * mean;
      T* loss = data<T>(losses) + t;
      const T total = (loss[0] = -log_alpha_of[t] * (mean_logp + T(target_entropy))) + (loss[n_tasks] = actor * mean) +
                      (loss[2 * n_tasks] = critic * mean);
      const bool kept = total <= T(max_task_loss);
      loss[3 * n_tasks] = kept ? 0 : 1;
      loss[4 * n_tasks] = -mean_logp;
      loss[5 * n_tasks] = alpha;
      // The mean over tasks divides by all of them; what is left out counts as zero.
      const T share = kept ? mean / n_tasks : T(0);
      d_log_alpha_of[t] = kept ? -(mean_logp + T(target_entropy)) / n_tasks : T(0);
      for (int64_t row = t * per_task; row < (t + 1) * per_task; ++row) {
        d_logp_of[row] = kept ? share * weight * alpha : T(0);
        T best = frozen_at(0, row);
        for (int64_t e = 1; e < n_nets; ++e) best = smaller(best, frozen_at(e, row));
        int64_t n_best = 0;
        for (int64_t e = 0; e < n_nets; ++e) n_best += frozen_at(e, row) == best;
        for (int64_t e = 0; e < n_nets; ++e) {
          T* d = d_q_of + e * 2 * n_rows + row;
          d[0] = kept ? d[0] * share : T(0);
          // Equal ones share the gradient.
          d[n_rows] = kept && frozen_at(e, row) == best ? -share * weight / n_best : T(0);
        }
      }
    }
  });
  return {losses, d_q, d_logp};
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("sac_losses", TORCH_BOX(&sac_losses));
}

}  // namespace d2r_fast
