// The operations of namespace d2r_fast_cpu. Outputs are allocated by the caller (d2r_fast/ops/cpp), which has checked
// what is cheap to check there; here is checked what would read or write out of bounds. A gradient that is not wanted, or
// what is not kept, is an empty tensor, which is not looked at.
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "host.h"

namespace d2r_fast {

void routed_modules(Tensor h0, Tensor weight, Tensor bias, Tensor index, Tensor gate, Tensor active, bool residual, bool bf16,
                    bool keep, Tensor mixed, Tensor h, Tensor opened);
void routed_modules_backward(Tensor d_mixed, Tensor weight, Tensor index, Tensor gate, Tensor flow, Tensor active, Tensor h,
                             Tensor opened, bool residual, bool bf16, bool to_weight, Tensor d_h0, Tensor d_weight,
                             Tensor d_bias, Tensor d_gate);
void linear(Tensor x, Tensor weight, Tensor bias, bool relu, bool bf16, Tensor y);
void linear_backward(Tensor d_y, Tensor x, Tensor weight, Tensor y, bool relu, bool bf16, bool to_x, bool to_weight, Tensor d_x,
                     Tensor d_weight, Tensor d_bias);
// `given` in uint8, int32 or int64, any values: illegal routes are refused.
void select_routes(Tensor logits, std::optional<Tensor> temperature, std::optional<Tensor> noise, std::optional<Tensor> given,
                   bool resrouting, Tensor index, Tensor gate, Tensor flow, Tensor active);
void select_routes_backward(Tensor d_gate, Tensor index, Tensor gate, Tensor d_logits);
void network(Tensor x, Tensor task, std::vector<Tensor> parameters, std::optional<Tensor> temperature,
             std::optional<Tensor> noise, std::optional<Tensor> given, bool residual, bool resrouting, bool bf16, bool keep,
             Tensor out, Tensor index, Tensor gate, Tensor flow, Tensor active, Tensor activations, Tensor h, Tensor opened);
void network_backward(Tensor d_out, std::optional<Tensor> to_gate, Tensor x, Tensor task, std::vector<Tensor> parameters,
                      Tensor index, Tensor gate, Tensor flow, Tensor active, Tensor activations, Tensor h, Tensor opened,
                      bool residual, bool bf16, bool to_x, Tensor d_x, std::vector<Tensor> d_parameters);


// Around the networks. Each allocates what it returns; a tensor that it changes comes last or is named so in its schema.
void gumbel_(Tensor uniform);
Tensor squashed_normal(Tensor out, Tensor noise, Tensor action);
Tensor squashed_normal_backward(Tensor d_action, Tensor d_logp, Tensor out, Tensor noise, Tensor action);
std::tuple<Tensor, Tensor, Tensor, Tensor> sac_losses(Tensor q, Tensor frozen_q, Tensor target_q, Tensor logp,
                                                      Tensor next_logp, Tensor reward, Tensor terminal, Tensor log_alpha,
                                                      double gamma, double target_entropy, double max_task_loss,
                                                      Tensor d_log_alpha);
Tensor optimiser_step(Tensor values, Tensor gradient, Tensor first, Tensor second, Tensor targets, Tensor step,
                      Tensor log_alpha, Tensor route_temp, Tensor segments, int64_t targets_begin,
                      std::vector<double> learning_rates, double beta1, double beta2, double eps, double max_norm,
                      double target_rate);
std::tuple<Tensor, Tensor, Tensor, Tensor> replay_rows(Tensor obs, Tensor action, Tensor reward, Tensor terminal,
                                                       Tensor next_obs, Tensor route, Tensor share, Tensor size);

}  // namespace d2r_fast
