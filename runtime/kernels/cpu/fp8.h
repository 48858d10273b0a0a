// Rows of x times a weight of e4m3 bytes in the blocked layout (linear_fp8.py), sixteen output rows
// a vector. Bytes become floats exactly; x is rounded to e4m3 first where the layer wants that.

constexpr float kE4m3Max = 448.0f;

// A byte's exponent and mantissa are those of a float16 that is 2^8 too small, denormal ones too.
#if defined(SMELT_AVX512)
inline V load_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i size = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
  return mul({_mm512_cvtph_ps(_mm256_or_si256(sign, size))}, set1(256.0f));
}
#elif defined(SMELT_AVX2)
inline V load_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(load128(p));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i size = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
  const __m256i half = _mm256_or_si256(sign, size);
  return mul({_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))},
             set1(256.0f));
}
#else
inline V load_e4m3(const uint8_t* p) {
  // The same with a float32 that is 2^120 too small, whose denormals plain code multiplies right.
  return each([&](int i) {
    const uint32_t b = p[i];
    return as_float((b & 0x80) << 24 | (b & 0x7f) << 20) * 0x1p120f;
  });
}
#endif

// To the nearest value of e4m3, ties to even; a is within -448..448.
inline V rounded_to_e4m3(V a) {
  float lanes[kLanes];
  store(lanes, a);
  for (float& x : lanes) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits & 0x80000000u;
    bits ^= sign;
    float size;
    __builtin_memcpy(&size, &bits, 4);
    const float small = (size + 24576.0f) - 24576.0f;  // under 2^-6: multiples of 2^-9
    uint32_t small_bits;
    __builtin_memcpy(&small_bits, &small, 4);
    const uint32_t normal = (bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u;
    bits = (bits < 0x3c800000u ? small_bits : normal) | sign;
    __builtin_memcpy(&x, &bits, 4);
  }
  return load(lanes);
}

int64_t fp8_scratch(const Fp8& q) { return 4 * q.m * round_up(q.k, kLanes); }

// Features first..last of a row, quantized with one scale and scaled back.
template <class T>
inline void fp8_quantize(const T* x, float* to, int64_t n, const float* given) {
  V most = zero(), bad = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = load_some(x + i, n - i);
    most = max(most, max(v, sub(zero(), v)));
    bad = add(bad, mul(v, zero()));  // NaN from the first NaN or infinity on
  }
  const float poison = sum(bad);
  float scale = given ? *given : largest(most) / kE4m3Max;
  if (!given && scale == 0) scale = 1;
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = div(load_some(x + i, n - i), set1(scale));
    const V bounded = max(min(v, set1(kE4m3Max)), set1(-kE4m3Max));
    const V back = mul(rounded_to_e4m3(bounded), set1(scale));
    store_some(to + i, poison != poison ? set1(poison) : back, n - i);
  }
}

template <class T>
void fp8_prepare_rows(const Fp8& q, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; m++) {
    const T* x = (const T*)q.x + m * q.k;
    float* row = (float*)q.packed_x + m * round_up(q.k, kLanes);
    if (!q.quantize_x) {
      for (int64_t i = 0; i < q.k; i += kLanes)
        store_some(row + i, load_some(x + i, q.k - i), q.k - i);
      continue;
    }
    for (int64_t i = 0; i < q.k; i += q.x_group)
      fp8_quantize(x + i, row + i, smaller(q.x_group, q.k - i), q.input_scale);
  }
}

void fp8_prepare(const Fp8& q, int64_t first, int64_t last) {
  with_type(q.type, [&](auto* t) {
    fp8_prepare_rows<std::remove_pointer_t<decltype(t)>>(q, first, last);
  });
}

