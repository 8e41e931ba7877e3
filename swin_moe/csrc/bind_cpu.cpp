// The CPU kernels as torch operators, run on torch's own thread pool.
#include <algorithm>
#include <atomic>

#include "bind_moe_dispatch.h"
#include "cpu/moe_dispatch.h"

namespace swin_moe {
namespace {

// A thread gets at least this much output, or waking it costs more than its work.
constexpr int64_t kGrainBytes = 64 * 1024;

// Splits `rows` over threads; `body` returns false for a bad index, which is an error here.
template <typename Body>
void for_rows(int64_t rows, int64_t row_bytes, const Body& body) {
  std::atomic<bool> ok{true};
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    if (!body(cpu::Range{begin, end})) ok = false;
  });
  STD_TORCH_CHECK(ok, "an index is out of range, or source and destination are not inverse");
}

int64_t row_bytes(const Tensor& matrix) { return matrix.size(1) * matrix.element_size(); }

struct Cpu {
  static constexpr bool kHasHalf = false;

  static void dispatch(DType dtype, const MoeShape& shape, const Tensor& x, const Tensor& source,
                       Tensor& out) {
    for_rows(shape.slots, row_bytes(out), [&](cpu::Range rows) {
      return cpu::moe_dispatch(dtype, shape, rows, x.const_data_ptr(),
                               source.const_data_ptr<int32_t>(), out.mutable_data_ptr());
    });
  }

  static void combine(DType dtype, const MoeShape& shape, const Tensor& table, const float* gate,
                      const Tensor& destination, Tensor& out) {
    for_rows(shape.tokens, row_bytes(out), [&](cpu::Range rows) {
      return cpu::moe_combine(dtype, shape, rows, table.const_data_ptr(), gate,
                              destination.const_data_ptr<int32_t>(), out.mutable_data_ptr());
    });
  }

  static void combine_backward(DType dtype, const MoeShape& shape, const Tensor& grad_out,
                               const Tensor& y, const Tensor& gate, const Tensor& source,
                               const Tensor& destination, Tensor& grad_y, Tensor& grad_gate) {
    const int32_t* sources = source.const_data_ptr<int32_t>();
    const int32_t* destinations = destination.const_data_ptr<int32_t>();
    float* grad_gates = grad_gate.mutable_data_ptr<float>();
    for_rows(shape.tokens * shape.top_k, sizeof(float), [&](cpu::Range rows) {
      return cpu::moe_zero_dropped(shape, rows, sources, destinations, grad_gates);
    });
    for_rows(shape.slots, row_bytes(grad_y), [&](cpu::Range rows) {
      return cpu::moe_combine_backward(dtype, shape, rows, grad_out.const_data_ptr(),
                                       y.const_data_ptr(), gate.const_data_ptr<float>(), sources,
                                       destinations, grad_y.mutable_data_ptr(), grad_gates);
    });
  }
};

}  // namespace
}  // namespace swin_moe

STABLE_TORCH_LIBRARY_IMPL(swin_moe, CPU, m) { swin_moe::register_moe_dispatch<swin_moe::Cpu>(m); }
