// The kernels of cuda/pointwise_loss.h. A block takes a chunk of kLossChunk values of one part: at most 32
// values a thread in float32, then float64, always in the same order.
#pragma once

#include <cmath>
#include <vector>

#include "cuda/numbers.h"
#include "cuda/phases.h"
#include "cuda/pointwise_loss.h"

namespace p2pfast::cuda {

P2PFAST_HD constexpr bool has_two(Loss loss) {
  return loss == Loss::kAbsoluteDifference || loss == Loss::kSquaredDifference;
}

// The loss of a value and its derivative; the formulas are those of csrc/cpu/kernels/pointwise_loss.cpp.
template <Loss kLoss>
P2PFAST_HD float evaluate(float a, float b, float target, float& gradient) {
  if constexpr (kLoss == Loss::kLogistic) {
    const float e = expf(a < 0.0f ? a : -a), near = 1.0f / (1.0f + e), far = e * near;
    // sigmoid(a) - target without cancellation, where either nears 1.
    const float up = a < 0.0f ? far : near, down = a < 0.0f ? near : far;
    gradient = a != a ? a : up * (1.0f - target) - down * target;
    return a != a ? a : (a < 0.0f ? 0.0f : a) - a * target + log1pf(e);
  } else if constexpr (kLoss == Loss::kHinge) {
    const float margin = 1.0f - target * a;
    gradient = margin > 0.0f ? -target : margin != margin ? margin : 0.0f;
    return margin < 0.0f ? 0.0f : margin;
  } else if constexpr (kLoss == Loss::kLinear) {
    gradient = target;
    return target * a;
  } else if constexpr (kLoss == Loss::kAbsoluteDifference) {
    const float d = a - b;
    gradient = d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : d;
    return d < 0.0f ? -d : d;
  } else {
    const float d = a - (kLoss == Loss::kSquare ? target : b);
    gradient = d + d;
    return d * d;
  }
}

template <Loss kLoss>
struct LossKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 3;
  static constexpr int kResident = 4;
  static constexpr int kParts = 64;
  static constexpr int kLanes = 32;  // of the reduction's second step

  struct Part {
    const void* a;
    const void* b;
    void* gradient;
    int64_t count;
    float weight, gradient_weight;
    uint32_t first_chunk;
    uint8_t type, b_type;
    bool aligned;  // all addresses to 16 bytes
  };
  struct Args {
    Part parts[kParts];
    double* sums;  // of the chunks, times their weights
    float target;
    int32_t count;
  };
  struct Shared {
    double thread[kThreads], lane[kLanes];
  };
  struct Local {};

  static P2PFAST_HD const Part& part_of(const Args& a, int64_t block) {
    int p = 0;
    while (p + 1 < a.count && a.parts[p + 1].first_chunk <= static_cast<uint32_t>(block)) ++p;
    return a.parts[p];
  }

  // kVec values of each array are one load of 16 bytes (two for a float32 b beside a 16-bit a).
  template <class A, class B>
  static P2PFAST_HD float run_chunk(const Part& part, float target, int64_t block, int thread) {
    constexpr int kVec = 16 / sizeof(A), kPack = 16 / sizeof(B) < kVec ? 16 / sizeof(B) : kVec;
    const int64_t first = (block - part.first_chunk) * kLossChunk;
    const int count = static_cast<int>(min2<int64_t>(kLossChunk, part.count - first));
    const A* const a = static_cast<const A*>(part.a) + first;
    const B* const b = has_two(kLoss) ? static_cast<const B*>(part.b) + first : nullptr;
    A* const gradient = part.gradient != nullptr ? static_cast<A*>(part.gradient) + first : nullptr;
    float total = 0;
    int i = 0;
    if (part.aligned) {
      for (i = thread * kVec; i + kVec <= count; i += kThreads * kVec) {
        const Pack<A, kVec> x = load_pack<kVec>(a + i);
        float y[kVec], derivative;
        if constexpr (has_two(kLoss)) {
          P2PFAST_UNROLL
          for (int v = 0; v < kVec; v += kPack) {
            const Pack<B, kPack> pack = load_pack<kPack>(b + i + v);
            P2PFAST_UNROLL
            for (int k = 0; k < kPack; ++k) y[v + k] = widened(pack.value[k]);
          }
        }
        Pack<A, kVec> g;
        P2PFAST_UNROLL
        for (int v = 0; v < kVec; ++v) {
          total += evaluate<kLoss>(widened(x.value[v]), has_two(kLoss) ? y[v] : 0.0f, target, derivative);
          narrow(derivative * part.gradient_weight, &g.value[v]);
        }
        if (gradient != nullptr) store_pack(gradient + i, g);
      }
      i = count / kVec * kVec;  // what is left, less than a load
    }
    for (i += thread; i < count; i += kThreads) {
      float derivative;
      total += evaluate<kLoss>(widened(a[i]), has_two(kLoss) ? widened(b[i]) : 0.0f, target, derivative);
      if (gradient != nullptr) narrow(derivative * part.gradient_weight, gradient + i);
    }
    return total;
  }

