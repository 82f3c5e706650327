// Gumbel noise out of uniform noise, on the CPU.
#include "host.h"
#include "parallel.h"

namespace d2r_fast {
namespace {

void gumbel_(Tensor uniform) {
  check(uniform.is_contiguous(), "uniform: expected a contiguous tensor");
  constexpr int64_t kPiece = 1 << 14;
  const int64_t n = uniform.numel();
  with_dtype(uniform, [&](auto zero) {
    using T = decltype(zero);
    for_each_block((n + kPiece - 1) / kPiece, [&](int64_t piece) {
      kernels<T>().gumbel(data<T>(uniform) + piece * kPiece, std::min(kPiece, n - piece * kPiece));
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(d2r_fast, CPU, m) {
  m.impl("gumbel_", TORCH_BOX(&gumbel_));
}

}  // namespace
}  // namespace d2r_fast
