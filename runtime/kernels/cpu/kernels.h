// What the torch side (ops_*.cpp) and the instruction-set units (unit.cpp, compiled once for each
// set) agree on. No torch type crosses this line: the units know pointers and sizes only, so they
// compile fast and cannot leak AVX512 code into functions shared with the rest of the library.
#pragma once

#include <cstdint>

namespace smelt {

enum class Type : int { F32 = 0, F16 = 1, BF16 = 2 };

constexpr int64_t kLanes = 16;  // floats of one vector on every instruction set

// out[m, n] = x[m, k] weight[n, k]^T + bias[n]
struct Dense {
  Type type;
  const void* weight;
  const void* bias;  // null or [n], of `type`
  const void* x;     // [m, k]; prepare() reads it
  void* packed_x;    // dense_scratch() bytes; prepare() fills it
  void* out;         // [m, n]
  int64_t m, n, k;
};

// The same with a weight of 2, 3, 4 or 8 bits in the blocked layout (runtime/ops/packing.py).
struct Quantized {
  Type type;  // of x, bias and out
  int bits;
  const void* packed;
  const uint16_t* scales;  // bfloat16 [blocks, groups, 16]
  const uint8_t* zeros;    // [blocks, groups, 16], null for 8 bits
  const void* bias;
  const void* x;
  void* packed_x;  // quantized_scratch() bytes
  void* out;
  int64_t m, n, k, groups;
  // Of the layer's whole call, which may decide in what order sums are made; 0: nothing may, as the
  // rows that an expert gets depend on other sequences.
  int64_t rows;
};

// int8 x, quantized on the way, times an int8 weight (runtime/ops/linear_w8a8.py).
struct W8A8 {
  Type type;  // of x, bias and out
  const int8_t* packed;
  const float* scales;       // [n]
  const float* input_scale;  // null: each row of x has its own
  const void* bias;
  const void* x;
  void* quantized_x;  // w8a8_scratch() bytes
  void* out;
  int64_t m, n, k;
};

// x, rounded to e4m3 on the way or not, times a weight of e4m3 (runtime/ops/linear_fp8.py).
struct Fp8 {
  Type type;  // of x, bias and out
  const uint8_t* packed;
  const float* scales;  // [blocks, groups, 16]
  bool quantize_x;
  const float* input_scale;  // null: each row's group of x has its own
  const void* bias;
  const void* x;
  void* packed_x;  // fp8_scratch() bytes
  void* out;
  int64_t m, n, k, groups, group, x_group;  // features of a weight's group, and of one of x
};

// In the order of ACTIVATIONS (runtime/ops/gated_activation.py).
enum class Activation : int { Silu = 0, Gelu = 1, GeluTanh = 2, Relu = 3 };

// How a cache holds the values of a head's row (runtime/ops/cache_format.py): elements of a Type,
// or bytes with the row's float16 parameters behind them.
enum class Form : int { Elements, Fp8, Int8, Int4 };

// Where one layer's cache lies; strides are in elements, of quantized rows in bytes.
struct Cache {
  void* data;
  Form form;
  Type type;  // of elements
  int64_t block, kv, slot, head;
  int64_t block_size;
};

struct Attention {
  Cache cache;
  Type type;  // of q and out
  const void* q;
  int64_t q_row, q_head;
  void* out;  // [rows, heads, size], contiguous
  int64_t heads, kv_heads, size;
  const int32_t* block_table;
  int64_t table_row;
  const float* sinks;  // null or [heads]
  const bool* tree;    // null or [rows, tree_row]
  int64_t tree_row;
  float scale, softcap;
  int64_t window;
};

// A tile of neighbouring query tokens of one sequence with the query heads of one kv head.
struct Tile {
  int64_t sequence, kv_head;
  int64_t row, tokens;      // rows of q
  int64_t position;         // of the first token
  int64_t before;               // tokens of the sequence before this step
  int64_t first_key, last_key;  // positions that any token of the tile may see
};

constexpr int64_t kChunkKeys = 512;  // keys summed on their own and then merged, in order
constexpr int64_t kTileRows = 64;    // rows (token x head) a tile aims at

struct Kernels {
  const char* name;
  // Rows of x up to which dense() is no slower than torch's product.
  int64_t (*dense_most)(const Dense&);
  int64_t (*dense_scratch)(const Dense&);
  void (*dense_prepare)(const Dense&, int64_t first_row, int64_t last_row);
  void (*dense)(const Dense&, int64_t first_row, int64_t last_row);
  int64_t (*quantized_scratch)(const Quantized&);
  void (*quantized_prepare)(const Quantized&, int64_t first_row, int64_t last_row);
  // Rows of x up to which quantized() is no slower than dequantize() and a matrix product.
  int64_t (*quantized_rows)(const Quantized&);
  void (*quantized)(const Quantized&, int64_t first_block, int64_t last_block);
  // weight[k, n0:n0 + 16 * blocks] of `type`, row stride `stride`: the transposed dense weight
  void (*dequantize)(const Quantized&, int64_t first_block, int64_t last_block, void* to,
                     int64_t stride);
  int64_t (*w8a8_scratch)(const W8A8&);
  void (*w8a8_prepare)(const W8A8&, int64_t first_row, int64_t last_row);
  void (*w8a8)(const W8A8&, int64_t first_block, int64_t last_block);
  int64_t (*fp8_scratch)(const Fp8&);
  void (*fp8_prepare)(const Fp8&, int64_t first_row, int64_t last_row);
  void (*fp8)(const Fp8&, int64_t first_block, int64_t last_block);
  // The dense weight's rows of whole blocks, [16 rows a block, k] of `type`.
  void (*fp8_dequantize)(const Fp8&, int64_t first_block, int64_t last_block, void* to);
  // out[n] = act(wide[:n]) * wide[n:2n]
  void (*gate)(Type, Activation, const void* wide, void* out, int64_t n);
  // out[n] = sum of weights[i] * rows[places[i], :n], in the order of i
  void (*combine)(Type, const void* rows, const int64_t* places, const float* weights,
                  int64_t count, void* out, int64_t n);
  // bytes of a thread's scratch and of the state (max, sum, weighted values) of a tile
  int64_t (*attention_scratch)(const Attention&);
  int64_t (*attention_state)(const Attention&, const Tile&);
  void (*attention_chunk)(const Attention&, const Tile&, int64_t chunk, void* state,
                          void* scratch);
  void (*attention_merge)(const Attention&, const Tile&, void* into, const void* from);
  void (*attention_finish)(const Attention&, const Tile&, void* state);
  void (*convert)(Type from, const void* in, Type to, void* out, int64_t n);
  // One row of n > 0 features in quantized form.
  void (*quantize)(Type from, const void* in, Form form, void* out, int64_t n);
};

// The best set this machine has, or the one that SMELT_CPU_ISA names.
const Kernels& kernels();

}  // namespace smelt
