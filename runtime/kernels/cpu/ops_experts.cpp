// A layer of routed experts: experts_dense and experts_quantized_blocked.
//
// The pairs (token, one of its experts) are sorted by expert, and each expert's rows go through its
// two products together; a token's results are then added in the order of its own choices. With our
// kernels no sum depends on which other tokens there are. An expert that many tokens chose goes
// through torch's matrix product instead, whose sums may.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/string_view.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "arguments.h"
#include "kernels.h"
#include "many_rows.h"
#include "parallel.h"
#include "types.h"

namespace smelt {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows of one expert at a time: they stay in a core's cache while its weight goes by.
constexpr int64_t kRowsAtOnce = 64;
// Bytes of the buffers of the tokens that go through the layer together.
constexpr int64_t kBufferBytes = 128 << 20;

// Pairs first .. first + count, all of one expert.
struct Portion {
  int64_t expert, first, count;
};

struct Routing {
  std::vector<int64_t> token;    // of each pair, pairs in the order of experts
  std::vector<int64_t> place;    // of a token's choice in that order, [tokens, top]
  std::vector<int64_t> portion;  // of each pair, -1 where its expert has many
  std::vector<Portion> portions;
  std::vector<Portion> large;  // the experts that have many, whole
};

// index [tokens, top]; pairs of one expert stay in the order of tokens. many: see Routing.
Routing route(const int64_t* index, int64_t tokens, int64_t top, int64_t experts, int64_t many) {
  const int64_t pairs = tokens * top;
  std::vector<int64_t> next(experts + 1, 0);
  for (int64_t i = 0; i < pairs; i++) {
    TORCH_CHECK(index[i] >= 0 && index[i] < experts, "smelt: a token chose expert ", index[i],
                " of ", experts);
    next[index[i] + 1]++;
  }
  for (int64_t e = 0; e < experts; e++) next[e + 1] += next[e];
  Routing r{std::vector<int64_t>(pairs), std::vector<int64_t>(pairs), std::vector<int64_t>(pairs), {}, {}};
  for (int64_t e = 0; e < experts; e++) {
    if (next[e + 1] - next[e] >= many) {
      std::fill(r.portion.begin() + next[e], r.portion.begin() + next[e + 1], -1);
      r.large.push_back({e, next[e], next[e + 1] - next[e]});
      continue;
    }
    for (int64_t first = next[e]; first < next[e + 1]; first += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, next[e + 1] - first);
      std::fill_n(r.portion.begin() + first, count, (int64_t)r.portions.size());
      r.portions.push_back({e, first, count});
    }
  }
  for (int64_t i = 0; i < pairs; i++) {
    const int64_t place = next[index[i]]++;
    r.place[i] = place;
    r.token[place] = i / top;
  }
  return r;
}

int64_t bytes_of(Type type) { return type == Type::F32 ? 4 : 2; }

// What the three kinds of weight are to a product: the weight of one expert, its units (rows, or
// blocks of them), the bytes of one, and the kernels.

Dense of_expert(Dense d, int64_t e) {
  d.weight = (const char*)d.weight + e * d.n * d.k * bytes_of(d.type);
  return d;
}
int64_t units(const Dense& d) { return d.n; }
int64_t step(const Dense&) { return kLanes; }  // units that tasks are multiples of
int64_t unit_bytes(const Dense& d) { return d.k * bytes_of(d.type); }
int64_t scratch(const Kernels& run, const Dense& d) { return run.dense_scratch(d); }
void prepare(const Kernels& run, const Dense& d, int64_t row) { run.dense_prepare(d, row, row + 1); }
void multiply(const Kernels& run, const Dense& d, int64_t first, int64_t last) {
  run.dense(d, first, last);
}

int64_t units(const Quantized& q) { return blocks_of(q.n); }
int64_t step(const Quantized&) { return 4; }
int64_t unit_bytes(const Quantized& q) {
  return words_of(q.bits, q.k) * kLanes * (q.bits < 8 ? 4 : 1);
}
Quantized of_expert(Quantized q, int64_t e) {
  const int64_t blocks = e * blocks_of(q.n);
  q.packed = (const char*)q.packed + blocks * unit_bytes(q);
  q.scales += blocks * q.groups * kLanes;
  if (q.zeros) q.zeros += blocks * q.groups * kLanes;
  return q;
}
int64_t scratch(const Kernels& run, const Quantized& q) { return run.quantized_scratch(q); }
void prepare(const Kernels& run, const Quantized& q, int64_t row) {
  run.quantized_prepare(q, row, row + 1);
}
void multiply(const Kernels& run, const Quantized& q, int64_t first, int64_t last) {
  run.quantized(q, first, last);
}

