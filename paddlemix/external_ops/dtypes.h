// Licensed under the Apache License, Version 2.0; see LICENSE.
// From Paddle's dtypes to the types of the kernels.
#pragma once

#include "kernel.h"
#include "simd.h"

// f of a value of the type, where that is float32, float16 or bfloat16; `what` tells in an error what takes these.
template <class F>
auto with_float(paddle::DataType type, const char* what, F f) {
  switch (type) {
    case paddle::DataType::FLOAT32:
      return f(float());
    case paddle::DataType::FLOAT16:
      return f(simd::float16());
    case paddle::DataType::BFLOAT16:
      return f(simd::bfloat16());
    default:
      PD_THROW(what, " takes float32, float16 or bfloat16");
  }
}

// The same of few_rows_linear's weights: float32, bfloat16, int8, or uint8 for 4 bits.
template <class F>
auto with_weight(paddle::DataType type, F f) {
  switch (type) {
    case paddle::DataType::FLOAT32:
      return f(float());
    case paddle::DataType::BFLOAT16:
      return f(simd::bfloat16());
    case paddle::DataType::INT8:
      return f(int8_t());
    case paddle::DataType::UINT8:
      return f(uint8_t());
    default:
      PD_THROW("a weight must be float32, bfloat16, int8 or uint8 (4 bits)");
  }
}

inline bool is_float(const paddle::Tensor& x, const std::vector<int64_t>& shape) {
  return x.is_cpu() && x.dtype() == paddle::DataType::FLOAT32 && x.shape() == shape;
}
