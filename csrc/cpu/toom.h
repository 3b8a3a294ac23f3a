// One-dimensional minimal filtering schemes (Winograd, Toom-Cook) as building blocks of the
// two-dimensional convolutions. F(m, r) computes m outputs of an r-tap filter with m + r - 1
// multiplications. See p2pfast/ops/conv/README.md for the mathematics.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace p2pfast::P2PFAST_LEVEL {

// The matrices of F(kOut, kTaps) for finite points P[0..n-2] and infinity:
//   y = At [(G g) * (Bt d)]
template <int kOut, int kTaps>
struct Toom {
  static constexpr int kPoints = kOut + kTaps - 1;
  double bt[kPoints][kPoints] = {};
  double g[kPoints][kTaps] = {};
  double at[kOut][kPoints] = {};

  constexpr explicit Toom(const double (&p)[kPoints - 1]) {
    constexpr int n = kPoints;
    for (int i = 0; i < n; ++i) {
      // Row i: coefficients of the product over all finite points but the i-th of (x - p).
      double poly[n] = {1.0};
      int degree = 0;
      double norm = 1.0;
      for (int j = 0; j < n - 1; ++j) {
        if (j == i) continue;
        for (int k = ++degree; k > 0; --k) poly[k] = poly[k - 1] - p[j] * poly[k];
        poly[0] *= -p[j];
        if (i < n - 1) norm *= p[i] - p[j];
      }
      for (int k = 0; k < n; ++k) bt[i][k] = poly[k];
      double power = 1.0;
      for (int k = 0; k < (kOut > kTaps ? kOut : kTaps); ++k) {
        if (i < n - 1) {
          if (k < kTaps) g[i][k] = power / norm;
          if (k < kOut) at[k][i] = power;
          power *= p[i];
        } else {
          if (k == kTaps - 1) g[i][k] = 1.0;
          if (k == kOut - 1) at[k][i] = 1.0;
        }
      }
    }
  }
};

// Calls f(std::integral_constant<int, 0>) ... f(std::integral_constant<int, kCount - 1>).
template <int kCount, class F>
P2PFAST_INLINE void unroll(F&& f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, kIndex>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// o[i * so] = sum_j M::at(i, j) * d[j * sd], the matrix known at compile time: its zeros and ones cost
// nothing.
template <class M, int kRows, int kColumns>
P2PFAST_INLINE void apply_matrix(const Vec* d, int sd, Vec* o, int so) {
  unroll<kRows>([&](auto i) __attribute__((always_inline)) {
    Vec sum = Vec{};
    bool first = true;
    unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
      constexpr float m = static_cast<float>(M::at(i, j));
      if constexpr (m != 0.0f) {
        const Vec v = d[j * sd];
        if (first) {
          sum = m == 1.0f ? v : v * m;
        } else {
          sum = m == 1.0f ? sum + v : m == -1.0f ? sum - v : sum + v * m;
        }
        first = false;
      }
    });
    o[i * so] = sum;
  });
}

// The two matrices of a filtering that act on data, for apply_matrix.
template <class F>
struct InputMatrix {
  static constexpr double at(int i, int j) { return F::m.bt[i][j]; }
};
template <class F>
struct OutputMatrix {
  static constexpr double at(int i, int j) { return F::m.at[i][j]; }
};

// F(4, 3) at 0, +-a, +-b, infinity. With these points the error is half of that with 1 and 2.
struct F43 {
  static constexpr double a = 0.65, b = 1.5;
  static constexpr Toom<4, 3> m{{0.0, a, -a, b, -b}};
  static constexpr int kPoints = 6;
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    constexpr float a1 = a, b1 = b, a2 = a * a, b2 = b * b;
    const Vec d1 = d[sd], d2 = d[2 * sd], d3 = d[3 * sd], d4 = d[4 * sd];
    const Vec even_a = d4 - b2 * d2, odd_a = a1 * (d3 - b2 * d1);
    const Vec even_b = d4 - a2 * d2, odd_b = b1 * (d3 - a2 * d1);
    o[0] = a2 * b2 * d[0] + (d4 - (a2 + b2) * d2);
    o[so] = even_a + odd_a;
    o[2 * so] = even_a - odd_a;
    o[3 * so] = even_b + odd_b;
    o[4 * so] = even_b - odd_b;
    o[5 * so] = a2 * b2 * d1 + (d[5 * sd] - (a2 + b2) * d3);
  }
  P2PFAST_INLINE static void output(const Vec* m_, int sm, Vec* o, int so) {
    constexpr float a1 = a, b1 = b, a2 = a * a, b2 = b * b, a3 = a * a * a, b3 = b * b * b;
    const Vec sa = m_[sm] + m_[2 * sm], da = m_[sm] - m_[2 * sm];
    const Vec sb = m_[3 * sm] + m_[4 * sm], db = m_[3 * sm] - m_[4 * sm];
    o[0] = m_[0] + (sa + sb);
    o[so] = a1 * da + b1 * db;
    o[2 * so] = a2 * sa + b2 * sb;
    o[3 * so] = a3 * da + (b3 * db + m_[5 * sm]);
  }
};

