// Few rows of x times a weight of 4 or 8 bits in the blocked layout: sixteen output rows a vector.
//
// Within a group of features the sum runs over integers, and the scale is applied once:
// out += scale * (sum (q - 8) x - (zero - 8) sum x). As in dense.h a sum's order depends on
// nothing but k and the group size.

#if defined(SMELT_AVX512)
constexpr int kColumns = 4;  // rows of x in one register tile
#else
constexpr int kColumns = 2;
#endif

inline V load_scales(const Quantized& q, int64_t block, int64_t group) {
  return load((const bf16*)q.scales + (block * q.groups + group) * kLanes);
}
inline V load_zeros(const Quantized& q, int64_t block, int64_t group) {
  return sub(load(q.zeros + (block * q.groups + group) * kLanes), set1(8.0f));
}

// Sixteen rows' next features times x. Step: features at once.
struct Int8 {
  static constexpr int64_t kStep = 1, kBytes = 16, kM = kColumns;
  using X = float;
  V w;
  inline void load_weight(const void* p) { w = load((const int8_t*)p); }
  inline V add_to(V sum, const X* x) const { return fma(w, set1(*x), sum); }
};

struct Int4 {
  static constexpr int64_t kStep = 8, kBytes = 64, kM = kColumns;
  using X = float;
  V w[8];
  inline void load_weight(const void* p) {
    Nibbles n = load_nibbles((const int32_t*)p);
    for (int j = 0; j < 8; j++) w[j] = nibble(n, j);
  }
  inline V add_to(V sum, const X* x) const {
    for (int j = 0; j < 8; j++) sum = fma(w[j], set1(x[j]), sum);
    return sum;
  }
};

template <class T, class W>
inline void pack_features(const T* x, typename W::X* to, int64_t k) {
  for (int64_t i = 0; i < k; i += 16) store_some(to + i, load_some(x + i, k - i), k - i);
  for (int64_t i = k; i < round_up(k, W::kStep); i++) to[i] = 0;
}

#if defined(SMELT_AVX512_BF16)
// x in bfloat16 multiplies pairs: the nibbles of one 32-bit word, four bits of each half at a time,
// become a pair of bfloat16 by one table look-up (exact: -8..7), products are summed in float32.
struct Int4Pairs {
  static constexpr int64_t kStep = 8, kBytes = 64, kM = kColumns;
  using X = bf16;  // eight features as the pairs (0, 4) (1, 5) (2, 6) (3, 7)
  __m512i w[4];
  inline void load_weight(const void* p) {
    // permutexvar on 16-bit lanes reads five bits of an index: the table is there twice.
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040,
        (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
    __m512i n = _mm512_loadu_si512(p);
    for (int j = 0; j < 4; j++)
      w[j] = _mm512_permutexvar_epi16(_mm512_srli_epi32(n, 4 * j), table);
  }
  inline V add_to(V sum, const X* x) const {
    for (int j = 0; j < 4; j++) {
      int pair;
      __builtin_memcpy(&pair, x + 2 * j, 4);
      sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)w[j], (__m512bh)_mm512_set1_epi32(pair));
    }
    return sum;
  }
};

// Two features of 8 bits as a pair: integers up to 127 are exact in bfloat16, so the upper halves
// of their floats hold them whole.
struct Int8Pairs {
  static constexpr int64_t kStep = 2, kBytes = 32, kM = 8;
  using X = bf16;
  __m512i w;
  inline void load_weight(const void* p) {
    const V a = load((const int8_t*)p), b = load((const int8_t*)p + 16);
    w = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16), _mm512_castps_si512(b.v));
  }
  inline V add_to(V sum, const X* x) const {
    int pair;
    __builtin_memcpy(&pair, x, 4);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair))};
  }
};

inline bool in_pairs(const Quantized& q) {
  return q.type == Type::BF16 && (q.bits == 4 || q.k / q.groups % 2 == 0);
}

inline void pack_pairs(const bf16* x, bf16* to, int64_t k) {
  for (int64_t i = 0; i < k; i += 8) {
    bf16 some[8] = {};
    for (int64_t j = i; j < k && k - i < 8; j++) some[j - i] = x[j];
    const __m128i v = _mm_loadu_si128((const __m128i*)(k - i < 8 ? some : x + i));
    _mm_storeu_si128((__m128i*)(to + i), _mm_unpacklo_epi16(v, _mm_srli_si128(v, 8)));
  }
}
#endif

struct PackedX {
  float* sums;  // [m, groups], the sum of x over each group
  void* x;
  int64_t row;  // features a row, padded
};

PackedX packed_x(const Quantized& q) {
  float* sums = (float*)q.packed_x;
  return {sums, sums + round_up(q.m * q.groups, kLanes), round_up(q.k, 16)};
}

int64_t quantized_scratch(const Quantized& q) {
  return 4 * (round_up(q.m * q.groups, kLanes) + q.m * round_up(q.k, 16));
}

template <class T>
void prepare_rows(const Quantized& q, int64_t first, int64_t last) {
  const PackedX to = packed_x(q);
  const int64_t size = q.k / q.groups;
  for (int64_t m = first; m < last; m++) {
    const T* x = (const T*)q.x + m * q.k;
    if (q.bits == 4) {
      for (int64_t g = 0; g < q.groups; g++) {
        V total = zero();
        for (int64_t i = 0; i < size; i += 16)
          total = add(total, load_some(x + g * size + i, size - i));
        to.sums[m * q.groups + g] = sum(total);
      }
    }
#if defined(SMELT_AVX512_BF16)
    if (in_pairs(q)) {
      bf16* row = (bf16*)to.x + m * to.row;
      q.bits == 4 ? pack_pairs((const bf16*)x, row, q.k)
                  : (void)__builtin_memcpy(row, x, (std::size_t)q.k * 2);
      continue;
    }
#endif
    float* row = (float*)to.x + m * to.row;
    q.bits == 4 ? pack_features<T, Int4>(x, row, q.k) : pack_features<T, Int8>(x, row, q.k);
  }
}

