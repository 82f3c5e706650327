// Every network's passes, the policy's actions and the losses of one update in one call (d2r_fast/ops/sac_gradient.py): what
// d2r_fast/learning/update.py does in eleven, whose calling takes as long as the arithmetic of a tenth of a small update.
#include "operations.h"

namespace d2r_fast {
namespace {

// Of the same memory: numbers from `offset` on.
Tensor view_of(const Tensor& tensor, std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides,
               int64_t offset = 0) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(shape.size()), shape.begin(),
                                                        strides.begin(), offset, &handle));
  return Tensor(handle);
}

Tensor sac_gradient(Tensor x, Tensor reward, Tensor terminal, Tensor route, Tensor task, Tensor noise,
                    std::optional<Tensor> temperature, std::optional<Tensor> route_noise,
                    std::optional<Tensor> critic_route, Tensor log_alpha, int64_t k, bool residual, bool resrouting, Precision precision,
                    double gamma, double target_entropy, double max_task_loss, bool weighted, Tensor d_log_alpha,
                    std::vector<Tensor> actor, std::vector<Tensor> critics, std::vector<Tensor> targets,
                    std::vector<Tensor> d_actor, std::vector<Tensor> d_critics) {
  check(x.dim() == 3 && noise.dim() == 2, "x, noise: expected [3,B,O+A] and [2B,A], got ", shape_text(x.sizes()), " and ",
        shape_text(noise.sizes()));
  const int64_t n = x.size(1), width = x.size(2), n_actions = noise.size(1), n_obs = width - n_actions;
  const ScalarType real = x.scalar_type();
  check(n_obs >= 0, "noise: expected at most ", width, " actions, got ", n_actions);
  check_tensor("x", x, real, {3, n, width});
  check_tensor("noise", noise, real, {2 * n, n_actions});
  check_tensor("task", task, ScalarType::Long, {2 * n});
  const Tensor acted_and_now = view_of(x, {2 * n, width}, {width, 1});
  const Tensor obs_now_and_after = view_of(x, {2 * n, n_obs}, {width, 1}, n * width);
  const Tensor actions = view_of(x, {2 * n, n_actions}, {width, 1}, n * width + n_obs);
  const Tensor after = view_of(x, {n, width}, {width, 1}, 2 * n * width);

  // The actor learns along the routes that it acted on; at next_obs it goes the greedy ones.
  const auto policy = routed_network(obs_now_and_after, task, std::nullopt, std::nullopt, route, k, residual, resrouting,
                                     precision, n, actor);
  const Tensor policy_out = view_of(std::get<0>(policy), {2 * n, 2 * n_actions}, {2 * n_actions, 1});
  const Tensor logp = squashed_normal(policy_out, noise, actions);  // the actions are what the critics read next

  // The critics learn from the actions in the batch; at the actor's they are constant.
  const auto value = routed_network(acted_and_now, task, temperature, route_noise, critic_route, k, residual, resrouting,
                                    precision, 2 * n, critics);
  const auto target = routed_network(after, view_of(task, {n}, {1}), std::nullopt, std::nullopt, std::nullopt, k, residual,
                                     resrouting, precision, 0, targets);
  const int64_t n_nets = std::get<0>(value).size(0);
  const auto [losses, d_q, d_logp] =
      sac_losses(view_of(std::get<0>(value), {n_nets, 2 * n}, {2 * n, 1}), view_of(std::get<0>(target), {n_nets, n}, {n, 1}), logp,
                 reward, terminal, log_alpha, gamma, target_entropy, max_task_loss, weighted, d_log_alpha);

  const auto back = [&](const auto& pass, const Tensor& d_out, const Tensor& in, const std::vector<Tensor>& parameters,
                        int64_t n_learning, int64_t first_to_x, const std::vector<Tensor>& d_parameters) {
    const auto& [out, gate, index, flow, active, activations, h, opened] = pass;
    return routed_network_backward(d_out, std::nullopt, in, task, parameters, gate, index, flow, active, activations, h, opened,
                                   residual, precision, n_learning, first_to_x, d_parameters);
  };
  const Tensor d_now = back(value, view_of(d_q, {n_nets, 2 * n, 1}, {2 * n, 1, 1}), acted_and_now, critics, n, n, d_critics);
  const Tensor d_policy = squashed_normal_backward(
      view_of(d_now, {n, n_actions}, {width, 1}, n_obs), d_logp, view_of(policy_out, {n, 2 * n_actions}, {2 * n_actions, 1}),
      view_of(noise, {n, n_actions}, {n_actions, 1}), view_of(actions, {n, n_actions}, {width, 1}));
  back(policy, view_of(d_policy, {1, n, 2 * n_actions}, {2 * n * n_actions, 2 * n_actions, 1}), obs_now_and_after, actor, n, n,
       d_actor);
  return losses;
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) { m.impl("sac_gradient", TORCH_BOX(&sac_gradient)); }

}  // namespace
}  // namespace d2r_fast
