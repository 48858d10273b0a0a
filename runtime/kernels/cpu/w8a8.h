// Rows of x, quantized to int8, times an int8 weight in the blocked layout (linear_w8a8.py): four
// features of sixteen output rows are 64 bytes, and sums run over integers. They are exact, so all
// instruction sets give the same bits.

#if defined(SMELT_AVX512_VNNI)
// dpbusd multiplies unsigned by signed bytes and does not saturate. The weight is the unsigned one:
// 128 more than it is, which adds 128 times the sum of the row of x and is taken off at the end.
struct Dot {
  static constexpr int kM = 8, kMany = 2, kOne = 4;
  static constexpr bool kOffset = true;
  using X = int8_t;
  struct Sum {
    __m512i v;
  };
  __m512i w;
  static inline Sum none() { return {_mm512_setzero_si512()}; }
  inline void load_weight(const int8_t* p) {
    w = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0x80808080));
  }
  inline Sum add_to(Sum s, const X* x) const {
    int four;
    __builtin_memcpy(&four, x, 4);
    return {_mm512_dpbusd_epi32(s.v, w, _mm512_set1_epi32(four))};
  }
  static inline V finish(Sum s, int32_t offset) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(s.v, _mm512_set1_epi32(offset)))};
  }
  static inline void store_whole(X* to, V a) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
  }
};
#elif defined(SMELT_AVX512)
// maddubs would saturate: both sides are widened to 16 bits, where two products fit 32 bits whole.
struct Dot {
  static constexpr int kM = 4, kMany = 2, kOne = 4;
  static constexpr bool kOffset = false;
  using X = int16_t;
  struct Sum {
    __m512i a, b;  // two halves of each row's sum side by side, rows 0..7 and 8..15
  };
  __m512i a, b;
  static inline Sum none() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  inline void load_weight(const int8_t* p) {
    a = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
    b = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(p + 32)));
  }
  inline Sum add_to(Sum s, const X* x) const {
    long long four;
    __builtin_memcpy(&four, x, 8);
    const __m512i v = _mm512_set1_epi64(four);
    return {_mm512_add_epi32(s.a, _mm512_madd_epi16(a, v)),
            _mm512_add_epi32(s.b, _mm512_madd_epi16(b, v))};
  }
  static inline V finish(Sum s, int32_t) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(s.a, even, s.b),
                                                _mm512_permutex2var_epi32(s.a, odd, s.b)))};
  }
  static inline void store_whole(X* to, V a) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
  }
};
#elif defined(SMELT_AVX2)
struct Dot {
  static constexpr int kM = 2, kMany = 1, kOne = 2;
  static constexpr bool kOffset = false;
  using X = int16_t;
  struct Sum {
    __m256i v[4];  // two halves of each row's sum side by side, four rows each
  };
  __m256i w[4];
  static inline Sum none() {
    const __m256i z = _mm256_setzero_si256();
    return {{z, z, z, z}};
  }
  inline void load_weight(const int8_t* p) {
    for (int i = 0; i < 4; i++) w[i] = _mm256_cvtepi8_epi16(load128(p + 16 * i));
  }
  inline Sum add_to(Sum s, const X* x) const {
    long long four;
    __builtin_memcpy(&four, x, 8);
    const __m256i v = _mm256_set1_epi64x(four);
    for (int i = 0; i < 4; i++) s.v[i] = _mm256_add_epi32(s.v[i], _mm256_madd_epi16(w[i], v));
    return s;
  }
  static inline __m256i halves(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
  }
  static inline V finish(const Sum& s, int32_t) {
    return from_ints(halves(s.v[0], s.v[1]), halves(s.v[2], s.v[3]));
  }
  static inline void store_whole(X* to, V x) {
    const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(both, 0xd8));
  }
};
#else
struct Dot {
  static constexpr int kM = 2, kMany = 1, kOne = 1;
  static constexpr bool kOffset = false;
  using X = int16_t;
  struct Sum {
    int32_t v[16];
  };
  const int8_t* w;
  static inline Sum none() { return {}; }
  inline void load_weight(const int8_t* p) { w = p; }
  inline Sum add_to(Sum s, const X* x) const {
    for (int i = 0; i < 16; i++)
      s.v[i] += w[4 * i] * x[0] + w[4 * i + 1] * x[1] + w[4 * i + 2] * x[2] + w[4 * i + 3] * x[3];
    return s;
  }
  static inline V finish(const Sum& s, int32_t) {
    return each([&](int i) { return (float)s.v[i]; });
  }
  static inline void store_whole(X* to, const V& a) {
    for (int i = 0; i < 16; i++) to[i] = (X)a.f[i];
  }
};
#endif

struct QuantizedX {
  float* scales;     // [m]
  int32_t* offsets;  // [m], 128 times the row's sum where Dot wants it
  Dot::X* x;
  int64_t row;  // features a row, padded
};

// As bytes rows do not begin at multiples of 4 KiB, which would share few places of a cache.
QuantizedX quantized_x(const W8A8& q) {
  const int64_t m = round_up(q.m, kLanes), row = round_up(q.k, 64);
  float* scales = (float*)q.quantized_x;
  return {scales, (int32_t*)(scales + m), (Dot::X*)(scales + 2 * m),
          row % 4096 ? row : row + 64};
}

