// The matrix products of the experts, by torch, in one of three ways:
//
// - each: one product per expert. The host needs the numbers of rows. No row is computed in vain.
// - batched: one product for all experts, whose rows are padded to the same number.
// - grouped: torch's grouped product on packed rows. Only the device needs the numbers of rows.
//
// Between them, `Device` computes the elementwise ops, on the rows of a `Span` at a time:
// `activate`, `activate_backward` (with the sums of the bias gradients) and `add_bias`. It sets
// empty rows to zero before products over rows (`without_empty_rows`). If an expert has no rows,
// it sets that expert's gradients to zero (`clear_unused`, `clear_unused_biases`).
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "bind_common.h"

namespace swin_moe {

enum class Method { kChoose, kEach, kBatched, kGrouped };

// Rows of one expert, known to the host.
struct Piece {
  int64_t expert;
  int64_t row;
  int64_t count;
  int64_t random_row;  // the first row's number in dropout
};

struct Experts {
  ExpertsShape shape;
  DType dtype;
  double dropout;
  Tensor rows;
  Tensor used;
  Tensor fc1_weight;
  Tensor fc1_bias;
  Tensor fc2_weight;
  std::optional<Tensor> seed;
  std::vector<Piece> pieces;  // one per expert; none if the host does not know the rows
  Method method = Method::kChoose;