Fp8 of_expert(Fp8 q, int64_t e) {
  const int64_t blocks = e * blocks_of(q.n);
  q.packed += blocks * q.k * kLanes;
  q.scales += blocks * q.groups * kLanes;
  return q;
}
int64_t units(const Fp8& q) { return blocks_of(q.n); }
int64_t step(const Fp8&) { return 4; }
// Widening e4m3 costs more than reading it.
int64_t unit_bytes(const Fp8& q) { return q.k * kLanes * 4; }
int64_t scratch(const Kernels& run, const Fp8& q) { return run.fp8_scratch(q); }
void prepare(const Kernels& run, const Fp8& q, int64_t row) { run.fp8_prepare(q, row, row + 1); }
void multiply(const Kernels& run, const Fp8& q, int64_t first, int64_t last) {
  run.fp8(q, first, last);
}

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Each portion's product, with its place in rows and out.
template <class Q>
std::vector<Q> products(const Q& all, const std::vector<Portion>& portions, void* Q::*packed,
                        const char* rows, char* out) {
  std::vector<Q> found;
  for (const Portion& p : portions) {
    Q q = of_expert(all, p.expert);
    q.m = p.count;
    q.x = rows + p.first * q.k * bytes_of(q.type);
    q.out = out + p.first * q.n * bytes_of(q.type);
    q.*packed = nullptr;
    found.push_back(q);
  }
  return found;
}

// out = rows times each expert's weight; fill(pair, to) writes a row of `rows` first.
template <class Q, class Fill>
void multiply_all(const Kernels& run, const Q& all, const Routing& routing, void* Q::*packed,
                  char* rows, char* out, const Fill& fill) {
  std::vector<Q> parts = products(all, routing.portions, packed, rows, out);
  std::vector<int64_t> starts;
  int64_t bytes = 0;
  for (const Q& q : parts) {
    starts.push_back(bytes);
    bytes += round_up(scratch(run, q), 64);
  }
  char* buffer = (char*)thread_buffer<5>(bytes);
  for (size_t i = 0; i < parts.size(); i++) parts[i].*packed = buffer + starts[i];

  const int64_t pairs = (int64_t)routing.token.size(), row_bytes = all.k * bytes_of(all.type);
  for_pieces(pairs, 1, row_bytes, [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; pair++) {
      const int64_t portion = routing.portion[pair];
      fill(pair, rows + pair * row_bytes);
      if (portion >= 0)
        prepare(run, parts[portion], pair - routing.portions[portion].first);
    }
  });

  // One list of tasks for all experts: with one token each expert alone is little work.
  struct Task {
    int64_t part, first, last;
  };
  constexpr int64_t kPiece = 1 << 16;
  std::vector<Task> tasks;
  int64_t work = 0;
  for (int64_t part = 0; part < (int64_t)parts.size(); part++) {
    const Q& q = parts[part];
    const int64_t cost = unit_bytes(q) * ((q.m + 3) / 4), n = units(q);
    const int64_t least = step(q);
    const int64_t each = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, cost * least)) * least;
    for (int64_t first = 0; first < n; first += each)
      tasks.push_back({part, first, std::min(n, first + each)});
    work += cost * n;
  }
  for_tasks((int64_t)tasks.size(), work > kWorthThreads, [&](int64_t i) {
    multiply(run, parts[tasks[i].part], tasks[i].first, tasks[i].last);
  });
  for (const Q& q : products(all, routing.large, packed, rows, out)) multiply_many(run, q);
}

Activation activation_of(c10::string_view kind) {
  const char* const names[] = {"silu", "gelu", "gelu_tanh", "relu"};
  for (int i = 0; i < 4; i++)
    if (kind == names[i]) return (Activation)i;
  TORCH_CHECK(false, "smelt: no activation ", std::string(kind));
}

// The layer over x; gate_up and down are the first expert's products, without rows.
template <class Q>
Tensor run_experts(const Tensor& x, const Tensor& index, const Tensor& weight, Q gate_up, Q down,
                   void* Q::*packed, c10::string_view kind, int64_t experts) {
  TORCH_CHECK(index.dim() == 2 && index.size(0) == x.size(0) && index.scalar_type() == at::kLong &&
                  weight.sizes() == index.sizes(),
              "smelt: ", x.size(0), " tokens, but choices ", index.sizes(), " with weights ",
              weight.sizes());
  const Kernels& run = kernels();
  const Activation activation = activation_of(kind);
  const Tensor rows = x.contiguous(), chosen = index.contiguous();
  const Tensor shares = weight.to(at::kFloat).contiguous();
  const int64_t tokens = x.size(0), top = index.size(1), k = gate_up.k, width = down.k;
  const int64_t size = x.element_size(), wide = std::max(k, width);
  Tensor out = at::empty({tokens, k}, x.options());
  if (tokens == 0) return out;
  const int64_t pair_bytes = (wide + 2 * width + k) * size + 4 * round_up(wide, 32);
  const int64_t fit = kBufferBytes / std::max<int64_t>(1, pair_bytes * top);
  const int64_t at_once = std::min(tokens, std::max(kRowsAtOnce, fit));
  const int64_t many = many_rows(run, gate_up);
  for (int64_t token = 0; token < tokens; token += at_once) {
    const int64_t count = std::min(at_once, tokens - token), pairs = count * top;
    const Routing r = route(chosen.const_data_ptr<int64_t>() + token * top, count, top, experts, many);
    const char* from = (const char*)rows.const_data_ptr() + token * k * size;
    char* in = (char*)thread_buffer<4>(pairs * (wide + 2 * width + k) * size + 128);
    char* middle = in + round_up(pairs * wide * size, 64);
    char* result = middle + round_up(pairs * 2 * width * size, 64);
    multiply_all(run, gate_up, r, packed, in, middle, [&](int64_t pair, char* to) {
      std::copy_n(from + r.token[pair] * k * size, k * size, to);
    });
    multiply_all(run, down, r, packed, in, result, [&](int64_t pair, char* to) {
      run.gate(down.type, activation, middle + pair * 2 * width * size, to, width);
    });
    char* to = (char*)out.mutable_data_ptr() + token * k * size;
    const float* share = shares.const_data_ptr<float>() + token * top;
    for_pieces(count, 1, top * k * size, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++)
        run.combine(down.type, result, r.place.data() + i * top, share + i * top, top,
                    to + i * k * size, k);
    });
  }
  return out;
}

