// Quantized weights as the torch side gets them, checked and put into what the units read.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

#include "kernels.h"

namespace smelt {

inline int64_t blocks_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// Elements of packed weight for sixteen rows, over sixteen (runtime/ops/packing.py).
inline int64_t words_of(int bits, int64_t k) {
  switch (bits) {
    case 2:
      return (k + 15) / 16;
    case 3:
      return 3 * ((k + 31) / 32);
    case 4:
      return (k + 7) / 8;
    default:
      return k;
  }
}

// n rows of q.k features of q.bits. Sets weight and groups of q, but not its n.
inline void set_weight(Quantized& q, int64_t n, const at::Tensor& packed, const at::Tensor& scales,
                       const std::optional<at::Tensor>& zeros) {
  TORCH_CHECK(packed.dim() == 3 && packed.size(0) == blocks_of(n) &&
                  packed.size(1) == words_of(q.bits, q.k) && packed.size(2) == kLanes &&
                  packed.is_contiguous() &&
                  packed.scalar_type() == (q.bits < 8 ? at::kInt : at::kChar),
              "smelt: packed weight ", packed.sizes(), " does not hold ", n, " x ", q.k);
  TORCH_CHECK(scales.dim() == 3 && scales.size(0) == blocks_of(n) && scales.size(2) == kLanes &&
                  scales.is_contiguous() && scales.scalar_type() == at::kBFloat16 &&
                  scales.size(1) > 0 && q.k % scales.size(1) == 0,
              "smelt: scales ", scales.sizes(), " do not divide ", n, " x ", q.k);
  TORCH_CHECK(!zeros || (zeros->sizes() == scales.sizes() && zeros->is_contiguous() &&
                         zeros->scalar_type() == at::kByte),
              "smelt: zeros do not have the shape of scales");
  q.groups = scales.size(1);
  q.packed = packed.const_data_ptr();
  q.scales = (const uint16_t*)scales.const_data_ptr();
  q.zeros = zeros ? (const uint8_t*)zeros->const_data_ptr() : nullptr;
}

// n rows of q.k features of e4m3; block: features that share a scale, 0 for a row's.
inline void set_weight(Fp8& q, int64_t n, const at::Tensor& packed, const at::Tensor& scales,
                       int64_t block) {
  q.group = block ? block : std::max<int64_t>(q.k, 1);
  q.groups = std::max<int64_t>(1, (q.k + q.group - 1) / q.group);
  TORCH_CHECK(packed.dim() == 3 && packed.size(0) == blocks_of(n) && packed.size(1) == q.k &&
                  packed.size(2) == kLanes && packed.is_contiguous() &&
                  packed.scalar_type() == at::kFloat8_e4m3fn,
              "smelt: packed weight ", packed.sizes(), " does not hold ", n, " x ", q.k);
  TORCH_CHECK(scales.dim() == 3 && scales.size(0) == blocks_of(n) && scales.size(1) == q.groups &&
                  scales.size(2) == kLanes && scales.is_contiguous() &&
                  scales.scalar_type() == at::kFloat,
              "smelt: scales ", scales.sizes(), " do not fit ", n, " x ", q.k);
  q.packed = (const uint8_t*)packed.const_data_ptr();
  q.scales = scales.const_data_ptr<float>();
}

}  // namespace smelt
