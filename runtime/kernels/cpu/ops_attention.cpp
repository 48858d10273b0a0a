// smelt::cached_attention and its form over a quantized cache on the CPU: writes the step's keys and values, then attends in tiles.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "types.h"

namespace smelt {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor last_contiguous(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

void write(const Kernels& run, const Cache& cache, Type type, const Tensor& from, int64_t kv,
           const int64_t* slots, int64_t slot_count) {
  const int64_t heads = from.size(1), size = from.size(2);
  const int64_t wide = from.element_size();
  const bool elements = cache.form == Form::Elements;
  const int64_t cache_wide = !elements ? 1 : cache.type == Type::F32 ? 4 : 2;
  const char* source = (const char*)from.const_data_ptr();
  for_pieces(from.size(0), 1, heads * size * wide, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      if (slots[i] < 0) continue;
      const int64_t block = slots[i] / cache.block_size, offset = slots[i] % cache.block_size;
      TORCH_CHECK(slots[i] < slot_count, "smelt: slot ", slots[i], " lies beyond the cache");
      for (int64_t h = 0; h < heads; h++) {
        const int64_t at = block * cache.block + kv * cache.kv + offset * cache.slot;
        const char* row = source + (i * from.stride(0) + h * from.stride(1)) * wide;
        char* to = (char*)cache.data + (at + h * cache.head) * cache_wide;
        if (elements) {
          run.convert(type, row, cache.type, to, size);
        } else {
          run.quantize(type, row, cache.form, to, size);
        }
      }
    }
  });
}

// Tiles of all sequences; `zero` is called for rows of no sequence.
struct Batch {
  const int32_t *starts, *lengths;
  int64_t sequences, rows;
};

std::vector<Tile> tiles_of(const Attention& a, const Batch& batch) {
  std::vector<Tile> tiles;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t most = std::max<int64_t>(1, kTileRows / group);
  for (int64_t b = 0; b < batch.sequences; b++) {
    const int64_t start = batch.starts[b], end = batch.starts[b + 1], length = batch.lengths[b];
    const int64_t before = length - (end - start);
    // The last tiles see the most keys: they start first, so that the threads end together.
    for (int64_t row = start + (end - start - 1) / most * most; end > start && row >= start;
         row -= most) {
      Tile t{};
      t.sequence = b;
      t.row = row;
      t.tokens = std::min(most, end - row);
      t.position = before + row - start;
      t.before = before;
      t.first_key = a.window > 0 ? std::max<int64_t>(0, t.position - a.window + 1) : 0;
      t.last_key = t.position + t.tokens - 1;
      if (a.tree) {
        t.first_key = a.window > 0 ? std::max<int64_t>(0, before - a.window + 1) : 0;
        t.last_key = length - 1;
      }
      for (t.kv_head = 0; t.kv_head < a.kv_heads; t.kv_head++) tiles.push_back(t);
    }
  }
  return tiles;
}

int64_t first_chunk(const Tile& t) { return t.first_key / kChunkKeys; }
int64_t chunks(const Tile& t) { return t.last_key / kChunkKeys - first_chunk(t) + 1; }

// One task a tile.
void attend_tiles(const Kernels& run, const Attention& a, const std::vector<Tile>& tiles,
                  bool worth) {
  for_tasks((int64_t)tiles.size(), worth, [&](int64_t i) {
    const Tile& t = tiles[i];
    const int64_t state = run.attention_state(a, t);
    char* total = (char*)thread_buffer<1>(2 * state + run.attention_scratch(a));
    char *part = total + state, *scratch = part + state;
    const int64_t first = first_chunk(t), last = first + chunks(t);
    run.attention_chunk(a, t, first, total, scratch);
    for (int64_t c = first + 1; c < last; c++) {
      run.attention_chunk(a, t, c, part, scratch);
      run.attention_merge(a, t, total, part);
    }
    run.attention_finish(a, t, total);
  });
}

