// The CPU kernels as torch operators, run on torch's own thread pool.
#include <algorithm>
#include <atomic>
#include <string>

#include "bind_adamw.h"
#include "bind_moe_dispatch.h"
#include "bind_moe_route.h"
#include "bind_moe_experts_cpu.h"
#include "bind_window_attention.h"
#include "cpu/adamw.h"
#include "cpu/moe_dispatch.h"
#include "cpu/moe_route.h"
#include "cpu/window_attention.h"

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

  static void adamw(const AdamwFactors& factors, const AdamwTensors& tensors, const Tensor&) {
    const cpu::AdamwKernels* kernels = cpu::adamw_kernels();
    STD_TORCH_CHECK(kernels != nullptr,
                    "SWIN_MOE_ISA must be amx_bf16, avx512_bf16, avx512, avx2 or generic");
    torch::stable::parallel_for(
        0, tensors.size, kGrainBytes / sizeof(float),
        [&](int64_t begin, int64_t end) { kernels->update(factors, tensors, {begin, end}); });
  }

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

  static bool route_supported(const RouteShape&) { return true; }

  static void route(const RouteTensors& in, const MaybeTensor& bias, RouteResult& out) {
    const RouteShape& shape = in.shape;
    const auto scratch = [&](int64_t size, ScalarType dtype) {
      return torch::stable::new_empty(in.logits, {size}, dtype);
    };
    Tensor keys = scratch(shape.tokens, ScalarType::UInt32);
    Tensor parts =
        scratch(cpu::route_chunks(shape) * cpu::route_part_size(shape), ScalarType::Float);
    Tensor queues = scratch(3 * shape.queues(), ScalarType::Long);
    int64_t* queued = queues.mutable_data_ptr<int64_t>();
    int64_t *queued_first = queued + shape.queues(), *first_row = queued_first + shape.queues();
    int64_t* expert = out.expert.mutable_data_ptr<int64_t>();
    int32_t* slot = out.slot.mutable_data_ptr<int32_t>();
    uint32_t* key = keys.mutable_data_ptr<uint32_t>();
    float* part = parts.mutable_data_ptr<float>();

    for_chunks(in, bias, [&](cpu::Range chunks, const cpu::RouteInputs& inputs) {
      cpu::route_scores(shape, in.options, chunks, inputs, expert,
                        out.gate.mutable_data_ptr<float>(), key, part);
    });
    cpu::route_sums(shape, part, out.sums.mutable_data_ptr<float>(),
                    out.scalars.mutable_data_ptr<float>());
    for_rows(shape.groups, shape.group_tokens() * shape.top_k * 16, [&](cpu::Range groups) {
      cpu::route_queues(shape, in.options, groups, key, expert, slot, queued, queued_first);
      return true;
    });
    cpu::route_plan(shape, queued, queued_first, out.counts.mutable_data_ptr<int64_t>(),
                    out.first.mutable_data_ptr<int64_t>(), out.used.mutable_data_ptr<int64_t>(),
                    first_row);
    int32_t* source = out.source.mutable_data_ptr<int32_t>();
    std::fill_n(source, shape.rows(), -1);
    for_rows(shape.tokens, shape.top_k * 16, [&](cpu::Range tokens) {
      cpu::route_rows(shape, tokens, expert, slot, first_row,
                      out.destination.mutable_data_ptr<int32_t>(), source);
      return true;
    });
  }

  static void route_backward(const RouteTensors& in, const MaybeTensor& grad_gate,
                             const MaybeTensor& grad_sums, const MaybeTensor& grad_scalars,
                             const Tensor& expert, Tensor& grad_logits) {
    const int64_t* chosen = expert.const_data_ptr<int64_t>();
    for_rows(expert.numel(), sizeof(int64_t), [&](cpu::Range assignments) {
      return cpu::route_valid(in.shape, assignments, chosen);
    });
    const cpu::RouteGrads grads{pointer_or_null(grad_gate), pointer_or_null(grad_sums),
                                pointer_or_null(grad_scalars)};
    for_chunks(in, std::nullopt, [&](cpu::Range chunks, const cpu::RouteInputs& inputs) {
      cpu::route_backward(in.shape, in.options, chunks, grads, inputs, chosen,
                          grad_logits.mutable_data_ptr<float>());
    });
  }

  static bool window_supported(DType dtype, const WindowShape& shape) {
    return cpu::window_attention_supported(dtype, shape);
  }

  static const cpu::WindowKernels& window_kernels(DType dtype) {
    const cpu::WindowKernels* kernels = cpu::window_kernels(dtype);
    STD_TORCH_CHECK(kernels != nullptr,
                    "SWIN_MOE_ISA must be amx_bf16, avx512_bf16, avx512, avx2 or generic");
    return *kernels;
  }

  static void window_forward(const WindowInputs& in, Tensor& out, Tensor& lse) {
    const cpu::WindowForward tensors{in.qkv.const_data_ptr(),
                                     in.bias.const_data_ptr<float>(),
                                     in.scale.const_data_ptr<float>(),
                                     in.seed_pointer(),
                                     cpu::head_groups(in.shape, in.shape.windows(), units_wanted()),
                                     out.mutable_data_ptr(),
                                     lse.mutable_data_ptr<float>()};
    const cpu::WindowKernels& kernels = window_kernels(in.dtype);
    torch::stable::parallel_for(
        0, tensors.groups.count * in.shape.windows(), 1, [&](int64_t begin, int64_t end) {
          kernels.forward(in.dtype, in.shape, in.options, tensors, {begin, end});
        });
  }

  static void window_backward(const WindowInputs& in, const Tensor& grad_out, const Tensor& out,
                              const Tensor& lse, Tensor& grad_qkv, Tensor& grad_bias,
                              Tensor& grad_scale) {
    const int64_t groups = cpu::window_groups(in.shape), heads = in.shape.heads;
    const int64_t pairs = in.shape.tokens() * in.shape.tokens();
    Tensor bias_parts =
        groups == 1 ? grad_bias : torch::stable::new_empty(grad_bias, {heads, groups, pairs});
    Tensor scale_parts = torch::stable::new_empty(grad_scale, {heads, groups});
    const cpu::WindowBackward tensors{grad_out.const_data_ptr(),
                                      in.qkv.const_data_ptr(),
                                      in.bias.const_data_ptr<float>(),
                                      in.scale.const_data_ptr<float>(),
                                      in.seed_pointer(),
                                      cpu::head_groups(in.shape, groups, units_wanted()),
                                      out.const_data_ptr(),
                                      lse.const_data_ptr<float>(),
                                      grad_qkv.mutable_data_ptr(),
                                      bias_parts.mutable_data_ptr<float>(),
                                      scale_parts.mutable_data_ptr<float>()};
    const cpu::WindowKernels& kernels = window_kernels(in.dtype);
    const int64_t units = tensors.groups.count * groups;
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      kernels.backward(in.dtype, in.shape, in.options, tensors, {begin, end});
    });
    add_parts(bias_parts.const_data_ptr<float>(), heads, groups, pairs,
              grad_bias.mutable_data_ptr<float>());
    add_parts(scale_parts.const_data_ptr<float>(), heads, groups, 1,
              grad_scale.mutable_data_ptr<float>());
  }

 private:
  // Splits the chunks of tokens of a routing over threads.
  template <typename Body>
  static void for_chunks(const RouteTensors& in, const MaybeTensor& bias, const Body& body) {
    const cpu::RouteInputs inputs{in.logits.const_data_ptr<float>(), pointer_or_null(in.noise),
                                  pointer_or_null(bias)};
    torch::stable::parallel_for(
        0, cpu::route_chunks(in.shape), 1,
        [&](int64_t begin, int64_t end) { body(cpu::Range{begin, end}, inputs); });
  }

  // Enough to spread evenly over the threads.
  static int64_t units_wanted() { return 8 * int64_t{torch::stable::get_num_threads()}; }

  // [heads, groups, size] to [heads, size], in the order of the groups.
  static void add_parts(const float* parts, int64_t heads, int64_t groups, int64_t size,
                        float* sums) {
    if (parts == sums) return;
    torch::stable::parallel_for(0, heads * size, 16 * 1024, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t head = at / size, first = at % size;
        const int64_t count = std::min(end - at, size - first);
        const float* part = parts + head * groups * size + first;
        std::copy_n(part, count, sums + at);
        for (int64_t group = 1; group < groups; ++group) {
          for (int64_t i = 0; i < count; ++i) sums[at + i] += part[group * size + i];
        }
        at += count;
      }
    });
  }
};

// The instruction set that the attention kernels use: for fp32, and for bf16.
std::string instruction_set(bool bf16) {
  return Cpu::window_kernels(bf16 ? DType::kBFloat16 : DType::kFloat32).name;
}

}  // namespace
}  // namespace swin_moe

STABLE_TORCH_LIBRARY_IMPL(swin_moe, CPU, m) {
  swin_moe::register_adamw<swin_moe::Cpu>(m);
  swin_moe::register_moe_dispatch<swin_moe::Cpu>(m);
  swin_moe::register_moe_route<swin_moe::Cpu>(m);
  swin_moe::register_moe_experts<swin_moe::CpuExperts>(m);
  swin_moe::register_window_attention<swin_moe::Cpu>(m);
}

STABLE_TORCH_LIBRARY_FRAGMENT(swin_moe, m) {
  m.def("cpu_instruction_set(bool bf16) -> str");
  m.def("allow_amx(bool allowed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(swin_moe, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&swin_moe::instruction_set));
  m.impl("allow_amx", TORCH_BOX(&swin_moe::cpu::allow_amx));
}
