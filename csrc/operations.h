// The operations of namespace d2r_fast_cpu. Outputs are allocated by the caller (d2r_fast/ops/cpp), which has checked
// what is cheap to check there; here is checked what would read or write out of bounds. A gradient that is not wanted, or
// what is not kept, is an empty tensor, which is not looked at.
#pragma once
#include <optional>
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

}  // namespace d2r_fast
