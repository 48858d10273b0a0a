// Sixteen rows of packed weight, a step of a few features at a time: how each format is read.
//
// kStep: features of a step; load_weight takes where the block begins and the number of the step;
// at() is where that step's bytes begin, for prefetching; bytes() those of a block of k features.
// kM: rows of x in one register tile. Values are whole numbers less the middle of their range.

#if defined(SMELT_AVX512)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

struct Int8 {
  static constexpr int64_t kStep = 1, kM = kColumns;
  using X = float;
  V w;
  static inline const char* at(const char* block, int64_t step) { return block + 16 * step; }
  static int64_t bytes(int64_t k) { return 16 * k; }
  inline void load_weight(const char* block, int64_t step) {
    w = load((const int8_t*)at(block, step));
  }
  inline V feature(int64_t) const { return w; }
  inline V add_to(V sum, const X* x) const { return fma(w, set1(*x), sum); }
};

// Eight features of 4 bits a step.
struct Int4 {
  static constexpr int64_t kStep = 8, kM = kColumns;
  using X = float;
  V w[8];
  static inline const char* at(const char* block, int64_t step) { return block + 64 * step; }
  static int64_t bytes(int64_t k) { return 64 * divide_up(k, 8); }
  inline void load_weight(const char* block, int64_t step) {
    const Words n = load_words((const int32_t*)at(block, step));
    for (int j = 0; j < 8; j++) w[j] = nibble(n, j);
  }
  inline V feature(int64_t j) const { return w[j]; }
  inline V add_to(V sum, const X* x) const {
    for (int j = 0; j < 8; j++) sum = fma(w[j], set1(x[j]), sum);
    return sum;
  }
};

// Two steps a word of sixteen.
struct Int2 : Int4 {
  static inline const char* at(const char* block, int64_t step) { return block + 64 * (step / 2); }
  static int64_t bytes(int64_t k) { return 64 * divide_up(k, 16); }
  inline void load_weight(const char* block, int64_t step) {
    const Words n = load_words((const int32_t*)at(block, step));
    const int half = 16 * (step % 2);
    for (int j = 0; j < 8; j++) w[j] = field(n, half + 2 * j, 3, 2);
  }
};

// Four steps a chunk of three words: the low bits of two steps, of two more, the high bits of all.
struct Int3 : Int4 {
  static inline const char* at(const char* block, int64_t step) {
    return block + 192 * (step / 4) + 64 * (step % 4 / 2);
  }
  static int64_t bytes(int64_t k) { return 192 * divide_up(k, 32); }
  inline void load_weight(const char* block, int64_t step) {
    const Words low = load_words((const int32_t*)at(block, step));
    const Words high = load_words((const int32_t*)(block + 192 * (step / 4) + 128));
    const int half = 16 * (step % 2), place = half + 8 * (step % 4 / 2);
    for (int j = 0; j < 8; j++)
      w[j] = fma(field(high, place + j, 1, 0), set1(4.0f), field(low, half + 2 * j, 3, 4));
  }
};

#if defined(SMELT_AVX512_BF16)
// x in bfloat16 multiplies pairs: the fields of one 32-bit word, one of each half at a time, become
// a pair of bfloat16 by one table look-up (exact: small integers), products are summed in float32.
inline V add_pair(V sum, __m512i w, const bf16* x) {
  int pair;
  __builtin_memcpy(&pair, x, 4);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair))};
}

struct Int4Pairs {
  static constexpr int64_t kStep = 8, kM = kColumns;
  using X = bf16;  // eight features as the pairs (0, 4) (1, 5) (2, 6) (3, 7)
  __m512i w[4];
  static inline const char* at(const char* block, int64_t step) { return Int4::at(block, step); }
  static int64_t bytes(int64_t k) { return Int4::bytes(k); }
  inline void load_weight(const char* block, int64_t step) {
    // permutexvar on 16-bit lanes reads five bits of an index: the table is there twice.
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040,
        (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
    const __m512i n = _mm512_loadu_si512(at(block, step));
    for (int j = 0; j < 4; j++)
      w[j] = _mm512_permutexvar_epi16(_mm512_srli_epi32(n, 4 * j), table);
  }
  inline __m512i pair(int64_t j) const { return w[j]; }
  inline V add_to(V sum, const X* x) const {
    for (int j = 0; j < 4; j++) sum = add_pair(sum, w[j], x + 2 * j);
    return sum;
  }
};

// Sixteen features a step, as the pairs (0, 8) (1, 9) .. (7, 15).
struct Int2Pairs {
  static constexpr int64_t kStep = 16, kM = kColumns;
  using X = bf16;
  __m512i w[8];
  static inline const char* at(const char* block, int64_t step) { return block + 64 * step; }
  static int64_t bytes(int64_t k) { return Int2::bytes(k); }
  inline void load_weight(const char* block, int64_t step) {
    // -2..1, eight times: only the two low bits of an index count.
    const __m512i table = _mm512_set1_epi64((long long)0x3f800000bf80c000);
    const __m512i n = _mm512_loadu_si512(at(block, step));
    for (int j = 0; j < 8; j++)
      w[j] = _mm512_permutexvar_epi16(_mm512_srli_epi32(n, 2 * j), table);
  }
  inline __m512i pair(int64_t j) const { return w[j]; }
  inline V add_to(V sum, const X* x) const {
    for (int j = 0; j < 8; j++) sum = add_pair(sum, w[j], x + 2 * j);
    return sum;
  }
};

struct Int3Pairs : Int2Pairs {
  static inline const char* at(const char* block, int64_t step) {
    return block + 192 * (step / 2) + 64 * (step % 2);
  }
  static int64_t bytes(int64_t k) { return Int3::bytes(k); }
  inline void load_weight(const char* block, int64_t step) {
    // -4..3, four times: three bits of an index count.
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi16(
        (short)0xc080, (short)0xc040, (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040));
    const __m512i low = _mm512_loadu_si512(at(block, step));
    const __m512i high = _mm512_loadu_si512(block + 192 * (step / 2) + 128);
    const __m512i two = _mm512_set1_epi16(3), one = _mm512_set1_epi16(4);
    // Bit j of the step's eight comes to stand above the two low bits.
    const __m512i bits = _mm512_slli_epi32(high, 2), later = _mm512_srli_epi32(high, 6);
    const __m512i mine = step % 2 ? later : bits;
    for (int j = 0; j < 8; j++) {
      const __m512i q = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(low, 2 * j), two),
                                        _mm512_and_si512(_mm512_srli_epi32(mine, j), one));
      w[j] = _mm512_permutexvar_epi16(q, table);
    }
  }
};

// Two features of 8 bits as a pair: integers up to 127 are exact in bfloat16, so the upper halves
// of their floats hold them whole.
struct Int8Pairs {
  static constexpr int64_t kStep = 2, kM = 8;
  using X = bf16;
  __m512i w;
  static inline const char* at(const char* block, int64_t step) { return block + 32 * step; }
  static int64_t bytes(int64_t k) { return 16 * k; }
  inline void load_weight(const char* block, int64_t step) {
    const int8_t* p = (const int8_t*)at(block, step);
    const V a = load(p), b = load(p + 16);
    w = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16), _mm512_castps_si512(b.v));
  }
  inline __m512i pair(int64_t) const { return w; }
  inline V add_to(V sum, const X* x) const { return add_pair(sum, w, x); }
};
#endif
