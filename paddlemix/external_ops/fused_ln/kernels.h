// Licensed under the Apache License, Version 2.0; see LICENSE.
// Rows and columns of norm.h, which includes this for each kind of vectors: the compiler makes them of these loops,
// which are the plain ones:
//
//   for each row:
//     mean = sum(x) / cols, 0 for RMS norm
//     rstd = 1 / sqrt(sum((x - mean)^2) / cols + epsilon)
//     for each column c: y[c] = (x[c] - mean) * rstd * scale[c] + bias[c]
namespace norm {
namespace SIMD {

template <class X, class W>
SIMD_TARGET void normalize_row(const Problem<X, W>& p, int64_t row, W* y) {
  const X* x = p.x + row * p.cols;
  double mean = 0, squares = 0;
  if (p.mean) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < p.cols; ++i) mean += simd::widen(x[i]);
    p.mean[row] = mean /= p.cols;
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < p.cols; ++i) {
    const double centred = simd::widen(x[i]) - mean;
    squares += centred * centred;
  }
  const double rstd = 1 / std::sqrt(squares / p.cols + p.epsilon);
  p.rstd[row] = rstd;
  const float middle = mean, size = rstd;
  if (p.bias) {
    for (int64_t i = 0; i < p.cols; ++i)
      narrow((simd::widen(x[i]) - middle) * size * simd::widen(p.scale[i]) + simd::widen(p.bias[i]), y + i);
  } else {
    for (int64_t i = 0; i < p.cols; ++i)
      narrow((simd::widen(x[i]) - middle) * size * simd::widen(p.scale[i]), y + i);
  }
}

// With n = (x - mean) * rstd and g = dy * scale: dx = (g - mean(g) - n * mean(g * n)) * rstd, and mean(g) is left
// out of RMS norm.
template <class X, class W>
SIMD_TARGET void row_gradient(const Problem<X, W>& p, int64_t row, const W* dy, X* dx) {
  const X* x = p.x + row * p.cols;
  const float mean = p.mean ? p.mean[row] : 0, rstd = p.rstd[row];
  double sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < p.cols; ++i) {
    const float g = simd::widen(dy[i]) * simd::widen(p.scale[i]);
    sum += g;
    product += double(g) * ((simd::widen(x[i]) - mean) * rstd);
  }
  const float shift = p.mean ? sum / p.cols : 0, slope = product / p.cols;
  for (int64_t i = 0; i < p.cols; ++i) {
    const float g = simd::widen(dy[i]) * simd::widen(p.scale[i]);
    narrow((g - shift - (simd::widen(x[i]) - mean) * rstd * slope) * rstd, dx + i);
  }
}

template <class X, class W>
SIMD_TARGET void column_gradients(const Problem<X, W>& p, int64_t begin, int64_t end, const W* dy, W* dscale,
                                  W* dbias) {
  double scale[BLOCK] = {}, bias[BLOCK] = {};
  for (int64_t row = 0; row < p.rows; ++row) {
    const X* x = p.x + row * p.cols + begin;
    const W* d = dy + row * p.cols + begin;
    const float mean = p.mean ? p.mean[row] : 0, rstd = p.rstd[row];
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) {
      const float gradient = simd::widen(d[i]);
      scale[i] += double(gradient) * ((simd::widen(x[i]) - mean) * rstd);
      bias[i] += gradient;
    }
  }
  for (int64_t i = 0; i < end - begin; ++i) {
    narrow(scale[i], dscale + begin + i);
    if (dbias) narrow(bias[i], dbias + begin + i);
  }
}

}  // namespace SIMD
}  // namespace norm
