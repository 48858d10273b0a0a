// x [m, k] times a row-major weight [n, k] for few rows of x: each weight is read once from memory.
//
// A sum belongs to one (row of x, row of weight) and runs over k in one order, whatever the tile
// it is computed in: results do not depend on m or on the number of threads.

#if defined(SMELT_AVX512)
constexpr int kDenseN = 4, kDenseM = 4;  // rows of weight and of x in one register tile
#else
constexpr int kDenseN = 2, kDenseM = 2;
#endif
constexpr int64_t kStep = 32;  // features a step

// 32 weights times 32 features, added to sixteen partial sums. x lies in memory as prepare left it.
template <class T>
struct Product {
  using X = float;
  V a, b;
  inline void load_weight(const T* w) { load_pair(w, a, b); }
  inline V add_to(V sum, const X* x) const { return fma(b, load(x + 16), fma(a, load(x), sum)); }
  // Row of x in the order in which load_pair gives the weights; p has room for round_up(k, 32).
  static void pack(const T* x, X* p, int64_t k) {
    for (int64_t i = 0; i < k; i += kStep, p += kStep) {
      T lanes[kStep] = {};
      for (int64_t j = 0; j < smaller(kStep, k - i); j++) lanes[j] = x[i + j];
      V first, second;
      load_pair(lanes, first, second);
      store(p, first);
      store(p + 16, second);
    }
  }
};

#if defined(SMELT_AVX512_BF16)
template <>
struct Product<bf16> {
  using X = bf16;
  __m512i a;
  inline void load_weight(const bf16* w) { a = _mm512_loadu_si512(w); }
  inline V add_to(V sum, const X* x) const {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)_mm512_loadu_si512(x))};
  }
  static void pack(const bf16* x, X* p, int64_t k) {
    for (int64_t i = 0; i < round_up(k, kStep); i++) p[i] = i < k ? x[i] : bf16{0};
  }
};
#endif

template <class T, int N, int M>
inline void dense_tile(const T* w, int64_t k, const typename Product<T>::X* x, int64_t x_row,
                       float (*out)[kDenseN]) {
  V acc[N][M];
  for (auto& row : acc)
    for (auto& a : row) a = zero();
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    for (int r = 0; r < N; r++) {
      Product<T> p;
      // The same place of the next tile: hardware prefetching loses its way at each row's end.
      __builtin_prefetch(w + (r + N) * k + i, 0, 2);
      p.load_weight(w + r * k + i);
      for (int c = 0; c < M; c++) acc[r][c] = p.add_to(acc[r][c], x + c * x_row + i);
    }
  }
  if (i < k) {
    for (int r = 0; r < N; r++) {
      T last[kStep] = {};
      for (int64_t j = i; j < k; j++) last[j - i] = w[r * k + j];
      Product<T> p;
      p.load_weight(last);
      for (int c = 0; c < M; c++) acc[r][c] = p.add_to(acc[r][c], x + c * x_row + i);
    }
  }
#if defined(SMELT_AVX512)
  // Adding up sixteen registers one by one would take longer than a short row's products.
  if constexpr (N == 4 && M > 1) {
    V all[16];
    for (int r = 0; r < 4; r++)
      for (int c = 0; c < 4; c++) all[4 * r + c] = c < M ? acc[r][c < M ? c : 0] : zero();
    store(&out[0][0], sums(all));
    return;
  }
#endif
  for (int c = 0; c < M; c++)
    for (int r = 0; r < N; r++) out[c][r] = sum(acc[r][c]);
}

// Chooses the tile made for m rows of x, of those made for M and fewer.
template <class T, int N, int M>
inline void dense_columns(const T* w, int64_t k, const typename Product<T>::X* x, int64_t x_row,
                          int64_t m, float (*out)[kDenseN]) {
  if (m == M) return dense_tile<T, N, M>(w, k, x, x_row, out);
  if constexpr (M > 1) dense_columns<T, N, M - 1>(w, k, x, x_row, m, out);
}

template <class T>
void dense_rows(const Dense& d, int64_t first, int64_t last) {
  using X = typename Product<T>::X;
  const int64_t x_row = round_up(d.k, kStep);
  for (int64_t n = first; n < last;) {
    const int64_t rows = last - n >= kDenseN ? kDenseN : 1;
    const T* w = (const T*)d.weight + n * d.k;
    float repeated[16] = {};  // the bias of these rows, once for each row of x
    if (d.bias) store(repeated, load_some((const T*)d.bias + n, rows));
    for (int64_t i = kDenseN; i < kDenseM * kDenseN; i++) repeated[i] = repeated[i % kDenseN];
    const V bias = load(repeated);
    for (int64_t m = 0; m < d.m; m += kDenseM) {
      const int64_t columns = smaller(kDenseM, d.m - m);
      const X* x = (const X*)d.packed_x + m * x_row;
      alignas(64) float totals[kDenseM][kDenseN] = {};
      if (rows == kDenseN) {
        dense_columns<T, kDenseN, kDenseM>(w, d.k, x, x_row, columns, totals);
      } else {
        dense_columns<T, 1, kDenseM>(w, d.k, x, x_row, columns, totals);
      }
      alignas(64) T rounded[kDenseM * kDenseN < 16 ? 16 : kDenseM * kDenseN];
      store(rounded, add(load_some(&totals[0][0], kDenseM * kDenseN), bias));
      for (int64_t c = 0; c < columns; c++)
        std::memcpy((T*)d.out + (m + c) * d.n + n, rounded + c * kDenseN, rows * sizeof(T));
    }
    n += rows;
  }
}

#include "dense_amx.h"

int64_t dense_most(const Dense& d) {
#if defined(SMELT_AMX)
  if (amx_takes(d)) return 64;
#endif
  // torch's product takes some 30 us to set up: as long as ours does for so many multiplications.
  constexpr int64_t kSmall = 3 << 19;
  return larger(8, kSmall / larger(1, d.n * d.k));
}

int64_t dense_scratch(const Dense& d) {
#if defined(SMELT_AMX)
  if (amx_takes(d)) return amx_scratch(d);
#endif
  return d.m * round_up(d.k, kStep) * (int64_t)sizeof(float);
}

void dense_prepare(const Dense& d, int64_t first, int64_t last) {
#if defined(SMELT_AMX)
  if (amx_takes(d)) return amx_prepare(d, first, last);
#endif
  with_type(d.type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using X = typename Product<T>::X;
    for (int64_t m = first; m < last; m++)
      Product<T>::pack((const T*)d.x + m * d.k, (X*)d.packed_x + m * round_up(d.k, kStep), d.k);
  });
}

void dense(const Dense& d, int64_t first, int64_t last) {
#if defined(SMELT_AMX)
  if (amx_takes(d)) return amx_dense(d, first, last);
#endif
  with_type(d.type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    dense_rows<T>(d, first, last);
  });
}