void quantized_prepare(const Quantized& q, int64_t first, int64_t last) {
  with_type(q.type, [&](auto* t) {
    prepare_rows<std::remove_pointer_t<decltype(t)>>(q, first, last);
  });
}

// B neighbouring blocks of sixteen rows, M rows of x.
template <class T, class W, int B, int M>
inline void quantized_tile(const Quantized& q, int64_t block, int64_t m) {
  const PackedX packed = packed_x(q);
  const int64_t steps = divide_up(q.k, W::kStep);
  const int64_t group_steps = divide_up(q.k / q.groups, W::kStep);
  const char* w = (const char*)q.packed + block * steps * W::kBytes;
  const typename W::X* x = (const typename W::X*)packed.x + m * packed.row;
  const float* sums = packed.sums + m * q.groups;
  V total[B][M];
  for (auto& row : total)
    for (auto& t : row) t = zero();
  for (int64_t g = 0; g < q.groups; g++) {
    V acc[B][M];
    for (auto& row : acc)
      for (auto& a : row) a = zero();
    const int64_t end = (g + 1) * group_steps;
    for (int64_t s = g * group_steps; s < end; s++) {
      for (int b = 0; b < B; b++) {
        W weights;
        const char* at = w + (b * steps + s) * W::kBytes;
        // The same place of the next tile: hardware prefetching loses its way at each block's end.
        if (M <= 4) __builtin_prefetch(at + B * steps * W::kBytes, 0, 2);
        weights.load_weight(at);
        for (int c = 0; c < M; c++)
          acc[b][c] = weights.add_to(acc[b][c], x + c * packed.row + s * W::kStep);
      }
    }
    for (int b = 0; b < B; b++) {
      const V scale = load_scales(q, block + b, g);
      V offset = zero();
      if (q.zeros) offset = load_zeros(q, block + b, g);
      for (int c = 0; c < M; c++) {
        V a = acc[b][c];
        if (q.zeros) a = sub(a, mul(offset, set1(sums[c * q.groups + g])));
        total[b][c] = fma(scale, a, total[b][c]);
      }
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

// Chooses the tile made for `columns` rows of x, of those made for M and fewer.
template <class T, class W, int B, int M>
inline void quantized_columns(const Quantized& q, int64_t block, int64_t m, int64_t columns) {
  if (columns == M) return quantized_tile<T, W, B, M>(q, block, m);
  if constexpr (M > 1) quantized_columns<T, W, B, M - 1>(q, block, m, columns);
}

template <class T, class W>
void quantized_blocks(const Quantized& q, int64_t first, int64_t last) {
  // As many blocks at once as it takes to hide the latency of the sums.
  constexpr int kOne = 4, kMany = 2;
  for (int64_t m = 0; q.m - m == 1 && first + kOne <= last; first += kOne)
    quantized_tile<T, W, kOne, 1>(q, first, m);
  while (first < last) {
    const bool many = first + kMany <= last;
    for (int64_t m = 0; m < q.m; m += W::kM) {
      const int64_t columns = smaller(W::kM, q.m - m);
      many ? quantized_columns<T, W, kMany, W::kM>(q, first, m, columns)
           : quantized_columns<T, W, 1, W::kM>(q, first, m, columns);
    }
    first += many ? kMany : 1;
  }
}

void quantized(const Quantized& q, int64_t first, int64_t last) {
#if defined(SMELT_AVX512_BF16)
  if (in_pairs(q)) {
    return q.bits == 4 ? quantized_blocks<bf16, Int4Pairs>(q, first, last)
                       : quantized_blocks<bf16, Int8Pairs>(q, first, last);
  }
#endif
  with_type(q.type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    q.bits == 4 ? quantized_blocks<T, Int4>(q, first, last)
                : quantized_blocks<T, Int8>(q, first, last);
  });
}

int64_t quantized_rows(const Quantized& q) {
  // A group that ends inside a word of eight nibbles: rare, and not worth a kernel.
  if (q.bits == 4 && q.groups > 1 && q.k / q.groups % 8 != 0) return 0;
#if defined(SMELT_AVX512_BF16)
  // Multiplying pairs is as fast as torch's bfloat16 product however many rows there are.
  if (in_pairs(q)) return INT64_MAX;
#endif
  return 64;
}

// The transposed dense weight, [k, 16 rows a block]: what a matrix product over many rows reads.
void dequantize(const Quantized& q, int64_t first, int64_t last, void* to, int64_t stride) {
  const int64_t size = q.k / q.groups;
  with_type(q.type, [&](auto* t) {
    for (int64_t block = first; block < last; block++) {
      auto* out = (decltype(t))to + (block - first) * kLanes;
      for (int64_t g = 0; g < q.groups; g++) {
        const V scale = load_scales(q, block, g);
        const V offset = q.zeros ? load_zeros(q, block, g) : zero();
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
          V w;
          if (q.bits == 4) {
            const int64_t word = block * divide_up(q.k, 8) + i / 8;
            w = sub(nibble(load_nibbles((const int32_t*)q.packed + word * kLanes), i % 8), offset);
          } else {
            w = load((const int8_t*)q.packed + (block * q.k + i) * kLanes);
          }
          store(out + i * stride, mul(w, scale));
        }
      }
    }
  });
}