// B neighbouring blocks of sixteen rows, M rows of x.
template <class T, int B, int M>
inline void fp8_tile(const Fp8& q, int64_t block, int64_t m) {
  const int64_t row = round_up(q.k, kLanes);
  const uint8_t* w = q.packed + block * q.k * kLanes;
  const float* x = (const float*)q.packed_x + m * row;
  V total[B][M];
  for (auto& line : total)
    for (auto& t : line) t = zero();
  for (int64_t g = 0; g < q.groups; g++) {
    V acc[B][M];
    for (auto& line : acc)
      for (auto& a : line) a = zero();
    const int64_t end = smaller((g + 1) * q.group, q.k);
    for (int64_t i = g * q.group; i < end; i++) {
      for (int b = 0; b < B; b++) {
        const uint8_t* at = w + (b * q.k + i) * kLanes;
        if (M <= 4) __builtin_prefetch(at + B * q.k * kLanes, 0, 2);
        const V weights = load_e4m3(at);
        for (int c = 0; c < M; c++) acc[b][c] = fma(weights, set1(x[c * row + i]), acc[b][c]);
      }
    }
    for (int b = 0; b < B; b++) {
      const V scale = load(q.scales + ((block + b) * q.groups + g) * kLanes);
      for (int c = 0; c < M; c++) total[b][c] = fma(scale, acc[b][c], total[b][c]);
    }
  }
  for (int b = 0; b < B; b++) {
    const int64_t n = (block + b) * kLanes;
    if (q.n <= n) break;
    const int64_t rows = smaller(kLanes, q.n - n);
    const V bias = q.bias ? load_some((const T*)q.bias + n, rows) : zero();
    for (int c = 0; c < M; c++)
      store_some((T*)q.out + (m + c) * q.n + n, add(total[b][c], bias), rows);
  }
}

template <class T, int B, int M>
inline void fp8_columns(const Fp8& q, int64_t block, int64_t m, int64_t columns) {
  if (columns == M) return fp8_tile<T, B, M>(q, block, m);
  if constexpr (M > 1) fp8_columns<T, B, M - 1>(q, block, m, columns);
}

template <class T>
void fp8_blocks(const Fp8& q, int64_t first, int64_t last) {
  constexpr int kOne = 4, kMany = 2, kM = kColumns;
  for (; q.m == 1 && first + kOne <= last; first += kOne) fp8_tile<T, kOne, 1>(q, first, 0);
  while (first < last) {
    const bool many = first + kMany <= last;
    for (int64_t m = 0; m < q.m; m += kM) {
      const int64_t columns = smaller(kM, q.m - m);
      many ? fp8_columns<T, kMany, kM>(q, first, m, columns)
           : fp8_columns<T, 1, kM>(q, first, m, columns);
    }
    first += many ? kMany : 1;
  }
}

void fp8(const Fp8& q, int64_t first, int64_t last) {
  with_type(q.type, [&](auto* t) {
    fp8_blocks<std::remove_pointer_t<decltype(t)>>(q, first, last);
  });
}

// Rows of the dense weight, [16 rows a block, k]. A tile at a time, so that what is written with
// the features apart is still in the cache when it is read back in rows.
void fp8_dequantize(const Fp8& q, int64_t first, int64_t last, void* to) {
  constexpr int64_t kTile = 32;
  with_type(q.type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    T tile[kTile][kLanes];
    for (int64_t block = first; block < last; block++) {
      T* out = (T*)to + (block - first) * kLanes * q.k;
      const uint8_t* packed = q.packed + block * q.k * kLanes;
      for (int64_t g = 0; g < q.groups; g++) {
        const V scale = load(q.scales + (block * q.groups + g) * kLanes);
        const int64_t end = smaller((g + 1) * q.group, q.k);
        for (int64_t i = g * q.group; i < end; i += kTile) {
          const int64_t count = smaller(kTile, end - i);
          for (int64_t j = 0; j < count; j++)
            store(tile[j], mul(load_e4m3(packed + (i + j) * kLanes), scale));
          for (int64_t row = 0; row < kLanes; row++)
            for (int64_t j = 0; j < count; j++) out[row * q.k + i + j] = tile[j][row];
        }
      }
    }
  });
}
