// Sixteen floats in one AVX512 register.
#include <immintrin.h>

struct V {
  __m512 v;
};

inline V zero() { return {_mm512_setzero_ps()}; }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
// The sums of a[4 r + c], for r and c below 4, in lane 4 c + r, each added up in the order of `sum`.
inline V sums(const V* a) {
  __m512 halves[8], quarters[4], pairs[2];
  for (int i = 0; i < 8; i++) {
    const __m512 x = a[2 * i].v, y = a[2 * i + 1].v;
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
  for (int i = 0; i < 4; i++) {
    const __m512 x = halves[2 * i], y = halves[2 * i + 1];
    quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
  for (int i = 0; i < 2; i++) {
    const __m512 x = quarters[2 * i], y = quarters[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  }
  return {_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88),
                        _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd))};
}
inline float largest(V a) { return _mm512_reduce_max_ps(a.v); }
inline V round(V a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline V times_power_of_two(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// 0 where x < limit, else a
inline V where_not_below(V x, float limit, V a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.v)};
}

inline V load(const bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline V load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline V load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline V load(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline void store(f16* p, V a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(bf16* p, V a) {
  __m512i x = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, odd), _mm512_set1_epi32(0x7fff));
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// float8 e4m3 but for its NaN, which is never stored: as float16 bits it is 2^8 smaller.
inline V load(const e4m3* p) {
  __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  __m256i h = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbf80));
  return mul({_mm512_cvtph_ps(h)}, set1(256.0f));
}
// Sixteen values of four bits, the low half of a byte first.
inline V load_u4(const uint8_t* p) {
  const __m128i low = _mm_set1_epi8(15), x = _mm_loadl_epi64((const __m128i*)p);
  __m128i q = _mm_unpacklo_epi8(_mm_and_si128(x, low), _mm_and_si128(_mm_srli_epi16(x, 4), low));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q))};
}

// 32 neighbouring bfloat16 as the even and the odd ones: two operations, no shuffle.
inline void load_pair(const bf16* p, V& even, V& odd) {
  __m512i x = _mm512_loadu_si512(p);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)))};
}

// Sixteen words; fields of bits of each as floats.
struct Words {
  __m512i v;
};
inline Words load_words(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
// (w >> shift & mask) - less
inline V field(Words w, int shift, int mask, int less) {
  const __m512i bits = _mm512_and_si512(_mm512_srli_epi32(w.v, shift), _mm512_set1_epi32(mask));
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(bits, _mm512_set1_epi32(less)))};
}
// Nibble j, less 8.
inline V nibble(Words w, int j) {
  // permutexvar reads the low four bits of each index only, which saves the mask.
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(w.v, 4 * j), table)};
}

// rows[i][j] becomes rows[j][i]
inline void transpose(V* r) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    __m512 b = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    __m512 c = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    __m512 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i] = {_mm512_shuffle_f32x4(a, b, 0x88)};
    r[i + 8] = {_mm512_shuffle_f32x4(a, b, 0xdd)};
    r[i + 4] = {_mm512_shuffle_f32x4(c, d, 0x88)};
    r[i + 12] = {_mm512_shuffle_f32x4(c, d, 0xdd)};
  }
}
