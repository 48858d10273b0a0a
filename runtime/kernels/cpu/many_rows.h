// Many rows of one expert times its weight in torch's bfloat16 product, which has kernels for
// machines with units of their own for it and reads a weight once for all rows; ours read it from
// the cache for every few.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <string_view>

#include "arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace smelt {

// Rows of one expert from which on torch's product is taken (benchmarks/experts_cpu.py): ours lead
// at 16 rows and are behind at 128. float8 is widened once for it, which costs as much as our kernel
// needs for some 64 rows. Kernels of 2 to 8 bits are about as fast as torch's with any number of rows, so that
// dequantizing first brings nothing.
inline int64_t many_rows(const Dense&) { return 64; }
inline int64_t many_rows(const Quantized&) { return INT64_MAX; }
inline int64_t many_rows(const Fp8&) { return 96; }

template <class Q>
int64_t many_rows(const Kernels& run, const Q& q) {
  // Elsewhere torch has no faster product of bfloat16 than ours.
  const std::string_view set = run.name;
  const bool direct = q.type == Type::BF16 && (set == "avx512_bf16" || set == "amx_bf16");
  return direct ? many_rows(q) : INT64_MAX;
}

// Row-major bfloat16 values as a tensor that owns nothing.
inline at::Tensor bf16_matrix(const void* data, int64_t rows, int64_t columns) {
  return at::from_blob((void*)data, {rows, columns}, at::TensorOptions(at::kBFloat16));
}

// d.out [m, n] = d.x [m, k] times the weight of d.
inline void multiply_many(const Kernels&, const Dense& d) {
  at::Tensor out = bf16_matrix(d.out, d.m, d.n);
  at::mm_out(out, bf16_matrix(d.x, d.m, d.k), bf16_matrix(d.weight, d.n, d.k).t());
}

inline void multiply_many(const Kernels& run, const Fp8& q) {
  // Kept: fresh pages for each expert would cost more than filling them.
  char* to = (char*)thread_buffer<3>(q.n * q.k * 2);
  for_pieces(blocks_of(q.n), 1, kLanes * q.k * 2, [&](int64_t first, int64_t last) {
    run.fp8_dequantize(q, first, last, to + first * kLanes * q.k * 2);
  });
  Dense d{};
  d.weight = to, d.x = q.x, d.out = q.out;
  d.m = q.m, d.n = q.n, d.k = q.k;
  multiply_many(run, d);
}

inline void multiply_many(const Kernels&, const Quantized&) {}

}  // namespace smelt
