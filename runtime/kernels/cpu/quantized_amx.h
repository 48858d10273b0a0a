// quantized.h in bfloat16 with AMX: tiles of 16 rows of x times tiles of 16 output rows, 32 features
// a product.
//
// Whole numbers are looked up as in weights.h, and sixteen vectors of pairs are the right operand as
// they are; x, as quantized_prepare left it, is the left one. A product takes as many cycles as there
// are rows of x, up to 16. Sums are made in another order than in quantized.h: even and odd features
// of a tile on their own.

#if defined(SMELT_AMX)
constexpr int64_t kTileFeatures = 32;  // of one product
constexpr int64_t kPieceTiles = 4;     // of a block's weight, looked up together
constexpr int64_t kFewRows = 2;        // for which looking up costs more than the products save
constexpr int64_t kRowTiles = 4;       // of x, multiplied by them before the next are looked up

inline bool amx_takes(const Quantized& q) {
  return q.rows > kFewRows && q.k > 0 && in_pairs(q) && q.k / q.groups % kTileFeatures == 0;
}

using Sums = float[kTileSums];
using Tiles = char[kPieceTiles][kTileBytes];

// Tile `tile` of a block's features.
template <class W>
inline void look_up(const char* block, int64_t tile, int64_t ahead, char* to) {
  constexpr int64_t kPairs = W::kStep / 2, kSteps = kTileFeatures / W::kStep;
  for (int64_t s = 0; s < kSteps; s++) {
    W weights;
    // The same place of the next blocks: hardware prefetching loses its way at each block's end.
    __builtin_prefetch(W::at(block, tile * kSteps + s) + ahead, 0, 2);
    weights.load_weight(block, tile * kSteps + s);
    for (int64_t j = 0; j < kPairs; j++)
      _mm512_store_si512(to + (s * kPairs + j) * 64, weights.pair(j));
  }
}

// One group's sums of a block and rows m.. of x, scaled, come to the totals.
inline void add_group(const Quantized& q, int64_t block, int64_t group, int64_t m, int64_t rows,
                      const float* sums, float* totals) {
  const V scale = load_scales(q, block, group);
  if (!q.zeros) {
    for (int64_t r = 0; r < rows; r++)
      store(totals + 16 * r, fma(scale, load(sums + 16 * r), load(totals + 16 * r)));
    return;
  }
  const V offset = load_zeros(q, block, group);
  const float* x = packed_x(q).sums + m * q.groups + group;
  for (int64_t r = 0; r < rows; r++) {
    const V less = sub(load(sums + 16 * r), mul(offset, set1(x[r * q.groups])));
    store(totals + 16 * r, fma(scale, less, load(totals + 16 * r)));
  }
}

// N tiles of sums, of B blocks and N / B tiles of x, go on over some tiles of features.
template <int B, int N>
inline void multiply(const char* x, int64_t row, const Tiles* weights, int64_t tiles, bool begin,
                     const Sums* sums) {
  const TilesAt right{weights, sizeof(Tiles)};
  begin ? amx_clear<N>() : amx_take_up<N>({sums});
  if constexpr (N == B) {
    amx_row<Operands::Pairs, B>(x, row, right, kTileBytes, tiles);
  } else {
    amx_square<Operands::Pairs>(x, row, right, kTileBytes, tiles);
  }
  amx_keep<N>({sums});
}

// B neighbouring blocks and up to kRowTiles tiles of x, of which there is only one if B is 4.
template <class W, int B>
inline void amx_tile(const Quantized& q, int64_t block, int64_t m, int64_t rows) {
  constexpr int64_t kMost = B == 4 ? 1 : kRowTiles;
  alignas(64) Tiles weights[B];
  alignas(64) Sums sums[kMost][B];
  alignas(64) Sums totals[kMost][B] = {};
  const PackedX packed = packed_x(q);
  const int64_t row = packed.row * 2, bytes = W::bytes(q.k);
  const char* w = (const char*)q.packed + block * bytes;
  const char* x = (const char*)packed.x + m * row;
  const int64_t row_tiles = divide_up(rows, kTileSide);
  const int64_t group_tiles = q.k / q.groups / kTileFeatures;
  for (int64_t g = 0; g < q.groups; g++) {
    const int64_t begin = g * group_tiles, end = begin + group_tiles;
    for (int64_t first = begin; first < end; first += kPieceTiles) {
      const int64_t tiles = smaller(kPieceTiles, end - first);
      for (int64_t t = 0; t < tiles; t++)
        for (int b = 0; b < B; b++) look_up<W>(w + b * bytes, first + t, B * bytes, weights[b][t]);
      for (int64_t i = 0; i < row_tiles;) {
        const char* from = x + i * kTileSide * row + first * 64;
        if (B == 2 && row_tiles - i > 1) {
          multiply<2, 4>(from, row, weights, tiles, first == begin, sums[i]);
          i += 2;
        } else {
          multiply<B, B>(from, row, weights, tiles, first == begin, sums[i]);
          i++;
        }
      }
    }
    for (int64_t i = 0; i < row_tiles; i++) {
      const int64_t from = i * kTileSide, count = smaller(kTileSide, rows - from);
      for (int b = 0; b < B; b++)
        add_group(q, block + b, g, m + from, count, sums[i][b], totals[i][b]);
    }
  }
  for (int b = 0; b < B; b++) {
    const int64_t n = (block + b) * kLanes;
    if (q.n <= n) break;
    const int64_t width = smaller(kLanes, q.n - n);
    const V bias = q.bias ? load_some((const bf16*)q.bias + n, width) : zero();
    for (int64_t r = 0; r < rows; r++) {
      const V total = load(totals[r / kTileSide][b] + r % kTileSide * 16);
      store_some((bf16*)q.out + (m + r) * q.n + n, add(total, bias), width);
    }
  }
}

template <class W>
inline void amx_blocks(const Quantized& q, int64_t first, int64_t last) {
  amx_configure(q.m);
  for (; q.m <= kTileSide && first + 4 <= last; first += 4) amx_tile<W, 4>(q, first, 0, q.m);
  while (first < last) {
    const int64_t blocks = smaller(2, last - first);
    for (int64_t m = 0; m < q.m; m += kRowTiles * kTileSide) {
      const int64_t some = smaller(kRowTiles * kTileSide, q.m - m);
      blocks == 2 ? amx_tile<W, 2>(q, first, m, some) : amx_tile<W, 1>(q, first, m, some);
    }
    first += blocks;
  }
  _tile_release();
}

void amx_quantized(const Quantized& q, int64_t first, int64_t last) {
  switch (q.bits) {
    case 2:
      return amx_blocks<Int2Pairs>(q, first, last);
    case 3:
      return amx_blocks<Int3Pairs>(q, first, last);
    case 4:
      return amx_blocks<Int4Pairs>(q, first, last);
    default:
      return amx_blocks<Int8Pairs>(q, first, last);
  }
}
#endif
