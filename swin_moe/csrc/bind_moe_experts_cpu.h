// The experts on a CPU: its kernels between the products, on torch's own thread pool.
#pragma once

#include <cstring>

#include "bind_moe_experts.h"
#include "cpu/moe_activation.h"

namespace swin_moe {

struct CpuExperts {
  static constexpr bool kHasHalf = false;
  static constexpr bool kHasSpans = true;

  static void locate(Experts& in) { find_pieces(in, in.used.const_data_ptr<int64_t>()); }

  static Results forward(const Experts& in, const std::optional<Tensor>& fc2_bias, bool keep) {
    switch (method(in)) {
      case Method::kGrouped: return forward_grouped<CpuExperts>(in, fc2_bias, keep);
      case Method::kBatched: {
        const Padding padding(in);
        const Results padded = forward_batched<CpuExperts>(padding.experts(in), fc2_bias, keep);
        return {padding.remove(padded.out), keep ? padding.remove(padded.pre) : padded.pre};
      }
      default: return forward_each<CpuExperts>(in, fc2_bias, keep);
    }
  }

  static void backward(const Experts& in, const Tensor& grad_out, const Tensor& pre,
                       ExpertsGrads& grads) {
    switch (method(in)) {
      case Method::kGrouped: return backward_grouped<CpuExperts>(in, grad_out, pre, grads);
      case Method::kBatched: {
        const Padding padding(in);
        grads.rows = new_matrix(in.rows, padding.total, in.shape.width);
        backward_batched<CpuExperts>(padding.experts(in), padding.add(grad_out), padding.add(pre),
                                     grads);
        grads.rows = padding.remove(grads.rows);
        return;
      }
      default: return backward_each<CpuExperts>(in, grad_out, pre, grads);
    }
  }

  static void activate(const Experts& in, const Span& span, ExpertRows pre, ExpertRows act) {
    const Units units(span);
    const cpu::ExpertActivation tensors = activation(in, pre, act);
    units.each(in.shape.hidden, [&](const cpu::ExpertUnit* all, cpu::Range range) {
      kernels(in).forward(in.dtype, tensors, all, range);
    });
  }

  // Gradients of the hidden rows and of the biases of the span's experts, which it has all rows of.
  static void activate_backward(const Experts& in, const Span& span, const Tensor& pre,
                                const Tensor& grad_out, ExpertRows act, ExpertRows grad,
                                ExpertsGrads& grads) {
    const int64_t D = in.shape.width, H = in.shape.hidden;
    const Units units(span);
    const int64_t count = static_cast<int64_t>(units.all.size());
    const bool has_bias = grads.fc2_bias.size(0) > 0;
    Tensor sums = torch::stable::new_empty(in.rows, {count * (H + D)}, ScalarType::Float);
    float* hidden_sums = sums.mutable_data_ptr<float>();
    float* out_sums = hidden_sums + count * H;
    cpu::ExpertActivation tensors = activation(in, {pre.data_ptr(), 0}, act);
    tensors.grad = grad;
    tensors.sums = hidden_sums;
    const ExpertRows outs{grad_out.data_ptr(), 0};
    units.each(H, [&](const cpu::ExpertUnit* all, cpu::Range range) {
      kernels(in).backward(in.dtype, tensors, all, range);
      if (has_bias) kernels(in).add_rows(in.dtype, D, outs, out_sums, all, range);
    });
    const auto add = [&](Tensor& to, int64_t width, const float* from, const auto& experts) {
      char* bytes = static_cast<char*>(to.mutable_data_ptr());
      kernels(in).add_units(in.dtype, width, from + experts.first * width, experts.count,
                            bytes + experts.expert * width * in.rows.element_size());
    };
    for (const auto& experts : units.by_expert) {
      add(grads.fc1_bias, H, hidden_sums, experts);
      if (has_bias) add(grads.fc2_bias, D, out_sums, experts);
    }
  }

  static void add_bias(const Experts& in, const Span& span, const Tensor& bias, Tensor& out) {
    const Units units(span);
    units.each(in.shape.width, [&](const cpu::ExpertUnit* all, cpu::Range range) {
      kernels(in).add_bias(in.dtype, in.shape.width, bias.const_data_ptr(), {out.data_ptr(), 0},
                           all, range);
    });
  }

  static void clear_unused_biases(const Experts& in, ExpertsGrads& grads) {
    clear_unused(in, grads.fc1_bias);
    if (grads.fc2_bias.size(0) > 0) clear_unused(in, grads.fc2_bias);
  }

  static void clear_unused(const Experts& in, Tensor& weights) {
    const int64_t bytes = weights.numel() / in.shape.experts * weights.element_size();
    for (const Piece& p : in.pieces) {
      if (p.count > 0) continue;
      std::memset(static_cast<char*>(weights.mutable_data_ptr()) + p.expert * bytes, 0, bytes);
    }
  }