  template <class A>
  static P2PFAST_HD float run_typed(const Part& part, float target, int64_t block, int thread) {
    if constexpr (has_two(kLoss) && sizeof(A) == 2)
      if (part.b_type == static_cast<uint8_t>(ValueType::kFloat32))
        return run_chunk<A, float>(part, target, block, thread);
    return run_chunk<A, A>(part, target, block, thread);
  }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared& s, Local&) {
    const Part& part = part_of(a, block);
    if constexpr (kPhase == 0) {
      const auto type = static_cast<ValueType>(part.type);
      s.thread[thread] = type == ValueType::kFloat32    ? run_typed<float>(part, a.target, block, thread)
                         : type == ValueType::kBFloat16 ? run_typed<BFloat16>(part, a.target, block, thread)
                                                        : run_typed<Float16>(part, a.target, block, thread);
    } else if constexpr (kPhase == 1) {
      if (thread >= kLanes) return;
      double sum = 0;
      for (int i = thread; i < kThreads; i += kLanes) sum += s.thread[i];
      s.lane[thread] = sum;
    } else if (thread == 0) {
      double sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += s.lane[i];
      a.sums[block] = part.weight * sum;
    }
  }
};

// One block: adds the chunks' sums in a fixed order.
struct LossSumKernel {
  static constexpr int kThreads = 512;
  static constexpr int kPhases = 3;
  static constexpr int kResident = 1;
  static constexpr int kLanes = 32;

  struct Args {
    const double* sums;
    int64_t count;
    float* out;
  };
  struct Shared {
    double thread[kThreads], lane[kLanes];
  };
  struct Local {};

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t, int thread, Shared& s, Local&) {
    if constexpr (kPhase == 0) {
      double sum = 0;
      for (int64_t i = thread; i < a.count; i += kThreads) sum += a.sums[i];
      s.thread[thread] = sum;
    } else if constexpr (kPhase == 1) {
      if (thread >= kLanes) return;
      double sum = 0;
      for (int i = thread; i < kThreads; i += kLanes) sum += s.thread[i];
      s.lane[thread] = sum;
    } else if (thread == 0) {
      double sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += s.lane[i];
      *a.out = static_cast<float>(sum);
    }
  }
};

// The backward pass: gradients times a factor that is known on the device only, and one of their own.
struct ScaleKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPhases = 1;
  static constexpr int kResident = 6;
  static constexpr int kParts = 64;

  struct Part {
    ScalePart tensor;
    uint32_t first_chunk;
    bool aligned;  // both addresses to 16 bytes
  };
  struct Args {
    Part parts[kParts];
    const float* factor;
    int32_t count;
  };
  struct Shared {};
  struct Local {};

  template <class T>
  static P2PFAST_HD void run_chunk(const Part& part, float factor, int64_t block, int thread) {
    constexpr int kVec = 16 / sizeof(T);
    const int64_t first = (block - part.first_chunk) * kLossChunk;
    const int count = static_cast<int>(min2<int64_t>(kLossChunk, part.tensor.count - first));
    const T* const from = static_cast<const T*>(part.tensor.from) + first;
    T* const to = static_cast<T*>(part.tensor.to) + first;
    int i = 0;
    if (part.aligned) {
      for (i = thread * kVec; i + kVec <= count; i += kThreads * kVec) {
        Pack<T, kVec> pack = load_pack<kVec>(from + i);
        P2PFAST_UNROLL
        for (int v = 0; v < kVec; ++v) narrow(widened(pack.value[v]) * factor, &pack.value[v]);
        store_pack(to + i, pack);
      }
      i = count / kVec * kVec;
    }
    for (i += thread; i < count; i += kThreads) narrow(widened(from[i]) * factor, to + i);
  }

  template <int kPhase>
  static P2PFAST_HD void run(const Args& a, int64_t block, int thread, Shared&, Local&) {
    int p = 0;
    while (p + 1 < a.count && a.parts[p + 1].first_chunk <= static_cast<uint32_t>(block)) ++p;
    const Part& part = a.parts[p];
    const float factor = *a.factor * part.tensor.factor;
    if (part.tensor.type == ValueType::kFloat32) return run_chunk<float>(part, factor, block, thread);
    if (part.tensor.type == ValueType::kBFloat16) return run_chunk<BFloat16>(part, factor, block, thread);
    run_chunk<Float16>(part, factor, block, thread);
  }
};