Type input_type(const Tensor& x) {
  const auto type = type_of(x.scalar_type());
  TORCH_CHECK(type && x.dim() == 2, "smelt: experts take float32, float16 or bfloat16 x [T, K]");
  return *type;
}

Tensor experts_dense(const Tensor& x, const Tensor& index, const Tensor& weight,
                     const Tensor& gate_up, const Tensor& down, c10::string_view kind) {
  const Type type = input_type(x);
  const int64_t k = x.size(1);
  TORCH_CHECK(gate_up.dim() == 3 && down.dim() == 3 && gate_up.size(0) == down.size(0) &&
                  gate_up.size(2) == k && down.size(1) == k &&
                  gate_up.size(1) == 2 * down.size(2) && gate_up.is_contiguous() &&
                  down.is_contiguous() && gate_up.scalar_type() == x.scalar_type() &&
                  down.scalar_type() == x.scalar_type(),
              "smelt: experts' weights ", gate_up.sizes(), " and ", down.sizes(),
              " do not fit x ", x.sizes());
  Dense first{}, second{};
  first.type = second.type = type;
  first.weight = gate_up.const_data_ptr();
  second.weight = down.const_data_ptr();
  first.n = gate_up.size(1), first.k = k;
  second.n = k, second.k = down.size(2);
  return run_experts(x, index, weight, first, second, &Dense::packed_x, kind, gate_up.size(0));
}

int bits_of(c10::string_view format) {
  if (format == "int4") return 4;
  if (format == "int3") return 3;
  if (format == "int2") return 2;
  TORCH_CHECK(format == "int8", "smelt: no experts of format ", std::string(format));
  return 8;
}

Tensor experts_quantized_blocked(const Tensor& x, const Tensor& index, const Tensor& weight,
                                 const Tensor& gate_up, const Tensor& gate_up_scales,
                                 const OptionalTensor& gate_up_zeros, const Tensor& down,
                                 const Tensor& down_scales, const OptionalTensor& down_zeros,
                                 c10::string_view kind, c10::string_view format, int64_t experts,
                                 int64_t block, int64_t width) {
  const Type type = input_type(x);
  const int64_t k = x.size(1);
  TORCH_CHECK(k % kLanes == 0 && 2 * width % kLanes == 0,
              "smelt: an expert's rows must fill blocks of ", kLanes, ", not ", 2 * width, " and ",
              k, "; the reference takes any");
  const auto shape = [&](auto& first, auto& second) {
    first.type = second.type = type;
    first.n = 2 * width, first.k = k;
    second.n = k, second.k = width;
  };
  if (format == "fp8") {
    Fp8 first{}, second{};
    shape(first, second);
    set_weight(first, experts * first.n, gate_up, gate_up_scales, block);
    set_weight(second, experts * second.n, down, down_scales, block);
    return run_experts(x, index, weight, first, second, &Fp8::packed_x, kind, experts);
  }
  Quantized first{}, second{};
  shape(first, second);
  first.bits = second.bits = bits_of(format);
  set_weight(first, experts * first.n, gate_up, gate_up_scales, gate_up_zeros);
  set_weight(second, experts * second.n, down, down_scales, down_zeros);
  for (const Quantized* q : {&first, &second})
    TORCH_CHECK((q->bits == 8 || q->zeros) && kernels().quantized_rows(*q) > 0,
                "smelt: no experts' kernel for groups of ", q->k / q->groups,
                " features; the reference takes any");
  return run_experts(x, index, weight, first, second, &Quantized::packed_x, kind, experts);
}

}  // namespace

TORCH_LIBRARY_IMPL(smelt, CPU, m) {
  m.impl("experts_dense", experts_dense);
  m.impl("experts_quantized_blocked", experts_quantized_blocked);
}

}  // namespace smelt
