#include "cpu/pointwise_loss.h"

#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/simd_math.h"

namespace p2pfast::P2PFAST_LEVEL {
namespace {

constexpr int64_t kFloatSum = 1024;  // values added up in float32 before float64 takes over

constexpr int64_t kStreamed = int64_t{8} << 20;  // bytes: more than what reads a gradient finds in a cache
constexpr int64_t kAlone = 65536;                // values that are no work for more than one thread

struct Result {
  Vec loss, gradient;
};

enum class Gradient { kNone, kStored, kStreamed };

// log(1 + y) for y in [0, 1], as 2 atanh(y / (2 + y)): relative error below 2e-7, also for tiny y.
P2PFAST_INLINE Vec log1p_vec(Vec y) {
  const Vec s = y / (2.0f + y), z = s * s;
  Vec p = splat(2.0f / 15.0f);
  p = p * z + 2.0f / 13.0f;
  p = p * z + 2.0f / 11.0f;
  p = p * z + 2.0f / 9.0f;
  p = p * z + 2.0f / 7.0f;
  p = p * z + 2.0f / 5.0f;
  p = p * z + 2.0f / 3.0f;
  return s * (p * z + 2.0f);
}

template <Loss kLoss>
P2PFAST_INLINE Result evaluate(Vec a, Vec b, Vec target) {
  if constexpr (kLoss == Loss::kLogistic) {
    const Vec e = exp_vec(a < 0.0f ? a : -a), near = 1.0f / (1.0f + e), far = e * near;
    const Vec positive = a < 0.0f ? Vec{} : a;
    // sigmoid(a) - target without cancellation, where either nears 1.
    const Vec up = a < 0.0f ? far : near, down = a < 0.0f ? near : far;
    const Vec gradient = up * (1.0f - target) - down * target;
    const Vec loss = positive - a * target + log1p_vec(e);
    return {a != a ? a : loss, a != a ? a : gradient};
  } else if constexpr (kLoss == Loss::kSquare) {
    const Vec d = a - target;
    return {d * d, d + d};
  } else if constexpr (kLoss == Loss::kHinge) {
    const Vec margin = 1.0f - target * a;
    return {margin < 0.0f ? Vec{} : margin, margin > 0.0f ? -target : margin != margin ? margin : Vec{}};
  } else if constexpr (kLoss == Loss::kLinear) {
    return {target * a, target};
  } else if constexpr (kLoss == Loss::kAbsoluteDifference) {
    const Vec d = a - b, one = splat(1.0f);
    return {d < 0.0f ? -d : d, d > 0.0f ? one : d < 0.0f ? -one : d};
  } else {
    const Vec d = a - b;
    return {d * d, d + d};
  }
}

constexpr bool has_two(Loss loss) {
  return loss == Loss::kAbsoluteDifference || loss == Loss::kSquaredDifference;
}

template <class A, class B, Loss kLoss, Gradient kGradient>
double run_chunk(const A* a, const B* b, A* gradient, int64_t count, float target_value, float weight) {
  const Vec target = splat(target_value), weights = splat(weight);
  double total = 0;
  int64_t i = 0;
  while (i + 2 * kLanes <= count) {
    Vec sum[2] = {};
    const int64_t end = min2(i + kFloatSum, count);
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      for (int k = 0; k < 2; ++k) {
        const int64_t at = i + k * kLanes;
        const Result r = evaluate<kLoss>(load(a + at), has_two(kLoss) ? load(b + at) : Vec{}, target);
        sum[k] += r.loss;
        if constexpr (kGradient == Gradient::kStored) store(gradient + at, r.gradient * weights);
        if constexpr (kGradient == Gradient::kStreamed) stream(gradient + at, r.gradient * weights);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) total += sum[0][lane] + sum[1][lane];
  }
  for (; i < count; i += kLanes) {
    const int64_t n = min2<int64_t>(kLanes, count - i);
    A rest_a[kLanes] = {}, out[kLanes];
    B rest_b[kLanes] = {};
    std::memcpy(rest_a, a + i, static_cast<size_t>(n) * sizeof(A));
    if constexpr (has_two(kLoss)) std::memcpy(rest_b, b + i, static_cast<size_t>(n) * sizeof(B));
    const Result r = evaluate<kLoss>(load(rest_a), load(rest_b), target);
    for (int64_t lane = 0; lane < n; ++lane) total += r.loss[lane];
    if constexpr (kGradient != Gradient::kNone) {
      store(out, r.gradient * weights);
      std::memcpy(gradient + i, out, static_cast<size_t>(n) * sizeof(A));
    }
  }
  if constexpr (kGradient == Gradient::kStreamed) finish_streams();
  return total;
}

template <class A, class B, Loss kLoss>
double run_part(const LossPart& part, int64_t first, int64_t count, float target) {
  const A* const a = static_cast<const A*>(part.a) + first;
  const B* const b = has_two(kLoss) ? static_cast<const B*>(part.b) + first : nullptr;
  if (!part.gradient) return run_chunk<A, B, kLoss, Gradient::kNone>(a, b, nullptr, count, target, 0.0f);
  A* const gradient = static_cast<A*>(part.gradient) + first;
  const float weight = part.gradient_weight;
  if constexpr (sizeof(A) == sizeof(float)) {
    const bool aligned = reinterpret_cast<uintptr_t>(gradient) % sizeof(Vec) == 0;
    if (aligned && part.count * static_cast<int64_t>(sizeof(A)) >= kStreamed)
      return run_chunk<A, B, kLoss, Gradient::kStreamed>(a, b, gradient, count, target, weight);
  }
  return run_chunk<A, B, kLoss, Gradient::kStored>(a, b, gradient, count, target, weight);
}

template <class A, Loss kLoss>
double run_typed(const LossPart& part, int64_t first, int64_t count, float target) {
  if constexpr (has_two(kLoss) && !(sizeof(A) == sizeof(float))) {
    if (part.b_type == ValueType::kFloat32) return run_part<A, float, kLoss>(part, first, count, target);
  }
  return run_part<A, A, kLoss>(part, first, count, target);
}

template <Loss kLoss>
void run_loss(const LossArgs& args) {
  auto run_one = [&](int64_t chunk, int) {
    // The last part that begins here or before: empty ones begin where the next one does.
    int64_t p = args.count - 1;
    while (args.parts[p].first_chunk > chunk) --p;
    const LossPart& part = args.parts[p];
    const int64_t first = (chunk - part.first_chunk) * kLossChunk;
    const int64_t count = min2(kLossChunk, part.count - first);
    auto run = part.type == ValueType::kFloat32    ? run_typed<float, kLoss>
               : part.type == ValueType::kBFloat16 ? run_typed<bf16, kLoss>
                                                   : run_typed<Half, kLoss>;
    args.sums[chunk] = run(part, first, count, args.target);
  };
  // A logarithm and an exponential take as long as 16 simpler losses.
  const int64_t values = args.chunks * kLossChunk * (kLoss == Loss::kLogistic ? 16 : 1);
  if (values <= kAlone) {
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) run_one(chunk, 0);
  } else {
    parallel_for(args.chunks, run_one);
  }
}

void run(const LossArgs& args) {
  switch (args.loss) {
    case Loss::kLogistic:
      return run_loss<Loss::kLogistic>(args);
    case Loss::kSquare:
      return run_loss<Loss::kSquare>(args);
    case Loss::kHinge:
      return run_loss<Loss::kHinge>(args);
    case Loss::kLinear:
      return run_loss<Loss::kLinear>(args);
    case Loss::kAbsoluteDifference:
      return run_loss<Loss::kAbsoluteDifference>(args);
    case Loss::kSquaredDifference:
      return run_loss<Loss::kSquaredDifference>(args);
  }
}

}  // namespace

const LossKernels loss_kernels = {run};

}  // namespace p2pfast::P2PFAST_LEVEL
