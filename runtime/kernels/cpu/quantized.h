// Few rows of x times a weight of 2, 3, 4 or 8 bits in the blocked layout: sixteen output rows a
// vector.
//
// Within a group of features the sum runs over integers, and the scale is applied once:
// out += scale * (sum (q - half) x - (zero - half) sum x), half the middle of the range. As in
// dense.h a sum's order depends on nothing but k and the group size.

inline V load_scales(const Quantized& q, int64_t block, int64_t group) {
  return load((const bf16*)q.scales + (block * q.groups + group) * kLanes);
}
inline V load_zeros(const Quantized& q, int64_t block, int64_t group) {
  const V half = set1((float)(1 << (q.bits - 1)));
  return sub(load(q.zeros + (block * q.groups + group) * kLanes), half);
}

template <class T, class W>
inline void pack_features(const T* x, typename W::X* to, int64_t k) {
  for (int64_t i = 0; i < k; i += 16) store_some(to + i, load_some(x + i, k - i), k - i);
  for (int64_t i = k; i < round_up(k, W::kStep); i++) to[i] = 0;
}

#if defined(SMELT_AVX512_BF16)
inline bool in_pairs(const Quantized& q) {
  return q.type == Type::BF16 && (q.bits < 8 || q.k / q.groups % 2 == 0);
}

// Features i .. i + 8, zero beyond k.
inline __m128i features(const bf16* x, int64_t k, int64_t i) {
  bf16 some[8] = {};
  if (i + 8 <= k) return _mm_loadu_si128((const __m128i*)(x + i));
  for (int64_t j = i; j < k; j++) some[j - i] = x[j];
  return _mm_loadu_si128((const __m128i*)some);
}

// The pairs of Int4Pairs.
inline void pack_eights(const bf16* x, bf16* to, int64_t k) {
  for (int64_t i = 0; i < k; i += 8) {
    const __m128i v = features(x, k, i);
    _mm_storeu_si128((__m128i*)(to + i), _mm_unpacklo_epi16(v, _mm_srli_si128(v, 8)));
  }
}

// The pairs of Int2Pairs and Int3Pairs.
inline void pack_sixteens(const bf16* x, bf16* to, int64_t k) {
  for (int64_t i = 0; i < k; i += 16) {
    const __m128i a = features(x, k, i), b = features(x, k, i + 8);
    _mm_storeu_si128((__m128i*)(to + i), _mm_unpacklo_epi16(a, b));
    _mm_storeu_si128((__m128i*)(to + i + 8), _mm_unpackhi_epi16(a, b));
  }
}
#else
inline bool in_pairs(const Quantized&) { return false; }
#endif

struct PackedX {
  float* sums;  // [m, groups], the sum of x over each group
  void* x;
  int64_t row;  // features a row, padded
};

// In bfloat16 rows do not begin at multiples of 4 KiB, which would share few places of a cache.
PackedX packed_x(const Quantized& q) {
  float* sums = (float*)q.packed_x;
  const int64_t row = round_up(q.k, 32);
  return {sums, sums + round_up(q.m * q.groups, kLanes), row % 2048 ? row : row + 32};
}

int64_t quantized_scratch(const Quantized& q) {
  return 4 * (round_up(q.m * q.groups, kLanes) + whole_tiles(q.m) * packed_x(q).row);
}

template <class T>
void prepare_rows(const Quantized& q, int64_t first, int64_t last) {
  const PackedX to = packed_x(q);
  const int64_t size = q.k / q.groups;
  for (int64_t m = first; m < last; m++) {
    const T* x = (const T*)q.x + m * q.k;
    if (q.bits < 8) {
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
      if (q.bits == 8) __builtin_memcpy(row, x, (std::size_t)q.k * 2);
      if (q.bits == 4) pack_eights((const bf16*)x, row, q.k);
      if (q.bits < 4) pack_sixteens((const bf16*)x, row, q.k);
      continue;
    }
#endif
    float* row = (float*)to.x + m * to.row;
    q.bits == 8 ? pack_features<T, Int8>(x, row, q.k) : pack_features<T, Int4>(x, row, q.k);
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
  const int64_t group_steps = divide_up(q.k / q.groups, W::kStep);
  const int64_t block_bytes = W::bytes(q.k);
  const char* w = (const char*)q.packed + block * block_bytes;
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
        const char* of = w + b * block_bytes;
        // The same place of the next tile: hardware prefetching loses its way at each block's end.
        if (M <= 4) __builtin_prefetch(W::at(of, s) + B * block_bytes, 0, 2);
        weights.load_weight(of, s);
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
    switch (q.bits) {
      case 2:
        return quantized_blocks<bf16, Int2Pairs>(q, first, last);
      case 3:
        return quantized_blocks<bf16, Int3Pairs>(q, first, last);
      case 4:
        return quantized_blocks<bf16, Int4Pairs>(q, first, last);
      default:
        return quantized_blocks<bf16, Int8Pairs>(q, first, last);
    }
  }
#endif
  with_type(q.type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    switch (q.bits) {
      case 2:
        return quantized_blocks<T, Int2>(q, first, last);
      case 3:
        return quantized_blocks<T, Int3>(q, first, last);
      case 4:
        return quantized_blocks<T, Int4>(q, first, last);
      default:
        return quantized_blocks<T, Int8>(q, first, last);
    }
  });
}

int64_t quantized_rows(const Quantized& q) {
  // A group that ends inside a step: rare, and not worth a kernel.
  const int64_t step = q.bits == 8 ? 1 : q.bits < 4 && in_pairs(q) ? 16 : 8;
  if (q.groups > 1 && q.k / q.groups % step != 0) return 0;
#if defined(SMELT_AVX512_BF16)
  // Multiplying pairs is as fast as torch's bfloat16 product however many rows there are.
  if (in_pairs(q)) return INT64_MAX;
#endif
  return 64;
}

// One block's columns of the transposed weight.
template <class W, class T>
inline void dequantize_block(const Quantized& q, int64_t block, T* out, int64_t stride) {
  const int64_t size = q.k / q.groups;
  const char* packed = (const char*)q.packed + block * W::bytes(q.k);
  W weights;
  for (int64_t g = 0; g < q.groups; g++) {
    const V scale = load_scales(q, block, g);
    const V offset = q.zeros ? load_zeros(q, block, g) : zero();
    for (int64_t i = g * size; i < (g + 1) * size; i++) {
      if (i % W::kStep == 0 || i == g * size) weights.load_weight(packed, i / W::kStep);
      store(out + i * stride, mul(sub(weights.feature(i % W::kStep), offset), scale));
    }
  }
}

// The transposed dense weight, [k, 16 rows a block]: what a matrix product over many rows reads.
void dequantize(const Quantized& q, int64_t first, int64_t last, void* to, int64_t stride) {
  with_type(q.type, [&](auto* t) {
    for (int64_t block = first; block < last; block++) {
      auto* out = (decltype(t))to + (block - first) * kLanes;
      switch (q.bits) {
        case 2:
          dequantize_block<Int2>(q, block, out, stride);
          break;
        case 3:
          dequantize_block<Int3>(q, block, out, stride);
          break;
        case 4:
          dequantize_block<Int4>(q, block, out, stride);
          break;
        default:
          dequantize_block<Int8>(q, block, out, stride);
      }
    }
  });
}
