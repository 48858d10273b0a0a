// w8a8.h with AMX: the packed weight, four features of sixteen output rows in 64 bytes, is a tile's
// right operand as it lies in memory, and rows of x are the left one. Sums are whole numbers, the
// same as on every set.

#if defined(SMELT_AMX)
inline bool amx_takes(const W8A8& q) { return q.k % kTileRow == 0; }

// Sums of a block and rows m.. of x -> out.
template <class T>
inline void store_sums(const W8A8& q, const int32_t* sums, int64_t block, int64_t m) {
  const int64_t n = block * kLanes;
  if (q.n <= n) return;
  const int64_t width = smaller(kLanes, q.n - n), rows = smaller(kTileSide, q.m - m);
  const V scale = load_some(q.scales + n, width);
  const V bias = q.bias ? load_some((const T*)q.bias + n, width) : zero();
  const float* scales = quantized_x(q).scales + m;
  for (int64_t r = 0; r < rows; r++) {
    const V whole = {_mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * r))};
    V y = mul(whole, mul(set1(scales[r]), scale));
    if (q.bias) y = add(y, bias);
    store_some((T*)q.out + (m + r) * q.n + n, y, width);
  }
}

template <class T, int B>
inline void amx_tile(const W8A8& q, int64_t block) {
  alignas(64) int32_t sums[4][kTileSums];
  const QuantizedX from = quantized_x(q);
  const int64_t bytes = q.k * kLanes;
  const TilesAt right{q.packed + block * bytes, bytes};
  for (int64_t m = 0; m < q.m;) {
    const auto* x = (const char*)(from.x + m * from.row);
    const bool two = B == 2 && q.m - m > kTileSide;
    if (two) {
      amx_clear<4>();
      amx_square<Operands::Bytes>(x, from.row, right, kTileBytes, q.k / kTileRow);
      amx_keep<4>({sums});
    } else {
      amx_clear<B>();
      amx_row<Operands::Bytes, B>(x, from.row, right, kTileBytes, q.k / kTileRow);
      amx_keep<B>({sums});
    }
    for (int64_t i = 0; i < (two ? 2 : 1); i++, m += kTileSide)
      for (int b = 0; b < B; b++) store_sums<T>(q, sums[i * B + b], block + b, m);
  }
}

void amx_w8a8(const W8A8& q, int64_t first, int64_t last) {
  amx_configure(q.m);
  with_type(q.type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    for (; q.m <= kTileSide && first + 4 <= last; first += 4) amx_tile<T, 4>(q, first);
    for (; first + 2 <= last; first += 2) amx_tile<T, 2>(q, first);
    for (; first < last; first++) amx_tile<T, 1>(q, first);
  });
  _tile_release();
}
#endif