// F(6, 3) at 0, +-a, +-b, +-c, infinity: a fifth less products than F(4, 3), four times its error.
struct F63 {
  static constexpr double a = 0.55, b = 1.0, c = 2.0;
  static constexpr Toom<6, 3> m{{0.0, a, -a, b, -b, c, -c}};
  static constexpr int kPoints = 8;
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    constexpr double a2 = a * a, b2 = b * b, c2 = c * c;
    const Vec d1 = d[sd], d2 = d[2 * sd], d3 = d[3 * sd], d4 = d[4 * sd], d5 = d[5 * sd], d6 = d[6 * sd];
    // p (x^2 - q^2)(x^2 - r^2) (x +- p): even powers, and odd ones times p.
    auto pair = [&](double p, double q2, double r2, int at) __attribute__((always_inline)) {
      const float sum = static_cast<float>(q2 + r2), product = static_cast<float>(q2 * r2);
      const Vec even = (d6 - sum * d4) + product * d2;
      const Vec odd = static_cast<float>(p) * ((d5 - sum * d3) + product * d1);
      o[at * so] = even + odd;
      o[(at + 1) * so] = even - odd;
    };
    pair(a, b2, c2, 1);
    pair(b, a2, c2, 3);
    pair(c, a2, b2, 5);
    constexpr float e1 = a2 + b2 + c2, e2 = a2 * b2 + a2 * c2 + b2 * c2, e3 = a2 * b2 * c2;
    o[0] = (d6 - e1 * d4) + (e2 * d2 - e3 * d[0]);
    o[7 * so] = (d[7 * sd] - e1 * d5) + (e2 * d3 - e3 * d1);
  }
  P2PFAST_INLINE static void output(const Vec* m_, int sm, Vec* o, int so) {
    constexpr double a2 = a * a, c2 = c * c;
    constexpr float a1 = a, a_2 = a2, a_3 = a2 * a, a_4 = a2 * a2, a_5 = a2 * a2 * a;
    constexpr float c1 = c, c_2 = c2, c_3 = c2 * c, c_4 = c2 * c2, c_5 = c2 * c2 * c;
    static_assert(b == 1.0, "its powers are left out");
    const Vec sa = m_[sm] + m_[2 * sm], da = m_[sm] - m_[2 * sm];
    const Vec sb = m_[3 * sm] + m_[4 * sm], db = m_[3 * sm] - m_[4 * sm];
    const Vec sc = m_[5 * sm] + m_[6 * sm], dc = m_[5 * sm] - m_[6 * sm];
    o[0] = (m_[0] + sa) + (sb + sc);
    o[so] = a1 * da + (db + c1 * dc);
    o[2 * so] = a_2 * sa + (sb + c_2 * sc);
    o[3 * so] = a_3 * da + (db + c_3 * dc);
    o[4 * so] = a_4 * sa + (sb + c_4 * sc);
    o[5 * so] = (a_5 * da + db) + (c_5 * dc + m_[7 * sm]);
  }
};

// F(4, 4) at 0, +-a, +-b, c, infinity.
struct F44 {
  static constexpr Toom<4, 4> m{{0.0, 0.6, -0.6, 1.1, -1.1, 2.6}};
  static constexpr int kPoints = 7;
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<InputMatrix<F44>, 7, 7>(d, sd, o, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<OutputMatrix<F44>, 4, 7>(d, sd, o, so);
  }
};

// F(2, 4) at 0, +-a, b, infinity.
struct F24 {
  static constexpr Toom<2, 4> m{{0.0, 0.7, -0.7, 2.4}};
  static constexpr int kPoints = 5;
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<InputMatrix<F24>, 5, 5>(d, sd, o, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<OutputMatrix<F24>, 2, 5>(d, sd, o, so);
  }
};

// F(2, 3) at 0, +-1, infinity.
struct F23 {
  static constexpr Toom<2, 3> m{{0.0, 1.0, -1.0}};
  static constexpr int kPoints = 4;
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<InputMatrix<F23>, 4, 4>(d, sd, o, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<OutputMatrix<F23>, 2, 4>(d, sd, o, so);
  }
};

// F(4, 2) at 0, +-a, b, infinity.
struct F42 {
  static constexpr Toom<4, 2> m{{0.0, 0.8, -0.8, 1.6}};
  static constexpr int kPoints = 5;
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<InputMatrix<F42>, 5, 5>(d, sd, o, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<OutputMatrix<F42>, 4, 5>(d, sd, o, so);
  }
};

// F(2, 2) at 0, 1, infinity.
struct F22 {
  static constexpr Toom<2, 2> m{{0.0, 1.0}};
  static constexpr int kPoints = 3;
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<InputMatrix<F22>, 3, 3>(d, sd, o, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
    apply_matrix<OutputMatrix<F22>, 2, 3>(d, sd, o, so);
  }
};

// A scheme is what one dimension of a tile does:
//   kWindow input samples, from kStepIn * tile + origin, become kPoints points; the point of index i
//   is multiplied by row i of weight() and accumulated into point sum_of(i) of kSums, from which
//   output() makes kStepOut results.