// One task a chunk of keys, for fewer tiles than would keep the threads busy.
void attend_chunks(const Kernels& run, const Attention& a, const std::vector<Tile>& tiles) {
  struct Task {
    int64_t tile, chunk, state;
  };
  std::vector<Task> tasks;
  int64_t bytes = 0;
  for (int64_t i = 0; i < (int64_t)tiles.size(); i++) {
    for (int64_t c = 0; c < chunks(tiles[i]); c++) {
      tasks.push_back({i, first_chunk(tiles[i]) + c, bytes});
      bytes += run.attention_state(a, tiles[i]);
    }
  }
  char* states = (char*)thread_buffer<2>(bytes);
  for_tasks((int64_t)tasks.size(), true, [&](int64_t i) {
    void* scratch = thread_buffer<1>(run.attention_scratch(a));
    run.attention_chunk(a, tiles[tasks[i].tile], tasks[i].chunk, states + tasks[i].state, scratch);
  });
  int64_t first = 0;
  for (int64_t i = 0; i < (int64_t)tasks.size(); i++) {
    const Tile& t = tiles[tasks[i].tile];
    if (i == 0 || tasks[i].tile != tasks[i - 1].tile) {
      first = i;
    } else {
      run.attention_merge(a, t, states + tasks[first].state, states + tasks[i].state);
    }
    if (i + 1 == (int64_t)tasks.size() || tasks[i + 1].tile != tasks[i].tile)
      run.attention_finish(a, t, states + tasks[first].state);
  }
}

void attend(const Kernels& run, const Attention& a, const Batch& batch) {
  const std::vector<Tile> tiles = tiles_of(a, batch);
  int64_t work = 0, most = 0;
  for (const Tile& t : tiles) {
    work += (t.last_key - t.first_key + 1) * (t.tokens + 4) * a.size;
    most = std::max(most, chunks(t));
  }
  const bool worth = work > kWorthThreads;
  // A handful of tiles for each thread evens out by itself.
  if (worth && most > 1 && (int64_t)tiles.size() < 4 * at::get_num_threads()) {
    attend_chunks(run, a, tiles);
  } else {
    attend_tiles(run, a, tiles, worth);
  }
}

// Bytes of a quantized row, as CacheFormat.row_bytes of runtime/ops/cache_format.py.
int64_t row_bytes(Form form, int64_t size) {
  return form == Form::Fp8 ? size + 2 : form == Form::Int8 ? size + 4 : (size + 1) / 2 + 4;
}

Form form_of(const std::string& format) {
  if (format == "fp8") return Form::Fp8;
  if (format == "int8") return Form::Int8;
  TORCH_CHECK(format == "int4", "smelt: no cache format ", format);
  return Form::Int4;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache, Form form,
           const Tensor& slots, const Tensor& starts, const Tensor& lengths, const Tensor& table,
           const OptionalTensor& sinks, const OptionalTensor& tree) {
  const auto type = type_of(q.scalar_type());
  const bool elements = form == Form::Elements;
  TORCH_CHECK(type && (elements ? type_of(cache.scalar_type()).has_value()
                                : cache.scalar_type() == at::kByte),
              "smelt: cached_attention takes float32, "
              "float16 or bfloat16, not ", q.scalar_type(), " with a cache of ",
              cache.scalar_type());
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
              "smelt: q, k and v differ in dtype");
  TORCH_CHECK(q.dim() == 3 && cache.dim() == 5 && k.sizes() == v.sizes() && k.dim() == 3 &&
                  k.size(0) == q.size(0) && k.size(2) == q.size(2) && cache.size(1) == 2 &&
                  cache.size(3) == k.size(1) && k.size(2) > 0 &&
                  cache.size(4) == (elements ? k.size(2) : row_bytes(form, k.size(2))) &&
                  cache.stride(4) == 1 && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "smelt: q ", q.sizes(), ", k ", k.sizes(), " and cache ", cache.sizes(),
              " do not fit");
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous() &&
                  slots.numel() == q.size(0), "smelt: slot_mapping must be int64 [T]");
  TORCH_CHECK(starts.scalar_type() == at::kInt && lengths.scalar_type() == at::kInt &&
                  table.scalar_type() == at::kInt && starts.is_contiguous() &&
                  lengths.is_contiguous() && table.dim() == 2 && table.stride(1) == 1 &&
                  starts.numel() == lengths.numel() + 1 && table.size(0) >= lengths.numel(),
              "smelt: query_start int32 [B+1], seq_lens int32 [B] and block_table int32 [B, M]");
  TORCH_CHECK(!sinks || sinks->numel() == q.size(1), "smelt: sinks must be [H]");
  TORCH_CHECK(!tree || (tree->dim() == 2 && tree->scalar_type() == at::kBool &&
                        tree->size(0) == q.size(0)), "smelt: tree_mask must be bool [T, W]");
}

