// The rows of one batch out of the replay's storage, on the CPU (d2r_fast/ops/replay_rows.py).
#include <cstring>
#include <tuple>

#include "host.h"
#include "parallel.h"

namespace d2r_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> replay_rows(Tensor obs, Tensor action, Tensor reward, Tensor terminal,
                                                       Tensor next_obs, Tensor route, Tensor share, Tensor size) {
  check(obs.dim() == 3 && action.dim() == 3 && route.dim() == 4 && share.dim() == 2,
        "obs, action, route, share: expected [T,S,O], [T,S,A], [T,S,N,K] and [T,n], got ", shape_text(obs.sizes()), ", ",
        shape_text(action.sizes()), ", ", shape_text(route.sizes()), ", ", shape_text(share.sizes()));
  const int64_t n_tasks = obs.size(0), stored = obs.size(1), n_obs = obs.size(2), n_actions = action.size(2);
  const int64_t n_modules = route.size(2), n_kept = route.size(3), per_task = share.size(1), n_rows = n_tasks * per_task;
  check_tensor("obs", obs, ScalarType::Float, {n_tasks, stored, n_obs});
  check_tensor("action", action, ScalarType::Float, {n_tasks, stored, n_actions});
  check_tensor("reward", reward, ScalarType::Float, {n_tasks, stored});
  check_tensor("terminal", terminal, ScalarType::Bool, {n_tasks, stored});
  check_tensor("next_obs", next_obs, ScalarType::Float, {n_tasks, stored, n_obs});
  check_tensor("route", route, ScalarType::Byte, {n_tasks, stored, n_modules, n_kept});
  check_tensor("share", share, ScalarType::Double, {n_tasks, per_task});
  check_tensor("size", size, ScalarType::Long, {});
  const int64_t filled = *const_data<int64_t>(size), width = n_obs + n_actions, routes = n_modules * n_kept;
  check(filled >= 1 && filled <= stored, "size: expected 1..", stored, " stored rows a task, got ", filled);
  Tensor rows = fresh(obs, {3, n_rows, width});
  Tensor rewards = fresh(reward, {n_rows}), terminals = fresh(reward, {n_rows});
  Tensor given = fresh(route, {1, n_rows, n_modules, n_kept});
  const float *obs_of = const_data<float>(obs), *action_of = const_data<float>(action);
  const float *next_obs_of = const_data<float>(next_obs), *reward_of = const_data<float>(reward);
  const bool* terminal_of = const_data<bool>(terminal);
  const uint8_t* route_of = const_data<uint8_t>(route);
  const double* share_of = const_data<double>(share);
  float *rows_of = data<float>(rows), *rewards_of = data<float>(rewards), *terminals_of = data<float>(terminals);
  uint8_t* given_of = data<uint8_t>(given);
  constexpr int64_t kRowsAtOnce = 128;
  for_each_block((n_rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t block) {
    for (int64_t row = block * kRowsAtOnce; row < std::min(n_rows, (block + 1) * kRowsAtOnce); ++row) {
      // A product may round up to the size.
      const auto drawn = static_cast<int64_t>(share_of[row] * static_cast<double>(filled));
      const int64_t from = row / per_task * stored + std::clamp<int64_t>(drawn, 0, filled - 1);
      float* to = rows_of + row * width;
      const float* own = obs_of + from * n_obs;
      std::memcpy(to, own, n_obs * sizeof(float));
      std::memcpy(to + n_obs, action_of + from * n_actions, n_actions * sizeof(float));
      to += n_rows * width;
      std::memcpy(to, own, n_obs * sizeof(float));
      std::memset(to + n_obs, 0, n_actions * sizeof(float));
      to += n_rows * width;
      std::memcpy(to, next_obs_of + from * n_obs, n_obs * sizeof(float));
      std::memset(to + n_obs, 0, n_actions * sizeof(float));
      rewards_of[row] = reward_of[from];
      terminals_of[row] = terminal_of[from] ? 1.0f : 0.0f;
      std::memcpy(given_of + row * routes, route_of + from * routes, routes);
    }
  });
  return {rows, rewards, terminals, given};
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("replay_rows", TORCH_BOX(&replay_rows));
}

}  // namespace
}  // namespace d2r_fast
