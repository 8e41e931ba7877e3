// Attention within shifted windows, fused from qkv to output: one (head, window) at a time.
//
// A window of N tokens is read from the feature map by index arithmetic and its head's rows of q, k
// and v, D elements each, are packed into scratch that stays in the first two caches. The scores
// are computed transposed: a *row* is a key j, the *lanes* are queries i. Softmax runs over keys,
// so its sum and its largest value are plain vector operations, and so are the norms and
// statistics of the queries; a key's values are broadcast.
//
//     scores     S[j, i]  = k_j . q_i           rows: keys,    lanes: queries,  words of D
//     output     O[i, d]  = sum_j P[j, i] v_j   rows: queries, lanes: elements, words of N
//
// Both products are the same small kernel: words of one operand are broadcast, words of the other
// are vectors, and Isa::dot multiplies and adds the one or two elements of a word in fp32. Lanes
// are worked on in blocks of kBlock queries, whose scores stay in registers until they have become
// probabilities. Everything with lanes of queries is stored by blocks: [block][row][lanes].
//
// No rolled or partitioned map and no mask is in memory. If a window holds several regions of the
// image, or padding, the score's epilogue compares the region numbers of key and query. Padded keys
// get -infinity.
#pragma once

#include "window_attention.h"
#include "window_backward.h"
#include "window_forward.h"

namespace swin_moe::cpu {
namespace {

template <class Isa, template <class, class, int> class Kernel, class Tensors>
void run(DType dtype, const WindowShape& shape, const WindowOptions& options,
         const Tensors& tensors, Range units) {
  const FlushDenormals flush;
  [[maybe_unused]] const typename Isa::Session session{};
  const auto with_width = [&](auto width) {
    constexpr int D = decltype(width)::value;
    if constexpr (!Isa::kBf16Only) {
      if (dtype == DType::kFloat32) {
        return Kernel<Isa, float, D>(shape, options, tensors).run(units);
      }
    }
    Kernel<Isa, BFloat16, D>(shape, options, tensors).run(units);
  };
  switch (shape.head_dim) {
    case 16: return with_width(Constant<16>{});
    case 32: return with_width(Constant<32>{});
    case 48: return with_width(Constant<48>{});
    default: return with_width(Constant<64>{});
  }
}

template <class Isa>
void forward(DType dtype, const WindowShape& shape, const WindowOptions& options,
             const WindowForward& tensors, Range units) {
  run<Isa, Forward>(dtype, shape, options, tensors, units);
}

template <class Isa>
void backward(DType dtype, const WindowShape& shape, const WindowOptions& options,
              const WindowBackward& tensors, Range units) {
  run<Isa, Backward>(dtype, shape, options, tensors, units);
}

}  // namespace
}  // namespace swin_moe::cpu