Tensor write_and_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_cache,
                        Form form, const Tensor& slot_mapping, const Tensor& query_start,
                        const Tensor& seq_lens, const Tensor& block_table, double scale,
                        int64_t window, double softcap, const OptionalTensor& sinks,
                        const OptionalTensor& tree_mask) {
  check(q, k, v, kv_cache, form, slot_mapping, query_start, seq_lens, block_table, sinks,
        tree_mask);
  const Kernels& run = kernels();
  const Type type = *type_of(q.scalar_type());
  const Tensor queries = last_contiguous(q);
  Attention a{};
  a.cache = {kv_cache.mutable_data_ptr(), form, type_of(kv_cache.scalar_type()).value_or(type),
             kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2), kv_cache.stride(3),
             kv_cache.size(2)};
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  const int64_t slot_count = kv_cache.size(0) * kv_cache.size(2);
  write(run, a.cache, type, last_contiguous(k), 0, slots, slot_count);
  write(run, a.cache, type, last_contiguous(v), 1, slots, slot_count);

  Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  a.type = type;
  a.q = queries.const_data_ptr();
  a.q_row = queries.stride(0);
  a.q_head = queries.stride(1);
  a.out = out.mutable_data_ptr();
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.size = q.size(2);
  a.block_table = block_table.const_data_ptr<int32_t>();
  a.table_row = block_table.stride(0);
  a.scale = (float)scale;
  a.softcap = (float)softcap;
  a.window = window;
  Tensor wide_sinks, tree;
  if (sinks) {
    wide_sinks = sinks->to(at::kFloat).contiguous();
    a.sinks = wide_sinks.const_data_ptr<float>();
  }
  if (tree_mask && tree_mask->size(1) > 0) {
    tree = tree_mask->contiguous();
    a.tree = tree.const_data_ptr<bool>();
    a.tree_row = tree.size(1);
  }
  const Batch batch{query_start.const_data_ptr<int32_t>(), seq_lens.const_data_ptr<int32_t>(),
                    seq_lens.numel(), q.size(0)};
  const int64_t row_bytes = a.heads * a.size * q.element_size();
  const int64_t first = std::min<int64_t>(batch.rows, std::max(0, batch.starts[0]));
  const int64_t last = std::min<int64_t>(batch.rows, batch.starts[batch.sequences]);
  std::memset(a.out, 0, first * row_bytes);
  std::memset((char*)a.out + last * row_bytes, 0, (batch.rows - last) * row_bytes);
  attend(run, a, batch);
  return out;
}

Tensor cached_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_cache,
                        const Tensor& slot_mapping, const Tensor& query_start,
                        const Tensor& seq_lens, const Tensor& block_table, double scale,
                        int64_t window, double softcap, const OptionalTensor& sinks,
                        const OptionalTensor& tree_mask) {
  return write_and_attend(q, k, v, kv_cache, Form::Elements, slot_mapping, query_start, seq_lens,
                          block_table, scale, window, softcap, sinks, tree_mask);
}

Tensor cached_attention_quantized(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& kv_cache, const Tensor& slot_mapping,
                                  const Tensor& query_start, const Tensor& seq_lens,
                                  const Tensor& block_table, double scale, int64_t window,
                                  double softcap, const OptionalTensor& sinks,
                                  const OptionalTensor& tree_mask, std::string format) {
  return write_and_attend(q, k, v, kv_cache, form_of(format), slot_mapping, query_start, seq_lens,
                          block_table, scale, window, softcap, sinks, tree_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(smelt, CPU, m) {
  m.impl("cached_attention", cached_attention);
  m.impl("cached_attention_quantized", cached_attention_quantized);
}

}  // namespace smelt
