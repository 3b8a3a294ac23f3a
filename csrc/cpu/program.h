// A planned network: steps that run one after another in one call. Addresses inside the steps are
// either real or relative to a slot, which is bound to memory at each run; so one program serves any
// number of callers, each with an arena, inputs and outputs of its own.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "cpu/conv.h"
#include "cpu/data_gradient.h"
#include "cpu/instance_edges.h"
#include "cpu/label_conv.h"
#include "cpu/norm.h"
#include "cpu/weight_gradient.h"

namespace p2pfast {

// Address `offset` bytes into `slot`.
constexpr uint64_t slot_address(int slot, uint64_t offset) {
  return static_cast<uint64_t>(slot + 1) << 48 | offset;
}

struct ConvStep {
  ConvArgs args;
  ConvAlgorithm algorithm;
};

// Packs a convolution's weights.
struct PackStep {
  ConvArgs args;
  ConvAlgorithm algorithm;
  float* packed;
};

struct WeightGradientStep {
  WeightGradientArgs args;
  WeightGradientAlgorithm algorithm;
};

// Throws std::invalid_argument naming the field whose value no kernel can take.
void check(const ConvArgs& args);
void check(const StatisticsArgs& args);
void check(const MergeArgs& args);
void check(const ApplyArgs& args);
void check(const PoolArgs& args);

using Step = std::variant<ConvStep, StatisticsArgs, MergeArgs, ApplyArgs, PoolArgs, LabelConvArgs,
                          InstanceEdges, PackStep, WeightGradientStep, DataGradientArgs>;

class Program {
 public:
  int add(Step step);
  int size() const { return static_cast<int>(steps_.size()); }
  Step& step(int index) { return steps_.at(index); }
  // Runs steps [begin, end) with `slots` as the base addresses. Where `seconds` is given, it gets one
  // time a step.
  void run(const std::vector<uint64_t>& slots, int begin, int end, std::vector<double>* seconds) const;

 private:
  std::vector<Step> steps_;
};

// Runs one step whose addresses are all real.
void run_step(const Step& step);

}  // namespace p2pfast