  // The experts have none here, see `Padding`.
  static Tensor without_empty_rows(const Experts&, const Tensor& rows) { return rows; }

 private:
  // Rows in units for the threads, and each expert's consecutive units.
  struct Units {
    struct OfExpert {
      int64_t expert;
      int64_t first;
      int64_t count;
    };
    std::vector<cpu::ExpertUnit> all;
    std::vector<OfExpert> by_expert;
    int64_t rows = 0;

    explicit Units(const Span& span) {
      for (const Piece& p : span.pieces) {
        const int64_t first = static_cast<int64_t>(all.size());
        for (int64_t i = 0; i < p.count; i += cpu::kExpertUnitRows) {
          all.push_back({p.expert, p.row + i, std::min(cpu::kExpertUnitRows, p.count - i),
                         p.random_row + i});
        }
        by_expert.push_back({p.expert, first, static_cast<int64_t>(all.size()) - first});
        rows += p.count;
      }
    }

    template <typename Body>
    void each(int64_t width, const Body& body) const {
      constexpr int64_t kGrain = 8 * 1024;  // elements that are worth waking a thread for
      const int64_t count = static_cast<int64_t>(all.size());
      const int64_t work = std::max<int64_t>(1, rows * width);
      const int64_t grain = std::max<int64_t>(1, kGrain * count / work);
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        body(all.data(), cpu::Range{begin, end});
      });
    }
  };

  // Every expert's rows padded with zeros to those of the largest, for the batched products.
  struct Padding {
    std::vector<Piece> pieces;
    int64_t stride = 0;
    int64_t total_before;
    int64_t total;

    explicit Padding(const Experts& in) : pieces(in.pieces), total_before(in.shape.rows) {
      for (const Piece& p : pieces) stride = std::max(stride, p.count);
      total = stride * in.shape.experts;
    }

    Experts experts(const Experts& in) const {
      Experts padded = in;
      padded.shape.rows = total;
      padded.shape.stride = stride;
      padded.rows = add(in.rows);
      for (Piece& p : padded.pieces) {
        p.row = p.expert * stride;
        p.count = stride;
      }
      return padded;
    }

    Tensor add(const Tensor& rows) const {
      Tensor padded = new_matrix(rows, total, rows.size(1));
      const int64_t bytes = rows.size(1) * rows.element_size();
      const char* from = static_cast<const char*>(rows.const_data_ptr());
      char* to = static_cast<char*>(padded.mutable_data_ptr());
      for (const Piece& p : pieces) {
        char* first = to + p.expert * stride * bytes;
        std::memcpy(first, from + p.row * bytes, p.count * bytes);
        std::memset(first + p.count * bytes, 0, (stride - p.count) * bytes);
      }
      return padded;
    }

    // Empty rows are left as they are.
    Tensor remove(const Tensor& padded) const {
      Tensor rows = new_matrix(padded, total_before, padded.size(1));
      const int64_t bytes = rows.size(1) * rows.element_size();
      const char* from = static_cast<const char*>(padded.const_data_ptr());
      char* to = static_cast<char*>(rows.mutable_data_ptr());
      for (const Piece& p : pieces) {
        std::memcpy(to + p.row * bytes, from + p.expert * stride * bytes, p.count * bytes);
      }
      return rows;
    }
  };

  // See docs/experts.md for measurements: a product in bf16 has a fixed cost of 15 to 25 us. One
  // product for all experts saves it, and pays as long as the padded rows do not cost more.
  static Method method(const Experts& in) {
    constexpr int64_t kMostRows = 128;
    constexpr int64_t kPrice = 2000000;  // of a product, in floating point operations
    int64_t most = 0, all = 0;
    for (const Piece& p : in.pieces) {
      most = std::max(most, p.count);
      all += p.count;
    }
    if (all == 0) return Method::kEach;
    if (in.method != Method::kChoose) return in.method;
    const int64_t padded = most * in.shape.experts - all;
    const bool batched = in.dtype == DType::kBFloat16 && most <= kMostRows &&
                         padded * 2 * in.shape.width * in.shape.hidden <= kPrice * in.shape.experts;
    return batched ? Method::kBatched : Method::kEach;
  }

  static const cpu::ExpertKernels& kernels(const Experts& in) {
    const cpu::ExpertKernels* kernels = cpu::expert_kernels(in.dtype);
    STD_TORCH_CHECK(kernels != nullptr,
                    "SWIN_MOE_ISA must be amx_bf16, avx512_bf16, avx512, avx2 or generic");
    return *kernels;
  }

  static cpu::ExpertActivation activation(const Experts& in, ExpertRows pre, ExpertRows act) {
    return {in.shape.hidden, in.fc1_bias.const_data_ptr(), in.seed_pointer(), in.dropout, pre, act,
            {},              nullptr};
  }
};

}  // namespace swin_moe
