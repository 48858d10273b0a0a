// From torch's element types to the kernels'.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

#include "kernels.h"

namespace smelt {

inline std::optional<Type> type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Type::F32;
    case at::kHalf:
      return Type::F16;
    case at::kBFloat16:
      return Type::BF16;
    default:
      return std::nullopt;
  }
}

}  // namespace smelt
