// Operations that another one calls, too. Their arguments are those of their schemas (d2r_fast/ops).
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "host.h"

namespace d2r_fast {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routed_network(
    Tensor x, Tensor task, std::optional<Tensor> temperature, std::optional<Tensor> noise, std::optional<Tensor> given,
    int64_t k, bool residual, bool resrouting, Precision precision, int64_t n_back, std::vector<Tensor> parameters);
Tensor routed_network_backward(Tensor d_out, std::optional<Tensor> to_gate, Tensor x, Tensor task,
                               std::vector<Tensor> parameters, Tensor gate, Tensor index, Tensor flow, Tensor active,
                               Tensor activations, Tensor h, Tensor opened, bool residual, Precision precision,
                               int64_t n_learning, int64_t first_to_x, std::vector<Tensor> d_parameters);
Tensor squashed_normal(Tensor out, Tensor noise, Tensor action);
Tensor squashed_normal_backward(Tensor d_action, Tensor d_logp, Tensor out, Tensor noise, Tensor action);
std::tuple<Tensor, Tensor, Tensor> sac_losses(Tensor q, Tensor target_q, Tensor logp, Tensor reward, Tensor terminal,
                                              Tensor log_alpha, double gamma, double target_entropy, double max_task_loss,
                                              bool weighted, Tensor d_log_alpha);

}  // namespace d2r_fast
