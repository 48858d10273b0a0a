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
namespace SMELT_ISA {
namespace {

#include "vec.h"
// Order matters: each uses what stands before it.
#include "convert.h"
#include "dense.h"
#if !defined(SMELT_AMX)
#include "weights.h"
#include "quantized.h"
#include "cache_rows.h"
#include "w8a8.h"
#include "fp8.h"
#include "experts.h"
#include "attention.h"
#endif

}  // namespace

#define SMELT_TEXT_(x) #x
#define SMELT_TEXT(x) SMELT_TEXT_(x)

extern const Kernels table;
#if defined(SMELT_AMX)
// The set before this one has the others (isa.cpp).
const Kernels table = {SMELT_TEXT(SMELT_ISA), dense_most, dense_scratch, dense_prepare, dense};
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
