// smelt::linear and the blocked quantized linears on the CPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <new>
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
// Bytes of dequantized weight at a time, for many rows.
constexpr int64_t kPanelBytes = 8 << 20;

Tensor output_of(const Tensor& x, int64_t n) {
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  return at::empty(sizes, x.options());
}

int64_t rows_of(const Tensor& x, int64_t k) { return k ? x.numel() / k : 0; }

const void* bias_data(const std::optional<Tensor>& bias, const Tensor& x, int64_t n,
                      Tensor& keep) {
  if (!bias) return nullptr;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "smelt: bias has ", bias->sizes(),
              " values, the layer ", n, " outputs");
  keep = bias->to(x.scalar_type()).contiguous();
  return keep.const_data_ptr();
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const auto type = type_of(x.scalar_type());
  const bool ours = type && x.dim() >= 1 && weight.dim() == 2 && weight.is_contiguous() &&
                    weight.scalar_type() == x.scalar_type() && weight.size(1) > 0 &&
                    x.size(-1) == weight.size(1);
  if (!ours || x.numel() == 0) return at::linear(x, weight, bias);
  const Kernels& run = kernels();
  const int64_t n = weight.size(0), k = weight.size(1), m = rows_of(x, k);
  Dense d{*type, weight.const_data_ptr(), nullptr, nullptr, nullptr, nullptr, m, n, k};
  if (m > run.dense_most(d)) return at::linear(x, weight, bias);
  const Tensor rows = x.contiguous();
  Tensor keep, out = output_of(x, n);
  d.bias = bias_data(bias, x, n, keep);
  d.x = rows.const_data_ptr();
  d.out = out.mutable_data_ptr();
  d.packed_x = thread_buffer<0>(run.dense_scratch(d));
  run.dense_prepare(d, 0, m);
  // A piece's cost grows with the rows that share it.
  const int64_t cost = k * weight.element_size() * ((m + 3) / 4);
  for_pieces(n, kLanes, cost, [&](int64_t first, int64_t last) { run.dense(d, first, last); });
  return out;
}

// Many rows: panels of the weight are dequantized (transposed) and go through torch's product.
Tensor many_rows(const Kernels& run, Quantized q, const Tensor& x, const OptionalTensor& bias) {
  const Tensor rows = x.reshape({q.m, q.k});
  const int64_t blocks = blocks_of(q.n);
  const int64_t block_bytes = q.k * kLanes * x.element_size();
  const int64_t each = std::min(blocks, std::max<int64_t>(1, kPanelBytes / block_bytes));
  // Kept: fresh pages for each call would cost more than filling them.
  const Tensor panel = at::from_blob(thread_buffer<3>(each * block_bytes), {q.k, each * kLanes},
                                     x.options());
  Tensor out = at::empty({q.m, q.n}, x.options());
  for (int64_t block = 0; block < blocks; block += each) {
    const int64_t count = std::min(each, blocks - block), n = block * kLanes;
    const int64_t width = std::min(count * kLanes, q.n - n);
    char* to = (char*)panel.mutable_data_ptr();
    for_pieces(count, 1, block_bytes, [&](int64_t first, int64_t last) {
      run.dequantize(q, block + first, block + last, to + first * kLanes * x.element_size(),
                     each * kLanes);
    });
    const Tensor weight = panel.narrow(1, 0, width);
    Tensor part = bias ? at::addmm(bias->narrow(0, n, width), rows, weight) : at::mm(rows, weight);
    if (width == q.n) {
      out = part;
    } else {
      out.narrow(1, n, width).copy_(part);
    }
  }
  return out.view(output_of(x, q.n).sizes());
}

Tensor quantized(Quantized q, const Tensor& x, const Tensor& packed, const Tensor& scales,
                 const OptionalTensor& zeros, const OptionalTensor& bias) {
  const auto type = type_of(x.scalar_type());
  TORCH_CHECK(type && x.dim() >= 1, "smelt: quantized layers take float32, float16 or bfloat16 x");
  q.type = *type;
  q.k = x.size(-1);
  q.m = rows_of(x, q.k);
  set_weight(q, q.n, packed, scales, zeros);
  if (q.m == 0) return output_of(x, q.n);
  const Kernels& run = kernels();
  if (q.m > run.quantized_rows(q)) return many_rows(run, q, x, bias);
  const Tensor rows = x.contiguous();
  Tensor keep, out = output_of(x, q.n);
  q.bias = bias_data(bias, x, q.n, keep);
  const int64_t m = q.rows = q.m, size = x.element_size();
  for (int64_t row = 0; row < m; row += kRowsAtOnce) {
    q.m = std::min(kRowsAtOnce, m - row);
    q.x = (const char*)rows.const_data_ptr() + row * q.k * size;
    q.out = (char*)out.mutable_data_ptr() + row * q.n * size;
    q.packed_x = thread_buffer<0>(run.quantized_scratch(q));
    for_pieces(q.m, 1, q.k * size,
               [&](int64_t first, int64_t last) { run.quantized_prepare(q, first, last); });
    // A piece's cost grows with the rows that share it.
    const int64_t cost = words_of(q.bits, q.k) * kLanes * packed.element_size() * ((q.m + 3) / 4);
    for_pieces(blocks_of(q.n), 4, cost,
               [&](int64_t first, int64_t last) { run.quantized(q, first, last); });
  }
  return out;
}

template <int Bits>
Tensor linear_grouped_blocked(const Tensor& x, const Tensor& packed, const Tensor& scales,
                              const Tensor& zeros, const OptionalTensor& bias, int64_t n) {
  Quantized q{};
  q.bits = Bits;
  q.n = n;
  return quantized(q, x, packed, scales, zeros, bias);
}

Tensor linear_int8_blocked(const Tensor& x, const Tensor& packed, const Tensor& scales,
                           const OptionalTensor& bias, int64_t n) {
  Quantized q{};
  q.bits = 8;
  q.n = n;
  return quantized(q, x, packed, scales, std::nullopt, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(smelt, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_int2_blocked", linear_grouped_blocked<2>);
  m.impl("linear_int3_blocked", linear_grouped_blocked<3>);
  m.impl("linear_int4_blocked", linear_grouped_blocked<4>);
  m.impl("linear_int8_blocked", linear_int8_blocked);
}

}  // namespace smelt
