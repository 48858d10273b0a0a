// Attention over the paged cache, in tiles: some query tokens with all query heads of one kv head,
// against 64 keys at a time, with the softmax computed online in float32.
//
// Keys are summed in chunks of kChunkKeys counted from the sequence's start, and chunks are merged
// in order. A row's result is therefore the same bits whether it is decoded alone, prefilled in a
// tile with others, or its chunks are spread over threads.

constexpr int64_t kKeys = 64;  // keys of one step

#if defined(SMELT_AVX512)
constexpr int kProductRows = 6, kProductColumns = 4;
#elif defined(SMELT_AVX2)
constexpr int kProductRows = 3, kProductColumns = 2;
#else
constexpr int kProductRows = 2, kProductColumns = 2;
#endif

// How features are multiplied: one float a lane, or two bfloat16 (exact products, float32 sums).
struct Floats {
  static constexpr int64_t kFeatures = 1;
  template <class T>
  static V lanes(const T* row, int64_t left) {
    return load_some(row, left);
  }
  static V add_product(V sum, V a, V b) { return fma(a, b, sum); }
};

#if defined(SMELT_AVX512_BF16)
struct Pairs {
  static constexpr int64_t kFeatures = 2;
  static V lanes(const bf16* row, int64_t left) {
    if (left >= 32) return load((const float*)row);
    bf16 some[32] = {};
    for (int64_t i = 0; i < left; i++) some[i] = row[i];
    return load((const float*)some);
  }
  static V add_product(V sum, V a, V b) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
#endif

// c[rows, columns of 16] (+)= a[rows, depth] b[depth, columns of 16]
template <class F, int R, int C>
inline void product_tile(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t depth, bool accumulate) {
  V acc[R][C];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) acc[r][j] = accumulate ? load(c + r * c_row + j * 16) : zero();
  for (int64_t d = 0; d < depth; d++) {
    V right[C];
    for (int j = 0; j < C; j++) right[j] = load(b + d * b_row + j * 16);
    for (int r = 0; r < R; r++) {
      const V left = set1(a[r * a_row + d]);
      for (int j = 0; j < C; j++) acc[r][j] = F::add_product(acc[r][j], left, right[j]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) store(c + r * c_row + j * 16, acc[r][j]);
}

template <class F, int R, int C>
inline void product_rest(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t rows, int64_t depth, bool accumulate) {
  if (rows == R) product_tile<F, R, C>(a, a_row, b, b_row, c, c_row, depth, accumulate);
  if constexpr (R > 1)
    product_rest<F, R - 1, C>(a, a_row, b, b_row, c, c_row, rows, depth, accumulate);
}

template <class F, int C>
inline void product_columns(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                            int64_t c_row, int64_t rows, int64_t depth, bool accumulate) {
  constexpr int R = kProductRows;
  for (; rows > R; rows -= R, a += R * a_row, c += R * c_row)
    product_tile<F, R, C>(a, a_row, b, b_row, c, c_row, depth, accumulate);
  product_rest<F, R, C>(a, a_row, b, b_row, c, c_row, rows, depth, accumulate);
}

template <class F>
void product(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row,
             int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  constexpr int64_t kWide = kProductColumns * 16;
  int64_t j = 0;
  for (; j + kWide <= columns; j += kWide)
    product_columns<F, kProductColumns>(a, a_row, b + j, b_row, c + j, c_row, rows, depth,
                                        accumulate);
  for (; j < columns; j += 16)
    product_columns<F, 1>(a, a_row, b + j, b_row, c + j, c_row, rows, depth, accumulate);
}

// How a tile's two products are computed: from floats or pairs in vectors (attention_amx.h has
// another way). Scores become weights in place.
template <class F>
struct Vectors {
  using Features = F;
  static void score(const float* queries, int64_t lanes, const float* keys, float* scores,
                    int64_t rows, int64_t columns) {
    product<F>(queries, lanes, keys, kKeys, scores, kKeys, rows, columns, lanes, false);
  }
  // Sixteen weights of a row, from `key` on; returns what was kept.
  static V keep(float* scores, int64_t key, V weights) {
    store(scores + key, weights);
    return weights;
  }
  // Values of keys as floats, zero where there is no key: to[key][feature].
  template <class R>
  static void load_values(const Attention& a, const int64_t* rows, int64_t count, float* to) {
    const R values((const typename R::Unit*)a.cache.data + a.cache.kv, rows, count, a.size);
    const int64_t width = round_up(a.size, 16);
    for (int64_t j = 0; j < count; j++, to += width)
      for (int64_t d = 0; d < width; d += 16)
        store(to + d, rows[j] < 0 ? zero() : values.template lanes<Floats>(j, d, a.size));
  }
  // to[row][feature] += the row's weights times the values
  static void add_values(const float* weights, const float* values, float* to, int64_t width,
                         int64_t rows, int64_t count) {
    product<Floats>(weights, kKeys, values, width, to, width, rows, width, count, true);
  }
};

// A tile's state in memory: rows maxima, rows sums, [rows, padded size] weighted values.
struct State {
  int64_t rows, width;
  float *max, *sum, *values;
};

inline int64_t tile_rows(const Attention& a, const Tile& t) {
  return t.tokens * (a.heads / a.kv_heads);
}

inline State state_of(const Attention& a, const Tile& t, void* memory) {
  State s;
  s.rows = tile_rows(a, t);
  s.width = round_up(a.size, 16);
  s.max = (float*)memory;
  s.sum = s.max + round_up(s.rows, 16);
  s.values = s.sum + round_up(s.rows, 16);
  return s;
}

int64_t attention_state(const Attention& a, const Tile& t) {
  const int64_t rows = tile_rows(a, t);
  return 4 * (2 * round_up(rows, 16) + whole_tiles(rows) * round_up(a.size, 16));
}

inline int64_t most_rows(const Attention& a) { return larger(kTileRows, a.heads / a.kv_heads); }

int64_t attention_scratch(const Attention& a) {
  const int64_t width = round_up(a.size, 16), rows = whole_tiles(most_rows(a));
  // queries, scores, one step's keys (transposed) and values
  return 4 * (rows * width + rows * kKeys + 2 * kKeys * width);
}

const float kHidden = -__builtin_inff();

// Lanes of a query or key row in the form F.
template <class F>
inline int64_t lanes_of(const Attention& a) {
  return round_up(divide_up(a.size, F::kFeatures), 16);
}

// Rows are ordered token by token, head by head within a token.
template <class F, class T>
inline void load_queries(const Attention& a, const Tile& t, float* to) {
  const int64_t lanes = lanes_of<F>(a), group = a.heads / a.kv_heads;
  for (int64_t i = 0; i < t.tokens; i++) {
    for (int64_t h = 0; h < group; h++, to += lanes) {
      const T* q = (const T*)a.q + (t.row + i) * a.q_row + (t.kv_head * group + h) * a.q_head;
      for (int64_t d = 0; d < lanes; d += 16)
        store(to + d, F::lanes(q + d * F::kFeatures, a.size - d * F::kFeatures));
    }
  }
}

// Where the keys of positions first .. first + count lie; -1 for those left of the window, whose
// blocks may have been given away.
inline void locate(const Attention& a, const Tile& t, int64_t first, int64_t count, int64_t* rows) {
  const Cache& c = a.cache;
  const int32_t* blocks = a.block_table + t.sequence * a.table_row;
  int64_t block = first / c.block_size, offset = first % c.block_size;
  for (int64_t j = 0; j < kKeys; j++, offset++) {
    if (offset == c.block_size) {
      offset = 0;
      block++;
    }
    const bool there = j < count && first + j >= t.first_key;
    rows[j] = there ? blocks[block] * c.block + offset * c.slot + t.kv_head * c.head : -1;
  }
}

// Sixteen keys as columns: to[lane][j], zero where there is no key.
template <class F, class R>
inline void load_keys(const Attention& a, const int64_t* rows, float* to) {
  const R keys((const typename R::Unit*)a.cache.data, rows, 16, a.size);
  const int64_t lanes = lanes_of<F>(a);
  for (int64_t d = 0; d < lanes; d += 16) {
    const int64_t feature = d * F::kFeatures;
    V square[16];
    for (int i = 0; i < 16; i++)
      square[i] = rows[i] < 0 ? zero() : keys.template lanes<F>(i, feature, a.size);
    transpose(square);
    for (int i = 0; i < 16; i++) store(to + (d + i) * kKeys, square[i]);
  }
}

// Where a token of a tree stands in its text: behind those of this step that it sees.
inline int64_t tree_position(const Attention& a, const Tile& t, const bool* seen) {
  int64_t count = 0;
  for (int64_t i = 0; i <= t.last_key - t.before; i++) count += seen[i];
  return t.before + count - 1;
}

// Hide the keys that a row's token does not see: after it, left of the window, off its tree branch.
inline void hide(const Attention& a, const Tile& t, int64_t row, int64_t first, int64_t count,
                 float* scores) {
  const int64_t token = row / (a.heads / a.kv_heads);
  const bool* tree = a.tree ? a.tree + (t.row + token) * a.tree_row : nullptr;
  const bool* own = a.tree ? a.tree + (t.row - t.position + t.before) * a.tree_row : nullptr;
  const int64_t position = tree ? tree_position(a, t, tree) : t.position + token;
  const int64_t oldest = a.window > 0 ? position - a.window + 1 : 0;
  const bool whole = first >= oldest && first + count - 1 <= position &&
                     (!tree || first + count <= t.before);
  for (int64_t j = whole ? count : 0; j < count; j++) {
    const int64_t key = first + j;
    bool seen = key >= oldest && key <= position;
    if (tree && key >= t.before) {
      const int64_t i = key - t.before;
      seen = tree[i] && (a.window <= 0 || tree_position(a, t, own + i * a.tree_row) >= oldest);
    }
    if (!seen) scores[j] = kHidden;
  }
  for (int64_t j = count; j < kKeys; j++) scores[j] = kHidden;
}

// Scores to weights, in place, with the running maximum, sum and values of the row brought along.
// A NaN among the scores stays in the sum: comparisons are written so that it is not left out.
template <class P>
inline void soften(float* scores, State& s, int64_t row) {
  V best = load(scores);
  for (int j = 16; j < kKeys; j += 16) best = max(best, load(scores + j));
  const float before = s.max[row], most = largest(best);
  if (most == kHidden) {
    V all = zero();
    for (int j = 0; j < kKeys; j += 16) {
      all = add(all, load(scores + j));
      P::keep(scores, j, zero());
    }
    if (sum(all) != kHidden) s.max[row] = s.sum[row] = __builtin_nanf("");
    return;
  }
  const float now = before > most ? before : most;
  V total = zero();
  for (int j = 0; j < kKeys; j += 16) {
    total = add(total, P::keep(scores, j, exp(sub(load(scores + j), set1(now)))));
  }
  if (!(now <= before)) {
    const float shrink = exp(before - now);
    s.sum[row] *= shrink;
    float* values = s.values + row * s.width;
    for (int64_t d = 0; d < s.width; d += 16) store(values + d, mul(load(values + d), set1(shrink)));
    s.max[row] = now;
  }
  s.sum[row] += sum(total);
}

// Rows of one head lie far apart, which the hardware's own prefetching does not follow.
template <class R>
inline void prefetch(const Attention& a, const int64_t* rows) {
  const auto* data = (const typename R::Unit*)a.cache.data;
  const int64_t bytes = R::bytes(a.size);
  for (int64_t j = 0; j < kKeys; j++) {
    if (rows[j] < 0) continue;
    for (int64_t d = 0; d < bytes; d += 64) {
      __builtin_prefetch((const char*)(data + rows[j]) + d);
      __builtin_prefetch((const char*)(data + rows[j] + a.cache.kv) + d);
    }
  }
}

// Products with the queries, scaled and capped, what a row must not see hidden.
template <class P, class R>
inline void score(const Attention& a, const Tile& t, const State& s, int64_t first, int64_t count,
                  const int64_t* rows, const float* queries, float* keys, float* scores) {
  using F = typename P::Features;
  const int64_t lanes = lanes_of<F>(a), columns = round_up(count, 16);
  for (int64_t j = 0; j < columns; j += 16) load_keys<F, R>(a, rows + j, keys + j);
  P::score(queries, lanes, keys, scores, s.rows, columns);
  for (int64_t r = 0; r < s.rows; r++) {
    float* row = scores + r * kKeys;
    for (int64_t j = 0; j < columns; j += 16) {
      V x = mul(load(row + j), set1(a.scale));
      if (a.softcap > 0) x = mul(tanh(div(x, set1(a.softcap))), set1(a.softcap));
      store(row + j, x);
    }
    hide(a, t, r, first, count, row);
  }
}

template <class P, class Q, class R>
void chunk_of(const Attention& a, const Tile& t, int64_t chunk, State& s, float* scratch) {
  const int64_t padded = whole_tiles(s.rows);
  float* queries = scratch;
  float* scores = queries + padded * s.width;
  float* keys = scores + padded * kKeys;
  float* values = keys + kKeys * s.width;
  load_queries<typename P::Features, Q>(a, t, queries);
  for (int64_t r = 0; r < s.rows; r++) {
    s.max[r] = kHidden;
    s.sum[r] = 0;
  }
  for (int64_t i = 0; i < s.rows * s.width; i += 16) store(s.values + i, zero());

  const int64_t end = smaller((chunk + 1) * kChunkKeys, t.last_key + 1);
  int64_t first = larger(chunk * kChunkKeys, t.first_key / kKeys * kKeys);
  int64_t here[kKeys], after[kKeys], *rows = here, *next = after;
  locate(a, t, first, smaller(kKeys, end - first), rows);
  for (; first < end; first += kKeys) {
    const int64_t count = smaller(kKeys, end - first);
    if (first + kKeys < end) {
      locate(a, t, first + kKeys, smaller(kKeys, end - first - kKeys), next);
      if (s.rows <= 16) prefetch<R>(a, next);
    }
    score<P, R>(a, t, s, first, count, rows, queries, keys, scores);
    for (int64_t r = 0; r < s.rows; r++) soften<P>(scores + r * kKeys, s, r);
    P::template load_values<R>(a, rows, count, values);
    P::add_values(scores, values, s.values, s.width, s.rows, count);
    int64_t* swap = rows;
    rows = next;
    next = swap;
  }
}

#if !defined(SMELT_AMX)  // whose set has the rest from the one before it
template <class R>
void chunk_with(const Attention& a, const Tile& t, int64_t chunk, State& s, float* scratch) {
  with_type(a.type, [&](auto* q) {
    chunk_of<Vectors<Floats>, std::remove_pointer_t<decltype(q)>, R>(a, t, chunk, s, scratch);
  });
}

void attention_chunk(const Attention& a, const Tile& t, int64_t chunk, void* state, void* memory) {
  State s = state_of(a, t, state);
  float* scratch = (float*)memory;
  switch (a.cache.form) {
    case Form::Fp8:
      return chunk_with<QuantizedRows<Form::Fp8>>(a, t, chunk, s, scratch);
    case Form::Int8:
      return chunk_with<QuantizedRows<Form::Int8>>(a, t, chunk, s, scratch);
    case Form::Int4:
      return chunk_with<QuantizedRows<Form::Int4>>(a, t, chunk, s, scratch);
    case Form::Elements:
      break;
  }
#if defined(SMELT_AVX512_BF16)
  if (a.type == Type::BF16 && a.cache.type == Type::BF16)
    return chunk_of<Vectors<Pairs>, bf16, Elements<bf16>>(a, t, chunk, s, scratch);
#endif
  with_type(a.cache.type, [&](auto* k) {
    chunk_with<Elements<std::remove_pointer_t<decltype(k)>>>(a, t, chunk, s, scratch);
  });
}

void attention_merge(const Attention& a, const Tile& t, void* into, const void* from) {
  State s = state_of(a, t, into), o = state_of(a, t, (void*)from);
  for (int64_t r = 0; r < s.rows; r++) {
    if (o.max[r] == kHidden) continue;
    const float now = s.max[r] > o.max[r] ? s.max[r] : o.max[r];
    const float mine = exp(s.max[r] - now), theirs = exp(o.max[r] - now);
    s.sum[r] = s.sum[r] * mine + o.sum[r] * theirs;
    s.max[r] = now;
    for (int64_t d = 0; d < s.width; d += 16) {
      float* values = s.values + r * s.width + d;
      const V other = mul(load(o.values + r * s.width + d), set1(theirs));
      store(values, fma(load(values), set1(mine), other));
    }
  }
}

void attention_finish(const Attention& a, const Tile& t, void* state) {
  State s = state_of(a, t, state);
  const int64_t group = a.heads / a.kv_heads;
  with_type(a.type, [&](auto* o) {
    for (int64_t r = 0; r < s.rows; r++) {
      const int64_t head = t.kv_head * group + r % group;
      float total = s.sum[r], shrink = 1;
      if (a.sinks) {
        // A sink takes probability and gives no value.
        const float now = s.max[r] > a.sinks[head] ? s.max[r] : a.sinks[head];
        shrink = exp(s.max[r] - now);
        total = total * shrink + exp(a.sinks[head] - now);
      }
      const float factor = total == 0 ? 0 : shrink / total;
      auto* out = (decltype(o))a.out + ((t.row + r / group) * a.heads + head) * a.size;
      for (int64_t d = 0; d < a.size; d += 16)
        store_some(out + d, mul(load(s.values + r * s.width + d), set1(factor)), a.size - d);
    }
  });
}
#endif