// Calls launch.operator()<Kernel>(args, blocks) for every 64 parts.
template <class Launch>
void run_pointwise_scale(const std::vector<ScalePart>& parts, const float* factor, Launch&& launch) {
  ScaleKernel::Args args{};
  args.factor = factor;
  int64_t blocks = 0;
  const auto flush = [&] {
    if (args.count > 0) launch.template operator()<ScaleKernel>(args, blocks);
    blocks = args.count = 0;
  };
  for (const ScalePart& part : parts) {
    if (part.count == 0) continue;
    const int64_t chunks = ceil_div(part.count, kLossChunk);
    if (args.count == ScaleKernel::kParts || blocks + chunks > INT32_MAX) flush();
    const bool aligned =
        (reinterpret_cast<uintptr_t>(part.from) | reinterpret_cast<uintptr_t>(part.to)) % 16 == 0;
    args.parts[args.count++] = {part, static_cast<uint32_t>(blocks), aligned};
    blocks += chunks;
  }
  flush();
}

// Calls launch.operator()<Kernel>(args, blocks) for each kernel in turn: one for every 64 parts, and the sum.
template <class Launch>
void run_pointwise_loss(Loss loss, float target, const std::vector<LossPart>& parts, double* workspace,
                        float* out, Launch&& launch) {
  int64_t done = 0;
  const auto run = [&]<Loss kLoss>() {
    using Kernel = LossKernel<kLoss>;
    typename Kernel::Args args{};
    int64_t blocks = 0;
    const auto flush = [&] {
      if (args.count > 0) launch.template operator()<Kernel>(args, blocks);
      done += blocks;
      blocks = args.count = 0;
    };
    for (const LossPart& part : parts) {
      if (part.count == 0) continue;
      const int64_t chunks = ceil_div(part.count, kLossChunk);
      if (args.count == Kernel::kParts || blocks + chunks > INT32_MAX) flush();
      const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
      const bool aligned =
          (address(part.a) | address(part.gradient) | (has_two(kLoss) ? address(part.b) : 0)) % 16 == 0;
      if (args.count == 0) args.sums = workspace + done;
      args.target = target;
      args.parts[args.count++] = {part.a,
                                  part.b,
                                  part.gradient,
                                  part.count,
                                  part.weight,
                                  part.gradient_weight,
                                  static_cast<uint32_t>(blocks),
                                  static_cast<uint8_t>(part.type),
                                  static_cast<uint8_t>(part.b_type),
                                  aligned};
      blocks += chunks;
    }
    flush();
  };
  switch (loss) {
    case Loss::kLogistic:
      run.template operator()<Loss::kLogistic>();
      break;
    case Loss::kSquare:
      run.template operator()<Loss::kSquare>();
      break;
    case Loss::kHinge:
      run.template operator()<Loss::kHinge>();
      break;
    case Loss::kLinear:
      run.template operator()<Loss::kLinear>();
      break;
    case Loss::kAbsoluteDifference:
      run.template operator()<Loss::kAbsoluteDifference>();
      break;
    case Loss::kSquaredDifference:
      run.template operator()<Loss::kSquaredDifference>();
      break;
  }
  launch.template operator()<LossSumKernel>(LossSumKernel::Args{workspace, done, out}, 1);
}

}  // namespace p2pfast::cuda
