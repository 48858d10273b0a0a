// AMX: eight registers of 16 rows of 64 bytes, tiles, and products of two of them added to a third.
//
// Tiles 0 to 3 hold sums, 4 the left operand, 5 to 7 right ones, of which 7 may be a second left
// one; where weights are on the left (dense_amx.h) it is the other way round. How many rows a tile
// has is set before it is used; the compiler wants its number literally.

#if defined(SMELT_AMX)
constexpr int64_t kTileSide = 16;        // rows of a tile
constexpr int64_t kTileRow = 64;         // bytes of a row
constexpr int64_t kTileBytes = 16 * 64;  // of one
constexpr int64_t kTileSums = 16 * 16;   // of one of sums

struct TileRows {
  uint8_t of[8];
};

inline void amx_configure(const TileRows& rows) {
  alignas(64) struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++) {
    config.bytes[i] = kTileRow;
    config.rows[i] = rows.of[i];
  }
  // g++ takes the instruction to read 8 bytes of the 64: without this it may leave out the stores
  // of the others.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// For left operands of m rows: as many as there are, or all 16.
inline void amx_configure(int64_t m) {
  const auto rows = (uint8_t)smaller(m, kTileSide);
  amx_configure({{rows, rows, rows, rows, rows, 16, 16, 16}});
}

// g++ does not know that loading a tile reads memory, and could put off stores until behind it.
inline void amx_finish_stores() { __asm__ volatile("" ::: "memory"); }

// Tiles beside each other in memory: bytes from one to the next and from row to row.
struct TilesAt {
  const void* first;
  int64_t beside = kTileBytes, row = kTileRow;
  inline char* tile(int64_t i) const { return (char*)first + i * beside; }
};

// The first N tiles of sums: to zero, and into and out of memory.
template <int N>
inline void amx_clear() {
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
}
template <int N>
inline void amx_keep(const TilesAt& sums) {
  _tile_stored(0, sums.tile(0), sums.row);
  if constexpr (N > 1) _tile_stored(1, sums.tile(1), sums.row);
  if constexpr (N > 2) _tile_stored(2, sums.tile(2), sums.row);
  if constexpr (N > 3) _tile_stored(3, sums.tile(3), sums.row);
}
template <int N>
inline void amx_take_up(const TilesAt& sums) {
  amx_finish_stores();
  _tile_loadd(0, sums.tile(0), sums.row);
  if constexpr (N > 1) _tile_loadd(1, sums.tile(1), sums.row);
  if constexpr (N > 2) _tile_loadd(2, sums.tile(2), sums.row);
  if constexpr (N > 3) _tile_loadd(3, sums.tile(3), sums.row);
}

// 16 pairs of bfloat16 or 64 bytes of whole numbers of each row are multiplied.
enum class Operands { Pairs, Bytes };
#define SMELT_ADD_PRODUCT(sums, left, right) \
  if constexpr (O == Operands::Pairs) {      \
    _tile_dpbf16ps(sums, left, right);       \
  } else {                                   \
    _tile_dpbssd(sums, left, right);         \
  }

// sums[i] += left * right[i] for N tiles beside each other, `depth` times: left goes on by a tile's
// row, right by `next` bytes.
template <Operands O, int N>
inline void amx_row(const char* left, int64_t left_row, TilesAt right, int64_t next, int64_t depth) {
  amx_finish_stores();
  for (; depth > 0; depth--, left += kTileRow, right.first = right.tile(0) + next) {
    _tile_loadd(4, left, left_row);
    _tile_loadd(5, right.tile(0), right.row);
    SMELT_ADD_PRODUCT(0, 4, 5)
    if constexpr (N > 1) {
      _tile_loadd(6, right.tile(1), right.row);
      SMELT_ADD_PRODUCT(1, 4, 6)
    }
    if constexpr (N > 2) {
      _tile_loadd(7, right.tile(2), right.row);
      SMELT_ADD_PRODUCT(2, 4, 7)
    }
    if constexpr (N > 3) {
      _tile_loadd(5, right.tile(3), right.row);
      SMELT_ADD_PRODUCT(3, 4, 5)
    }
  }
}

// The same for two tiles of left rows, one after the other, and two of right: sums [2 left][2 right].
template <Operands O>
inline void amx_square(const char* left, int64_t left_row, TilesAt right, int64_t next,
                       int64_t depth) {
  amx_finish_stores();
  for (; depth > 0; depth--, left += kTileRow, right.first = right.tile(0) + next) {
    _tile_loadd(5, right.tile(0), right.row);
    _tile_loadd(4, left, left_row);
    SMELT_ADD_PRODUCT(0, 4, 5)
    _tile_loadd(6, right.tile(1), right.row);
    SMELT_ADD_PRODUCT(1, 4, 6)
    _tile_loadd(7, left + kTileSide * left_row, left_row);
    SMELT_ADD_PRODUCT(2, 7, 5)
    SMELT_ADD_PRODUCT(3, 7, 6)
  }
}
#undef SMELT_ADD_PRODUCT
#endif
