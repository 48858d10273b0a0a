// One instruction set's kernels. The build compiles this file once a set, with SMELT_ISA naming it.
#include "kernels.h"

#include <cstddef>
#include <cstring>
#include <type_traits>

namespace smelt {
namespace SMELT_ISA {
namespace {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

}  // namespace
}  // namespace SMELT_ISA
}  // namespace smelt

#if defined(SMELT_AVX512) || defined(SMELT_AVX2)
#include <immintrin.h>
#endif

namespace smelt {
#if defined(SMELT_AMX)
namespace avx512_bf16 {
extern const Kernels table;
}
#endif
namespace SMELT_ISA {
namespace {

#include "vec.h"
// Order matters: each uses what stands before it.
#include "convert.h"
#include "amx.h"
#include "dense.h"
#include "weights.h"
#include "quantized.h"
#include "w8a8.h"
#include "cache_rows.h"
#include "attention.h"
#if defined(SMELT_AMX)
#include "quantized_amx.h"
#include "w8a8_amx.h"
#include "attention_amx.h"
#else
#include "fp8.h"
#include "experts.h"
#endif

}  // namespace

#define SMELT_TEXT_(x) #x
#define SMELT_TEXT(x) SMELT_TEXT_(x)

extern const Kernels table;
#if defined(SMELT_AMX)
void quantized_or_plain(const Quantized& q, int64_t first, int64_t last) {
  amx_takes(q) ? amx_quantized(q, first, last) : avx512_bf16::table.quantized(q, first, last);
}
void w8a8_or_plain(const W8A8& q, int64_t first, int64_t last) {
  amx_takes(q) ? amx_w8a8(q, first, last) : avx512_bf16::table.w8a8(q, first, last);
}
void attention_chunk_or_plain(const Attention& a, const Tile& t, int64_t chunk, void* state,
                              void* scratch) {
  amx_takes(a) ? amx_attention_chunk(a, t, chunk, state, scratch)
               : avx512_bf16::table.attention_chunk(a, t, chunk, state, scratch);
}
// The set before this one has the others (isa.cpp).
const Kernels table = {
    .name = SMELT_TEXT(SMELT_ISA),
    .dense_most = dense_most,
    .dense_scratch = dense_scratch,
    .dense_prepare = dense_prepare,
    .dense = dense,
    .quantized = quantized_or_plain,
    .w8a8 = w8a8_or_plain,
    .attention_chunk = attention_chunk_or_plain,
};
#else
const Kernels table = {
    SMELT_TEXT(SMELT_ISA), dense_most,       dense_scratch,   dense_prepare,  dense,
    quantized_scratch,     quantized_prepare, quantized_rows, quantized, dequantize,
    w8a8_scratch,          w8a8_prepare,      w8a8,
    fp8_scratch,           fp8_prepare,       fp8,             fp8_dequantize,
    gate,                  combine,
    attention_scratch,     attention_state,   attention_chunk, attention_merge,
    attention_finish,      convert,           quantize,
};
#endif

}  // namespace SMELT_ISA
}  // namespace smelt
