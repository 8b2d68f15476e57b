// Licensed under the Apache License, Version 2.0; see LICENSE.
// tests/test_few_rows_linear.py compiles it: AVX-VNNI's products beside AVX-512 VNNI's, in the encoding of the latter.
#include <cstdio>

#include "few_rows_linear/few_rows_linear.h"

using namespace few_rows_linear;
using Numbers = std::vector<float>;

template <class T, class A, class B>
void compare(const char* name, int64_t rows, A wide, B narrow) {
  constexpr int64_t in = 300, out = 37;
  Numbers x(rows * in), weight(in * out), scale(out * 3), y(rows * out), z(rows * out);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(i);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = std::cos(i);
  std::vector<uint8_t> codes(out * 384);
  quantize<float>(weight.data(), out, in, std::is_same<T, int8_t>::value ? 8 : 4, codes.data(), scale.data());
  Problem p{x.data(), codes.data(), scale.data(), y.data(), rows, in, out};
  wide(p);
  p.y = z.data();
  narrow(p);
  float most = 0, difference = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    most = std::max(most, std::fabs(y[i]));
    difference = std::max(difference, std::fabs(y[i] - z[i]));
  }
  std::printf("%s %ld %g\n", name, (long)rows, most > 0 ? difference / most : NAN);
}

int main() {
  for (int64_t rows : {1, 5}) {
    compare<int8_t>("int8", rows, [](auto& p) { whole16::few_rows(p, 8); }, [](auto& p) { vex16::few_rows(p, 8); });
    compare<uint8_t>("int4", rows, [](auto& p) { whole8::few_rows(p, 8); }, [](auto& p) { vex8::few_rows(p, 8); });
  }
  compare<int8_t>("int8", 70, [](auto& p) { whole16::many_rows<int8_t>(p); }, [](auto& p) { vex16::many_rows<int8_t>(p); });
  compare<uint8_t>("int4", 70, [](auto& p) { whole8::many_rows<uint8_t>(p); }, [](auto& p) { vex8::many_rows<uint8_t>(p); });
}
