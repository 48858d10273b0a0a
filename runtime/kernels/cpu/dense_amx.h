// dense.h in bfloat16 with AMX: tiles of 16 rows of the weight, as they lie in memory, times tiles
// of 16 rows of x, added up in float32 over 32 features at a time.
//
// The weight is the left operand, so it needs no layout of its own; x, which is small, is laid out
// in pairs of features (prepare). Sums run over k in one order whatever m is, as in dense.h.

#if defined(SMELT_AMX)
inline bool amx_takes(const Dense& d) { return d.type == Type::BF16 && d.k % kStep == 0; }

// x in tiles: [ceil(m / 16), k / 32, 16 pairs of features, 16 rows, 2]. A column of absent rows
// holds what it held, which reaches no other column.
inline int64_t amx_scratch(const Dense& d) { return round_up(d.m, kTileSide) * d.k * 2; }

inline void amx_prepare(const Dense& d, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; m++) {
    const char* from = (const char*)d.x + m * d.k * 2;
    char* to = (char*)d.packed_x + m / kTileSide * kTileSide * d.k * 2 + m % kTileSide * 4;
    for (int64_t pair = 0; pair < d.k / 2; pair++) std::memcpy(to + pair * 64, from + pair * 4, 4);
  }
}

// Of sums and `rows` rows of the weight (tiles 5 to 7; with all 16 of them 7 may be one more of x);
// x is in tile 4.
inline TileRows dense_tiles(int64_t rows) {
  const auto r = (uint8_t)rows;
  return {{r, r, r, r, 16, r, r, r}};
}

// Sums of `rows` <= 16 rows of the weight and one tile of x.
inline void amx_one(const bf16* w, int64_t k, const char* x, float* sums) {
  amx_clear<1>();
  for (int64_t i = 0; i < k; i += kStep, x += kTileBytes) {
    _tile_loadd(4, x, 64);
    _tile_loadd(5, w + i, k * 2);
    _tile_dpbf16ps(0, 5, 4);
  }
  amx_keep<1>({sums});
}

// Of 64 rows of the weight and one tile of x: four chains of sums hide each other's latency.
inline void amx_four(const bf16* w, int64_t k, const char* x, float* sums) {
  const int64_t tile = kTileSide * k, row = k * 2;
  amx_clear<4>();
  for (int64_t i = 0; i < k; i += kStep, x += kTileBytes) {
    _tile_loadd(4, x, 64);
    _tile_loadd(5, w + i, row);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, w + tile + i, row);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(7, w + 2 * tile + i, row);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, w + 3 * tile + i, row);
    _tile_dpbf16ps(3, 5, 4);
  }
  amx_keep<4>({sums});
}

// Of 32 rows of the weight and two tiles of x, x_tile bytes apart: sums [2 of x][2 of the weight].
inline void amx_two_by_two(const bf16* w, int64_t k, const char* x, int64_t x_tile, float* sums) {
  const int64_t tile = kTileSide * k, row = k * 2;
  amx_clear<4>();
  for (int64_t i = 0; i < k; i += kStep, x += kTileBytes) {
    _tile_loadd(5, w + i, row);
    _tile_loadd(4, x, 64);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, w + tile + i, row);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(7, x + x_tile, 64);
    _tile_dpbf16ps(2, 5, 7);
    _tile_dpbf16ps(3, 6, 7);
  }
  amx_keep<4>({sums});
}

// sums [16 of the weight][16 of x] of outputs n.. and rows m.. -> out, with the bias.
inline void amx_store(const Dense& d, const float* sums, int64_t n, int64_t rows, int64_t m) {
  const int64_t columns = smaller(kTileSide, d.m - m);
  const V bias = d.bias ? load_some((const bf16*)d.bias + n, rows) : zero();
  bf16* out = (bf16*)d.out + m * d.n + n;
  if (columns <= 4) {
    const __m512i down = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    for (int64_t c = 0; c < columns; c++)
      store_some(out + c * d.n, add({_mm512_i32gather_ps(down, sums + c, 4)}, bias), rows);
    return;
  }
  V turned[16];
  for (int r = 0; r < 16; r++) turned[r] = load(sums + 16 * r);
  transpose(turned);
  for (int64_t c = 0; c < columns; c++) store_some(out + c * d.n, add(turned[c], bias), rows);
}

inline void amx_dense(const Dense& d, int64_t first, int64_t last) {
  const int64_t k = d.k, x_tile = kTileSide * k * 2;
  alignas(64) float sums[4 * kTileSums];
  amx_configure(dense_tiles(kTileSide));
  int64_t n = first;
  while (last - n >= kTileSide) {
    const int64_t tiles = last - n >= 4 * kTileSide ? 4 : last - n >= 2 * kTileSide ? 2 : 1;
    const bf16* w = (const bf16*)d.weight + n * k;
    for (int64_t m = 0; m < d.m;) {
      const char* x = (const char*)d.packed_x + m / kTileSide * x_tile;
      if (tiles > 1 && d.m - m > kTileSide) {
        for (int64_t t = 0; t < tiles; t += 2) {
          amx_two_by_two(w + t * kTileSide * k, k, x, x_tile, sums);
          for (int64_t i = 0; i < 4; i++)
            amx_store(d, sums + i * kTileSums, n + (t + i % 2) * kTileSide, kTileSide,
                      m + i / 2 * kTileSide);
        }
        m += 2 * kTileSide;
        continue;
      }
      if (tiles == 4) {
        amx_four(w, k, x, sums);
      } else {
        for (int64_t t = 0; t < tiles; t++)
          amx_one(w + t * kTileSide * k, k, x, sums + t * kTileSums);
      }
      for (int64_t t = 0; t < tiles; t++)
        amx_store(d, sums + t * kTileSums, n + t * kTileSide, kTileSide, m);
      m += kTileSide;
    }
    n += tiles * kTileSide;
  }
  if (n < last) {
    amx_configure(dense_tiles(last - n));
    const bf16* w = (const bf16*)d.weight + n * k;
    for (int64_t m = 0; m < d.m; m += kTileSide) {
      amx_one(w, k, (const char*)d.packed_x + m / kTileSide * x_tile, sums);
      amx_store(d, sums, n, last - n, m);
    }
  }
  _tile_release();
}
#endif
