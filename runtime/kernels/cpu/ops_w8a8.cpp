// Linear layers whose input is quantized, too: linear_w8a8_blocked and linear_fp8_blocked.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <c10/util/string_view.h>

#include <algorithm>
#include <optional>

#include "arguments.h"
#include "kernels.h"
#include "parallel.h"
#include "types.h"

namespace smelt {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows of x at a time: they stay in a core's cache while the weight goes by.
constexpr int64_t kRowsAtOnce = 64;
// 127 * 127 * kMaxK stays below 2^31.
constexpr int64_t kMaxK = 1 << 17;

template <class Q>
Tensor set_shapes(Q& q, const Tensor& x, int64_t n) {
  const auto type = type_of(x.scalar_type());
  TORCH_CHECK(type && x.dim() >= 1, "smelt: quantized layers take float32, float16 or bfloat16 x");
  q.type = *type;
  q.n = n;
  q.k = x.size(-1);
  q.m = q.k ? x.numel() / q.k : 0;
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  return at::empty(sizes, x.options());
}

const float* input_scale_of(const OptionalTensor& scale) {
  if (!scale) return nullptr;
  TORCH_CHECK(scale->numel() == 1 && scale->scalar_type() == at::kFloat,
              "smelt: a static input scale is one float32, not ", scale->sizes());
  return scale->const_data_ptr<float>();
}

const void* bias_of(const OptionalTensor& bias, const Tensor& x, int64_t n, Tensor& keep) {
  if (!bias) return nullptr;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "smelt: bias has ", bias->sizes(),
              " values, the layer ", n, " outputs");
  keep = bias->to(x.scalar_type()).contiguous();
  return keep.const_data_ptr();
}

// Rows of x in portions: prepare(q, rows), then multiply(q, blocks) with a block's cost in bytes.
template <class Q, class Scratch, class Prepare, class Multiply>
void in_portions(Q q, const Tensor& x, Tensor& out, int64_t block_bytes, void* Q::*scratch,
                 Scratch bytes, Prepare prepare, Multiply multiply) {
  const int64_t m = q.m, size = x.element_size(), blocks = blocks_of(q.n);
  for (int64_t row = 0; row < m; row += kRowsAtOnce) {
    q.m = std::min(kRowsAtOnce, m - row);
    q.x = (const char*)x.const_data_ptr() + row * q.k * size;
    q.out = (char*)out.mutable_data_ptr() + row * q.n * size;
    q.*scratch = thread_buffer<0>(bytes(q));
    for_pieces(q.m, 1, q.k * size, [&](int64_t first, int64_t last) { prepare(q, first, last); });
    for_pieces(blocks, 4, block_bytes * ((q.m + 3) / 4),
               [&](int64_t first, int64_t last) { multiply(q, first, last); });
  }
}

Tensor linear_w8a8_blocked(const Tensor& x, const Tensor& packed, const Tensor& scales,
                           const OptionalTensor& input_scale, const OptionalTensor& bias) {
  TORCH_CHECK(scales.dim() == 1 && scales.is_contiguous() && scales.scalar_type() == at::kFloat,
              "smelt: scales are one float32 an output, not ", scales.sizes());
  W8A8 q{};
  Tensor keep, out = set_shapes(q, x, scales.size(0));
  TORCH_CHECK(q.k <= kMaxK, "smelt: int8 sums over ", q.k, " features may overflow; ", kMaxK,
              " is the most");
  TORCH_CHECK(packed.dim() == 4 && packed.size(0) == blocks_of(q.n) &&
                  packed.size(1) == (q.k + 3) / 4 && packed.size(2) == kLanes &&
                  packed.size(3) == 4 && packed.is_contiguous() &&
                  packed.scalar_type() == at::kChar,
              "smelt: packed weight ", packed.sizes(), " does not hold ", q.n, " x ", q.k);
  q.packed = packed.const_data_ptr<int8_t>();
  q.scales = scales.const_data_ptr<float>();
  q.input_scale = input_scale_of(input_scale);
  q.bias = bias_of(bias, x, q.n, keep);
  const Kernels& run = kernels();
  in_portions(q, x.contiguous(), out, q.k * kLanes, &W8A8::quantized_x, run.w8a8_scratch,
              run.w8a8_prepare, run.w8a8);
  return out;
}

Tensor linear_fp8_blocked(const Tensor& x, const Tensor& packed, const Tensor& scales,
                          const OptionalTensor& input_scale, const OptionalTensor& bias,
                          c10::string_view activations, int64_t block, int64_t n) {
  Fp8 q{};
  Tensor keep, out = set_shapes(q, x, n);
  set_weight(q, n, packed, scales, block);
  q.quantize_x = activations != "none";
  q.input_scale = input_scale_of(input_scale);
  q.x_group = activations == "dynamic" ? q.group : std::max<int64_t>(q.k, 1);
  TORCH_CHECK((activations == "static") == (q.input_scale != nullptr),
              "smelt: an input scale belongs to static activations, and only to them");
  q.bias = bias_of(bias, x, n, keep);
  const Kernels& run = kernels();
  in_portions(q, x.contiguous(), out, q.k * kLanes * 4, &Fp8::packed_x, run.fp8_scratch,
              run.fp8_prepare, run.fp8);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(smelt, CPU, m) {
  m.impl("linear_w8a8_blocked", linear_w8a8_blocked);
  m.impl("linear_fp8_blocked", linear_fp8_blocked);
}

}  // namespace smelt