int64_t w8a8_scratch(const W8A8& q) {
  const int64_t x = whole_tiles(q.m) * quantized_x(q).row * (int64_t)sizeof(Dot::X);
  return 8 * round_up(q.m, kLanes) + x;
}

template <class T>
void w8a8_prepare_rows(const W8A8& q, int64_t first, int64_t last) {
  const QuantizedX to = quantized_x(q);
  for (int64_t m = first; m < last; m++) {
    const T* x = (const T*)q.x + m * q.k;
    Dot::X* row = to.x + m * to.row;
    V most = zero(), bad = zero();
    for (int64_t i = 0; i < q.k; i += kLanes) {
      const V v = load_some(x + i, q.k - i);
      most = max(most, max(v, sub(zero(), v)));
      bad = add(bad, mul(v, zero()));  // NaN from the first NaN or infinity on
    }
    const float poison = sum(bad);
    to.offsets[m] = 0;
    if (poison != poison) {
      to.scales[m] = poison;
      __builtin_memset(row, 0, (std::size_t)to.row * sizeof(Dot::X));
      continue;
    }
    float scale = q.input_scale ? *q.input_scale : largest(most) / 127.0f;
    if (!q.input_scale && scale == 0) scale = 1;
    to.scales[m] = scale;
    V total = zero();
    for (int64_t i = 0; i < q.k; i += kLanes) {
      const V whole = round(div(load_some(x + i, q.k - i), set1(scale)));
      const V v = max(min(whole, set1(127.0f)), set1(-127.0f));
      total = add(total, v);
      Dot::store_whole(row + i, v);
    }
    if (Dot::kOffset) to.offsets[m] = 128 * (int32_t)sum(total);
  }
}

void w8a8_prepare(const W8A8& q, int64_t first, int64_t last) {
  with_type(q.type, [&](auto* t) {
    w8a8_prepare_rows<std::remove_pointer_t<decltype(t)>>(q, first, last);
  });
}

// B neighbouring blocks of sixteen rows, M rows of x.
template <class T, int B, int M>
inline void w8a8_tile(const W8A8& q, int64_t block, int64_t m) {
  const QuantizedX from = quantized_x(q);
  const int64_t steps = divide_up(q.k, 4);
  const int8_t* w = q.packed + block * steps * 64;
  const Dot::X* x = from.x + m * from.row;
  Dot::Sum acc[B][M];
  for (auto& row : acc)
    for (auto& a : row) a = Dot::none();
  for (int64_t s = 0; s < steps; s++) {
    for (int b = 0; b < B; b++) {
      Dot weights;
      const int8_t* at = w + (b * steps + s) * 64;
      // The same place of the next tile: hardware prefetching loses its way at each block's end.
      if (M <= 4) __builtin_prefetch(at + B * steps * 64, 0, 2);
      weights.load_weight(at);
      for (int c = 0; c < M; c++) acc[b][c] = weights.add_to(acc[b][c], x + c * from.row + s * 4);
    }
  }
  for (int b = 0; b < B; b++) {
    const int64_t n = (block + b) * kLanes;
    if (q.n <= n) break;
    const int64_t rows = smaller(kLanes, q.n - n);
    const V scale = load_some(q.scales + n, rows);
    for (int c = 0; c < M; c++) {
      V y = mul(Dot::finish(acc[b][c], from.offsets[m + c]), mul(set1(from.scales[m + c]), scale));
      if (q.bias) y = add(y, load_some((const T*)q.bias + n, rows));
      store_some((T*)q.out + (m + c) * q.n + n, y, rows);
    }
  }
}

// Chooses the tile made for `columns` rows of x, of those made for M and fewer.
template <class T, int B, int M>
inline void w8a8_columns(const W8A8& q, int64_t block, int64_t m, int64_t columns) {
  if (columns == M) return w8a8_tile<T, B, M>(q, block, m);
  if constexpr (M > 1) w8a8_columns<T, B, M - 1>(q, block, m, columns);
}

template <class T>
void w8a8_blocks(const W8A8& q, int64_t first, int64_t last) {
  // One row: as many blocks at once as it takes to hide the latency of the sums.
  for (; q.m == 1 && first + Dot::kOne <= last; first += Dot::kOne)
    w8a8_tile<T, Dot::kOne, 1>(q, first, 0);
  while (first < last) {
    const bool many = first + Dot::kMany <= last;
    for (int64_t m = 0; m < q.m; m += Dot::kM) {
      const int64_t columns = smaller(Dot::kM, q.m - m);
      many ? w8a8_columns<T, Dot::kMany, Dot::kM>(q, first, m, columns)
           : w8a8_columns<T, 1, Dot::kM>(q, first, m, columns);
    }
    first += many ? Dot::kMany : 1;
  }
}

void w8a8(const W8A8& q, int64_t first, int64_t last) {
  with_type(q.type, [&](auto* t) {
    w8a8_blocks<std::remove_pointer_t<decltype(t)>>(q, first, last);
  });
}