template <class F, int kOut, int kFilter>
struct Stride1 {
  static constexpr int kTaps = kFilter, kWindow = kOut + kTaps - 1, kStepIn = kOut, kStepOut = kOut;
  static constexpr int kPoints = F::kPoints, kSums = F::kPoints;
  static constexpr int origin(int pad) { return -pad; }
  static constexpr int sum_of(int point) { return point; }
  static constexpr double weight(int point, int tap) { return F::m.g[point][tap]; }
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) { F::input(d, sd, o, so); }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) { F::output(d, sd, o, so); }
};

// Taps 0 and 2 fall on every other sample: a two-tap filter there; tap 1 on the samples between.
template <class F, int kOut>
struct Stride2Taps3 {
  static constexpr int kTaps = 3, kWindow = 2 * kOut + 1, kStepIn = 2 * kOut, kStepOut = kOut;
  static constexpr int kPoints = F::kPoints + kOut, kSums = kPoints;
  static constexpr int origin(int pad) { return -pad; }
  static constexpr int sum_of(int point) { return point; }
  static constexpr double weight(int point, int tap) {
    if (point < F::kPoints) return tap == 1 ? 0.0 : F::m.g[point][tap / 2];
    return tap == 1 ? 1.0 : 0.0;
  }
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    F::input(d, 2 * sd, o, so);
#pragma GCC unroll 16
    for (int i = 0; i < kOut; ++i) o[(F::kPoints + i) * so] = d[(2 * i + 1) * sd];
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
    F::output(d, sd, o, so);
#pragma GCC unroll 16
    for (int i = 0; i < kOut; ++i) o[i * so] += d[(F::kPoints + i) * sd];
  }
};

// Taps 0 and 2, and taps 1 and 3: two two-tap filters whose products add up point by point.
template <class F, int kOut>
struct Stride2Taps4 {
  static constexpr int kTaps = 4, kWindow = 2 * kOut + 2, kStepIn = 2 * kOut, kStepOut = kOut;
  static constexpr int kPoints = 2 * F::kPoints, kSums = F::kPoints;
  static constexpr int origin(int pad) { return -pad; }
  static constexpr int sum_of(int point) { return point % F::kPoints; }
  static constexpr double weight(int point, int tap) {
    return point / F::kPoints == tap % 2 ? F::m.g[point % F::kPoints][tap / 2] : 0.0;
  }
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    F::input(d, 2 * sd, o, so);
    F::input(d + sd, 2 * sd, o + F::kPoints * so, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) { F::output(d, sd, o, so); }
};

// Transposed, stride 2, padding 1. Even outputs see tap 1 alone, odd ones taps 0 and 2.
template <class F, int kOut>
struct Transposed3 {
  static constexpr int kTaps = 3, kWindow = kOut + 1, kStepIn = kOut, kStepOut = 2 * kOut;
  static constexpr int kPoints = kOut + F::kPoints, kSums = kPoints;
  static constexpr int origin(int) { return 0; }
  static constexpr int sum_of(int point) { return point; }
  static constexpr double weight(int point, int tap) {
    if (point < kOut) return tap == 1 ? 1.0 : 0.0;
    return tap == 1 ? 0.0 : F::m.g[point - kOut][tap == 2 ? 0 : 1];
  }
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
#pragma GCC unroll 16
    for (int i = 0; i < kOut; ++i) o[i * so] = d[i * sd];
    F::input(d, sd, o + kOut * so, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
#pragma GCC unroll 16
    for (int i = 0; i < kOut; ++i) o[2 * i * so] = d[i * sd];
    F::output(d + kOut * sd, sd, o + so, 2 * so);
  }
};

// Transposed, stride 2, padding 1. Even outputs see taps 3 and 1, odd ones taps 2 and 0.
template <class F, int kOut>
struct Transposed4 {
  static constexpr int kTaps = 4, kWindow = kOut + 2, kStepIn = kOut, kStepOut = 2 * kOut;
  static constexpr int kPoints = 2 * F::kPoints, kSums = kPoints;
  static constexpr int origin(int) { return -1; }
  static constexpr int sum_of(int point) { return point; }
  static constexpr double weight(int point, int tap) {
    const bool odd = point >= F::kPoints;
    const int even_tap[4] = {-1, 1, -1, 0}, odd_tap[4] = {1, -1, 0, -1};
    const int t = odd ? odd_tap[tap] : even_tap[tap];
    return t < 0 ? 0.0 : F::m.g[point % F::kPoints][t];
  }
  P2PFAST_INLINE static void input(const Vec* d, int sd, Vec* o, int so) {
    F::input(d, sd, o, so);
    F::input(d + sd, sd, o + F::kPoints * so, so);
  }
  P2PFAST_INLINE static void output(const Vec* d, int sd, Vec* o, int so) {
    F::output(d, sd, o, 2 * so);
    F::output(d + F::kPoints * sd, sd, o + so, 2 * so);
  }
};

}  // namespace p2pfast::P2PFAST_LEVEL