  const int64_t* seed_pointer() const {
    return seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr;
  }
};

struct ExpertsGrads {
  Tensor rows;
  Tensor fc1_weight;
  Tensor fc1_bias;
  Tensor fc2_weight;
  Tensor fc2_bias;  // of no experts if there is none
};

// Finds the rows of each expert from `used`, which the host can read.
inline void find_pieces(Experts& in, const int64_t* used) {
  const ExpertsShape& s = in.shape;
  int64_t row = 0;
  for (int64_t e = 0; e < s.experts; ++e) {
    if (s.stride > 0) row = e * s.stride;
    const int64_t room = s.stride > 0 ? s.stride : s.rows - row;
    STD_TORCH_CHECK(used[e] >= 0 && used[e] <= room, "used[", e, "] is ", used[e],
                    ", but there is room for ", room, " rows");
    in.pieces.push_back({e, row, used[e], row});
    row += used[e];
  }
}

// Neighbouring rows that are worked on together, in scratch that stays in a cache.
struct Span {
  int64_t first;
  int64_t rows;
  std::vector<Piece> pieces;
};

// The hidden rows of a span.
constexpr int64_t kSpanBytes = int64_t{8} << 20;

// A matrix within `like`, or its transpose: rows `first` and following, of `width` elements.
inline Tensor matrix(const Tensor& like, int64_t first, int64_t rows, int64_t width,
                     bool transposed = false) {
  char* data = static_cast<char*>(like.data_ptr()) + first * width * like.element_size();
  if (transposed) {
    return torch::stable::from_blob(data, {width, rows}, {1, width}, like.device(),
                                    like.scalar_type());
  }
  return torch::stable::from_blob(data, {rows, width}, {width, 1}, like.device(),
                                  like.scalar_type());
}

// The same for a matrix [rows, width] per expert.
inline Tensor matrices(const Tensor& like, int64_t experts, int64_t rows, int64_t width,
                       bool transposed = false) {
  if (transposed) {
    return torch::stable::from_blob(like.data_ptr(), {experts, width, rows},
                                    {rows * width, 1, width}, like.device(), like.scalar_type());
  }
  return torch::stable::from_blob(like.data_ptr(), {experts, rows, width},
                                  {rows * width, width, 1}, like.device(), like.scalar_type());
}

// to = a b, by aten::mm or aten::bmm.
inline void multiply(const char* product, const Tensor& a, const Tensor& b, const Tensor& to) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(to)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(product, "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows of scratch for the largest span.
inline Tensor new_scratch(const Experts& in, const std::vector<Span>& spans) {
  int64_t rows = 0;
  for (const Span& span : spans) rows = std::max(rows, span.rows);
  return new_matrix(in.rows, rows, in.shape.hidden);
}

// All rows in spans; those of one expert stay together unless `split`.
inline std::vector<Span> spans_of(const Experts& in, bool split) {
  const int64_t most =
      std::max<int64_t>(64, kSpanBytes / (in.shape.hidden * in.rows.element_size()) / 64 * 64);
  std::vector<Span> spans;
  for (const Piece& whole : in.pieces) {
    const int64_t step = split ? most : std::max<int64_t>(1, whole.count);
    for (int64_t done = 0; done < whole.count; done += step) {
      const Piece piece{whole.expert, whole.row + done, std::min(step, whole.count - done),
                        whole.random_row + done};
      const int64_t end = piece.row + piece.count;
      if (spans.empty() || end - spans.back().first > most) spans.push_back({piece.row, 0, {}});
      spans.back().rows = end - spans.back().first;
      spans.back().pieces.push_back(piece);
    }
  }
  return spans;
}

// All rows, and their experts if the host knows them.
inline Span whole_span(const Experts& in) { return {0, in.shape.rows, in.pieces}; }

// The results of a forward pass; `pre`, the hidden rows before the activation, has none if they are
// not to be kept.
struct Results {
  Tensor out;
  Tensor pre;
};

template <typename Device>
std::vector<Span> device_spans(const Experts& in, bool split) {
  return Device::kHasSpans ? spans_of(in, split) : std::vector<Span>{whole_span(in)};
}

template <typename Device>
Results forward_each(const Experts& in, const std::optional<Tensor>& fc2_bias, bool keep) {
  const int64_t D = in.shape.width, H = in.shape.hidden;
  const std::vector<Span> spans = device_spans<Device>(in, true);
  Tensor scratch = new_scratch(in, spans);
  Results to{new_matrix(in.rows, in.shape.rows, D),
             new_matrix(in.rows, keep ? in.shape.rows : 0, H)};
  for (const Span& span : spans) {
    const Tensor& hidden = keep ? to.pre : scratch;
    const int64_t first = keep ? 0 : span.first;  // of `hidden`
    for (const Piece& p : span.pieces) {
      if (p.count == 0) continue;
      multiply("aten::mm", matrix(in.rows, p.row, p.count, D),
               matrix(in.fc1_weight, p.expert * H, H, D, true),
               matrix(hidden, p.row - first, p.count, H));
    }
    Device::activate(in, span, {hidden.data_ptr(), first}, {scratch.data_ptr(), span.first});
    for (const Piece& p : span.pieces) {
      if (p.count == 0) continue;
      multiply("aten::mm", matrix(scratch, p.row - span.first, p.count, H),
               matrix(in.fc2_weight, p.expert * D, D, H, true),
               matrix(to.out, p.row, p.count, D));
    }
    if (fc2_bias.has_value()) Device::add_bias(in, span, *fc2_bias, to.out);
  }
  return to;
}

template <typename Device>
void backward_each(const Experts& in, const Tensor& grad_out, const Tensor& pre,
                   ExpertsGrads& grads) {
  const int64_t D = in.shape.width, H = in.shape.hidden;
  for (const Piece& p : in.pieces) {
    if (p.count > 0) continue;
    Tensor first = matrix(grads.fc1_weight, p.expert * H, H, D);
    Tensor second = matrix(grads.fc2_weight, p.expert * D, D, H);
    torch::stable::zero_(first);
    torch::stable::zero_(second);
  }
  Device::clear_unused_biases(in, grads);
  const std::vector<Span> spans = device_spans<Device>(in, false);
  Tensor act = new_scratch(in, spans), grad = new_scratch(in, spans);
  for (const Span& span : spans) {
    for (const Piece& p : span.pieces) {
      if (p.count == 0) continue;
      multiply("aten::mm", matrix(grad_out, p.row, p.count, D),
               matrix(in.fc2_weight, p.expert * D, D, H),
               matrix(grad, p.row - span.first, p.count, H));
    }
    Device::activate_backward(in, span, pre, grad_out, {act.data_ptr(), span.first},
                              {grad.data_ptr(), span.first}, grads);
    for (const Piece& p : span.pieces) {
      if (p.count == 0) continue;
      const int64_t row = p.row - span.first;
      multiply("aten::mm", matrix(grad_out, p.row, p.count, D, true), matrix(act, row, p.count, H),
               matrix(grads.fc2_weight, p.expert * D, D, H));
      multiply("aten::mm", matrix(grad, row, p.count, H, true),
               matrix(in.rows, p.row, p.count, D), matrix(grads.fc1_weight, p.expert * H, H, D));
      multiply("aten::mm", matrix(grad, row, p.count, H),
               matrix(in.fc1_weight, p.expert * H, H, D), matrix(grads.rows, p.row, p.count, D));
    }
  }
}

template <typename Device>
Results forward_batched(const Experts& in, const std::optional<Tensor>& fc2_bias, bool keep) {
  const int64_t E = in.shape.experts, N = in.shape.stride, D = in.shape.width;
  const int64_t S = in.shape.rows, H = in.shape.hidden;
  Tensor act = new_matrix(in.rows, S, H);
  Results to{new_matrix(in.rows, S, D), new_matrix(in.rows, keep ? S : 0, H)};
  Tensor& hidden = keep ? to.pre : act;
  multiply("aten::bmm", matrices(in.rows, E, N, D), matrices(in.fc1_weight, E, H, D, true),
           matrices(hidden, E, N, H));
  const Span span = whole_span(in);
  Device::activate(in, span, {hidden.data_ptr(), 0}, {act.data_ptr(), 0});
  multiply("aten::bmm", matrices(act, E, N, H), matrices(in.fc2_weight, E, D, H, true),
           matrices(to.out, E, N, D));
  if (fc2_bias.has_value()) Device::add_bias(in, span, *fc2_bias, to.out);
  return to;
}

template <typename Device>
void backward_batched(const Experts& in, const Tensor& grad_out, const Tensor& pre,
                      ExpertsGrads& grads) {
  const int64_t E = in.shape.experts, N = in.shape.stride, D = in.shape.width;
  const int64_t H = in.shape.hidden;
  const Tensor clean = Device::without_empty_rows(in, grad_out);
  const Tensor rows = Device::without_empty_rows(in, in.rows);
  Tensor act = new_matrix(in.rows, in.shape.rows, H);
  Tensor grad = new_matrix(in.rows, in.shape.rows, H);
  multiply("aten::bmm", matrices(clean, E, N, D), matrices(in.fc2_weight, E, D, H),
           matrices(grad, E, N, H));
  Device::activate_backward(in, whole_span(in), pre, clean, {act.data_ptr(), 0},
                            {grad.data_ptr(), 0}, grads);
  multiply("aten::bmm", matrices(clean, E, N, D, true), matrices(act, E, N, H),
           matrices(grads.fc2_weight, E, D, H));
  multiply("aten::bmm", matrices(grad, E, N, H, true), matrices(rows, E, N, D),
           matrices(grads.fc1_weight, E, H, D));
  multiply("aten::bmm", matrices(grad, E, N, H), matrices(in.fc1_weight, E, H, D),
           matrices(grads.rows, E, N, D));
}

// a b for the rows of each expert, or, where both are [., rows], the products over them.
inline Tensor multiply_grouped(const Tensor& a, const Tensor& b, const Tensor& ends) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(a), from(b), from(std::optional<Tensor>(ends)),
                                    from(std::nullopt), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

// Where the rows of each expert end, int32 [E], on the device.
inline Tensor ends_of(const Experts& in) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(in.used), from(int64_t{0}),
                                    from(std::optional<ScalarType>(ScalarType::Int))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename Device>
Results forward_grouped(const Experts& in, const std::optional<Tensor>& fc2_bias, bool keep) {
  const int64_t E = in.shape.experts, D = in.shape.width, H = in.shape.hidden;
  const Tensor ends = ends_of(in);
  const Span span = whole_span(in);
  Tensor pre = multiply_grouped(in.rows, matrices(in.fc1_weight, E, H, D, true), ends);
  Tensor act = keep ? torch::stable::empty_like(pre) : pre;
  Device::activate(in, span, {pre.data_ptr(), 0}, {act.data_ptr(), 0});
  Tensor out = multiply_grouped(act, matrices(in.fc2_weight, E, D, H, true), ends);
  if (fc2_bias.has_value()) Device::add_bias(in, span, *fc2_bias, out);
  return {out, keep ? pre : new_matrix(in.rows, 0, H)};
}

template <typename Device>
void backward_grouped(const Experts& in, const Tensor& grad_out, const Tensor& pre,
                      ExpertsGrads& grads) {
  const int64_t S = in.shape.rows, D = in.shape.width, H = in.shape.hidden;
  const Tensor ends = ends_of(in);
  Tensor grad = multiply_grouped(grad_out, in.fc2_weight, ends);
  Tensor act = torch::stable::empty_like(grad);
  Device::activate_backward(in, whole_span(in), pre, grad_out, {act.data_ptr(), 0},
                            {grad.data_ptr(), 0}, grads);
  grads.fc2_weight = multiply_grouped(matrix(grad_out, 0, S, D, true), act, ends);
  grads.fc1_weight = multiply_grouped(matrix(grad, 0, S, H, true), in.rows, ends);
  grads.rows = multiply_grouped(grad, in.fc1_weight, ends);
  // A product of nothing might write nothing.
  Device::clear_unused(in, grads.fc1_weight);
  Device::clear_unused(in, grads.fc2_weight);
}

}  // namespace swin_moe
