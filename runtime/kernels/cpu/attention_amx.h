// attention.h in bfloat16 with AMX: tiles of 16 rows of queries times tiles of 16 keys, and of
// weights, rounded to bfloat16, times tiles of 16 features of the values.
//
// A row is divided by the sum of its rounded weights. Rows that a tile has beyond those of the step
// hold anything, which reaches no other row.

#if defined(SMELT_AMX)
inline bool amx_takes(const Attention& a) {
  return a.cache.form == Form::Elements && a.type == Type::BF16 && a.cache.type == Type::BF16;
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns] for whole tiles, depth in those of 32
// features or keys; rows of a, b and c are that many bytes apart.
template <bool kAccumulate>
inline void product_of_tiles(const void* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                             int64_t c_row, int64_t rows, int64_t columns, int64_t depth) {
  auto some = [&](auto count, int64_t r, int64_t j) {
    constexpr int N = decltype(count)::value;
    const TilesAt right{b + j, kTileRow, b_row}, sums{(char*)(c + j) + r * c_row, kTileRow, c_row};
    kAccumulate ? amx_take_up<N>(sums) : amx_clear<N>();
    amx_row<Operands::Pairs, N>((const char*)a + r * a_row, a_row, right, kTileSide * b_row, depth);
    amx_keep<N>(sums);
  };
  for (int64_t r = 0; r < rows; r += kTileSide) {
    int64_t j = 0;
    for (; j + 64 <= columns; j += 64) some(std::integral_constant<int, 4>{}, r, j);
    for (; j < columns; j += 16) some(std::integral_constant<int, 1>{}, r, j);
  }
}

struct InTiles {
  using Features = Pairs;
  static constexpr int64_t kScoreBytes = 4 * kKeys;  // of a row

  static void score(const float* queries, int64_t lanes, const float* keys, float* scores,
                    int64_t rows, int64_t columns) {
    product_of_tiles<false>(queries, 4 * lanes, keys, kScoreBytes, scores, kScoreBytes, rows,
                            columns, lanes / 16);
  }

  // In bfloat16 at the row's beginning, over scores that have been read.
  static V keep(float* scores, int64_t key, V weights) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(weights.v);
    _mm256_storeu_si256((__m256i*)((char*)scores + 2 * key), rounded);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16))};
  }

  // Pairs of neighbouring keys: to[pair][feature].
  template <class R>
  static void load_values(const Attention& a, const int64_t* rows, int64_t count, float* to) {
    const R values((const typename R::Unit*)a.cache.data + a.cache.kv, rows, count, a.size);
    const int64_t width = round_up(a.size, 16);
    auto value = [&](int64_t j, int64_t d) {
      const bool there = j < count && rows[j] >= 0;
      return _mm512_castps_si512((there ? values.template lanes<Floats>(j, d, a.size) : zero()).v);
    };
    for (int64_t j = 0; j < round_up(count, 32); j += 2, to += width)
      for (int64_t d = 0; d < width; d += 16)
        _mm512_storeu_si512(
            to + d, _mm512_or_si512(_mm512_srli_epi32(value(j, d), 16), value(j + 1, d)));
  }

  static void add_values(const float* weights, const float* values, float* to, int64_t width,
                         int64_t rows, int64_t count) {
    product_of_tiles<true>(weights, kScoreBytes, values, 4 * width, to, 4 * width, rows, width,
                           divide_up(count, 32));
  }
};

void amx_attention_chunk(const Attention& a, const Tile& t, int64_t chunk, void* state,
                         void* memory) {
  State s = state_of(a, t, state);
  amx_configure(s.rows);
  chunk_of<InTiles, bf16, Elements<bf16>>(a, t, chunk, s, (float*)memory);
  _tile_release();
}
#endif
