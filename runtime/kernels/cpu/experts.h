// What stands between and behind the two products of an expert: the gate, and the weighted sum of a
// token's experts. Every row begins a vector of its own, so that it does not matter where it lies.

// erfc(x) / 2 for x >= 0, to about 1e-7 (Abramowitz and Stegun, Handbook, 7.1.26).
inline V half_erfc(V x) {
  const V t = div(set1(1.0f), fma(set1(0.3275911f), x, set1(1.0f)));
  V p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  return mul(mul(set1(0.5f), mul(p, t)), exp(sub(zero(), mul(x, x))));
}

inline V activate(Activation kind, V x) {
  switch (kind) {
    case Activation::Silu:
      return div(x, add(set1(1.0f), exp(sub(zero(), x))));
    case Activation::Gelu: {
      const V tail = half_erfc(mul(max(x, sub(zero(), x)), set1(0.70710678118654752f)));
      const V rest = sub(set1(1.0f), add(tail, tail));
      return mul(x, add(tail, where_not_below(x, 0.0f, rest)));
    }
    case Activation::GeluTanh: {
      const V cubed = mul(mul(x, x), x);
      const V inside = mul(set1(0.79788456080286536f), fma(set1(0.044715f), cubed, x));
      return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inside)));
    }
    default:
      return max(zero(), x);
  }
}

void gate(Type type, Activation kind, const void* wide, void* out, int64_t n) {
  with_type(type, [&](auto* t) {
    const auto* row = (const decltype(t))wide;
    for (int64_t i = 0; i < n; i += kLanes) {
      const V up = load_some(row + n + i, n - i);
      const V a = activate(kind, load_some(row + i, n - i));
      store_some((decltype(t))out + i, mul(a, up), n - i);
    }
  });
}

void combine(Type type, const void* rows, const int64_t* places, const float* weights,
             int64_t count, void* out, int64_t n) {
  with_type(type, [&](auto* t) {
    for (int64_t i = 0; i < n; i += kLanes) {
      V total = zero();
      for (int64_t j = 0; j < count; j++) {
        const auto* row = (const decltype(t))rows + places[j] * n;
        total = fma(set1(weights[j]), load_some(row + i, n - i), total);
      }
      store_some((decltype(t))out + i, total, n - i);
    }
  });
}
